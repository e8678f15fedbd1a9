"""The whole processor: batches, shared videos, the plain call, outputs, saving, remote code, the pipeline."""

import json
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vidllm.processing.processing_vidllm import VidLLMProcessor
from vidllm.processing.video_processing_vidllm import VidLLMVideoProcessor
from vidllm.processing.video_reading_vidllm import VidLLMInputError

from .media import NUM_SCENE_TOKENS, byte_tokenizer, picture, tiny_processor, write_folder, write_video


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [
        write_video(folder / "a.mp4", [picture(i) for i in range(6)]),
        write_video(folder / "b.mp4", [picture(i, 64, 48) for i in range(3)]),
    ]


def ask(video, words="How many?"):
    content = [{"type": "text", "text": words}]
    return [{"role": "user", "content": ([{"type": "video", "path": video}] if video is not None else []) + content}]


def encode(processor, chat, **kwargs):
    return processor.apply_chat_template(
        chat,
        **{"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt", **kwargs},
    )


def test_one_chat(processor, videos):
    inputs = encode(processor, ask(videos[0]))
    assert set(inputs) == {"input_ids", "attention_mask", "scene_index", "pixel_values_videos", "video_size_shw"}
    assert inputs["pixel_values_videos"].shape == (1, 4, 3, 28, 28)
    assert inputs["pixel_values_videos"].dtype == torch.float32
    assert inputs["scene_index"].tolist() == [0]
    assert set(inputs) <= set(processor.model_input_names)
    assert inputs.video_metadata[0]["frames_indices"] == [0, 2, 3, 5]
    moved = inputs.to("cpu", dtype=torch.bfloat16)
    assert moved["pixel_values_videos"].dtype == torch.bfloat16
    assert moved.video_metadata[0]["frames_indices"] == [0, 2, 3, 5]


def test_metadata_on_demand_and_call_arguments(processor, videos):
    inputs = encode(processor, ask(videos[0]), processor_kwargs={"return_metadata": True, "num_frames": 2})
    assert inputs["video_metadata"][0]["frames_indices"] == [0, 5]
    assert inputs["pixel_values_videos"].shape[1] == 2
    inputs = encode(processor, ask(videos[0]), processor_kwargs={"videos_kwargs": {"fps": 5}})
    assert inputs.video_metadata[0]["frames_indices"] == [0, 2, 4]
    with pytest.raises(ValueError, match="num_frames or fps"):
        encode(processor, ask(videos[0]), processor_kwargs={"num_frames": 2, "fps": 5})


def test_batch_row_equals_the_row_alone(processor, videos):
    chats = [ask(videos[0], "A long question about the room?"), ask(videos[1], "Hm?"), ask(None, "Only text")]
    inputs = encode(processor, chats)
    assert inputs["scene_index"].tolist() == [0, 1, -1]
    assert inputs["video_size_shw"].tolist() == [[4, 28, 28], [3, 28, 28]]
    for row, chat in enumerate(chats):
        alone = encode(processor, chat)
        length = alone["input_ids"].shape[1]
        assert torch.equal(inputs["input_ids"][row, -length:], alone["input_ids"][0])  # padded on the left
        assert inputs["attention_mask"][row].sum() == length
        assert inputs["attention_mask"][row, -length:].all()
        if row < 2:
            frames, height, width = inputs["video_size_shw"][row].tolist()
            ours = inputs["pixel_values_videos"][row, :frames, :, :height, :width]
            assert torch.equal(ours, alone["pixel_values_videos"][0])


def test_padding_can_be_chosen(processor, videos):
    chats = [ask(videos[0], "A long question about the room?"), ask(videos[1], "Hm?")]
    right = encode(processor, chats, processor_kwargs={"padding_side": "right"})
    assert right["attention_mask"][1, 0] == 1
    assert right["attention_mask"][1, -1] == 0
    wide = encode(processor, chats, processor_kwargs={"text_kwargs": {"padding": "max_length", "max_length": 200}})
    assert wide["input_ids"].shape == (2, 200)
    lists = encode(processor, chats, return_tensors=None, processor_kwargs={"padding": False})
    assert len(lists["input_ids"][0]) != len(lists["input_ids"][1])
    arrays = encode(processor, chats, return_tensors="np")
    assert all(isinstance(arrays[key], np.ndarray) for key in arrays)


def test_truncation_that_cuts_placeholders_is_an_error(processor, videos):
    with pytest.raises(VidLLMInputError, match=f"wanted {NUM_SCENE_TOKENS} <video> tokens"):
        encode(processor, ask(videos[0]), processor_kwargs={"truncation": True, "max_length": 8})


def test_chats_share_a_video(processor, videos, tmp_path, monkeypatch):
    decoded = []
    read = VidLLMVideoProcessor.preprocess
    monkeypatch.setattr(
        VidLLMVideoProcessor,
        "preprocess",
        lambda self, videos, **kw: decoded.append(list(videos)) or read(self, videos, **kw),
    )
    monkeypatch.chdir(os.path.dirname(videos[0]))
    chats = [ask(videos[1]), ask(videos[0]), ask("a.mp4", "Again?"), ask(None), ask(videos[1]), ask("./b.mp4")]
    inputs = encode(processor, chats)
    assert inputs["scene_index"].tolist() == [0, 1, 1, -1, 0, 0]
    assert inputs["pixel_values_videos"].shape[0] == 2
    assert decoded == [[videos[1], videos[0]]]
    frames = [picture(i) for i in range(3)]
    inputs = encode(processor, [ask(frames), ask(frames), ask([picture(i) for i in range(3)])])
    assert inputs["scene_index"].tolist() == [0, 0, 1]  # the same object is the same video


def test_two_photographs_in_two_chats_are_two_videos(processor, tmp_path):
    paths = []
    for index in range(2):
        paths.append(str(tmp_path / f"{index}.png"))
        Image.fromarray(picture(index)).save(paths[-1])
    with pytest.warns(UserWarning, match="geometry needs motion"):
        inputs = encode(processor, [ask(path) for path in paths])
    assert inputs["video_size_shw"].tolist() == [[1, 28, 28], [1, 28, 28]]


def test_sources_of_a_block(processor, tmp_path):
    frames = [picture(i) for i in range(4)]
    folder = write_folder(tmp_path / "f", frames)
    stills = [f"{folder}/frame_{i}.png" for i in range(4)]
    wanted = encode(processor, ask(folder))
    for key, source in (
        ("video", frames),
        ("video", np.stack(frames)),
        ("video", torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)),
        ("video", [Image.fromarray(frame) for frame in frames]),
        ("path", stills),
        ("url", folder),
    ):
        chat = [{"role": "user", "content": [{"type": "video", key: source}, {"type": "text", "text": "How many?"}]}]
        inputs = encode(processor, chat)
        assert torch.equal(inputs["pixel_values_videos"], wanted["pixel_values_videos"])
        assert torch.equal(inputs["input_ids"], wanted["input_ids"])
    with pytest.raises(VidLLMInputError, match="not an image that can be read"):
        encode(processor, ask([write_video(tmp_path / "a.mp4", frames), str(tmp_path / "a.mp4")]))


def test_bad_video_in_a_chat(processor, tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    for source in (tmp_path / "text.mp4", tmp_path / "missing.mp4", tmp_path):
        with pytest.raises(ValueError, match=str(source)):
            encode(processor, ask(str(source)))


def test_text_is_checked_before_anything_is_decoded(processor):
    with pytest.raises(VidLLMInputError, match="<coord>"):
        processor(text="<video>Where is <coord>?", videos="no/such/file.mp4")


def test_plain_call(processor, videos):
    chat = ask(videos[0])
    rendered = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(text=rendered, videos=videos[0], return_tensors="pt")
    wanted = encode(processor, chat)
    assert set(inputs) == set(wanted)
    for key in wanted:
        assert torch.equal(inputs[key], wanted[key])
    inputs = processor(
        text=["<video>a", "b", "<video>cc"],
        videos=videos,
        coord_points_world=None,
        return_tensors="pt",
        padding_side="right",
    )
    assert inputs["scene_index"].tolist() == [0, -1, 1]
    inputs = processor(
        text=["<video>a", "<video>bb<coord>", "c"], videos=videos[0], coord_points_world=[[], [[1, 2, 3]], []]
    )
    assert inputs["scene_index"].tolist() == [0, 0, -1]
    assert inputs["coord_mask"].tolist() == [[False], [True], [False]]
    inputs = processor(text=["<video>a", "<video>b", "c"], videos=videos, scene_index=[1, 1, -1])
    assert inputs["scene_index"].tolist() == [1, 1, -1]
    assert set(processor(videos=videos)) == {"pixel_values_videos", "video_size_shw"}
    assert processor(text="Hello", return_tensors="pt")["scene_index"].tolist() == [-1]


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({}, "wanted text, videos, or both"),
        ({"text": "a", "images": [1]}, "takes videos"),
        ({"text": "a", "audio": [1]}, "takes videos"),
        ({"text": ["<video>a", "b"]}, "1 placeholders and 0 videos"),
        ({"text": ["<video>a", "b"], "videos": 2}, "1 placeholders and 2 videos"),
        ({"text": ["a", "b"], "videos": 1}, "0 placeholders and 1 videos"),
        ({"text": ["<video><video>a"], "videos": 1}, "at most one video placeholder"),
        ({"text": ["<video>a"], "videos": 1, "scene_index": [1]}, "scene_index: wanted"),
        ({"text": ["<video>a"], "videos": 1, "scene_index": [-1]}, "scene_index: wanted"),
        ({"text": ["<video>a"], "videos": 1, "coord_points_world": [[[1, 2, 3]]]}, "wanted 1 <coord> tokens"),
        ({"text": ["a<coord>"], "coord_points_world": [[[1, 2, float("nan")]]]}, "finite"),
        ({"text": ["a<coord>"], "coord_points_world": [[[1, 2, 3]], []]}, "points for 1 prompts"),
        ({"text": 7}, "wanted a text"),
    ],
)
def test_bad_plain_calls(processor, videos, kwargs, reason):
    if isinstance(kwargs.get("videos"), int):
        kwargs = {**kwargs, "videos": videos[: kwargs["videos"]]}
    with pytest.raises((ValueError, TypeError), match=reason):
        processor(**kwargs)


def test_construction_checks():
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match="it lacks <point>"):
        VidLLMProcessor(VidLLMVideoProcessor(), tokenizer, num_scene_tokens=4, coord_token="<point>")
    with pytest.raises(ValueError, match="num_scene_tokens"):
        VidLLMProcessor(VidLLMVideoProcessor(), tokenizer, num_scene_tokens=0)


def test_video_processor_is_the_one_in_the_slot(processor):
    assert processor.video_processor is processor.image_processor


def grounding_output(**changes):
    fields = {
        "boxes": torch.arange(2 * 4 * 6).reshape(2, 4, 6).float(),
        "box_scores": torch.tensor([[0.9, 0.2, 0.7, 0.99], [0.1, 0.3, 0.2, 0.0]]),
        "box_token_index": torch.tensor([[5, 5, 8, -1], [4, 4, 4, -1]]),
        "no_target_scores": torch.tensor([[0.5, 0.5, 0.8, 0.0], [0.5, 0.5, 0.5, 0.0]]),
        "box_unit": "m",
        **changes,
    }
    return {key: value for key, value in fields.items() if value is not None}


@pytest.mark.parametrize("as_dict", [False, True])
def test_post_process_grounding(processor, as_dict):
    def post(min_boxes=0, **changes):
        fields = grounding_output(**changes)
        found = processor.post_process_grounding(fields if as_dict else SimpleNamespace(**fields), min_boxes=min_boxes)
        return found, [[int(box[0]) // 6 for box in row["boxes"]] for row in found]

    found, kept = post()
    assert kept == [[0], []]  # the score must beat "no target" of its own token; -1 is no box
    assert found[0]["frame"] == "room"
    assert found[0]["unit"] == "m"
    assert found[0]["token_index"].tolist() == [5]
    assert found[0]["scores"].tolist() == [pytest.approx(0.9)]
    assert found[1]["boxes"].shape == (0, 6)
    assert post(min_boxes=1)[1] == [[0], [5]]
    assert post(min_boxes=2)[1] == [[0, 2], [5, 6]]
    assert post(min_boxes=9)[1] == [[0, 1, 2], [4, 5, 6]]
    assert post(no_target_scores=None)[1] == [[0, 1, 2], [4, 5, 6]]
    assert post(box_unit="relative")[0][0]["unit"] == "relative"
    assert post(boxes=None, box_scores=None, box_token_index=None, no_target_scores=None, sequences=torch.zeros(2, 7))[
        1
    ] == [[], []]


def test_post_process_grounding_refuses_bare_ids(processor):
    for wrong in (torch.zeros(2, 7), [[1, 2]], SimpleNamespace(logits=1)):
        with pytest.raises(ValueError, match="return_dict_in_generate=True"):
            processor.post_process_grounding(wrong)


@pytest.mark.parametrize(
    ("answer", "boxes"),
    [
        ("[1, 2, 3, 4, 5, 6]", [[1, 2, 3, 4, 5, 6]]),
        ("It is at [1.5,-2,.5, 1e-1, 2., +3 ].", [[1.5, -2, 0.5, 0.1, 2, 3]]),
        ("[0, 0, 0, 1, 1, 1] and [1, 1, 1, 2, 2, 2]", [[0, 0, 0, 1, 1, 1], [1, 1, 1, 2, 2, 2]]),
        ("nothing", []),
        ("[1, 2, 3, 4, 5]", []),
        ("[1, 2, 3, 4, 5, 6, 7]", []),
        ("[1, 2, 3, 4, 5, 0]", []),
        ("[1, 2, 3, 4, 5, -6]", []),
        ("[1, 2, 3, 4, 5, 1e999]", []),
        ("[1, 2, nan, 4, 5, 6]", []),
        ("[1, 2, 3, 4, 5, __import__('os')]", []),
        ("1, 2, 3, 4, 5, 6", []),
        ("[1 2 3 4 5 6]", []),
    ],
)
def test_parse_box_text(processor, answer, boxes):
    found = processor.parse_box_text(answer)
    assert found.shape == (len(boxes), 6)
    torch.testing.assert_close(found, torch.tensor(boxes, dtype=torch.float32).reshape(-1, 6))


def save(processor, folder):
    processor.save_pretrained(folder)
    return folder


def test_save_and_load(processor, videos, tmp_path):
    own = tiny_processor(num_frames=3, patch_size=7, image_std=[0.5, 0.6, 0.7])
    folder = save(own, tmp_path / "saved")
    again = VidLLMProcessor.from_pretrained(folder)
    for name in ("num_scene_tokens", "video_token", "coord_token", "loc_token", "chat_template", "video_token_id"):
        assert getattr(again, name) == getattr(own, name)
    assert type(again.video_processor) is VidLLMVideoProcessor
    first, second = encode(own, ask(videos[0])), encode(again, ask(videos[0]))
    assert set(first) == set(second)
    for key in first:
        assert torch.equal(first[key], second[key])
    twice = save(again, tmp_path / "again")
    for name in ("processor_config.json", "chat_template.jinja", "processing_vidllm.py", "video_reading_vidllm.py"):
        assert (twice / name).read_bytes() == (folder / name).read_bytes()


def test_saved_folder_is_flat_and_complete(processor, tmp_path, repository):
    folder = save(processor, tmp_path / "saved")
    shipped = {path.name for path in (repository / "processing").glob("*_vidllm.py")}
    assert shipped == {path.name for path in folder.glob("*.py")}
    config = json.loads((folder / "processor_config.json").read_text())
    assert config["auto_map"] == {"AutoProcessor": "processing_vidllm.VidLLMProcessor"}
    assert (
        config["image_processor"]["auto_map"]["AutoImageProcessor"] == "video_processing_vidllm.VidLLMVideoProcessor"
    )
    assert config["num_scene_tokens"] == NUM_SCENE_TOKENS
    assert (folder / "chat_template.jinja").read_text() == processor.chat_template


REMOTE_SCRIPT = """
    import importlib.abc, json, sys

    class Refuse(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "vidllm":
                raise ModuleNotFoundError(f"{name} is not installed here", name=name)

    sys.meta_path.insert(0, Refuse())
    try:
        import vidllm
        raise SystemExit("vidllm must not be importable")
    except ModuleNotFoundError:
        pass
    import torch
    from transformers import AutoImageProcessor, AutoProcessor

    folder, video, out = sys.argv[1:]
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    alone = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    chat = [{"role": "user", "content": [
        {"type": "video", "path": video}, {"type": "text", "text": "At <loc>?"}, {"type": "point", "xyz": [1, 2, 3]}]}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    geometry = processor.prepare_geometry({"cam_from_world": torch.eye(4).expand(6, 4, 4)}, inputs)
    torch.save({**inputs, **geometry, "alone": alone(video)["pixel_values_videos"]}, out)
    processor.save_pretrained(folder + "_again")
    assert not any(name.split(".")[0] in ("vidllm", "torchvision") for name in sys.modules)
"""


def test_remote_code_in_a_fresh_process(processor, videos, tmp_path, torchvision_absent):
    folder = save(processor, tmp_path / "saved")
    moved = folder.rename(tmp_path / "elsewhere")
    script = tmp_path / "remote.py"
    script.write_text(textwrap.dedent(REMOTE_SCRIPT))
    result = subprocess.run(
        [sys.executable, "-P", str(script), str(moved), videos[0], str(tmp_path / "out.pt")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={
            **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(tmp_path / "modules"),
        },
    )
    assert result.returncode == 0, result.stderr[-2000:]
    got = torch.load(tmp_path / "out.pt")
    chat = ask(videos[0], "At <loc>?")
    chat[0]["content"].append({"type": "point", "xyz": [1, 2, 3]})
    wanted = encode(processor, chat)
    assert set(wanted) <= set(got)
    for key in wanted:
        assert torch.equal(got[key], wanted[key]), key
    assert torch.equal(got["alone"], wanted["pixel_values_videos"])
    assert got["cam_from_world"].shape == (1, 4, 4, 4)
    again = tmp_path / "elsewhere_again"
    assert {path.name for path in again.iterdir()} == {path.name for path in moved.iterdir()}


def test_pipeline_calls_the_processor_as_this_one_expects(processor, videos):
    """`pipeline("image-text-to-text")` on a chat with an mp4, with a stand-in for the model."""
    from transformers import PreTrainedConfig
    from transformers.pipelines.image_text_to_text import ImageTextToTextPipeline

    class StandIn(torch.nn.Module):
        config = PreTrainedConfig()
        generation_config = None
        device = torch.device("cpu")
        dtype = torch.float32
        seen = None

        def can_generate(self):
            return False

        def generate(self, input_ids, attention_mask, scene_index, pixel_values_videos, video_size_shw, **kwargs):
            StandIn.seen = (input_ids, pixel_values_videos)
            answer = processor.tokenizer("Two.", add_special_tokens=False)["input_ids"]
            return torch.cat([input_ids, torch.tensor([answer])], dim=1)

    class Pipeline(ImageTextToTextPipeline):
        def check_model_type(self, supported_models):
            pass

        def _prepare_generate_kwargs(self, generate_kwargs, **kwargs):
            return generate_kwargs

    pipe = Pipeline(model=StandIn(), processor=processor, tokenizer=processor.tokenizer)
    chat = ask(videos[0])
    answer = pipe(text=chat, return_full_text=False)
    assert answer[0]["generated_text"] == "Two."
    wanted = encode(processor, chat)
    assert torch.equal(StandIn.seen[0], wanted["input_ids"])
    assert torch.equal(StandIn.seen[1], wanted["pixel_values_videos"])
    full = pipe(text=chat)[0]["generated_text"]
    assert full[-1] == {"role": "assistant", "content": "Two."}

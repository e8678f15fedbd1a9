"""The folder that ships: half the space, the same weights, a clip with its truth, code that does not fall behind."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.processing.rooms.language import speak_about
from vidllm.processing.rooms.layout import make_room
from vidllm.processing.rooms.render import RoomRenderer, visibility
from vidllm.processing.rooms.scene_graph import SceneGraph
from vidllm.processing.rooms.write import write_rooms
from vidllm.train.demo_clip import CLIP_NAME, TRUTH_NAME, choose_questions, demo_clip
from vidllm.train.initialise import initialise
from vidllm.train.ship import check_shipped, float16_tensor, main, refresh_code, ship


SEED, NUMBER = 5, 7000


@pytest.fixture(scope="module")
def clip():
    return demo_clip(SEED, NUMBER)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint that does not say that it is untrained."""
    folder = tmp_path_factory.mktemp("ship") / "source"
    initialise("vidllm-tiny", folder, seed=4)
    (folder / "initialisation.json").unlink()
    return folder


@pytest.fixture(scope="module")
def shipped(source, clip):
    folder = source.parent / "shipped"
    return folder, ship(source, folder, clip)


def changed_weights(source, target, change):
    """A copy of a checkpoint whose weights went through a function."""
    shutil.copytree(source, target)
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


# ---------------------------------------------------------------------- the clip


def test_the_clip_is_the_room_that_the_rooms_command_writes(clip, shipped, tmp_path):
    write_rooms(tmp_path, 1, seed=SEED, difficulty="easy", split="val")
    scene = clip.truth["room"]["scene_id"]
    assert (shipped[0] / CLIP_NAME).read_bytes() == (tmp_path / "videos" / f"{scene}.mp4").read_bytes()
    written = json.loads((tmp_path / "rooms.json").read_text())["val"]["scenes"][scene]
    annotation_from_cam = np.array(written["annotation_from_scene"]) @ np.array(written["scene_from_cam"])
    assert np.allclose(clip.truth["camera"]["annotation_from_cam"], annotation_from_cam, atol=2e-5)
    assert np.allclose(clip.truth["camera"]["intrinsics_px"], written["intrinsics_px"])
    objects = {thing["object_id"]: thing for thing in written["objects"]}
    texts = {}
    for row in json.loads((tmp_path / "annotations" / "ScanRefer_filtered_val.json").read_text()):
        texts.setdefault(int(row["object_id"]), []).append(row["description"])
    assert 2 <= len(clip.truth["descriptions"]) <= 3
    for item in clip.truth["descriptions"]:
        thing = objects[item["object_id"]]
        assert np.allclose(item["box_annotation"], thing["box_annotation"])
        assert (item["category"], item["colour"]) == (thing["category"], thing["colour"])
        assert item["description"] in texts[item["object_id"]]
    assert 1 <= len(clip.truth["places"]) <= 2
    for item in clip.truth["places"]:
        thing = objects[item["object_id"]]
        assert np.allclose(item["point_annotation"], thing["box_annotation"][:3])
        assert (item["category"], item["colour"]) == (thing["category"], thing["colour"])
        assert item["references"] == texts[item["object_id"]]


def test_lengths_of_the_truth(clip):
    room = make_room(SEED, NUMBER, "easy")
    truth = clip.truth
    poses = np.array(truth["camera"]["annotation_from_cam"])
    assert poses.shape == (24, 4, 4)
    assert truth["camera"]["annotation_from_world"] == truth["camera"]["annotation_from_cam"][0]
    assert truth["clip"]["num_frames"] == len(clip.rgb) == 24
    steps = [np.linalg.norm(after[:3, 3] - before[:3, 3]) for before, after in itertools.pairwise(poses)]
    assert truth["camera"]["path_length_m"] == pytest.approx(sum(steps), abs=1e-6)
    assert np.allclose(truth["room"]["size_m"], room.high - room.low)
    # Pixel by pixel: a ray per pixel, as long as the depth says.
    (fx, _, cx), (_, fy, cy), _ = truth["camera"]["intrinsics_px"]
    depth_m = RoomRenderer(room).render((96, 128), colour=False).depth_m.double().numpy()
    v, u = np.mgrid[:96, :128]
    rays = np.stack([(u - cx) / fx, (v - cy) / fy, np.ones_like(u, float)], axis=-1)
    points = np.einsum("fij,fhwj->fhwi", poses[:, :3, :3], rays * depth_m[..., None]) + poses[:, None, None, :3, 3]
    low, high = np.percentile(points.reshape(-1, 3), [2, 98], axis=0)
    assert np.allclose(truth["room"]["seen_size_m"], high - low, atol=1e-4)
    assert (np.array(truth["room"]["seen_size_m"]) <= np.array(truth["room"]["size_m"]) + 1e-6).all()


def test_questions_are_a_mix_of_kinds_from_those_of_the_room(clip):
    asked = clip.truth["questions"]
    assert len(asked) >= 8
    kinds = [item["kind"] for item in asked]
    assert {"colour", "existence", "place"} <= set(kinds)
    assert len(set(kinds)) >= 6
    room = make_room(SEED, NUMBER, "easy")
    known = {
        question.text: list(question.answers) for question in speak_about(SceneGraph(room, visibility(room))).questions
    }
    assert len({item["question"] for item in asked}) == len(asked)
    assert all(known[item["question"]] == item["answers"] for item in asked)


def test_a_kind_comes_twice_only_when_every_kind_has_come(clip):
    room = make_room(SEED, NUMBER, "easy")
    questions = speak_about(SceneGraph(room, visibility(room))).questions
    few = [question for question in questions if question.kind in ("existence", "colour", "place")]
    chosen = choose_questions(few)
    assert len(chosen) == len(set(chosen)) == 10
    assert {question.kind for question in chosen[:3]} == {"existence", "colour", "place"}
    yes_no = [question.answers[0] for question in chosen if question.kind == "existence"]
    assert abs(yes_no.count("yes") - yes_no.count("no")) <= 1


@pytest.mark.parametrize(("number", "message"), [(1500, "no training sees"), (7001, "without place")])
def test_rooms_that_cannot_be_shown_are_refused(number, message):
    with pytest.raises(ValueError, match=message):
        demo_clip(SEED, number)


# ---------------------------------------------------------------------- the folder


def test_every_weight_is_stored_in_float16_and_loads_as_float32(source, shipped):
    folder, report = shipped
    with safe_open(folder / "model.safetensors", "pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    assert {value.dtype for value in kept.values()} == {torch.float16}
    assert report["weight_bytes"] == (folder / "model.safetensors").stat().st_size
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == config["vision_config"]["dtype"] == "float32"
    trained = VidLLMForConditionalGeneration.from_pretrained(source).state_dict()
    loaded = VidLLMForConditionalGeneration.from_pretrained(folder)
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, trained[name].half().float()), name
    assert not torch.equal(loaded.lm_head.weight, trained["lm_head.weight"]), "nothing was rounded"


def test_the_folder_is_complete_and_says_what_it_is(source, shipped):
    folder, report = shipped
    names = {path.name for path in folder.iterdir()}
    assert {path.name for path in source.iterdir()} | {CLIP_NAME, TRUTH_NAME} == names
    assert json.loads((folder / TRUTH_NAME).read_text())["room"]["number"] == NUMBER
    assert report["scene_id"] == f"scene{NUMBER}_00"
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers")
    assert "trained on procedural rooms" in card
    assert f"{report['parameters']:,} parameters" in card
    assert not [path for path in folder.parent.iterdir() if path.name.endswith(".partial")]


def test_untrained_weights_stay_marked_as_such(tmp_path, clip):
    initialise("vidllm-tiny", tmp_path / "made", dtype="bfloat16")
    ship(tmp_path / "made", tmp_path / "shipped", clip)
    assert json.loads((tmp_path / "shipped" / "initialisation.json").read_text())["untrained"] is True
    assert "untrained" in (tmp_path / "shipped" / "README.md").read_text()
    loaded = VidLLMForConditionalGeneration.from_pretrained(tmp_path / "shipped")
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}


def test_the_nano_model_fits_into_its_space_and_ties_its_head(tmp_path, clip):
    initialise("vidllm-nano", tmp_path / "nano", seed=2)
    report = ship(tmp_path / "nano", tmp_path / "shipped", clip)
    assert report["weight_bytes"] < 24_500_000
    with safe_open(tmp_path / "shipped" / "model.safetensors", "pt") as file:
        sizes = {name: int(np.prod(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118
        exact = {name for name in sizes if file.get_slice(name).get_dtype() == "F32"}
    assert "lm_head.weight" not in sizes
    statistics = {name: size for name, size in sizes.items() if "running_" in name}
    assert len(statistics) == 4  # of camera head and room head
    assert exact == set(statistics)
    assert sum(sizes.values()) - sum(statistics.values()) == report["parameters"]
    loaded = VidLLMForConditionalGeneration.from_pretrained(tmp_path / "shipped")
    assert loaded.lm_head.weight.data_ptr() == loaded.model.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize(("value", "message"), [(7e4, "fit into float16"), (float("nan"), "finite")])
def test_a_weight_that_float16_cannot_hold_is_named(source, clip, tmp_path, value, message):
    def change(weights):
        weights[next(name for name in weights if "metric_depth" in name)].view(-1)[1] = value

    bad = changed_weights(source, tmp_path / "bad", change)
    with pytest.raises(ValueError, match=message) as error:
        ship(bad, tmp_path / "out", clip)
    assert "weights: model.metric_depth." in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_only_floating_weights_are_rounded():
    counts = torch.tensor([[1, 70000]])
    assert float16_tensor("counts", counts) is counts
    assert float16_tensor("edge", torch.tensor(65504.0)).item() == 65504.0


def test_a_checkpoint_that_lacks_weights_is_refused(source, clip, tmp_path):
    bad = changed_weights(
        source, tmp_path / "bad", lambda weights: weights.pop(next(k for k in weights if "lm_head" in k))
    )
    with pytest.raises(ValueError, match=r"1 missing weights, such as lm_head\.weight"):
        ship(bad, tmp_path / "out", clip)
    extra = changed_weights(source, tmp_path / "extra", lambda weights: weights.update(more=torch.ones(2, 3)))
    with pytest.raises(ValueError, match="1 unexpected weights, such as more"):
        ship(extra, tmp_path / "out", clip)
    with pytest.raises(ValueError, match=r"no config\.json"):
        ship(tmp_path, tmp_path / "out", clip)


def test_a_folder_that_holds_something_is_left_alone(source, clip, tmp_path):
    (tmp_path / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(ValueError, match="holds something already"):
        ship(source, tmp_path, clip)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_check_after_writing_sees_a_wrong_folder(source, shipped, tmp_path):
    trained = VidLLMForConditionalGeneration.from_pretrained(source)
    check_shipped(shipped[0], trained)
    other = changed_weights(shipped[0], tmp_path / "other", lambda weights: next(iter(weights.values())).add_(1))
    with pytest.raises(ValueError, match="is not the trained weight"):
        check_shipped(other, trained)
    half = shutil.copytree(shipped[0], tmp_path / "half")
    config = (half / "config.json").read_text()
    (half / "config.json").write_text(config.replace('"float32"', '"float16"'))
    with pytest.raises(ValueError, match="wanted float32 parameters"):
        check_shipped(half, trained)


# ---------------------------------------------------------------------- new code, old weights


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_code_is_brought_up_to_date_and_nothing_else(shipped, tmp_path):
    folder = shutil.copytree(shipped[0], tmp_path / "copy")
    assert refresh_code(folder) == []
    assert contents(folder) == contents(shipped[0])
    (folder / "layers_vidllm.py").write_text("raise SystemExit\n")
    (folder / "gone_vidllm.py").write_text("raise SystemExit\n")
    (folder / "video_reading_vidllm.py").unlink()
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text("{{ 'older' }}" + template)
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"], config["num_scale_frames"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("a card with scores\n")
    changed = refresh_code(folder)
    assert sorted(changed) == [
        "chat_template.jinja", "config.json", "gone_vidllm.py", "layers_vidllm.py", "video_reading_vidllm.py",
    ]  # fmt: skip
    assert contents(folder) == {**contents(shipped[0]), "README.md": b"a card with scores\n"}


def test_weights_that_do_not_fit_the_code_any_more_are_found(shipped, tmp_path):
    def rename(weights):
        weights["model.older_name"] = weights.pop("lm_head.weight")

    folder = changed_weights(shipped[0], tmp_path / "old", rename)
    before = contents(folder)
    with pytest.raises(ValueError, match="missing weights"):
        refresh_code(folder)
    assert contents(folder) == before


def test_an_unknown_end_of_turn_has_no_template(shipped, tmp_path):
    folder = shutil.copytree(shipped[0], tmp_path / "copy")
    text = (folder / "tokenizer_config.json").read_text()
    (folder / "tokenizer_config.json").write_text(
        text.replace('"eos_token": "<|im_end|>"', '"eos_token": "<|endoftext|>"')
    )
    with pytest.raises(ValueError, match="wanted a tokenizer of one of the families chatml, llama3"):
        refresh_code(folder)


# ---------------------------------------------------------------------- the command


def test_the_command_ships_and_refreshes(source, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--model", str(source), "--out", str(out), "--seed", str(SEED), "--number", str(NUMBER)]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["folder"] == str(out)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: output folder: wanted a new or empty folder")
    assert captured.err.count("\n") == 1
    (out / "layers_vidllm.py").unlink()
    assert main(["--code-only", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["changed"] == ["layers_vidllm.py"]
    assert main(["--model", str(tmp_path), *arguments[2:]]) == 2
    for wrong in (arguments[2:], [*arguments, "--code-only", str(out)]):
        with pytest.raises(SystemExit) as stop:
            main(wrong)
        assert stop.value.code == 2

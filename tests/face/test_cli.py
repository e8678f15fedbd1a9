"""The `vidllm` command on a tiny untrained checkpoint: results, files, and one line for each kind of bad input."""

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from vidllm import commands
from vidllm.chat import ChatSession
from vidllm.cli import app
from vidllm.train.initialise import initialise


NUM_SOURCE_FRAMES = 9


def load_media():
    """`tests/processing/media.py`; by its path, for the name `processing` belongs to the source folder."""
    spec = importlib.util.spec_from_file_location("media", Path(__file__).parents[1] / "processing" / "media.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


media = load_media()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """An untrained tiny checkpoint."""
    folder = tmp_path_factory.mktemp("face") / "tiny"
    initialise("vidllm-tiny", folder, seed=3)
    return folder


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """Nine frames of 48 x 64 pixels."""
    frames = [media.picture(index) for index in range(NUM_SOURCE_FRAMES)]
    return media.write_video(tmp_path_factory.mktemp("clips") / "room.mp4", frames)


@pytest.fixture(scope="session")
def loaded(model_dir):
    return commands.load(model_dir)


@pytest.fixture
def scene(loaded, clip):
    model, processor = loaded
    return commands.encode(model, commands.read_video(processor, clip))


def run(*arguments, stdin=None):
    """One command in this process; no exception but the exit may leave it."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def run_json(*arguments):
    """The one JSON document that a command prints."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def error_line(*arguments, stdin=None, alone=True):
    """The error of a command that is refused: exit code 2, one line, nothing on stdout."""
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    lines = result.stderr.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0] == lines[-1]
    if alone:
        assert len(lines) == 1, result.stderr
    return errors[0]


# ---------------------------------------------------------------------- results


def test_ask_answers_each_question_as_the_model_does(model_dir, clip, loaded):
    questions = ["How many chairs are there?", "What?", "Is <video> a <loc> or <|im_end|>?"]
    document = run_json("ask", clip, *questions, "--model", model_dir, "--max-new-tokens", 6)
    assert [answer["question"] for answer in document["answers"]] == questions
    model, processor = loaded
    for question, answer in zip(questions, document["answers"], strict=True):
        content = [{"type": "video", "path": clip}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        ids = model.generate(**inputs, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
        assert answer["answer"] == processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
    assert document["untrained"] is True
    assert document["unit"] == "relative"
    assert document["geometry"] == "predicted"
    assert document["frames"] == [0, 4, 8]


def test_many_questions_cost_one_encoding(model_dir, clip, monkeypatch):
    from vidllm import VidLLMForConditionalGeneration

    calls = []
    encode_scene = VidLLMForConditionalGeneration.encode_scene

    def counted(self, *args, **kwargs):
        calls.append(1)
        return encode_scene(self, *args, **kwargs)

    monkeypatch.setattr(VidLLMForConditionalGeneration, "encode_scene", counted)
    questions = [f"What is {'very ' * number}far away?" for number in range(commands.QUESTIONS_PER_BATCH + 2)]
    document = run_json("ask", clip, *questions, "--model", model_dir, "--max-new-tokens", 3)
    assert len(document["answers"]) == len(questions)
    assert calls == [1]


def test_ask_prints_answers_on_stdout_and_notices_on_stderr(model_dir, clip):
    result = run("ask", clip, "What?", "Where?", "--model", model_dir, "--frames", 2, "--max-new-tokens", 3)
    assert result.exit_code == 0
    assert [line for line in result.stdout.splitlines() if line.startswith("Q: ")] == ["Q: What?", "Q: Where?"]
    assert result.stderr.count("untrained weights: answers are random") == 1
    assert result.stderr.count("relative geometry") == 1
    assert "untrained" not in result.stdout


def test_a_photograph_is_a_video_of_one_frame_with_a_warning(model_dir, tmp_path):
    photo = tmp_path / "photo.jpg"
    Image.fromarray(media.picture(1)).save(photo)
    result = run("ask", photo, "What?", "--model", model_dir, "--json", "--max-new-tokens", 2)
    assert json.loads(result.stdout)["frames"] == [0]
    assert result.stderr.count("geometry needs motion") == 1
    folder = media.write_folder(tmp_path / "folder", [media.picture(i) for i in range(4)])
    result = run("ask", folder, "What?", "--model", model_dir, "--json", "--max-new-tokens", 2)
    assert len(json.loads(result.stdout)["frames"]) == 3
    assert "geometry needs motion" not in result.stderr


def test_own_warnings_are_one_line(model_dir, tmp_path):
    frames = [media.picture(0), media.picture(1, height=40, width=60)]
    folder = media.write_folder(tmp_path / "sizes", frames)
    result = run("ask", folder, "What?", "--model", model_dir, "--max-new-tokens", 2)
    lines = [line for line in result.stderr.splitlines() if "different size" in line]
    assert len(lines) == 1
    assert lines[0].startswith("warning: ")


def test_control_characters_do_not_reach_the_terminal():
    from vidllm.cli_console import printable

    assert printable("a\x1b[31mb\x07\u202ec\n\td") == "a\ufffd[31mb\ufffd\ufffdc\n\td"


def test_chat_remembers_and_streams(model_dir, clip, loaded, scene):
    result = run(
        "chat", clip, "--model", model_dir, "--max-new-tokens", 4, stdin="What?\n\n   \nWhere?\nexit\nnever asked\n"
    )
    assert result.exit_code == 0
    assert result.stderr.count("type a question") == 2
    model, processor = loaded
    talk = ChatSession(model, processor, scene, max_new_tokens=4)
    wanted = [talk.ask(question).answer for question in ("What?", "Where?")]
    blocks = lambda text: "".join(letter for letter in text if letter.isprintable())  # noqa: E731
    assert blocks(result.stdout) == blocks("".join(wanted))
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2


def test_chat_ends_at_the_end_of_input(model_dir, clip):
    result = run("chat", clip, "--model", model_dir, "--max-new-tokens", 2, stdin="What?\n")
    assert result.exit_code == 0


def test_the_second_turn_sees_the_first(loaded, scene):
    model, processor = loaded
    talk = ChatSession(model, processor, scene, max_new_tokens=3)
    talk.ask("What is it?")
    alone = commands.make_prompt(model, processor, scene, [[{"role": "user", "content": "Where?"}]])
    turn = {"role": "user", "content": [{"type": "text", "text": "Where?"}]}
    together = commands.make_prompt(model, processor, scene, [[*talk.messages, turn]])
    assert together["input_ids"].shape[1] > alone["input_ids"].shape[1] + len("What is it?")


def test_a_chat_that_grows_too_long_forgets_its_oldest_turns(loaded, scene):
    model, processor = loaded
    talk = ChatSession(model, processor, scene, max_new_tokens=2)
    for number in range(6):
        talk.ask(f"question {number} " + "x" * 100)
    assert talk.num_forgotten > 0
    assert talk.messages[-2]["content"][0]["text"].startswith("question 5")
    assert talk.messages[0]["content"][0]["text"].startswith(f"question {talk.num_forgotten}")
    with pytest.raises(commands.PromptTooLongError, match="at most 512"):
        talk.ask("x" * 600)


def test_loc_tokens_of_an_answer_become_box_blocks(loaded, scene):
    _, processor = loaded
    talk = ChatSession(*loaded, scene)
    ids = processor.tokenizer("ab", add_special_tokens=False)["input_ids"]
    blocks = talk._blocks([ids[0], processor.loc_token_id, ids[1], processor.tokenizer.eos_token_id])
    assert blocks == [{"type": "text", "text": "a"}, {"type": "box"}, {"type": "text", "text": "b"}]


def set_no_target(monkeypatch, logit):
    """Let the checkpoint be sure that something, or nothing, in the room is meant."""
    from vidllm import VidLLMForConditionalGeneration

    boxes_of = VidLLMForConditionalGeneration.boxes_of

    def changed(self, outputs):
        outputs.grounding.no_target_logit.fill_(logit)
        return boxes_of(self, outputs)

    monkeypatch.setattr(VidLLMForConditionalGeneration, "boxes_of", changed)


def test_ground_gives_the_boxes_of_the_forced_loc(model_dir, clip, loaded, scene, monkeypatch):
    set_no_target(monkeypatch, -50.0)
    document = run_json("ground", clip, "the red chair", "--model", model_dir)
    assert document["frame"] == "room"
    assert document["matched"] is True
    scores = [box["score"] for box in document["boxes"]]
    assert scores == sorted(scores, reverse=True)
    assert min(scores) > document["no_target_score"]
    found = commands.ground(*loaded, scene, "the red chair")
    assert np.allclose([box.box for box in found.boxes], [box["box"] for box in document["boxes"]], atol=1e-4)
    assert commands.ground(*loaded, scene, "a lamp").boxes != found.boxes


def test_below_the_threshold_the_best_candidate_is_shown_as_such(model_dir, clip, tmp_path, monkeypatch):
    set_no_target(monkeypatch, 50.0)
    document = run_json("ground", clip, "a whale", "--model", model_dir)
    assert document["matched"] is False
    assert len(document["boxes"]) == 1
    assert document["no_target_score"] > document["boxes"][0]["score"]
    result = run("ground", clip, "a whale", "--model", model_dir, "--draw", tmp_path / "whale.png")
    assert result.exit_code == 0
    assert "nothing matched" in result.stdout
    assert "best candidate, below the threshold" in result.stdout
    assert (tmp_path / "whale.png").is_file()
    assert (tmp_path / "whale_map.png").is_file()


def test_boxes_written_as_text_are_parsed(loaded, scene, monkeypatch):
    model, processor = loaded
    monkeypatch.setattr(model.config, "box_output", "text")
    said = "there: [1.0, -0.5, 0.4, 0.6, 0.6, 0.9] and [1, 2, 3]"
    monkeypatch.setattr(type(processor), "batch_decode", lambda self, ids, **kwargs: [said] * len(ids))
    found = commands.ground(model, processor, scene, "the chair")
    assert found.matched
    assert [box.score for box in found.boxes] == [None]
    assert np.allclose(found.boxes[0].box, [1.0, -0.5, 0.4, 0.6, 0.6, 0.9])
    said = "nowhere"
    assert not commands.ground(model, processor, scene, "the chair").matched


def test_ground_writes_boxes_and_every_export(model_dir, clip, tmp_path):
    out = tmp_path / "new" / "out"
    document = run_json("ground", clip, "chair", "--model", model_dir, "--out", out, "--draw", tmp_path / "pictures")
    assert {path.name for path in out.iterdir()} == {*EXPORTS, "boxes.json", "boxes.png"}
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"boxes.png", "map.png"}
    written = json.loads((out / "boxes.json").read_text())
    assert written["boxes"] == document["boxes"]
    assert set(document["files"]) > {"scene", "boxes", "drawn_map"}


def test_a_point_is_the_same_in_room_and_world(model_dir, clip, loaded, scene):
    room = run_json("caption", clip, "--point", -0.5, "1.5", "-0.25", "--model", model_dir, "--max-new-tokens", 4)
    assert np.allclose(room["point_room"], [-0.5, 1.5, -0.25])
    rotation = scene.reconstruction.room_from_world[0].numpy()
    assert np.allclose(rotation @ room["point_world"], room["point_room"], atol=1e-5)
    world = run_json(
        "caption",
        clip,
        "--point",
        *room["point_world"],
        "--frame-of",
        "world",
        "--model",
        model_dir,
        "--max-new-tokens",
        4,
    )
    assert np.allclose(world["point_room"], room["point_room"], atol=1e-5)
    assert world["caption"] == room["caption"]


def test_a_pixel_is_the_point_under_it(model_dir, clip, scene):
    document = run_json("caption", clip, "--frame", 1, "--pixel", 12, 20, "--model", model_dir, "--max-new-tokens", 2)
    assert np.allclose(document["point_world"], scene.point_at(1, 12, 20).tolist(), atol=1e-5)


EXPORTS = {"cameras.json", "depth.npz", "points.ply", "scene.glb", "trajectory.tum", "colmap", "depth.png", "map.png"}


def test_reconstruct_writes_all_and_its_cameras_can_be_given_back(model_dir, clip, tmp_path):
    out = tmp_path / "out"
    document = run_json("reconstruct", clip, "--out", out, "--model", model_dir, "--frames", 4)
    assert {path.name for path in out.iterdir()} == EXPORTS
    assert document["frames"] == json_frames(out / "cameras.json")
    assert len(document["frames"]) == 4
    depth = np.load(out / "depth.npz")["depth"]
    assert list(depth.shape[1:]) == document["size_hw"]
    assert document["median_depth"] == pytest.approx(float(np.median(depth[depth > 0])))
    again = tmp_path / "again"
    # without metres it is refused; who knows the scale says so in the file
    refused = run("reconstruct", clip, "--out", again, "--model", model_dir, "--geometry", out / "cameras.json")
    assert refused.exit_code == 2
    assert "wanted metres; its unit is 'relative'" in refused.stderr
    text = (out / "cameras.json").read_text()
    (out / "cameras.json").write_text(text.replace('"unit": "relative"', '"unit": "m"'))
    given = run_json(
        "reconstruct", clip, "--out", again, "--model", model_dir, "--frames", 4, "--geometry", out / "cameras.json"
    )
    assert given["geometry"] == "given"
    assert given["given"] == ["cam_from_world", "intrinsics_px"]
    first, second = (json.loads((folder / "cameras.json").read_text()) for folder in (out, again))
    for one, other in zip(first["frames"], second["frames"], strict=True):
        assert np.allclose(one["cam_from_world"], other["cam_from_world"], atol=1e-5)
        assert np.allclose(one["intrinsics_px"], other["intrinsics_px"], rtol=1e-5)
    assert document["path_length"] == pytest.approx(given["path_length"], rel=1e-4)


def json_frames(path):
    return [frame["index"] for frame in json.loads(path.read_text())["frames"]]


def test_given_poses_in_metres_make_the_scene_metric(model_dir, clip, tmp_path):
    lines = [f"{index / 10} {0.3 * index} 0 0 0 0 0 1" for index in range(NUM_SOURCE_FRAMES)]
    poses = tmp_path / "poses.tum"
    poses.write_text("\n".join(lines) + "\n")
    result = run("ground", clip, "chair", "--model", model_dir, "--geometry", poses, "--json")
    document = json.loads(result.stdout)
    assert (document["geometry"], document["unit"]) == ("given", "m")
    assert "relative" not in result.stderr
    summary = run_json("reconstruct", clip, "--out", tmp_path / "out", "--model", model_dir, "--geometry", poses)
    assert summary["path_length"] == pytest.approx(0.3 * (NUM_SOURCE_FRAMES - 1), rel=1e-4)


def test_init_makes_a_folder_that_loads(tmp_path):
    out = tmp_path / "fresh"
    result = run("init", "vidllm-tiny", "--out", out, "--seed", 5, "--dtype", "bfloat16")
    assert result.exit_code == 0
    assert "untrained weights" in result.stderr
    assert "byte-level" in result.stderr
    assert json.loads((out / "initialisation.json").read_text())["seed"] == 5
    model, _ = commands.load(out)
    assert model.dtype == torch.bfloat16


# ---------------------------------------------------------------------- bad input


def nan_folder(tmp_path):
    (tmp_path / "nan").mkdir()
    for number in range(2):
        values = np.full((48, 64), 0.5, np.float32)
        values[3, 5] = math.nan
        Image.fromarray(values, mode="F").save(tmp_path / "nan" / f"{number}.tiff")
    return tmp_path / "nan"


def text_file(tmp_path):
    path = tmp_path / "text.mp4"
    path.write_text("this is not a video\n" * 100)
    return path


def empty_file(tmp_path):
    path = tmp_path / "zero.mp4"
    path.touch()
    return path


def empty_folder(tmp_path):
    path = tmp_path / "empty"
    path.mkdir()
    return path


def mixed_folder(tmp_path):
    return media.write_folder(tmp_path / "mixed", [media.picture(0), media.picture(1, height=64, width=48)])


def truncated(tmp_path):
    whole = media.write_video(tmp_path / "whole.mp4", [media.picture(i) for i in range(20)])
    return media.cut(whole, tmp_path / "cut.mp4", 0.6)


BAD_VIDEOS = {
    "missing": (lambda tmp_path: tmp_path / "nowhere.mp4", "nowhere.mp4: no such file"),
    "text": (text_file, "text.mp4"),
    "truncated": (truncated, "frames could be decoded"),
    "audio only": (lambda tmp_path: media.write_audio(tmp_path / "sound.mp4"), "no video in this file"),
    "zero bytes": (empty_file, "0 bytes"),
    "empty folder": (empty_folder, "no image in this folder"),
    "mixed orientation": (mixed_folder, "portrait and landscape"),
    "NaN pixels": (nan_folder, "NaN"),
    "address": (lambda tmp_path: "https://example.com/room.mp4", "wanted a local path"),
}


@pytest.mark.parametrize("name", BAD_VIDEOS)
@pytest.mark.parametrize("command", ["ask", "reconstruct"])
def test_bad_videos(name, command, model_dir, tmp_path):
    make, fragment = BAD_VIDEOS[name]
    rest = ["What?"] if command == "ask" else ["--out", tmp_path / "out"]
    assert fragment in error_line(command, make(tmp_path), *rest, "--model", model_dir)
    assert not (tmp_path / "out").exists()


def test_nan_pixels_through_python(loaded):
    video = np.full((2, 48, 64, 3), 0.5, np.float32)
    video[1, 4, 4, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        commands.read_video(loaded[1], video)


@pytest.mark.parametrize("question", ["", "  \n"])
def test_empty_texts(question, model_dir, clip):
    assert "empty" in error_line("ask", clip, "What?", question, "--model", model_dir)
    assert "empty" in error_line("ground", clip, question, "--model", model_dir)


def test_a_question_that_is_too_long(model_dir, clip):
    assert "at most 512" in error_line("ask", clip, "x" * 600, "--model", model_dir, alone=False)


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--point", "nan", "0", "0"], "finite"),
        (["--point", "0", "inf", "0"], "finite"),
        (["--frame", "0", "--pixel", "nan", "1"], "finite"),
        ([], "--point X Y Z"),
        (["--frame", "0"], "--frame I with --pixel"),
        (["--pixel", "1", "2"], "--frame I with --pixel"),
        (["--point", "0", "1", "0", "--frame", "0", "--pixel", "1", "2"], "wanted --point"),
        (["--point", "0", "1", "0", "--frame-of", "moon"], "room or world"),
        (["--frame", "0", "--pixel", "1", "2", "--frame-of", "room"], "with --point"),
        (["--point", "0", "1"], "--point"),
        (["--point", "a", "1", "2"], "--point"),
    ],
)
def test_bad_places(arguments, fragment, model_dir, clip):
    assert fragment in error_line("caption", clip, *arguments, "--model", model_dir)


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [(["--frame", "9", "--pixel", "1", "2"], "0..2"), (["--frame", "0", "--pixel", "1", "2000"], "v=2000")],
)
def test_places_outside_of_the_video(arguments, fragment, model_dir, clip):
    assert fragment in error_line("caption", clip, *arguments, "--model", model_dir, alone=False)


def copy_without(model_dir, target, *patterns):
    shutil.copytree(model_dir, target, ignore=shutil.ignore_patterns(*patterns))
    return target


def test_bad_models(model_dir, clip, tmp_path):
    ask = ["ask", clip, "What?"]
    assert "vidllm init vidllm-nano --out" in error_line(*ask)
    assert "no such folder" in error_line(*ask, "--model", tmp_path / "nowhere")
    assert "no config.json" in error_line(*ask, "--model", empty_folder(tmp_path))
    assert "wanted a folder" in error_line(*ask, "--model", clip)
    assert "no weights" in error_line(*ask, "--model", copy_without(model_dir, tmp_path / "w", "*.safetensors"))
    without = copy_without(model_dir, tmp_path / "p", "processor_config.json")
    assert "processor_config.json" in error_line(*ask, "--model", without)
    assert "nobody/nothing" in error_line(*ask, "--model", "nobody/nothing")
    assert "--device" in error_line(*ask, "--model", model_dir, "--device", "toaster", alone=False)


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"model_type": "qwen3"}, "'qwen3'"),
        ({"adapter_type": "bidirectionl"}, "adapter_type"),
        ({"hidden_size": "wide"}, ""),
        (None, "not a model's config"),
    ],
)
def test_bad_configs(changes, fragment, model_dir, clip, tmp_path):
    folder = copy_without(model_dir, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    text = "{" if changes is None else json.dumps({**config, **changes})
    if changes == {"hidden_size": "wide"}:
        text = json.dumps({**config, "text_config": {**config["text_config"], "hidden_size": "wide"}})
    (folder / "config.json").write_text(text)
    assert fragment in error_line("ask", clip, "What?", "--model", folder, alone=False)


def test_unknown_adapter_suggests_the_closest(model_dir, clip, tmp_path):
    folder = copy_without(model_dir, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    known = config["adapter_type"]
    (folder / "config.json").write_text(json.dumps({**config, "adapter_type": known[:-1]}))
    line = error_line("ask", clip, "What?", "--model", folder, alone=False)
    assert repr(known[:-1]) in line
    assert known in line.replace(repr(known[:-1]), "")


def test_damaged_weights(model_dir, clip, tmp_path):
    folder = copy_without(model_dir, tmp_path / "cut", "*.safetensors")
    media.cut(model_dir / "model.safetensors", folder / "model.safetensors", 0.5)
    assert "cannot be loaded" in error_line("ask", clip, "What?", "--model", folder, alone=False)


def test_missing_weights_are_not_made_up(model_dir, clip, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = copy_without(model_dir, tmp_path / "less", "*.safetensors")
    weights = load_file(model_dir / "model.safetensors")
    dropped = next(name for name in weights if "adapter" in name)
    del weights[dropped]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    line = error_line("ask", clip, "What?", "--model", folder, alone=False)
    assert "1 weights are missing" in line
    assert dropped in line


def tum(*rows):
    return "\n".join(rows) + "\n"


@pytest.mark.parametrize(
    ("name", "text", "fragment"),
    [
        ("cameras.json", "{}", "cameras.json"),
        ("cameras.json", "not json", "cameras.json"),
        ("poses.tum", "0.0 1 2 3\n", "line 1"),
        ("poses.tum", tum("0.4 0 0 0 0 0 0 1", "0.0 1 0 0 0 0 0 1", "0.8 1 0 0 0 0 0 1"), "order"),
        ("poses.tum", tum("0.0 0 0 0 0 0 0 1", "0.4 1 0 0 0 0 0 1"), "frame 8"),
        ("poses.tum", tum("0.0 0 0 0 0 0 0 1", "0.4 nan 0 0 0 0 0 1", "0.8 1 0 0 0 0 0 1"), "frame 4"),
    ],
)
def test_bad_geometry(name, text, fragment, model_dir, clip, tmp_path):
    (tmp_path / name).write_text(text)
    line = error_line("ask", clip, "What?", "--model", model_dir, "--geometry", tmp_path / name)
    assert fragment in line


def test_missing_geometry(model_dir, clip, tmp_path):
    line = error_line("ask", clip, "What?", "--model", model_dir, "--geometry", tmp_path / "none.json")
    assert "--geometry" in line
    assert "none.json: no such file" in line


def test_output_that_cannot_be_written(model_dir, clip, tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("a file")
    line = error_line("reconstruct", clip, "--out", taken, "--model", model_dir, alone=False)
    assert "wanted a folder" in line
    assert "png" in error_line("ground", clip, "chair", "--model", model_dir, "--draw", tmp_path / "boxes.gif")


def test_bad_presets(tmp_path):
    assert "did you mean 'vidllm-nano'" in error_line("init", "vidllm-nanno", "--out", tmp_path / "a")
    assert "float8" in error_line("init", "vidllm-tiny", "--out", tmp_path / "a", "--dtype", "float8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").touch()
    assert "new or empty folder" in error_line("init", "vidllm-tiny", "--out", tmp_path / "full")
    line = error_line("init", "vidllm-tiny", "--out", tmp_path / "a", "--vision", "dino", "--geometry", "vggt")
    assert "vision: wanted a Hub id (owner/name) or a folder with a config; got dino, which is neither" in line
    line = error_line("init", "vidllm-tiny", "--out", tmp_path / "a", "--geometry", "vggt")
    assert "geometry: wanted a Hub id, a folder or a file; got vggt, which does not exist" in line
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["asc"], "Did you mean 'ask'"),
        (["ask"], "VIDEO"),
        (["ask", "room.mp4"], "QUESTION"),
        (["ask", "room.mp4", "What?", "--frames", "0"], "--frames"),
        (["ask", "room.mp4", "What?", "--frames", "few"], "--frames"),
        (["ask", "room.mp4", "What?", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["ask", "room.mp4", "What?", "--modell", "x"], "--modell"),
        (["reconstruct", "room.mp4"], "--out"),
        (["init"], "PRESET"),
    ],
)
def test_wrong_usage_is_one_line_that_names_the_help(arguments, fragment):
    line = error_line(*arguments)
    assert fragment in line
    assert "--help)" in line


def test_debug_shows_the_traceback(model_dir, tmp_path, monkeypatch):
    arguments = ["ask", tmp_path / "nowhere.mp4", "What?", "--model", model_dir]
    for result in (
        run("--debug", *arguments),
        CliRunner(env={"VIDLLM_DEBUG": "1"}).invoke(app, list(map(str, arguments))),
    ):
        assert result.exit_code == 2
        assert "Traceback" in result.stderr
        assert result.stderr.strip().splitlines()[-1].startswith("error: ")


def test_faults_of_the_program_are_not_hidden(model_dir, clip, monkeypatch):
    def broken(*args, **kwargs):
        raise AssertionError("a bug")

    monkeypatch.setattr(commands, "ask", broken)
    result = CliRunner().invoke(app, ["ask", clip, "What?", "--model", str(model_dir)])
    assert isinstance(result.exception, AssertionError)
    assert result.exit_code == 1


# ---------------------------------------------------------------------- processes of their own


def test_help_is_quick_and_light():
    probe = (
        "import sys, time; start = time.perf_counter()\n"
        "from typer.testing import CliRunner\n"
        "from vidllm.cli import app\n"
        "texts = [CliRunner().invoke(app, [*c.split(), '--help']).stdout for c in "
        "['', 'ask', 'chat', 'ground', 'caption', 'reconstruct', 'init', 'demo']]\n"
        "assert all('Usage' in text for text in texts)\n"
        "print(time.perf_counter() - start, *sorted(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    seconds, *modules = done.stdout.split()
    assert float(seconds) < 2
    assert not {"torch", "transformers", "numpy", "PIL", "av"} & set(modules)


def test_a_real_process(model_dir, clip):
    command = [sys.executable, "-c", "from vidllm.cli import main; main()", "ask", clip, "What?"]
    done = subprocess.run(
        [*command, "--model", str(model_dir), "--json", "--max-new-tokens", "2"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(json.loads(done.stdout)["answers"]) == 1
    lines = done.stderr.splitlines()
    assert [line.split(":")[0] for line in lines] == ["notice", "warning"], done.stderr

"""Features on disk: of these clips and no others of the same names, of the frames that a run sees, through the commands as README has them."""

import inspect
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vidllm import cli_train
from vidllm.cli import app
from vidllm.train.clip_data import FRAMES_KEPT, ClipFolder, ClipVisits
from vidllm.train.distill_recipes import DistillRecipe, chosen_distill_recipe, paper_stage1
from vidllm.train.distillation import main, train_distill
from vidllm.train.feature_folder import MANIFEST_NAME, FeatureFolder, content_identity
from vidllm.train.initialise import build_untrained, initialise
from vidllm.train.precompute import check_clips_have_features, precompute
from vidllm.train.teachers import VisionTeacher


pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory", "ignore:.*gradient_checkpointing")


def write_pictures(root, seed, names=("a", "b"), frames=5):
    rng = np.random.default_rng(seed)
    for name in names:
        (root / name).mkdir(parents=True)
        for number in range(frames):
            picture = rng.integers(0, 255, (28, 42, 3), dtype=np.uint8)
            Image.fromarray(picture).save(root / name / f"{number:03}.png", compress_level=0)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Three tiny checkpoints, and clips of the same names in two folders: nothing is compressed, so that sizes say nothing."""
    root = tmp_path_factory.mktemp("features")
    for name, seed in (("student", 1), ("geometry", 2), ("language", 3)):
        initialise("vidllm-tiny", root / name, seed=seed)
    write_pictures(root / "train", 0)
    write_pictures(root / "val", 1)
    return root


@pytest.fixture(scope="module")
def written(places):
    """Features of both folders' clips, each with four frames."""
    teacher, processor = VisionTeacher(str(places / "geometry")), build_untrained("vidllm-tiny")[1]
    counts = [
        precompute(teacher, ClipFolder(places / name, 4), processor, places / "both") for name in ("train", "val")
    ]
    precompute(teacher, ClipFolder(places / "train", 4), processor, places / "one")
    return counts


def settings_of(places, features, *more):
    return [
        f"model={places / 'student'}", f"geometry_teacher={places / features}", f"language_teacher={places / 'language'}", "steps=1", "num_frames=2",
        "frames_kept=4", *more,
    ]  # fmt: skip


# ---------------------------------------------------------------------- identity


def test_identity_is_of_the_content_and_of_nothing_else(places, tmp_path):
    shutil.copytree(places / "train" / "a", tmp_path / "copy")
    one = content_identity(places / "train" / "a")
    assert len(one) == 32
    assert content_identity(tmp_path / "copy") == one
    assert content_identity(places / "val" / "a") != one
    (tmp_path / "copy" / "notes.txt").write_text("not a picture")
    assert content_identity(tmp_path / "copy") == one
    (tmp_path / "copy" / "002.png").unlink()
    assert content_identity(tmp_path / "copy") != one
    # an export keeps its pictures one folder further down
    (tmp_path / "scene").mkdir()
    shutil.copytree(places / "train" / "a", tmp_path / "scene" / "color")
    other = tmp_path / "other" / "color"
    shutil.copytree(places / "val" / "a", other)
    assert content_identity(tmp_path / "scene") != content_identity(tmp_path / "other")


def test_identity_of_a_long_file_reads_its_size_and_ends(tmp_path):
    rng = np.random.default_rng(0)
    data = bytearray(rng.integers(0, 255, 300_000, dtype=np.uint8).tobytes())
    file = tmp_path / "film.mp4"
    file.write_bytes(data)
    seen = {content_identity(file)}
    for place in (0, 65_535, len(data) - 65_536, len(data) - 1):
        changed = bytearray(data)
        changed[place] ^= 1
        file.write_bytes(changed)
        seen.add(content_identity(file))
    file.write_bytes(data[:150_000] + b"x" + data[150_000:])
    seen.add(content_identity(file))
    assert len(seen) == 6


def test_visits_carry_the_identity_of_their_clip(places):
    clips = ClipFolder(places / "val", 4)
    for visit in (ClipVisits(clips, 4, 2)[number] for number in range(4)):
        assert visit.identity == content_identity(places / "val" / visit.clip)


# ---------------------------------------------------------------------- features of other clips


def test_clips_of_another_folder_are_written_beside_those_of_the_first(places, written):
    assert written == [2, 2]
    folder = FeatureFolder(places / "both")
    assert set(folder.clips) == {"a", "b"}
    assert len({name for files in folder.clips.values() for name in files.values()}) == 4
    for root in ("train", "val"):
        identity = content_identity(places / root / "a")
        assert folder.file_of("a", identity).is_file()
    with pytest.raises(ValueError, match=r"holds those of another clip a \(its content is .*; wanted of no file\)"):
        folder.file_of("a", "")
    with pytest.raises(ValueError, match=r"holds nothing of the clip c: .* clips that are held out need features too"):
        folder.file_of("c", identity)


def test_what_is_held_out_has_its_own_features(places, written, tmp_path):
    """The losses of a run on features are those of a run on the teacher itself."""
    held = ["held_out.every=1", "held_out.scenes=2", f"held_out.clips={places / 'val'}"]
    looks = {}
    for features in ("both", "geometry"):
        chosen = chosen_distill_recipe("debug_stage1", settings_of(places, features, *held), str(places / "train"))
        check_clips_have_features(chosen)
        train_distill(chosen, tmp_path / features, use_cpu=True)
        looks[features] = [
            json.loads(line) for line in (tmp_path / features / "held_out.jsonl").read_text().splitlines()
        ]
    for name in ("geometry_feature", "structure"):
        for disk, live in zip(looks["both"], looks["geometry"], strict=True):
            assert disk[name] == pytest.approx(live[name], rel=1e-3), name


def test_features_of_other_clips_of_the_same_names_are_refused(places, written, tmp_path, capsys):
    chosen = chosen_distill_recipe("debug_stage1", settings_of(places, "one"), str(places / "val"))
    with pytest.raises(ValueError, match="holds those of another clip a"):
        check_clips_have_features(chosen)
    settings = [word for text in settings_of(places, "one") for word in ("--set", text)]
    assert (
        main(["debug_stage1", "--out", str(tmp_path / "run"), "--clips", str(places / "val"), "--cpu", *settings]) == 2
    )
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: features: ")
    assert "with these clips adds theirs" in error
    held = [f"held_out.clips={places / 'val'}"]
    chosen = chosen_distill_recipe("debug_stage1", settings_of(places, "one", *held), str(places / "train"))
    with pytest.raises(ValueError, match="holds those of another clip"):
        check_clips_have_features(chosen)


def test_a_folder_that_does_not_say_what_is_in_its_clips_is_refused(places, written, tmp_path):
    shutil.copytree(places / "one", tmp_path / "old")
    document = json.loads((tmp_path / "old" / MANIFEST_NAME).read_text())
    document["clips"] = {name: next(iter(files.values())) for name, files in document["clips"].items()}
    (tmp_path / "old" / MANIFEST_NAME).write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"with the identity of each clip's content; .*: make them again"):
        FeatureFolder(tmp_path / "old")


# ---------------------------------------------------------------------- recipes and features


def test_features_must_be_of_the_frames_that_a_run_sees(places, written):
    wanted = r"debug_stage1: geometry_teacher: wanted features of 6 frames of each clip .* holds those of 4: --set frames_kept=4, or .* --frames-kept 6"
    with pytest.raises(ValueError, match=wanted):
        chosen_distill_recipe("debug_stage1", [*settings_of(places, "one"), "frames_kept=6"], str(places / "train"))
    with pytest.raises(ValueError, match="wanted a model as geometry_teacher of rooms"):
        chosen_distill_recipe("debug_stage1", settings_of(places, "one"))
    with pytest.raises(ValueError, match=r"geometry_teacher: wanted features of the stream language; .* encoder"):
        chosen_distill_recipe(
            "debug_stage1", settings_of(places, "one", "geometry_stream=language"), str(places / "train")
        )


@pytest.mark.parametrize("place", ["train", "train/a", "."])
def test_what_is_learned_from_is_not_held_out(places, place):
    settings = settings_of(places, "geometry", f"held_out.clips={places / place}")
    with pytest.raises(ValueError, match=r"wanted held_out.clips beside the clips that are learned from"):
        chosen_distill_recipe("debug_stage1", settings, str(places / "train"))


def test_recipe_and_command_keep_as_many_frames():
    command = next(c for c in cli_train.train.registered_commands if c.callback.__name__ == "precompute")
    default = inspect.signature(command.callback).parameters["frames_kept"].default
    assert default == FRAMES_KEPT == paper_stage1().frames_kept == DistillRecipe("any", None).frames_kept


def test_the_commands_of_stage_1_work_together(places, tmp_path, monkeypatch):
    """As README has them, with their defaults; clips with more frames than are kept."""
    write_pictures(tmp_path / "clips", 5, names=("a",), frames=70)
    # the launcher's process is this one
    monkeypatch.setattr(cli_train, "launch_command", lambda *_: [])
    monkeypatch.setattr(cli_train, "run_launcher", main)
    given = [
        "train", "precompute", str(places / "geometry"), "--clips", str(tmp_path / "clips"), "--like", str(places / "student"), "--out",
        str(tmp_path / "features"), "--device", "cpu",
    ]  # fmt: skip
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    given = [
        "train", "distill", "paper_stage1", "--clips", str(tmp_path / "clips"), "--out", str(tmp_path / "stage1"), "--cpu",
        "--set", f"model={places / 'student'}", "--set", f"geometry_teacher={tmp_path / 'features'}",
        "--set", f"language_teacher={places / 'language'}", "--set", "steps=1", "--set", "workers=0",
    ]  # fmt: skip
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "stage1" / "model.safetensors").is_file()

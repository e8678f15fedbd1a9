"""People's own videos: fields, frames, and frames of samples on access."""

import json

import benchmark_files as official
import datasets
import numpy as np
import pytest
from PIL import Image

from vidllm.processing.benchmarks import frames_of, load_benchmark, open_sample, usable_rows
from vidllm.processing.benchmarks.frames import depth_as_colour_sees_it, sample_indices
from vidllm.processing.samples import Sample
from vidllm.processing.scenes.base import Frame, PoseUnavailableError


ROOM_FROM_WORLD = [[1, 0, 0], [0, 0, 1], [0, -1, 0]]


@pytest.fixture
def write(tmp_path):
    datasets.disable_progress_bars()
    folder = tmp_path / "mine" / "clip"
    folder.mkdir(parents=True)
    for number in range(5):
        Image.fromarray(np.full((20, 30, 3), 40 * number, dtype=np.uint8)).save(folder / f"frame_{number}.png")

    def call(*rows, end="\n", **options):
        path = tmp_path / "mine" / "chat.jsonl"
        path.write_bytes(end.join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
        return load_benchmark("jsonl", path, "train", cache_dir=tmp_path / "cache", **options)

    yield call
    datasets.enable_progress_bars()


def ask(*blocks, reply="A chair."):
    return [{"role": "user", "content": list(blocks) or "What is there?"}, {"role": "assistant", "content": reply}]


TEXT = {"type": "text", "text": "look"}
POINT, BOX = {"type": "point"}, {"type": "box"}


def test_a_plain_conversation(write):
    more = [{"role": "system", "content": "Be brief."}, *ask(), *ask(TEXT)]
    rows = write({"video": "clip", "messages": ask()}, {"video": "clip", "id": 7, "messages": more}, end="\r\n\r\n")
    first, second = (Sample.from_row(row) for row in rows)
    assert (first.official_id, second.official_id, first.task, first.scene_id) == ("1", "7", "chat", "clip")
    assert [block["type"] for block in second.messages[1]["content"]] == ["video", "text"]
    assert [turn["role"] for turn in second.messages] == ["system", "user", "assistant", "user", "assistant"]
    frames = frames_of(second, num_frames=3)
    assert frames.indices == [0, 2, 4]
    assert [int(rgb[0, 0, 0]) for rgb in frames.rgb] == [0, 80, 160]
    assert frames.cam_from_world is None
    assert frames.annotation_from_world is None


def test_text_may_hold_what_unicode_calls_a_line_end(write):
    rows = write({"video": "clip", "messages": ask({"type": "text", "text": "a\u2028b\x85c"})})
    assert rows[0]["question"] == "a\u2028b\x85c"


def test_boxes_and_points_in_each_frame(write):
    message = [{"role": "user", "content": [TEXT, POINT]}, {"role": "assistant", "content": [BOX]}]
    base = {"video": "clip", "messages": message, "task": "ground", "room_from_world": ROOM_FROM_WORLD}
    # 2 m ahead of the first camera and 0.5 m below it: y is forward and z up in the room
    room, world = [0.0, 2.0, -0.5], [0.0, 0.5, 2.0]
    size = [1.0, 0.4, 0.8]
    rows = write(
        {**base, "boxes": [[*room, *size]], "box_frame": "room", "points": [room], "point_frame": "room"},
        {**base, "boxes": [[*world, *size]], "box_frame": "world", "points": [world]},
    )
    for row in rows:
        sample = Sample.from_row(row)
        np.testing.assert_allclose(sample.boxes_annotation, [[*room, *size]], atol=1e-9)
        np.testing.assert_allclose(sample.boxes_world(), [[*world, *size]], atol=1e-9)
        np.testing.assert_allclose(sample.points_world(), [world], atol=1e-9)
        np.testing.assert_allclose(frames_of(sample, num_frames=2).annotation_from_world[:3, :3], ROOM_FROM_WORLD)
    assert usable_rows(rows)[0] == [0, 1]


def test_several_box_blocks(write):
    turns = [*ask(TEXT, reply=[BOX]), *ask(TEXT, reply=[BOX])]
    boxes = [[[0, 0, 0, 1, 1, 1], [1, 0, 0, 1, 1, 1]], [[2, 0, 0, 1, 1, 1]]]
    row = write(
        {"video": "clip", "messages": turns, "boxes": boxes, "box_frame": "room", "room_from_world": ROOM_FROM_WORLD}
    )[0]
    assert row["box_block"] == [0, 0, 1]
    assert np.array(row["boxes_annotation"]).shape == (3, 6)


def test_poses_beside_a_video_place_its_annotation_frame(write, tmp_path):
    lines = [f"{n} {1 + 0.1 * n} 2 1.5 -0.70710678 0 0 0.70710678" for n in range(5)]  # level, looking along +y
    (tmp_path / "mine" / "poses.txt").write_text("# TUM\n" + "\n".join(lines))
    row = {
        "video": "clip",
        "poses": "poses.txt",
        "messages": ask(TEXT, POINT),
        "points": [[1, 4, 1.5]],
        "point_frame": "annotation",
    }
    sample = Sample.from_row(write(row)[0])
    frames = frames_of(sample, num_frames=5)
    np.testing.assert_allclose(frames.cam_from_world[0], np.eye(4))
    np.testing.assert_allclose(np.linalg.inv(frames.cam_from_world[2])[:3, 3], [0.2, 0, 0], atol=1e-6)
    # 2 m ahead of the first camera
    np.testing.assert_allclose(sample.points_world(frames.annotation_from_world), [[0, 0, 2]], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"vidoe": 1}, "'vidoe'"),
        ({"video": "nothing.mp4"}, "'video': wanted a path that exists"),
        ({"messages": []}, "'messages'"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages 0, field 'role'"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "content 0, field 'type'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "exactly one video"),
        ({"points": [[0, 0, 0]]}, "'points': wanted 0 points"),
        ({"messages": ask(POINT), "points": [[0, 0]]}, "lists of 3 finite numbers"),
        ({"boxes": [[0, 0, 0, 1, 1, 1]]}, "'boxes': wanted boxes for the 0 box blocks"),
        ({"messages": ask(reply=[BOX]), "boxes": [[0, 0, 0, 1, 1]]}, "lists of 6"),
        ({"messages": ask(reply=[BOX]), "boxes": [[0, 0, 0, 1, 1, -1]]}, "edge lengths"),
        ({"messages": ask(reply=[BOX]), "boxes": [[0, 0, 0, 1, 1, 1]], "box_frame": "room"}, "'room_from_world'"),
        ({"room_from_world": [[1, 0, 0], [0, 1, 0], [0, 0, -1]]}, "3x3 rotation"),
        ({"task": "drive"}, "'task'"),
        ({"id": ["a"]}, "'id'"),
    ],
)
def test_malformed_lines(write, change, says):
    with pytest.raises(ValueError, match=says) as caught:
        write({"video": "clip", "messages": ask()}, {"video": "clip", "messages": ask(), **change})
    assert "chat.jsonl, line 2" in str(caught.value)


def test_duplicate_ids_and_broken_lines(write, tmp_path):
    with pytest.raises(ValueError, match=r"line 2.*'id'.*line 1 has it too"):
        write({"video": "clip", "id": "a", "messages": ask()}, {"video": "clip", "id": "a", "messages": ask()})
    (tmp_path / "mine" / "chat.jsonl").write_text('{"video": "clip"')
    with pytest.raises(ValueError, match="line 1, column 17: not JSON"):
        load_benchmark("jsonl", tmp_path / "mine" / "chat.jsonl", "train")


def test_splits_of_a_folder(write, tmp_path):
    write({"video": "clip", "messages": ask()})
    (tmp_path / "mine" / "chat.jsonl").rename(tmp_path / "mine" / "val.jsonl")
    assert load_benchmark("jsonl", tmp_path / "mine", "val", cache_dir=tmp_path / "cache")[0]["scene_id"] == "clip"


@pytest.mark.filterwarnings("ignore:.*rows without boxes")
def test_frames_of_a_scan(tmp_path):
    datasets.disable_progress_bars()
    root = official.write_root(tmp_path / "root")
    rows = load_benchmark("scan2cap", root, "val", cache_dir=tmp_path / "cache")
    sample = Sample.from_row(rows[0])
    frames = frames_of(sample, num_frames=3, depth=True)
    assert frames.indices == [0, 2, 5]
    assert frames.frame_ids == [0, 20, 50]
    wanted = official.ANNOTATION_FROM_SCENE @ official.scene_from_cam(0)
    np.testing.assert_allclose(frames.annotation_from_world, wanted, atol=1e-6)
    # worked out: raw corners of the table minus the first camera, in that camera's axes (right x, down -z, forward y)
    centre = np.array([3.25, 1.5, 0.2]) - [0.5, -2.0, 1.5]
    np.testing.assert_allclose(
        sample.points_world(frames.annotation_from_world), [[centre[0], -centre[2], centre[1]]], atol=1e-6
    )
    assert [float(depth[5, 5]) for depth in frames.depth_m] == pytest.approx([1.0, 1.2, 1.5])
    usable, skipped = usable_rows(rows)
    assert usable == [0, 1, 2, 3]
    assert skipped.counts == {"its scene is absent": 1}


@pytest.mark.filterwarnings("ignore:.*rows without boxes")
def test_scenes_without_valid_first_poses(tmp_path):
    datasets.disable_progress_bars()
    root = official.write_root(tmp_path / "root", invalid_frames=(0, 3))
    rows = load_benchmark("scanrefer", root, "val", cache_dir=tmp_path / "cache")
    frames = frames_of(Sample.from_row(rows[0]), num_frames=3)
    assert frames.frame_ids == [10, 20, 50]  # the lost ones are never sampled
    wanted = official.ANNOTATION_FROM_SCENE @ official.scene_from_cam(1)
    np.testing.assert_allclose(frames.annotation_from_world, wanted, atol=1e-6)

    lost = official.write_root(tmp_path / "lost", invalid_frames=range(official.NUM_FRAMES))
    rows = load_benchmark("scanrefer", lost, "val", cache_dir=tmp_path / "cache")
    usable, skipped = usable_rows(rows)
    assert usable == []
    assert skipped.counts == {"none of its scene's frames has a valid pose": 5, "its scene is absent": 1}
    with pytest.raises(PoseUnavailableError):
        frames_of(Sample.from_row(rows[0]), num_frames=3)


def test_random_frames_keep_a_first_frame_that_places_are_told_from(write):
    sample = Sample.from_row(write({"video": "clip", "messages": ask(TEXT, POINT), "points": [[0, 0, 1]]})[0])
    reader = open_sample(sample)
    draws = [sample_indices(sample, reader, 2, "random", np.random.default_rng(seed)) for seed in range(30)]
    assert {draw[0] for draw in draws} == {0}
    assert {draw[1] for draw in draws} == {2, 3, 4}


def test_depth_as_the_colour_camera_sees_it():
    depth = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    camera = np.array([[8.0, 0, 8], [0, 8, 6], [0, 0, 1]])
    frame = lambda matrix: Frame(np.zeros((12, 16, 3), np.uint8), depth, None, camera, np.array(matrix), 0, None)  # noqa: E731
    np.testing.assert_array_equal(depth_as_colour_sees_it(frame([[2.0, 0, 2], [0, 2, 1.5], [0, 0, 1]])), depth)
    # the depth camera's centre lies one pixel further right: it saw everything one column further right
    shifted = depth_as_colour_sees_it(frame([[2.0, 0, 3], [0, 2, 1.5], [0, 0, 1]]))
    np.testing.assert_array_equal(shifted[:, :3], depth[:, 1:])
    np.testing.assert_array_equal(shifted[:, 3], 0)

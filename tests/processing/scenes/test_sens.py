"""`.sens` files: every compression, damage at every boundary, memory and speed on a large file."""

import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from vidllm.processing.scenes.sens import SensReader
from vidllm.processing.video_reading_vidllm import VidLLMInputError

from .made_scene import ALIGNMENT, DEPTH_INTRINSICS, HW, INTRINSICS, contents, depth_raw, lost, picture, pose
from .sens_writer import JPEG, OCCI_USHORT, PNG, RAW, RAW_USHORT, ZLIB_USHORT, write_sens


def write(path, num_frames=6, lost_frames=(), **options):
    pictures, depths, poses = contents(num_frames, lost_frames)
    return write_sens(path, pictures, depths, poses, INTRINSICS, DEPTH_INTRINSICS, **options)


@pytest.mark.parametrize("colour", [JPEG, PNG, RAW])
@pytest.mark.parametrize("depth", [ZLIB_USHORT, RAW_USHORT])
@pytest.mark.parametrize("num_imu", [0, 3])
def test_every_compression_gives_back_what_was_written(tmp_path, colour, depth, num_imu):
    write(tmp_path / "a.sens", colour=colour, depth=depth, num_imu=num_imu)
    reader = SensReader(tmp_path / "a.sens")
    assert (len(reader), reader.frame_ids, reader.has_depth, reader.has_poses) == (6, list(range(6)), True, True)
    assert reader.num_imu_samples == num_imu
    assert reader.problems == []
    for index in (5, 0, 3):
        frame = reader.frame(index)
        error = np.abs(frame.rgb.astype(int) - picture(index).astype(int))
        assert error.max() == 0 if colour != JPEG else error.mean() < 2
        assert np.array_equal(frame.depth_m, depth_raw(index).astype(np.float32) / np.float32(1000))
        assert frame.depth_m.dtype == np.float32
        assert np.allclose(np.linalg.inv(frame.cam_from_scene), pose(index), atol=1e-6)
        assert np.allclose(frame.intrinsics_px, INTRINSICS)
        assert np.allclose(frame.depth_intrinsics_px, DEPTH_INTRINSICS)
        assert frame.timestamp_s == pytest.approx(1 + 0.033333 * index)
        assert (frame.frame_id, frame.rgb.shape, frame.depth_m.shape) == (index, (48, 64, 3), (30, 40))
    assert reader.frame(2, depth=False).depth_m is None
    assert np.array_equal(reader.depth(4)[0], reader.frame(4).depth_m)
    stored = reader.stored_jpeg(1)
    assert stored is None if colour != JPEG else stored[:2] == b"\xff\xd8"


def test_depth_shift_is_the_files_own(tmp_path):
    write(tmp_path / "a.sens", depth_shift=4000.0)
    assert np.array_equal(SensReader(tmp_path / "a.sens").depth(0)[0], depth_raw(0).astype(np.float32) / 4000)


def test_a_scene_without_depth(tmp_path):
    pictures, _, poses = contents(3)
    write_sens(tmp_path / "a.sens", pictures, None, poses, INTRINSICS, np.zeros((4, 4)))
    reader = SensReader(tmp_path / "a.sens")
    frame = reader.frame(1)
    assert not reader.has_depth
    assert (frame.depth_m, frame.depth_intrinsics_px, reader.depth(1)) == (None, None, (None, None))


def test_invalid_poses_are_dropped_and_counted_by_reason(tmp_path):
    pictures, depths, poses = contents(8, lost_frames=(1, 6))
    poses[2] = pose(2)
    poses[2][1, 2] = np.nan
    poses[3] = np.zeros((4, 4))
    poses[3][3, 3] = 1
    poses[4] = pose(4)
    poses[4][3] = (0, 0, 0, 2)
    poses[5] = pose(5)
    poses[5][:3, :3] *= 2
    write_sens(tmp_path / "a.sens", pictures, depths, poses, INTRINSICS, DEPTH_INTRINSICS)
    reader = SensReader(tmp_path / "a.sens")
    assert reader.valid_pose_mask.tolist() == [True, False, False, False, False, False, False, True]
    assert np.isnan(reader.poses()[[1, 2, 3, 4, 5, 6]]).all()
    assert reader.frame(1).cam_from_scene is None
    # Poses after a loss stay trustworthy.
    assert np.allclose(np.linalg.inv(reader.poses()[7]), pose(7), atol=1e-6)
    text = "\n".join(reader.problems)
    for part in ("3 of 8 poses are invalid: not finite, tracking lost (first: frame 1)", "1 of 8 poses are invalid: zero in",
                 "1 of 8 poses are invalid: a bottom row", "1 of 8 poses are invalid: not a rotation"):  # fmt: skip
        assert part in text
    assert len(reader.problems) == 4


def test_a_rotation_with_a_zero_in_the_first_place_is_a_pose(tmp_path):
    pictures, depths, poses = contents(2)
    poses[1] = np.array([[0, -1, 0, 1], [1, 0, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1.0]])
    write_sens(tmp_path / "a.sens", pictures, depths, poses, INTRINSICS, DEPTH_INTRINSICS)
    assert SensReader(tmp_path / "a.sens").valid_pose_mask.all()


def cuts(ends):
    """Every boundary, and the byte before and after it."""
    return sorted({place + step for place in ends.values() for step in (-1, 0, 1)})


def test_a_file_cut_at_any_boundary_serves_what_is_whole(tmp_path):
    ends = write(tmp_path / "whole.sens", num_frames=4, num_imu=2)
    content = (tmp_path / "whole.sens").read_bytes()
    whole = SensReader(tmp_path / "whole.sens")
    seen = set()
    for cut in cuts(ends):
        if not 0 <= cut < len(content):
            continue
        path = tmp_path / "cut.sens"
        path.write_bytes(content[:cut])
        expected = sum(ends[f"frame {index}"] <= cut for index in range(4))
        seen.add(expected)
        if expected == 0:
            with pytest.raises(VidLLMInputError, match=r"cut.sens: no whole frame in this file"):
                SensReader(path)
            continue
        reader = SensReader(path)
        assert len(reader) == expected == len(reader.poses())
        for index in range(expected):
            assert np.array_equal(reader.frame(index).rgb, whole.frame(index).rgb)
            assert np.array_equal(reader.frame(index).depth_m, whole.frame(index).depth_m)
        if expected < 4:
            assert len(reader.problems) == 1
            assert f"{expected} of 4 frames are whole, {4 - expected} are lost" in reader.problems[0]
            assert f"ends at {cut}" in reader.problems[0]
        elif cut == ends["frame 3"]:
            # Exactly what a writer without inertial block produces: nothing is known to be lost.
            assert reader.problems == []
            assert reader.num_imu_samples is None
        else:
            assert len(reader.problems) == 1
            assert "all frames are whole" in reader.problems[0]
            if cut >= ends["imu count"]:
                complete = sum(ends[f"imu {index}"] <= cut for index in range(2))
                assert f"{complete} of 2 inertial samples" in reader.problems[0]
                assert reader.num_imu_samples == complete
    assert seen == {0, 1, 2, 3, 4}


def test_a_file_without_inertial_block(tmp_path):
    write(tmp_path / "a.sens", write_imu_count=False)
    reader = SensReader(tmp_path / "a.sens")
    assert (len(reader), reader.num_imu_samples, reader.problems) == (6, None, [])


def test_extrinsics_that_are_not_applied_are_told(tmp_path):
    write(tmp_path / "a.sens", colour_extrinsics=np.zeros((4, 4)))
    assert SensReader(tmp_path / "a.sens").problems == []
    write(tmp_path / "a.sens", colour_extrinsics=pose(1))
    assert "extrinsics of the colour camera are not the identity" in SensReader(tmp_path / "a.sens").problems[0]


def test_bytes_behind_the_end_are_told(tmp_path):
    write(tmp_path / "a.sens")
    with open(tmp_path / "a.sens", "ab") as file:
        file.write(b"12345")
    assert "5 bytes after the end" in SensReader(tmp_path / "a.sens").problems[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": 3}, "wanted a .sens file of version 4; got version 3"),
        ({"colour": -1}, r"wanted colour compression raw, png or jpeg; got -1 \(unknown\)"),
        ({"depth_shift": 0.0}, "wanted a positive depth shift"),
    ],
)
def test_what_cannot_be_read_is_one_clear_error(tmp_path, options, message):
    write(tmp_path / "a.sens", **options)
    with pytest.raises(VidLLMInputError, match=f"a.sens: {message}"):
        SensReader(tmp_path / "a.sens")


def test_another_format_is_one_clear_error(tmp_path):
    (tmp_path / "a.sens").write_bytes(b"\x04\x00\x00\x00" + b"\xff" * 500)
    with pytest.raises(VidLLMInputError, match="sensor name of"):
        SensReader(tmp_path / "a.sens")
    (tmp_path / "b.sens").write_bytes(b"PK" * 300)
    with pytest.raises(VidLLMInputError, match=r"wanted a .sens file of version 4"):
        SensReader(tmp_path / "b.sens")
    with pytest.raises(FileNotFoundError, match="no such file"):
        SensReader(tmp_path / "c.sens")


def test_occi_depth_is_one_clear_error_and_colour_stays_readable(tmp_path):
    write(tmp_path / "a.sens", depth=OCCI_USHORT)
    reader = SensReader(tmp_path / "a.sens")
    with pytest.raises(VidLLMInputError, match=r"frame 2, depth: wanted depth compression .*occi_ushort"):
        reader.frame(2)
    assert reader.frame(2, depth=False).rgb.shape == (*HW, 3)


def test_damaged_blobs_name_file_and_frame(tmp_path):
    ends = write(tmp_path / "a.sens")
    content = bytearray((tmp_path / "a.sens").read_bytes())
    content[ends["sizes 1"] : ends["sizes 1"] + 40] = bytes(40)
    content[ends["colour 2"] : ends["colour 2"] + 10] = bytes(10)
    (tmp_path / "a.sens").write_bytes(content)
    reader = SensReader(tmp_path / "a.sens")
    with pytest.raises(VidLLMInputError, match=r"a.sens, frame 1, colour"):
        reader.frame(1)
    with pytest.raises(VidLLMInputError, match=r"a.sens, frame 2, depth"):
        reader.frame(2)
    assert reader.frame(3).frame_id == 3
    for index in (-1, 6):
        with pytest.raises(VidLLMInputError, match=r"index in 0\.\.5"):
            reader.frame(index)


def test_times_that_do_not_rise_are_none(tmp_path):
    write(tmp_path / "a.sens", times=[0] * 6)
    assert SensReader(tmp_path / "a.sens").frame(3).timestamp_s is None


def test_alignment_comes_from_the_text_beside_it(tmp_path):
    folder = tmp_path / "scans" / "scene0900_00"
    folder.mkdir(parents=True)
    write(folder / "scene0900_00.sens")
    assert SensReader(folder / "scene0900_00.sens").annotation_from_scene is None
    numbers = " ".join(str(value) for value in ALIGNMENT.reshape(-1))
    (folder / "scene0900_00.txt").write_text(
        f"sceneType = Office\r\naxisAlignment = {numbers} \r\ncolorWidth = 64\r\n"
    )
    assert np.array_equal(SensReader(folder / "scene0900_00.sens").annotation_from_scene, ALIGNMENT)
    (folder / "scene0900_00.txt").write_text("sceneType = Office\n")
    assert np.array_equal(SensReader(folder / "scene0900_00.sens").annotation_from_scene, np.eye(4))
    (folder / "scene0900_00.txt").write_text("axisAlignment = 1 2 three 4\n")
    with pytest.raises(
        VidLLMInputError, match=r"scene0900_00.txt, axisAlignment, field 3: wanted a number; got 'three'"
    ):
        SensReader(folder / "scene0900_00.sens")


def test_a_reader_travels_to_another_process(tmp_path):
    write(tmp_path / "a.sens", lost_frames=(0,))
    reader = pickle.loads(pickle.dumps(SensReader(tmp_path / "a.sens")))
    assert np.array_equal(reader.frame(2).depth_m, depth_raw(2).astype(np.float32) / 1000)
    assert not reader.valid_pose_mask[0]
    assert not np.isfinite(lost()).any()


MEASURE = """
    import resource, sys, time
    from vidllm.processing.scenes.sens import SensReader
    def peak():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    idle = peak()
    start = time.perf_counter()
    reader = SensReader(sys.argv[1])
    for index in range(0, len(reader), int(sys.argv[2])):
        reader.frame(index)
    print(len(reader), time.perf_counter() - start, peak() - idle)
"""


@pytest.mark.slow
def test_one_frame_in_fifty_of_two_gigabytes(tmp_path):
    """Real sizes of pictures; the same few blobs over and over."""
    target = 2_000_000_000
    if shutil.disk_usage(tmp_path).free < 2 * target:
        pytest.skip("wants 4 GB of free disk")
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:968, :1296]
    noise = rng.integers(0, 60, (968, 1296, 3))
    rgb = (np.stack([rows // 8, columns // 8, (rows + columns) // 12], axis=-1) % 190 + noise).astype(np.uint8)
    raw = (2000 + (rows[:480, :640] * 2) + rng.integers(0, 30, (480, 640))).astype(np.uint16)
    path = tmp_path / "large.sens"
    ends = write_sens(path, [rgb], [raw], [pose(0)], INTRINSICS, DEPTH_INTRINSICS, write_imu_count=False)
    content = path.read_bytes()
    body = content[ends["header"] :]
    num_frames = target // len(body) + 1
    try:
        with open(path, "wb") as file:
            file.write(content[: ends["header"] - 8] + num_frames.to_bytes(8, "little"))
            for _ in range(num_frames):
                file.write(body)
        assert os.path.getsize(path) >= target
        script = tmp_path / "measure.py"
        script.write_text(textwrap.dedent(MEASURE))

        def measure(step):
            out = subprocess.run(
                [sys.executable, str(script), str(path), str(step)], capture_output=True, text=True, check=True
            )
            count, seconds, kilobytes = out.stdout.split()
            return int(count), float(seconds), int(kilobytes)

        start = time.perf_counter()
        count, sparse_s, sparse_kb = measure(50)
        _, every_s, _ = measure(1)
        print(
            f"{count} frames: 1 in 50 {sparse_s:.2f} s, all {every_s:.2f} s, {sparse_kb / 1024:.0f} MiB over idle, {time.perf_counter() - start:.0f} s"
        )
        assert count == num_frames
        assert sparse_kb < 300 * 1024
        assert every_s > 10 * sparse_s
    finally:
        path.unlink(missing_ok=True)

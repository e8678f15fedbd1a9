"""Exported layouts, videos, folders: what is written comes back, what is malformed is named."""

import pickle
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from vidllm.processing.scenes import (
    Frame,
    annotation_from_world,
    cam_from_world,
    choose_frames,
    find_scenes,
    open_path,
    open_scene,
    write_layout,
)
from vidllm.processing.scenes.base import PoseUnavailableError, SkipCounter, invert_pose
from vidllm.processing.scenes.layouts import PosedImagesReader, PoseEvalReader, SensExportReader
from vidllm.processing.scenes.write import WRITERS
from vidllm.processing.video_reading_vidllm import VidLLMInputError

from .made_scene import ALIGNMENT, DEPTH_INTRINSICS, HW, INTRINSICS, contents, depth_raw, lost, picture, pose
from .sens_writer import write_sens


SCENE = "scene0900_00"
FOLDERS = ("posed_images", "sens_export", "llava3d", "frames_square", "pose_eval")
IDS = (0, 10, 20, 100, 110, 1000)


def frames(numbers=IDS, lost_frames=(), posed=True):
    for index, number in enumerate(numbers):
        yield Frame(
            rgb=picture(index),
            depth_m=depth_raw(index).astype(np.float32) / 1000 if posed else None,
            cam_from_scene=invert_pose(pose(index)) if posed and index not in lost_frames else None,
            intrinsics_px=INTRINSICS if posed else None,
            depth_intrinsics_px=DEPTH_INTRINSICS if posed else None,
            frame_id=number,
            timestamp_s=None,
        )


def save_matrix(path, matrix):
    """As numpy's own writer does it, `%f`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savetxt(path, matrix, fmt="%f")


def four(matrix):
    full = np.eye(4)
    full[:3, :3] = matrix
    return full


def make_posed_images(root, numbers=IDS, lost_frames=()):
    """EmbodiedScan's files by hand."""
    folder = root / "posed_images" / SCENE
    for index, number in enumerate(numbers):
        save_matrix(folder / f"{number:05d}.txt", lost() if index in lost_frames else pose(index))
        Image.fromarray(picture(index)).save(folder / f"{number:05d}.jpg", quality=98)
        Image.fromarray(depth_raw(index)).save(folder / f"{number:05d}.png")
    save_matrix(folder / "intrinsic.txt", four(INTRINSICS))
    save_matrix(folder / "depth_intrinsic.txt", four(DEPTH_INTRINSICS))
    return folder


def make_sens_export(root, numbers=IDS):
    """ScanNet's SensReader export by hand."""
    folder = root / SCENE
    for name in ("color", "depth"):
        (folder / name).mkdir(parents=True)
    for index, number in enumerate(numbers):
        Image.fromarray(picture(index)).save(folder / "color" / f"{number}.jpg", quality=98)
        Image.fromarray(depth_raw(index)).save(folder / "depth" / f"{number}.png")
        save_matrix(folder / "pose" / f"{number}.txt", pose(index))
    save_matrix(folder / "intrinsic" / "intrinsic_color.txt", four(INTRINSICS))
    save_matrix(folder / "intrinsic" / "intrinsic_depth.txt", four(DEPTH_INTRINSICS))
    for camera in ("color", "depth"):
        save_matrix(folder / "intrinsic" / f"extrinsic_{camera}.txt", np.eye(4))
    return folder


def write_info(root, alignment=ALIGNMENT, cameras=True):
    folder = root / "scans" / SCENE
    folder.mkdir(parents=True, exist_ok=True)
    text = "axisAlignment = " + " ".join(f"{value:.6f}" for value in alignment.reshape(-1)) + " \n"
    if cameras:
        for camera, k, (height, width) in (("color", INTRINSICS, (96, 128)), ("depth", DEPTH_INTRINSICS, (30, 40))):
            values = {"fx": k[0, 0], "fy": k[1, 1], "mx": k[0, 2], "my": k[1, 2]}
            text += "".join(
                f"{key}_{camera} = {value * (2 if camera == 'color' else 1)}\n" for key, value in values.items()
            )
            text += f"{camera}Width = {width}\n{camera}Height = {height}\n"
    (folder / f"{SCENE}.txt").write_text(text)


def check_contents(reader, numbers=IDS, lost_frames=()):
    assert reader.frame_ids == list(numbers)
    for index in range(len(numbers)):
        frame = reader.frame(index)
        assert np.abs(frame.rgb.astype(int) - picture(index).astype(int)).mean() < 3
        assert np.array_equal(frame.depth_m, depth_raw(index).astype(np.float32) / np.float32(1000))
        assert frame.frame_id == numbers[index]
        if index in lost_frames:
            assert frame.cam_from_scene is None
        else:
            assert np.allclose(np.linalg.inv(frame.cam_from_scene), pose(index), atol=2e-6)


@pytest.mark.parametrize("make", [make_posed_images, make_sens_export])
def test_files_made_by_hand(tmp_path, make):
    make(tmp_path)
    reader = open_scene(tmp_path, SCENE)
    check_contents(reader)
    assert isinstance(reader, PosedImagesReader if make is make_posed_images else SensExportReader)
    assert np.allclose(reader.frame(0).intrinsics_px, INTRINSICS)
    assert np.allclose(reader.frame(0).depth_intrinsics_px, DEPTH_INTRINSICS)
    assert (reader.problems, reader.has_depth, reader.annotation_from_scene) == ([], True, None)
    assert pickle.loads(pickle.dumps(reader)).frame(2, depth=False).depth_m is None
    assert np.array_equal(np.asarray(Image.open(__import__("io").BytesIO(reader.stored_jpeg(1)))), reader.frame(1).rgb)


@pytest.mark.parametrize("layout", FOLDERS)
def test_every_layout_gives_back_what_was_written(tmp_path, layout):
    write_info(tmp_path)
    write_layout(layout, tmp_path, SCENE, frames(lost_frames=(2,)), ALIGNMENT)
    reader = open_scene(tmp_path, SCENE)
    numbers = range(6) if layout == "pose_eval" else IDS
    check_contents(reader, list(numbers), lost_frames=(2,))
    assert reader.valid_pose_mask.tolist() == [True, True, False, True, True, True]
    assert sum("1 of 6 poses are invalid: not finite" in problem for problem in reader.problems) == 1
    assert np.allclose(reader.annotation_from_scene, ALIGNMENT)
    assert np.allclose(reader.frame(1).depth_intrinsics_px, DEPTH_INTRINSICS)
    assert find_scenes(tmp_path)[SCENE][0] == layout
    assert type(open_scene(tmp_path, SCENE, layout)) is type(reader)
    # Where the layout has no colour intrinsics, those of <scene>.txt are scaled to the pictures, and that is said.
    assert np.allclose(reader.frame(0).intrinsics_px, INTRINSICS)
    told = any("no colour intrinsics" in problem for problem in reader.problems)
    assert told == (layout in ("frames_square", "pose_eval", "llava3d"))


@pytest.mark.parametrize("layout", ["frames_square", "pose_eval"])
def test_no_intrinsics_anywhere_is_none_and_told(tmp_path, layout):
    write_layout(layout, tmp_path, SCENE, frames())
    reader = open_scene(tmp_path, SCENE)
    assert (reader.frame(0).intrinsics_px, reader.frame(0).depth_intrinsics_px) == (None, None)
    assert [problem.split(": ")[1] for problem in reader.problems] == ["no colour intrinsics", "no depth intrinsics"]


def test_pictures_of_the_depth_cameras_size_take_its_intrinsics(tmp_path):
    folder = tmp_path / SCENE
    for name in ("color", "depth"):
        (folder / name).mkdir(parents=True)
    for index in range(3):
        Image.fromarray(picture(index, (30, 40))).save(folder / "color" / f"{index}.png")
        Image.fromarray(depth_raw(index)).save(folder / "depth" / f"{index}.png")
        save_matrix(folder / "pose" / f"{index}.txt", pose(index))
    save_matrix(folder / "intrinsic" / "intrinsic_depth.txt", four(DEPTH_INTRINSICS))
    save_matrix(folder / "axis_align_matrix.txt", ALIGNMENT)
    reader = open_scene(tmp_path, SCENE)
    assert type(reader).__name__ == "Llava3dReader"
    assert np.allclose(reader.frame(0).intrinsics_px, DEPTH_INTRINSICS)
    assert np.array_equal(reader.frame(1).rgb, picture(1, (30, 40)))
    assert np.allclose(reader.annotation_from_scene, ALIGNMENT)
    assert reader.stored_jpeg(0) is None


def test_intrinsics_of_another_size_are_told(tmp_path):
    folder = make_posed_images(tmp_path)
    save_matrix(folder / "intrinsic.txt", four(np.array([[1170.0, 0, 648], [0, 1170, 484], [0, 0, 1]])))
    problems = open_scene(tmp_path, SCENE).problems
    assert len(problems) == 1
    assert "are these intrinsics of another size?" in problems[0]


def test_numbers_sort_as_numbers(tmp_path):
    make_sens_export(tmp_path, numbers=(2, 9, 10, 100))
    assert open_scene(tmp_path, SCENE).frame_ids == [2, 9, 10, 100]


def test_missing_partners_are_counted_not_dropped(tmp_path):
    folder = make_posed_images(tmp_path, lost_frames=(3,))
    (folder / "00010.txt").unlink()
    (folder / "00020.png").unlink()
    (folder / "00100.jpg").unlink()
    (folder / "notes.jpg").write_bytes(b"x")
    reader = open_scene(tmp_path, SCENE)
    assert reader.frame_ids == [0, 10, 20, 110, 1000]
    assert reader.valid_pose_mask.tolist() == [True, False, True, True, True]
    assert (reader.frame(2).depth_m, reader.frame(1).cam_from_scene) == (None, None)
    text = "\n".join(reader.problems)
    for part in ("1 of 5 frames have no depth map (first: frame 20)", "1 of 5 depth map files have no picture (first: frame 100)",
                 "1 of 5 frames have no pose (first: frame 10)", "1 of 5 pose files have no picture (first: frame 100)",
                 "1 files are not named by a frame number (first: notes.jpg)"):  # fmt: skip
        assert part in text
    assert len(reader.problems) == 5


@pytest.mark.parametrize("token", ["-inf", "inf", "nan", "-1.#INF"])
def test_lost_tracking_in_text(tmp_path, token):
    folder = make_posed_images(tmp_path)
    (folder / "00020.txt").write_text("\n".join([" ".join([token] * 4)] * 4))
    reader = open_scene(tmp_path, SCENE)
    assert reader.valid_pose_mask.tolist() == [True, True, False, True, True, True]
    assert "1 of 6 poses are invalid: not finite, tracking lost (first: frame 20)" in reader.problems[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 0 0 0\n0 1 0 x\n0 0 1 0\n0 0 0 1", "00020.txt, line 2, field 4: wanted a number; got 'x'"),
        (
            "1 0 0 0\n0 1 0 0\n0 0 1 0",
            "00020.txt: wanted a pose of 4 lines with 4 numbers; got lines of [4, 4, 4] numbers",
        ),
        ("", "00020.txt: wanted a pose of 4 lines with 4 numbers; got lines of [] numbers"),
    ],
)
def test_a_malformed_pose_names_file_line_and_field(tmp_path, text, message):
    folder = make_posed_images(tmp_path)
    (folder / "00020.txt").write_text(text)
    with pytest.raises(VidLLMInputError, match=re.escape(message)):
        open_scene(tmp_path, SCENE)


def test_other_malformed_files_are_named(tmp_path):
    folder = make_posed_images(tmp_path)
    (folder / "00010.jpg").write_bytes(b"no picture")
    Image.fromarray(np.zeros((30, 40), np.uint8)).save(folder / "00020.png")
    reader = open_scene(tmp_path, SCENE)
    with pytest.raises(VidLLMInputError, match=r"00010\.jpg: this picture cannot be decoded"):
        reader.frame(1)
    with pytest.raises(VidLLMInputError, match=r"00020\.png: wanted one channel of 16 bits .*mode L"):
        reader.frame(2)
    (folder / "intrinsic.txt").write_text("1 2\n3 4\n")
    with pytest.raises(VidLLMInputError, match=r"intrinsic\.txt: wanted intrinsics of 4 lines"):
        open_scene(tmp_path, SCENE)
    (folder / "intrinsic.txt").unlink()
    (folder / "10.jpg").write_bytes(b"")
    with pytest.raises(VidLLMInputError, match=r"wanted one file per frame; got 00010\.jpg and 10\.jpg"):
        open_scene(tmp_path, SCENE)


def test_pose_rows_of_another_number_are_an_error(tmp_path):
    write_layout("pose_eval", tmp_path, SCENE, frames())
    path = tmp_path / SCENE / "pose_90.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:5]))
    with pytest.raises(VidLLMInputError, match=r"pose_90\.txt: wanted one line per picture \(6\); got 5"):
        PoseEvalReader(tmp_path / SCENE)
    path.write_text("\n".join([*lines[:5], lines[5].rsplit(" ", 1)[0]]))
    with pytest.raises(VidLLMInputError, match=r"pose_90\.txt, line 6: wanted 16 numbers; got 15"):
        PoseEvalReader(tmp_path / SCENE)


@pytest.mark.parametrize("layout", ["video", "images"])
def test_videos_and_folders(tmp_path, layout):
    write_layout(layout, tmp_path, SCENE, frames(posed=False))
    write_info(tmp_path)
    reader = open_scene(tmp_path, SCENE)
    assert (len(reader), reader.has_depth, reader.has_poses, reader.frame_ids) == (6, False, False, list(range(6)))
    assert np.allclose(reader.annotation_from_scene, ALIGNMENT)
    decoded = reader.frames([4, 0, 4])
    for frame, index in zip(decoded, (4, 0, 4), strict=True):
        assert frame.rgb.shape == (*HW, 3)
        assert np.abs(frame.rgb.astype(int) - picture(index).astype(int)).mean() < 12
        others = [np.abs(frame.rgb.astype(int) - picture(other).astype(int)).mean() for other in range(6)]
        assert np.argmin(others) == index
        assert (frame.depth_m, frame.cam_from_scene, frame.intrinsics_px) == (None, None, None)
        assert frame.timestamp_s == (pytest.approx(index / 10) if layout == "video" else None)
    assert np.array_equal(reader.frame(4).rgb, decoded[0].rgb)
    assert choose_frames(reader, 3) == [0, 2, 5]
    assert find_scenes(tmp_path) == {SCENE: [layout]}
    assert type(open_path(reader.source)) is type(reader)
    with pytest.raises(VidLLMInputError, match=r"index in 0\.\.5; got 6"):
        reader.frame(6)
    with pytest.raises(PoseUnavailableError):
        annotation_from_world(reader, [0, 1])


def test_the_order_in_which_layouts_are_preferred(tmp_path):
    pictures, depths, poses = contents()
    (tmp_path / "scans" / SCENE).mkdir(parents=True)
    write_sens(tmp_path / "scans" / SCENE / f"{SCENE}.sens", pictures, depths, poses, INTRINSICS, DEPTH_INTRINSICS)
    for layout in WRITERS:
        if layout not in ("sens_export", "llava3d", "pose_eval"):
            write_layout(layout, tmp_path, SCENE, frames())
    make_sens_export(tmp_path)
    found = find_scenes(tmp_path)[SCENE]
    assert found == ["posed_images", "sens_export", "frames_square", "sens", "video", "images"]
    for layout in found:
        assert len(open_scene(tmp_path, SCENE, layout)) == 6
    shutil.rmtree(tmp_path / "posed_images")
    assert type(open_scene(tmp_path, SCENE)) is SensExportReader


@pytest.mark.parametrize("scene_id", ["../scene0900_00", "", "..", "a/b", None])
def test_names_that_leave_the_root_are_refused(tmp_path, scene_id):
    with pytest.raises(VidLLMInputError, match="scene id: wanted a name"):
        open_scene(tmp_path, scene_id)


def test_what_is_not_there_is_one_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no frames of scene scene0901_00; looked for posed_images/"):
        open_scene(tmp_path, "scene0901_00")
    with pytest.raises(VidLLMInputError, match=r"did you mean posed_images\?"):
        open_scene(tmp_path, SCENE, "posed_image")
    with pytest.raises(FileNotFoundError, match="wanted a data root"):
        open_scene(tmp_path / "absent", SCENE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(VidLLMInputError, match="found no picture"):
        open_path(tmp_path / "empty")


def test_writers_never_leave_half_a_scene(tmp_path):
    def broken():
        yield from frames(numbers=(0, 1))
        raise VidLLMInputError("the third frame is damaged")

    for layout in WRITERS:
        with pytest.raises(VidLLMInputError, match="third frame"):
            write_layout(layout, tmp_path, SCENE, broken())
        with pytest.raises(VidLLMInputError, match="at least one frame"):
            write_layout(layout, tmp_path, SCENE, [])
    assert [path for path in tmp_path.rglob("*") if path.name.startswith((SCENE, "."))] == []
    write_layout("images", tmp_path, SCENE, frames())
    with pytest.raises(VidLLMInputError, match="it exists already"):
        write_layout("images", tmp_path, SCENE, frames())
    write_layout("images", tmp_path, SCENE, frames(numbers=(1, 2)), overwrite=True)
    assert len(open_scene(tmp_path, SCENE)) == 2


def test_uniform_choice_truncates_over_valid_frames(tmp_path):
    numbers = tuple(range(0, 230, 10))
    make_posed_images(tmp_path, numbers, lost_frames=(0, 5, 22))
    reader = open_scene(tmp_path, SCENE)
    valid = [index for index in range(23) if index not in (0, 5, 22)]
    for count in (1, 2, 3, 7, 19):
        positions = [int(place * 19 / (count - 1)) if count > 1 else 0 for place in range(count)]
        assert choose_frames(reader, count) == [valid[position] for position in positions]
    # By hand: 7 of 20 positions 0, 3.17, 6.33, 9.5, 12.67, 15.83, 19 truncate to 0 3 6 9 12 15 19.
    assert choose_frames(reader, 7) == [valid[position] for position in (0, 3, 6, 9, 12, 15, 19)]
    assert choose_frames(reader, 20) == choose_frames(reader, 99) == valid
    assert choose_frames(reader, 4, require_pose=False) == [0, 7, 14, 22]


def test_the_first_sampled_frame_carries_the_annotation(tmp_path):
    make_posed_images(tmp_path, lost_frames=(0,))
    write_info(tmp_path)
    reader = open_scene(tmp_path, SCENE)
    chosen = choose_frames(reader, 3)
    assert chosen[0] == 1
    assert np.allclose(annotation_from_world(reader, chosen), ALIGNMENT @ pose(1), atol=2e-6)
    poses = cam_from_world(reader, [1, 0, 3])
    assert np.array_equal(poses[0], np.eye(4))
    assert np.isnan(poses[1]).all()
    assert np.allclose(poses[2], np.linalg.inv(pose(3)) @ pose(1), atol=2e-6)
    # A first frame without pose: the sample is skipped and counted.
    counter = SkipCounter(num_examples=1)
    for name, indices in (("q-1", [0, 1]), ("q-2", [1, 2]), ("q-3", [0])):
        try:
            annotation_from_world(reader, indices)
        except PoseUnavailableError as error:
            counter.add(str(error).split(": ")[-1], name)
    assert counter.total == 2
    assert counter.summary() == ["2 skipped: the first sampled frame (number 0) has no valid pose (first: q-1)"]
    with pytest.raises(PoseUnavailableError):
        cam_from_world(reader, [0, 1])


def test_a_scene_without_a_valid_pose(tmp_path):
    make_posed_images(tmp_path, lost_frames=range(6))
    reader = open_scene(tmp_path, SCENE)
    assert reader.has_poses
    with pytest.raises(PoseUnavailableError, match=f"{SCENE}: none of the 6 frames has a valid pose"):
        choose_frames(reader, 3)
    assert choose_frames(reader, 2, require_pose=False) == [0, 5]

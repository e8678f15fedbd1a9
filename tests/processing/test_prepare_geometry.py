"""Given geometry: every source gives the same tensors, resized and cropped as the frames; bad ones name the frame."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidllm.modeling_vidllm.geometry_vidllm import crop_intrinsics, resize_intrinsics
from vidllm.modeling_vidllm.scene_vidllm import VidLLMReconstruction
from vidllm.processing.export import write_cameras_json, write_colmap_text, write_trajectory_tum
from vidllm.processing.export_scene import export_scene
from vidllm.processing.given_geometry_vidllm import intrinsics_to_model, intrinsics_to_source
from vidllm.processing.video_processing_vidllm import resize_plan
from vidllm.processing.video_reading_vidllm import VidLLMInputError

from .media import picture, tiny_processor, write_folder, write_video


TOTAL = 9
HEIGHT, WIDTH = 48, 64


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(num_frames=4)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clip") / "room.mp4", [picture(i) for i in range(TOTAL)])


@pytest.fixture(scope="module")
def inputs(processor, video):
    return processor.video_processor(video)  # frames 0 3 5 8, 28x28 of 28x37


def rigid(count, seed=0):
    """Random rigid transforms (count, 4, 4)."""
    rng = np.random.default_rng(seed)
    matrices = np.tile(np.eye(4), (count, 1, 1))
    rotation = np.linalg.qr(rng.normal(size=(count, 3, 3)))[0]
    matrices[:, :3, :3] = rotation * np.linalg.det(rotation)[:, None, None]
    matrices[:, :3, 3] = rng.normal(size=(count, 3))
    return matrices


def quat_xyzw(rotation):
    """Slow and obvious: the eigenvector of the largest eigenvalue."""
    (a, b, c), (d, e, f), (g, h, i) = rotation
    k = np.array(
        [
            [a - e - i, b + d, c + g, h - f],
            [b + d, e - a - i, f + h, c - g],
            [c + g, f + h, i - a - e, d - b],
            [h - f, c - g, d - b, a + e + i],
        ]
    )
    return np.linalg.eigh(k)[1][:, -1]


POSES = rigid(TOTAL)
INTRINSICS = np.stack([[[50.0 + i, 0, 31.0], [0, 52.0 + i, 25.0], [0, 0, 1]] for i in range(TOTAL)])


def model_intrinsics(indices):
    """The formulas by hand for 48x64 -> 28x37, crop 4 columns on the left."""
    wanted = INTRINSICS[indices].copy()
    wanted[:, 0] *= 37 / 64
    wanted[:, 1] *= 28 / 48
    wanted[:, 0, 2] -= 4
    return wanted


def write_cameras(path, indices=range(TOTAL), width=WIDTH, height=HEIGHT, unit="m", scale=1.0, **changes):
    frames = [
        {
            "index": int(i),
            "timestamp_s": i / 10,
            "cam_from_world": POSES[i].tolist(),
            "intrinsics_px": (np.diag([scale, scale, 1]) @ INTRINSICS[i]).tolist(),
        }
        for i in indices
    ]
    cameras = {
        "convention": "cam_from_world, OpenCV axes, metres",
        "unit": unit,
        "width": width,
        "height": height,
        "frames": frames,
    }
    path.write_text(json.dumps({**cameras, **changes}))
    return str(path)


def write_tum(path, times=None, poses=POSES):
    lines = ["# timestamp tx ty tz qx qy qz qw"]
    for i, pose in enumerate(poses):
        world_from_cam = np.linalg.inv(pose)
        time = i / 10 if times is None else times[i]
        numbers = [time, *world_from_cam[:3, 3], *quat_xyzw(world_from_cam[:3, :3])]
        lines.append(" ".join(f"{number:.9f}" for number in numbers))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def write_colmap_folder(folder, names, model="PINHOLE", scale=1.0, order=None):
    folder.mkdir()
    cameras, images = ["# cameras"], ["# images"]
    for i, name in enumerate(names):
        k = np.diag([scale, scale, 1]) @ INTRINSICS[i]
        k[:2, 2] += 0.5  # COLMAP's origin is the corner of a pixel
        numbers = {
            "PINHOLE": [k[0, 0], k[1, 1], k[0, 2], k[1, 2]],
            "OPENCV": [k[0, 0], k[1, 1], k[0, 2], k[1, 2], 0.1, 0, 0, 0],
            "SIMPLE_RADIAL": [k[0, 0], k[0, 2], k[1, 2], 0.0],
        }[model]
        cameras.append(f"{i + 1} {model} {int(WIDTH * scale)} {int(HEIGHT * scale)} " + " ".join(map(str, numbers)))
        q = quat_xyzw(POSES[i][:3, :3])
        pose = " ".join(f"{number:.12f}" for number in [q[3], *q[:3], *POSES[i][:3, 3]])
        images.append(f"{i + 1} {pose} {i + 1} {name}")
        images.append("" if i % 2 else "10.5 11.5 -1 12 13 7")
    (folder / "cameras.txt").write_text("\n".join(cameras) + "\n")
    (folder / "images.txt").write_text("\n".join(images) + "\n")
    return str(folder)


def check(geometry, indices, intrinsics=True):
    assert set(geometry) == ({"cam_from_world", "intrinsics_px"} if intrinsics else {"cam_from_world"})
    assert all(value.dtype == torch.float32 for value in geometry.values())
    np.testing.assert_allclose(geometry["cam_from_world"][0], POSES[indices], atol=2e-6)
    if intrinsics:
        np.testing.assert_allclose(geometry["intrinsics_px"][0], model_intrinsics(indices), rtol=1e-6)


def test_all_sources_agree(processor, inputs, tmp_path):
    indices = inputs.video_metadata[0]["frames_indices"]
    assert indices == [0, 3, 5, 8]
    names = [f"frame_{i:06d}.png" for i in range(TOTAL)]
    check(processor.prepare_geometry(write_cameras(tmp_path / "cameras.json"), inputs), indices)
    check(processor.prepare_geometry(write_cameras(tmp_path / "some.json", indices), inputs), indices)
    check(
        processor.prepare_geometry(write_cameras(tmp_path / "double.json", width=128, height=96, scale=2.0), inputs),
        indices,
    )
    check(processor.prepare_geometry(write_colmap_folder(tmp_path / "colmap", names), inputs), indices)
    check(processor.prepare_geometry(write_colmap_folder(tmp_path / "half", names, scale=0.5), inputs), indices)
    check(processor.prepare_geometry(write_tum(tmp_path / "path.tum"), inputs), indices, intrinsics=False)
    arrays = {"cam_from_world": POSES, "intrinsics_px": INTRINSICS}
    for source in (
        arrays,
        {key: value[indices] for key, value in arrays.items()},
        {key: torch.from_numpy(value[indices])[None] for key, value in arrays.items()},
        [arrays],
        {"cam_from_world": POSES, "intrinsics_px": INTRINSICS, "depth_m": None},
    ):
        check(processor.prepare_geometry(source, inputs), indices)
    one = processor.prepare_geometry({"intrinsics_px": INTRINSICS[3]}, inputs)["intrinsics_px"]
    np.testing.assert_allclose(one[0], model_intrinsics([3, 3, 3, 3]), rtol=1e-6)


def test_where_the_metadata_may_stand(processor, video, inputs):
    source = {"cam_from_world": POSES}
    info = inputs.video_metadata
    wanted = processor.prepare_geometry(source, inputs)["cam_from_world"]
    with_key = processor.video_processor(video, return_metadata=True)
    for place in (info, info[0], {"video_metadata": info}, with_key, dict(with_key)):
        assert torch.equal(processor.prepare_geometry(source, place)["cam_from_world"], wanted)
    for place in ({}, {"input_ids": 1}, [], None):
        with pytest.raises(VidLLMInputError, match="wanted the inputs that this processor made"):
            processor.prepare_geometry(source, place)


def test_chat_inputs_carry_the_metadata(processor, video):
    chat = [{"role": "user", "content": [{"type": "video", "path": video}, {"type": "text", "text": "a"}]}]
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    check(processor.prepare_geometry({"cam_from_world": POSES}, inputs.to("cpu")), [0, 3, 5, 8], intrinsics=False)


@given(
    height=st.integers(60, 900),
    width=st.integers(60, 900),
    short=st.integers(28, 300),
    focal=st.floats(10, 2000),
    shift=st.floats(-20, 20),
)
@settings(max_examples=60, deadline=None)
def test_intrinsics_match_the_models_own_formulas(height, width, short, focal, shift):
    resized_hw, top, left, _ = resize_plan((height, width), {"shortest_edge": short}, 14)
    metadata = {"resized_hw": resized_hw, "crop_top_left": (top, left), "height": height, "width": width}
    matrix = np.array([[focal, 0, width / 2 + shift], [0, focal * 1.1, height / 2 - shift], [0, 0, 1]])
    got = intrinsics_to_model(matrix, (height, width), metadata)
    theirs = crop_intrinsics(
        resize_intrinsics(torch.from_numpy(matrix).float(), (height, width), resized_hw), top, left
    )
    np.testing.assert_allclose(got, theirs.numpy(), rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(intrinsics_to_source(got, metadata), matrix, rtol=1e-9, atol=1e-9)
    # A point seen at a source pixel is seen where the resize and the crop put that pixel.
    point = np.array([0.3, -0.2, 2.0])
    before, after = matrix @ point / 2, got @ point / 2
    np.testing.assert_allclose(after[0], before[0] * resized_hw[1] / width - left)
    np.testing.assert_allclose(after[1], before[1] * resized_hw[0] / height - top)


def test_exported_intrinsics_in_model_pixels_are_taken_as_they_are(processor, inputs, tmp_path):
    path = write_cameras(tmp_path / "cameras.json", width=28, height=28)
    got = processor.prepare_geometry(path, inputs)["intrinsics_px"]
    np.testing.assert_allclose(got[0], INTRINSICS[[0, 3, 5, 8]], rtol=1e-6)


def test_depth_follows_the_pixels(processor, inputs):
    indices = [0, 3, 5, 8]
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    depth = np.stack([1 + i + columns / 100 + rows / 1000 for i in range(TOTAL)])
    depth[:, 10, 20] = np.nan
    depth[:, 30, 40] = -1
    depth[:, :, 60:] = 0
    got = processor.prepare_geometry({"depth_m": depth}, inputs)["depth_m"]
    assert got.shape == (1, 4, 28, 28)
    assert got.dtype == torch.float32
    assert torch.isfinite(got).all()
    for frame, index in enumerate(indices):
        for row in range(28):
            for column in range(28):
                y, x = int((row + 0.5) * 48 / 28), int((column + 4 + 0.5) * 64 / 37)
                wanted = depth[index, y, x]
                wanted = wanted if np.isfinite(wanted) and wanted > 0 else 0
                assert abs(float(got[0, frame, row, column]) - wanted) < 1e-5
    low = processor.prepare_geometry({"depth_m": depth[:, ::2, ::2]}, inputs)["depth_m"]
    assert low.shape == got.shape
    with pytest.raises(
        VidLLMInputError, match="wanted depth_m for pictures like the upright source frame, 64x48; got 48x64"
    ):
        processor.prepare_geometry({"depth_m": depth.transpose(0, 2, 1)}, inputs)


def test_folder_by_file_name_and_by_time(processor, tmp_path):
    frames = [picture(i) for i in range(TOTAL)]
    names = [f"{1000 + i / 10:.3f}.png" for i in range(TOTAL)]
    inputs = processor.video_processor(write_folder(tmp_path / "frames", frames, names))
    geometry = processor.prepare_geometry(
        write_tum(tmp_path / "path.txt", [1000 + i / 10 + 0.01 for i in range(TOTAL)]), inputs
    )
    check(geometry, [0, 3, 5, 8], intrinsics=False)
    check(processor.prepare_geometry(write_colmap_folder(tmp_path / "colmap", names), inputs), [0, 3, 5, 8])
    with pytest.raises(VidLLMInputError, match=r"frame 0 \(1000\.000\.png\): no pose .* within 0\.005 s"):
        processor.prepare_geometry(str(tmp_path / "path.txt"), inputs, max_time_difference_s=0.005)
    # Names without times: the index stands for the time.
    inputs = processor.video_processor(write_folder(tmp_path / "plain", frames))
    check(
        processor.prepare_geometry(write_tum(tmp_path / "index.tum", range(TOTAL)), inputs),
        [0, 3, 5, 8],
        intrinsics=False,
    )


def test_one_file_name_missing_is_not_replaced_by_a_number(processor, tmp_path):
    names = [f"img_{i}.png" for i in range(TOTAL)]
    inputs = processor.video_processor(write_folder(tmp_path / "frames", [picture(i) for i in range(TOTAL)], names))
    folder = write_colmap_folder(tmp_path / "colmap", [*names[:5], "other_5.png", *names[6:]])
    with pytest.raises(VidLLMInputError, match=r"frame 5 \(img_5\.png\): .* has no image of this frame"):
        processor.prepare_geometry(folder, inputs)


def test_several_videos_are_padded_like_their_pixels(processor, video, tmp_path):
    short = write_video(tmp_path / "short.mp4", [picture(i, 28, 98) for i in range(2)])
    inputs = processor.video_processor([video, short])
    sources = [
        {"cam_from_world": POSES, "depth_m": np.ones((TOTAL, 48, 64)), "intrinsics_px": INTRINSICS},
        {"cam_from_world": POSES[:2], "depth_m": np.full((2, 28, 98), 2.0), "intrinsics_px": INTRINSICS[:2]},
    ]
    geometry = processor.prepare_geometry(sources, inputs)
    batch, frames, _, height, width = inputs["pixel_values_videos"].shape
    assert geometry["depth_m"].shape == (batch, frames, height, width)
    assert geometry["cam_from_world"].shape == (batch, frames, 4, 4)
    assert geometry["intrinsics_px"].shape == (batch, frames, 3, 3)
    assert (geometry["depth_m"][0, :, :, 28:] == 0).all()
    assert (geometry["depth_m"][1, 2:] == 0).all()
    assert torch.equal(geometry["cam_from_world"][1, 2:], torch.eye(4).expand(2, 4, 4))
    np.testing.assert_allclose(geometry["cam_from_world"][1, :2], POSES[:2], atol=1e-6)
    same = processor.video_processor([video, video])
    stacked = processor.prepare_geometry({"cam_from_world": np.stack([POSES, POSES[::-1]])}, same)["cam_from_world"]
    np.testing.assert_allclose(stacked[1], POSES[::-1][[0, 3, 5, 8]], atol=1e-6)
    with pytest.raises(VidLLMInputError, match="one source per video"):
        processor.prepare_geometry(sources[:1], inputs)
    with pytest.raises(VidLLMInputError, match="same parts for all videos"):
        processor.prepare_geometry([sources[0], {"cam_from_world": POSES[:2]}], inputs)


def broken(frame, **changes):
    """POSES with one that is no rigid transform."""
    poses = POSES.copy()
    for key, value in changes.items():
        if key == "value":
            poses[frame, 1, 2] = value
        if key == "scale":
            poses[frame, :3, :3] *= value
        if key == "mirror":
            poses[frame, :3, 0] *= -1
        if key == "bottom":
            poses[frame, 3, 0] = value
    return poses


@pytest.mark.parametrize(
    "changes",
    [
        {"value": np.nan},
        {"value": np.inf},
        {"value": 7.0},
        {"scale": 1.1},
        {"scale": 0.0},
        {"mirror": True},
        {"bottom": 0.5},
    ],
)
def test_invalid_pose_names_the_frame(processor, inputs, tmp_path, changes):
    poses = broken(5, **changes)
    with pytest.raises(ValueError, match=r"geometry of frame 5 \(0\.500 s\): the pose is not"):
        processor.prepare_geometry({"cam_from_world": poses}, inputs)
    cameras = json.loads(Path(write_cameras(tmp_path / "cameras.json")).read_text())
    cameras["frames"][5]["cam_from_world"] = poses[5].tolist()
    (tmp_path / "cameras.json").write_text(json.dumps(cameras))
    with pytest.raises(ValueError, match="geometry of frame 5"):
        processor.prepare_geometry(tmp_path / "cameras.json", inputs)


def test_shorter_sources_name_the_frame(processor, inputs, tmp_path):
    with pytest.raises(ValueError, match=r"frame 8 .*has 7 entries, wanted 9 .* or 4"):
        processor.prepare_geometry({"cam_from_world": POSES[:7]}, inputs)
    with pytest.raises(ValueError, match=r"frame 8 .*has no such frame; it holds 6 frames, up to 5"):
        processor.prepare_geometry(write_cameras(tmp_path / "cameras.json", range(6)), inputs)
    with pytest.raises(ValueError, match=r"frame 8 .*no pose .*spans 0\.000 to 0\.600 s"):
        processor.prepare_geometry(write_tum(tmp_path / "path.tum", poses=POSES[:7]), inputs)
    with pytest.raises(ValueError, match=r"frame 8 .*has no image of this frame among its 7"):
        processor.prepare_geometry(write_colmap_folder(tmp_path / "colmap", [f"{i}.png" for i in range(7)]), inputs)


def test_unsorted_sources_name_the_frame(processor, inputs, tmp_path):
    order = [0, 1, 2, 5, 4, 3, 6, 7, 8]
    with pytest.raises(ValueError, match="in order of index; frame 4 has 4 after 5"):
        processor.prepare_geometry(write_cameras(tmp_path / "cameras.json", order), inputs)
    with pytest.raises(ValueError, match=r"in order of time; frame 4 has 0\.4 after 0\.5"):
        processor.prepare_geometry(write_tum(tmp_path / "path.tum", [i / 10 for i in order]), inputs)
    with pytest.raises(ValueError, match="in order of time; frame 1"):
        processor.prepare_geometry(write_tum(tmp_path / "same.tum", [0.0] * TOTAL), inputs)


def test_bad_quaternion_names_the_frame(processor, inputs, tmp_path):
    lines = Path(write_tum(tmp_path / "path.tum")).read_text().splitlines()
    for words, reason in (("0 0 0 0", "unit quaternion"), ("1 1 1 1", "unit quaternion"), ("nan 0 0 1", "not finite")):
        lines[6] = " ".join(lines[6].split()[:4] + words.split())
        (tmp_path / "path.tum").write_text("\n".join(lines))
        with pytest.raises(ValueError, match=f"geometry of frame 5.*{reason}"):
            processor.prepare_geometry(tmp_path / "path.tum", inputs)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", "{", "not a cameras.json"),
        ("a.json", "[]", "not a cameras.json"),
        ("a.json", '{"convention": "world_from_cam", "frames": []}', "wanted the convention cam_from_world"),
        ("a.json", '{"convention": "cam_from_world", "frames": []}', "it holds no frame"),
        ("a.tum", "", "it holds no frame"),
        ("a.tum", "0 1 2 3\n", "line 1: wanted `timestamp"),
        ("a.tum", "0 0 0 0 0 0 0 one\n", "line 1: wanted `timestamp"),
        ("missing.json", None, "no such file"),
    ],
)
def test_bad_files(processor, inputs, tmp_path, name, content, reason):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=reason):
        processor.prepare_geometry(tmp_path / name, inputs)


def test_bad_colmap(processor, inputs, tmp_path):
    names = [f"{i}.png" for i in range(TOTAL)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no cameras\.txt in this folder"):
        processor.prepare_geometry(tmp_path / "empty", inputs)
    with pytest.warns(UserWarning, match="lens distortion .* is ignored"):
        check(
            processor.prepare_geometry(write_colmap_folder(tmp_path / "bent", names, "OPENCV"), inputs), [0, 3, 5, 8]
        )
    folder = write_colmap_folder(tmp_path / "fisheye", names)
    text = (tmp_path / "fisheye" / "cameras.txt").read_text()
    (tmp_path / "fisheye" / "cameras.txt").write_text(text.replace("PINHOLE", "FOV"))
    with pytest.raises(ValueError, match="line 2: wanted one of SIMPLE_PINHOLE"):
        processor.prepare_geometry(folder, inputs)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ({"cam_from_wrold": POSES}, "did you mean 'cam_from_world'"),
        ({"cam_from_world": POSES[:, :3]}, r"shape \(frames, 4, 4\)"),
        ({"intrinsics_px": -INTRINSICS}, "frame 0 .*not a pinhole camera"),
        ({"intrinsics_px": INTRINSICS * np.nan}, "frame 0 .*not a pinhole camera"),
        (7, "wanted a cameras.json"),
    ],
)
def test_bad_arrays(processor, inputs, source, reason):
    with pytest.raises(ValueError, match=reason):
        processor.prepare_geometry(source, inputs)


def write_exports(folder, processor, inputs, is_metric):
    """What `vidllm reconstruct` writes for a video; poses `(1, S, 4, 4)` and intrinsics `(1, S, 3, 3)` of it."""
    info = inputs.video_metadata[0]
    frames, height, width = inputs["video_size_shw"][0].tolist()
    cam_from_world = torch.from_numpy(rigid(frames, seed=1)).float()[None]
    intrinsics_px = torch.tensor([[30.0, 0, 14.5], [0, 31, 13.5], [0, 0, 1]]).expand(1, frames, 3, 3)
    reconstruction = VidLLMReconstruction(
        cam_from_world=cam_from_world,
        intrinsics_px=intrinsics_px,
        depth=torch.ones(1, frames, height, width),
        depth_confidence=torch.full((1, frames, height, width), 2.0),
        points_world=torch.rand(1, frames, height, width, 3),
        scale=torch.ones(1),
        scale_valid_mask=torch.ones(1, dtype=torch.bool),
        room_from_world=torch.eye(3)[None],
        metric_mask=torch.tensor([is_metric]),
        video_size_shw=inputs["video_size_shw"],
    )
    pixels = processor.video_processor.denormalize(inputs["pixel_values_videos"])[0]
    scene = export_scene(reconstruction, pixels, info["frames_indices"], info["timestamps_s"])
    write_cameras_json(folder / "cameras.json", scene)
    write_trajectory_tum(folder / "trajectory.tum", scene)
    write_colmap_text(folder / "colmap", scene)
    return cam_from_world, intrinsics_px


@pytest.mark.parametrize("name", ["cameras.json", "trajectory.tum", "colmap"])
def test_our_own_export_reads_back(processor, video, tmp_path, name):
    """It is the geometry of that video again, in the model's pixels; without metres it is refused."""
    inputs = processor.video_processor(video)
    write_exports(tmp_path, processor, inputs, is_metric=False)
    with pytest.raises(ValueError, match=f"{name}.*: wanted metres; .*unit is 'relative'") as error:
        processor.prepare_geometry(tmp_path / name, inputs)
    assert "\n" not in str(error.value)
    cam_from_world, intrinsics_px = write_exports(tmp_path, processor, inputs, is_metric=True)
    geometry = processor.prepare_geometry(tmp_path / name, inputs)
    torch.testing.assert_close(geometry["cam_from_world"], cam_from_world, atol=1e-5, rtol=0)
    if name != "trajectory.tum":
        torch.testing.assert_close(geometry["intrinsics_px"], intrinsics_px, atol=1e-4, rtol=0)

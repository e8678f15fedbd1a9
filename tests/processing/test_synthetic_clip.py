"""The ray-cast room: its pictures, depth, poses and boxes belong together."""

import av
import numpy as np
import pytest

from vidllm.processing.synthetic_clip import synthetic_clip, write_synthetic_clip


@pytest.fixture(scope="module")
def clip():
    return synthetic_clip(num_frames=5, size_hw=(48, 66), fps=5)


def unproject(clip, frame):
    """World points (H, W, 3) of one frame, pixel by pixel rule written out."""
    height, width = clip.depth_m.shape[1:]
    v, u = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(clip.intrinsics_px[frame]).T
    world_from_cam = np.linalg.inv(clip.cam_from_world[frame])
    return (rays * clip.depth_m[frame][..., None]) @ world_from_cam[:3, :3].T + world_from_cam[:3, 3]


def test_poses_are_rigid_and_start_at_the_identity(clip):
    assert np.array_equal(clip.cam_from_world[0], np.eye(4))
    rotation = clip.cam_from_world[:, :3, :3]
    np.testing.assert_allclose(rotation @ rotation.transpose(0, 2, 1), np.tile(np.eye(3), (5, 1, 1)), atol=1e-12)
    assert np.all(np.linalg.det(rotation) > 0.99)
    assert np.linalg.norm(clip.cam_from_world[-1, :3, 3]) > 1.0
    room = clip.room_from_world
    np.testing.assert_allclose(room @ room.T, np.eye(3), atol=1e-12)
    assert room[2] @ [0, -1, 0] > 0.9  # the picture's up is the room's up
    np.testing.assert_array_equal(clip.timestamps_s, [0, 0.2, 0.4, 0.6, 0.8])


def test_depth_of_one_frame_projects_onto_the_depth_of_another(clip):
    points = unproject(clip, 1)
    cam = points @ clip.cam_from_world[2, :3, :3].T + clip.cam_from_world[2, :3, 3]
    pixel = cam @ clip.intrinsics_px[2].T
    u, v = np.rint(pixel[..., :2] / pixel[..., 2:]).astype(int).transpose(2, 0, 1)
    inside = (u >= 0) & (u < 66) & (v >= 0) & (v < 48) & (cam[..., 2] > 0)
    error = np.abs(clip.depth_m[2][v[inside], u[inside]] - cam[inside][:, 2]) / cam[inside][:, 2]
    assert inside.mean() > 0.5
    assert np.median(error) < 0.01


def test_room_frame_is_axis_aligned(clip):
    """The floor is flat in the room frame, and each box touches seen points on its faces and holds none deep outside."""
    points = np.concatenate([unproject(clip, i).reshape(-1, 3) for i in range(5)]) @ clip.room_from_world.T
    lowest = np.sort(points[:, 2])[: len(points) // 20]
    assert lowest.max() - lowest.min() < 1e-3
    assert len(clip.labels) == len(clip.boxes_room) >= 4
    for label, box in zip(clip.labels, clip.boxes_room):
        offset = np.abs(points - box[:3]) - box[3:] / 2
        on_surface = np.abs(offset.max(axis=1)) < 1e-3
        assert on_surface.sum() > 20, label


def test_objects_have_their_colour(clip):
    sofa = clip.boxes_room[clip.labels.index("sofa")]
    points = unproject(clip, 0) @ clip.room_from_world.T
    inside = np.all(np.abs(points - sofa[:3]) < sofa[3:] / 2 + 1e-3, axis=-1)
    red, green, blue = clip.frames_rgb[0][inside].mean(axis=0)
    assert inside.sum() > 20
    assert red > 2 * green
    assert red > 2 * blue


def test_same_arguments_same_bytes_and_the_file_shows_the_frames(tmp_path):
    first = write_synthetic_clip(tmp_path / "a" / "one.mp4", seconds=0.6, size_hw=(48, 66), fps=5)
    write_synthetic_clip(tmp_path / "two.mp4", seconds=0.6, size_hw=(48, 66), fps=5)
    assert (tmp_path / "a" / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()
    with av.open(str(tmp_path / "two.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == len(first.frames_rgb) == 3
    assert np.abs(np.stack(frames).astype(float) - first.frames_rgb).mean() < 8


def test_bad_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="even height"):
        write_synthetic_clip(tmp_path / "x.mp4", size_hw=(47, 66))
    assert not (tmp_path / "x.mp4").exists()
    with pytest.raises(ValueError, match="at least 1 frame"):
        synthetic_clip(num_frames=0)

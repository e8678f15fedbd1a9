"""Every export opens in the program that it is for, and says what the reconstruction says."""

import json
import sys

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from vidllm.modeling_vidllm.scene_vidllm import VidLLMReconstruction
from vidllm.processing import export as exports
from vidllm.processing import pictures
from vidllm.processing.export_meshes import corners_of_box, frustum_segments, tube_mesh
from vidllm.processing.export_scene import check_boxes, export_scene, replaced_file
from vidllm.processing.synthetic_clip import synthetic_clip


SIZE_HW = (36, 50)
ALL_FILES = {
    "cameras.json",
    "depth.npz",
    "points.ply",
    "scene.glb",
    "trajectory.tum",
    "colmap/cameras.txt",
    "colmap/images.txt",
    "colmap/points3D.txt",
    "depth.png",
    "map.png",
}


def reconstruction_of(clip, metric=True, padding=(0, 0, 0)):
    """Ground truth of a clip in row 1 of a batch of two; row 0 is something else; `padding` adds frames, rows, columns of junk."""
    frames, height, width = clip.depth_m.shape
    v, u = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    points = np.empty((frames, height, width, 3))
    for s in range(frames):
        rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(clip.intrinsics_px[s]).T
        world_from_cam = np.linalg.inv(clip.cam_from_world[s])
        points[s] = (rays * clip.depth_m[s][..., None]) @ world_from_cam[:3, :3].T + world_from_cam[:3, 3]
    confidence = 1 + np.random.default_rng(3).random((frames, height, width))

    def rows(value, pad_axes):
        value = torch.tensor(np.asarray(value), dtype=torch.float32)
        pads = [0, 0] * (value.ndim - pad_axes)
        for axis in reversed(range(pad_axes)):
            pads += [0, padding[axis]]
        value = torch.nn.functional.pad(value, pads, value=77.0)
        return torch.stack([value + 5, value])

    return VidLLMReconstruction(
        cam_from_world=rows(clip.cam_from_world, 1),
        intrinsics_px=rows(clip.intrinsics_px, 1),
        depth=rows(clip.depth_m, 3),
        depth_confidence=rows(confidence, 3),
        points_world=rows(points, 3),
        room_from_world=rows(clip.room_from_world, 0),
        metric_mask=torch.tensor([not metric, metric]),
        video_size_shw=torch.tensor([[2, 3, 4], [frames, height, width]]),
    )


@pytest.fixture(scope="module")
def clip():
    return synthetic_clip(num_frames=4, size_hw=SIZE_HW, fps=2)


@pytest.fixture(scope="module")
def boxes(clip):
    return [(label, box, 0.5) for label, box in zip(clip.labels, clip.boxes_room)] + [
        ("sofa", clip.boxes_room[3], None)
    ]


@pytest.fixture(scope="module")
def scene(clip, boxes):
    return export_scene(reconstruction_of(clip), clip.frames_rgb, [0, 3, 6, 9], clip.timestamps_s, boxes, row=1)


@pytest.fixture(scope="module")
def exported(clip, boxes, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "deep" / "er"
    paths = exports.export_reconstruction(
        out, reconstruction_of(clip), clip.frames_rgb, [0, 3, 6, 9], clip.timestamps_s, boxes, row=1
    )
    return out, paths


def files_in(folder):
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and "colmap/images/" not in str(path)
    }


# ---------------------------------------------------------------- the scene


def test_padding_is_cut_and_changes_nothing(clip, scene):
    padded = export_scene(reconstruction_of(clip, padding=(2, 5, 7)), clip.frames_rgb, row=1)
    for name in ("cam_from_world", "intrinsics_px", "depth", "depth_confidence", "points_world", "valid_mask"):
        assert np.array_equal(getattr(padded, name), getattr(scene, name)), name


def test_invalid_pixels_are_masked_and_zero(clip):
    recon = reconstruction_of(clip)
    recon.depth[1, 0, 0, 0] = 0
    recon.depth[1, 0, 0, 1] = torch.nan
    recon.points_world[1, 0, 0, 2, 1] = torch.inf
    recon.depth_confidence[1, 0, 0, 3] = torch.nan
    scene = export_scene(recon, clip.frames_rgb, row=1)
    assert not scene.valid_mask[0, 0, :4].any()
    assert scene.valid_mask.sum() == scene.valid_mask.size - 4
    assert not scene.depth[0, 0, :4].any()
    assert np.isfinite(scene.points_world).all()


def test_point_selection_keeps_the_surest_and_is_repeatable(scene):
    confidence = scene.depth_confidence.reshape(-1)
    kept = scene.select_points(0.7)
    dropped = np.setdiff1d(np.arange(confidence.size), kept)
    assert abs(len(kept) / confidence.size - 0.7) < 0.001
    assert confidence[kept].min() > confidence[dropped].max()
    few = scene.select_points(0.7, 100)
    assert len(few) == 100
    assert set(few) <= set(kept)
    assert np.array_equal(few, scene.select_points(0.7, 100))
    assert len(scene.select_points(1.0)) == confidence.size
    for bad in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="keep_fraction"):
            scene.select_points(bad)


def test_constant_confidence_drops_nothing(clip):
    recon = reconstruction_of(clip)
    recon.depth_confidence[:] = 1.0
    scene = export_scene(recon, clip.frames_rgb, row=1)
    assert len(scene.select_points(0.3)) == scene.valid_mask.sum()


def test_mistakes_are_named(clip, tmp_path):
    recon = reconstruction_of(clip)
    with pytest.raises(ValueError, match="frames_rgb"):
        export_scene(recon, clip.frames_rgb[:, :-1], row=1)
    with pytest.raises(ValueError, match="frames_rgb"):
        export_scene(recon, clip.frames_rgb / 255.0, row=1)
    with pytest.raises(ValueError, match="timestamps_s"):
        export_scene(recon, clip.frames_rgb, timestamps_s=[0.0], row=1)
    with pytest.raises(ValueError, match=r"row: wanted 0\.\.1; got 2"):
        export_scene(recon, clip.frames_rgb, row=2)
    with pytest.raises(ValueError, match=r"box 0 \('chair'\)"):
        check_boxes([("chair", [0, 0, 0, 1, 1, -1], 0.5)])
    with pytest.raises(ValueError, match="6 finite"):
        check_boxes([("chair", [0, 0, 0, 1, 1, float("nan")], 0.5)])
    recon.cam_from_world[1, 2, 0, 3] = torch.nan
    with pytest.raises(ValueError, match=r"frame 2 \(source frame 20\)"):
        export_scene(recon, clip.frames_rgb, [0, 10, 20, 30], row=1)
    taken = tmp_path / "taken"
    taken.write_text("a file")
    with pytest.raises(ValueError, match="taken"):
        exports.export_reconstruction(taken, recon, clip.frames_rgb, row=1)
    with pytest.raises(ValueError, match="taken"):
        exports.check_export(taken / "below")


def test_missing_libraries_name_the_extra(monkeypatch, scene, tmp_path):
    for module in ("trimesh", "matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"vidllm\[export\]"):
        exports.write_scene_glb(tmp_path / "x.glb", scene)
    with pytest.raises(ImportError, match=r"vidllm\[export\]"):
        exports.write_depth_png(tmp_path / "x.png", scene)
    monkeypatch.setattr(exports, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"trimesh and matplotlib.*vidllm\[export\]"):
        exports.check_export(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "kept.txt"
    target.write_text("old")

    def write_and_fail():
        with replaced_file(target) as partial:
            partial.write_text("half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_and_fail()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
    with replaced_file(target) as partial:
        partial.write_text("new")
    assert target.read_text() == "new"
    other = tmp_path / "plain"
    other.touch()
    assert target.stat().st_mode == other.stat().st_mode


# ---------------------------------------------------------------- the files


def test_everything_is_written_once(exported):
    out, paths = exported
    assert files_in(out) == ALL_FILES | {"boxes.png"}
    assert all(path.exists() for path in paths.values())
    assert {path.name for path in paths.values()} == {name.split("/")[0] for name in ALL_FILES} | {"boxes.png"}


def test_cameras_json_reads_back_to_the_same_bits(exported, clip):
    document = json.loads((exported[0] / "cameras.json").read_text())
    assert document["convention"] == "cam_from_world, OpenCV axes (x right, y down, z forward)"
    assert (document["unit"], document["width"], document["height"]) == ("m", 50, 36)
    recon = reconstruction_of(clip)
    poses = np.float32([frame["cam_from_world"] for frame in document["frames"]])
    assert np.array_equal(poses, recon.cam_from_world[1].numpy())
    assert np.array_equal(np.float32([f["intrinsics_px"] for f in document["frames"]]), recon.intrinsics_px[1].numpy())
    assert np.array_equal(np.float32(document["room_from_world"]), recon.room_from_world[1].numpy())
    assert [frame["index"] for frame in document["frames"]] == [0, 3, 6, 9]
    assert [frame["timestamp_s"] for frame in document["frames"]] == [0, 0.5, 1.0, 1.5]


def test_depth_npz(exported, clip):
    with np.load(exported[0] / "depth.npz") as file:
        assert file["depth"].dtype == file["confidence"].dtype == np.float32
        assert np.array_equal(file["depth"], clip.depth_m)
        assert file["confidence"].shape == clip.depth_m.shape
        assert str(file["unit"]) == "m"


def test_ply_opens_with_colours_in_the_room_frame(exported, scene):
    path = exported[0] / "points.ply"
    header = path.read_bytes().split(b"end_header")[0].decode()
    assert "comment frame: room (z up" in header
    assert "comment unit: m" in header
    cloud = trimesh.load(path)
    index = scene.select_points(0.8)
    points, colours = scene.points_and_colours(index)
    np.testing.assert_allclose(cloud.vertices, points, atol=1e-6)
    assert np.array_equal(cloud.colors[:, :3], colours)
    floor = np.sort(cloud.vertices[:, 2])[: len(points) // 20]
    assert np.ptp(floor) < 1e-3  # z is up: the floor is flat


def test_ply_in_the_world_frame(scene, tmp_path):
    exports.write_points_ply(tmp_path / "w.ply", scene, keep_fraction=1.0, max_points=None, frame="world")
    cloud = trimesh.load(tmp_path / "w.ply")
    np.testing.assert_allclose(cloud.vertices, scene.points_world.reshape(-1, 3), atol=1e-6)
    assert b"comment frame: world" in (tmp_path / "w.ply").read_bytes()
    with pytest.raises(ValueError, match="'room' or 'world'"):
        exports.write_points_ply(tmp_path / "w.ply", scene, frame="annotation")


def test_glb_has_named_nodes_and_is_y_up(exported, scene, clip):
    glb = trimesh.load(exported[0] / "scene.glb")
    names = set(glb.graph.nodes_geometry)
    cameras = {f"camera_{number:06d}" for number in (0, 3, 6, 9)}
    assert names == {"points", "camera_path", *cameras, *clip.labels, "sofa_2"}
    assert glb.metadata["unit"] == "m"

    def bounds(name):
        matrix, geometry = glb.graph[name]
        return trimesh.transform_points(glb.geometry[geometry].vertices, matrix)

    # The box's cage, carried by the node's transform: glTF (x, y up, z) is room (x, z, -y).
    cage = bounds("bed")
    room = np.stack([cage[:, 0], -cage[:, 2], cage[:, 1]], axis=1)
    box = clip.boxes_room[clip.labels.index("bed")]
    slack = 0.01 * scene.diagonal()
    np.testing.assert_allclose(room.min(axis=0), box[:3] - box[3:] / 2, atol=slack)
    np.testing.assert_allclose(room.max(axis=0), box[:3] + box[3:] / 2, atol=slack)
    # The first camera stands in the origin.
    assert np.abs(bounds("camera_000000")).min(axis=0).max() < slack
    assert np.linalg.norm(np.median(bounds("camera_000009"), axis=0) - np.median(bounds("camera_000000"), axis=0)) > 2


def test_frustum_surrounds_what_the_camera_sees(scene):
    ends = frustum_segments(scene, 2, 1.0).reshape(-1, 3)
    pose = scene.room_from_cam[2]
    cam = (ends - pose[:3, 3]) @ pose[:3, :3]
    corners = cam[np.isclose(cam[:, 2], 1.0)] @ scene.intrinsics_px[2].T
    assert np.isclose(corners[:, 0].min(), -0.5, atol=1e-4)
    assert np.isclose(corners[:, 0].max(), SIZE_HW[1] - 0.5, atol=1e-4)
    assert np.isclose(corners[:, 1].max(), SIZE_HW[0] - 0.5, atol=1e-4)
    assert corners[:, 1].min() < -0.5  # the tick shows which way is up


def test_tubes_are_closed_and_face_outwards():
    segments = np.random.default_rng(0).normal(size=(5, 2, 3))
    vertices, faces = tube_mesh(np.concatenate([segments, np.zeros((1, 2, 3))]), 0.01)
    for mesh in trimesh.Trimesh(vertices, faces, process=False).split(only_watertight=False):
        assert mesh.is_watertight
        assert mesh.volume > 0
    total = trimesh.Trimesh(vertices, faces, process=False).volume
    hexagon = 6 * np.sin(np.pi / 3) / 2 * 0.01**2
    assert np.isclose(total, hexagon * np.linalg.norm(segments[:, 1] - segments[:, 0], axis=1).sum())


def test_tum_opens_in_evo(exported, scene):
    from evo.tools import file_interface

    trajectory = file_interface.read_tum_trajectory_file(str(exported[0] / "trajectory.tum"))
    np.testing.assert_allclose(trajectory.timestamps, [0, 0.5, 1.0, 1.5])
    np.testing.assert_allclose(np.array(trajectory.poses_se3), np.linalg.inv(scene.cam_from_world), atol=1e-5)


def read_colmap(folder):
    """Plain reader of the three text files."""

    def lines(name):
        return [line for line in (folder / name).read_text().splitlines() if not line.startswith("#")]

    cameras = {int(row[0]): row[1:] for row in (line.split() for line in lines("cameras.txt"))}
    rows = lines("images.txt")
    assert len(rows) % 2 == 0
    assert not any(rows[1::2])
    points = np.array([line.split() for line in lines("points3D.txt")], dtype=float)
    return cameras, [line.split() for line in rows[::2]], points


def test_colmap_projects_its_own_points_onto_their_colours(exported, scene):
    """With COLMAP's conventions alone (wxyz, pixel centres at .5), a point lands on the pixel that it came from."""
    cameras, images, points = read_colmap(exported[0] / "colmap")
    assert list(cameras) == [1]  # equal intrinsics share a camera
    model, width, height, *params = cameras[1]
    assert (model, width, height) == ("PINHOLE", "50", "36")
    fx, fy, cx, cy = map(float, params)
    index = scene.select_points(0.8, 100_000)
    assert points.shape == (len(index), 8)
    frame, row, column = np.unravel_index(index, scene.depth.shape)
    for number, image in enumerate(images):
        image_id, w, x, y, z, *translation, camera, name = image
        assert (int(image_id), camera) == (number + 1, "1")
        picture = np.asarray(Image.open(exported[0] / "colmap" / "images" / name))
        assert np.array_equal(picture, scene.frames_rgb[number])
        q = np.array([w, x, y, z], float)
        rotation = trimesh.transformations.quaternion_matrix(q)[:3, :3]
        mine = points[frame == number]
        cam = mine[:, 1:4] @ rotation.T + np.array(translation, float)
        u, v = fx * cam[:, 0] / cam[:, 2] + cx, fy * cam[:, 1] / cam[:, 2] + cy
        np.testing.assert_allclose(u, column[frame == number] + 0.5, atol=1e-3)
        np.testing.assert_allclose(v, row[frame == number] + 0.5, atol=1e-3)
        seen = picture[np.floor(v).astype(int), np.floor(u).astype(int)]
        assert np.array_equal(seen, mine[:, 4:7])


def test_colmap_writes_a_camera_per_frame_where_they_differ(clip, tmp_path):
    recon = reconstruction_of(clip)
    recon.intrinsics_px[1, 2, 0, 0] += 1
    exports.write_colmap_text(tmp_path, export_scene(recon, clip.frames_rgb, row=1), max_points=10)
    cameras, images, points = read_colmap(tmp_path)
    assert list(cameras) == [1, 2, 3, 4]
    assert [image[8] for image in images] == ["1", "2", "3", "4"]
    assert float(cameras[3][3]) - float(cameras[1][3]) == pytest.approx(1, abs=1e-5)
    assert len(points) == 10


def test_quaternions_near_half_turns():
    from scipy.spatial.transform import Rotation

    axes = np.random.default_rng(1).normal(size=(60, 3))
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    axes[:3] = np.eye(3)
    for angle in (0.0, 1e-7, 1.0, np.pi - 1e-7, np.pi):
        matrices = Rotation.from_rotvec(angle * axes).as_matrix()
        quats = exports.quat_xyzw_from_rotations(matrices)
        np.testing.assert_allclose(Rotation.from_quat(quats).as_matrix(), matrices, atol=1e-9)
        assert (quats[:, 3] >= 0).all()


# ---------------------------------------------------------------- pictures


def test_pictures_are_pictures(exported):
    for name in ("depth.png", "map.png", "boxes.png"):
        picture = np.asarray(Image.open(exported[0] / name).convert("RGB"))
        assert min(picture.shape[:2]) > 200, name
        assert len(np.unique(picture[::4, ::4].reshape(-1, 3) @ [1, 256, 65536])) > 300, name


def test_map_shows_the_bed_where_it_is(scene):
    """The top view's cell at the bed's centre has the bed's colour, row 0 at the smallest y."""
    points, colours = scene.points_and_colours(scene.select_points(0.8))
    low, high = points[:, :2].min(axis=0), points[:, :2].max(axis=0)
    view = pictures._top_view(points, colours, low, high)
    edge = (high - low).max() / max(view.shape[:2])
    for label, channel in (("sofa", 0), ("bin", 1)):
        box = dict(zip([box.label for box in scene.boxes[:-1]], [box.box_room for box in scene.boxes]))[label]
        column, row = ((np.array(box[:2]) - low) / edge).astype(int)
        patch = view[max(row - 1, 0) : row + 2, column - 1 : column + 2].reshape(-1, 4)
        patch = patch[patch[:, 3] > 0][:, :3].astype(float)
        assert len(patch), label
        assert np.delete(patch, channel, axis=1).max(axis=1).mean() < patch[:, channel].mean(), label


def test_ceiling_is_left_out():
    rng = np.random.default_rng(0)
    floor, ceiling = (
        rng.random((500, 3)) * [4, 4, 0.5] - [0, 0, 1.5],
        rng.random((400, 3)) * [4, 4, 0.01] + [0, 0, 1.2],
    )
    shown = pictures._below_ceiling(np.concatenate([floor, ceiling]), np.array([0.0, 0.1]))
    assert shown[:500].all()
    assert not shown[500:].any()
    assert pictures._below_ceiling(ceiling, np.array([0.0])).all()


def test_labels_keep_apart():
    rng = np.random.default_rng(2)
    anchors = rng.random((9, 2)) * 60 + 200
    anchors[4] = anchors[3]
    sizes = np.stack([rng.integers(40, 120, 9), np.full(9, 16)], axis=1).astype(float)
    centres = pictures.place_labels(anchors, sizes, (0, 0, 500, 400))
    for a in range(9):
        assert (centres[a] - sizes[a] / 2 >= -1e-9).all()
        assert (centres[a] + sizes[a] / 2 <= np.array([500, 400]) + 1e-9).all()
        for b in range(a):
            assert (np.abs(centres[a] - centres[b]) >= (sizes[a] + sizes[b]) / 2).any(), (a, b)


def test_near_plane_clipping_equals_dense_sampling():
    """Points sampled densely on each segment: exactly those with z >= near lie on the clipped segment."""
    segments = np.random.default_rng(5).normal(size=(40, 2, 3))
    near = 0.3
    clipped = pictures.clip_segments_near(segments, near)
    assert len(clipped) == ((segments[:, :, 2] >= near).any(axis=1)).sum()
    assert (clipped[:, :, 2] >= near - 1e-12).all()
    for original, cut in zip(segments[(segments[:, :, 2] >= near).any(axis=1)], clipped):
        samples = original[0] + np.linspace(0, 1, 2001)[:, None] * (original[1] - original[0])
        kept = (samples[:, 2] >= near).mean()
        share = np.linalg.norm(cut[1] - cut[0]) / np.linalg.norm(original[1] - original[0])
        assert abs(kept - share) < 2e-3


def test_rectangle_clipping_equals_dense_sampling():
    segments = np.random.default_rng(6).normal(size=(60, 2, 2)) * 2
    segments[0] = [[-3, 0.2], [3, 0.2]]
    segments[1] = [[0.5, -9], [0.5, 9]]
    segments[2] = [[-3, 7], [3, 7]]
    low, high = np.array([-1, -0.5]), np.array([1.5, 1])
    total = 0.0
    for segment in segments:
        samples = segment[0] + np.linspace(0, 1, 4001)[:, None] * (segment[1] - segment[0])
        share = ((samples >= low) & (samples <= high)).all(axis=1).mean()
        cut = pictures.clip_segments_rectangle(segment[None], low, high)
        length = np.linalg.norm(cut[:, 1] - cut[:, 0], axis=1).sum() / np.linalg.norm(segment[1] - segment[0])
        assert abs(length - share) < 2e-3
        total += length
    assert total > 3


def test_box_around_the_camera_is_drawn_without_wild_lines(scene):
    """A box that holds the camera has corners behind it; what is drawn stays in the picture."""
    for box in ((0, 0, 0, 1, 1, 1), (0, 0, 0, 6, 6, 3)):
        segments = pictures.box_segments_px(scene, 0, box)
        assert np.isfinite(segments).all()
        assert (segments >= -0.5).all()
        assert (segments <= np.array(SIZE_HW[::-1]) - 0.5).all()
    behind = scene.room_from_cam[0, :3, 3] - 2 * scene.room_from_cam[0, :3, 2]
    assert not len(pictures.box_segments_px(scene, 0, (*behind, 0.5, 0.5, 0.5)))


def test_projected_box_meets_the_pixels_of_its_object(scene):
    """In front of the camera and unclipped, the wireframe's hull is the hull of the eight projected corners."""
    number = [box.label for box in scene.boxes].index("cabinet")
    corners = corners_of_box(scene.boxes[number].box_room) @ scene.room_from_world
    cam = corners @ scene.cam_from_world[0, :3, :3].T + scene.cam_from_world[0, :3, 3]
    pixel = cam @ scene.intrinsics_px[0].T
    pixel = pixel[:, :2] / pixel[:, 2:]
    ends = pictures.box_segments_px(scene, 0, scene.boxes[number].box_room).reshape(-1, 2)
    np.testing.assert_allclose(ends.min(axis=0), pixel.min(axis=0), atol=1e-3)
    np.testing.assert_allclose(ends.max(axis=0), pixel.max(axis=0), atol=1e-3)


def test_frames_are_chosen_where_the_box_is_seen(scene):
    only = [box for box in scene.boxes if box.label == "stool"]
    chosen = pictures.choose_frames(scene, tuple(only), 1)
    assert len(pictures.box_segments_px(scene, chosen[0], only[0].box_room))
    assert pictures.choose_frames(scene, (), 3) == pictures.spread(4, 3)
    assert pictures.spread(32, 8)[-1] == 31
    assert len(pictures.spread(32, 8)) == 8
    assert pictures.spread(1, 8) == [0]


# ---------------------------------------------------------------- odd scenes


@pytest.mark.parametrize("kind", ["one frame", "no valid pixel", "relative", "flat depth", "no timestamps"])
def test_odd_scenes_give_valid_files(clip, boxes, tmp_path, kind):
    recon, frames = reconstruction_of(clip, metric=kind != "relative"), clip.frames_rgb
    times, few = clip.timestamps_s, boxes[:2]
    if kind == "one frame":
        for name in ("cam_from_world", "intrinsics_px", "depth", "depth_confidence", "points_world"):
            setattr(recon, name, getattr(recon, name)[:, :1])
        recon.video_size_shw[1, 0] = 1
        frames, times, few = frames[:1], times[:1], None
    elif kind == "no valid pixel":
        recon.depth[:] = 0
    elif kind == "flat depth":
        recon.depth[:] = 1.0
        recon.points_world[:] = recon.points_world[1, 0, 0, 0]
    elif kind == "no timestamps":
        times = None
    # A second run over the first one's files replaces them.
    for _ in range(2):
        exports.export_reconstruction(tmp_path, recon, frames, timestamps_s=times, boxes=few, row=1)
    assert files_in(tmp_path) == ALL_FILES | ({"boxes.png"} if few else set())
    unit = "relative" if kind == "relative" else "m"
    assert json.loads((tmp_path / "cameras.json").read_text())["unit"] == unit
    assert f"unit: {unit}" in (tmp_path / "points.ply").read_bytes()[:300].decode("latin-1")
    assert f"unit {unit}" in (tmp_path / "trajectory.tum").read_text()
    assert f"unit {unit}" in (tmp_path / "colmap" / "images.txt").read_text()
    with np.load(tmp_path / "depth.npz") as file:
        assert str(file["unit"]) == unit
    glb = trimesh.load(tmp_path / "scene.glb")
    assert glb.metadata["unit"] == unit
    assert ("points" in glb.graph.nodes_geometry) == (kind != "no valid pixel")
    assert "camera_000000" in glb.graph.nodes_geometry
    from evo.tools import file_interface

    expected = len(frames)
    assert file_interface.read_tum_trajectory_file(str(tmp_path / "trajectory.tum")).num_poses == expected
    header = (tmp_path / "points.ply").read_bytes().split(b"end_header")[0].decode()
    assert ("element vertex 0" in header) == (kind == "no valid pixel")
    for name in ("depth.png", "map.png"):
        Image.open(tmp_path / name).load()

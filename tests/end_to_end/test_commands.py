"""The commands on real videos and photographs with an untrained nano checkpoint; every export opens in the program it is for."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from vidllm.cli import app
from vidllm.train.initialise import initialise


EXPORTS = {"cameras.json", "depth.npz", "points.ply", "scene.glb", "trajectory.tum", "colmap", "depth.png", "map.png"}


@pytest.fixture(scope="session")
def realdata(repository):
    """Real videos, which are not part of the repository."""
    folder = repository.parent / "shared" / "realdata"
    if not folder.is_dir():
        pytest.skip("no real data beside the repository")
    return folder


@pytest.fixture(scope="session")
def nano(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano") / "model"
    initialise("vidllm-nano", folder)
    return folder


def run(*arguments):
    """The JSON document of one command in this process, and what it said on stderr."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), result.stderr


def check_exports(folder: Path, num_frames: int) -> None:
    """Open every file with the program that people will open it with."""
    import trimesh
    from evo.tools.file_interface import read_tum_trajectory_file
    from PIL import Image

    assert {path.name for path in folder.iterdir()} >= EXPORTS
    cameras = json.loads((folder / "cameras.json").read_text())
    assert len(cameras["frames"]) == num_frames
    world_from_cam = np.linalg.inv([frame["cam_from_world"] for frame in cameras["frames"]])

    mesh = trimesh.load(folder / "scene.glb")
    assert mesh.geometry
    assert np.isfinite(mesh.bounds).all()
    points = trimesh.load(folder / "points.ply")
    assert len(points.vertices) > 0

    trajectory = read_tum_trajectory_file(folder / "trajectory.tum")
    assert trajectory.num_poses == num_frames
    assert trajectory.check()[0], trajectory.check()[1]
    assert np.allclose(trajectory.positions_xyz, world_from_cam[:, :3, 3], atol=1e-5)
    assert np.allclose([pose[:3, :3] for pose in trajectory.poses_se3], world_from_cam[:, :3, :3], atol=1e-5)

    check_colmap(folder / "colmap", cameras)
    depth = np.load(folder / "depth.npz")["depth"]
    assert depth.shape == (num_frames, cameras["height"], cameras["width"])
    for name in ("depth.png", "map.png"):
        with Image.open(folder / name) as picture:
            picture.load()
            assert min(picture.size) > 200


def check_colmap(folder: Path, cameras: dict) -> None:
    """Parse the text model as COLMAP's documentation describes it."""
    rows = {
        name: [line for line in (folder / f"{name}.txt").read_text().splitlines() if not line.startswith("#")]
        for name in ("cameras", "images", "points3D")
    }
    models = {int(line.split()[0]): line.split() for line in rows["cameras"]}
    assert len(rows["images"]) == 2 * len(cameras["frames"])
    for line, frame in zip(rows["images"][::2], cameras["frames"], strict=True):
        _, qw, qx, qy, qz, tx, ty, tz, camera_id, name = line.split()
        assert (folder / "images" / name).is_file()
        assert np.allclose([float(tx), float(ty), float(tz)], np.array(frame["cam_from_world"])[:3, 3], atol=1e-5)
        assert abs(sum(float(value) ** 2 for value in (qw, qx, qy, qz)) - 1) < 1e-6
        _, model, width, height, fx, *_ = models[int(camera_id)]
        assert (model, int(width), int(height)) == ("PINHOLE", cameras["width"], cameras["height"])
        assert float(fx) == pytest.approx(frame["intrinsics_px"][0][0], rel=1e-6)
    assert all(len(line.split()) == 8 for line in rows["points3D"])


def check_everything(source: Path, model: Path, out: Path, num_frames: int, *more) -> str:
    """ask, ground, caption and reconstruct on one source; what they said on stderr."""
    common = ["--model", model, *more]
    asked, said = run("ask", source, "How many chairs are there?", "What is on the desk?", *common)
    assert len(asked["answers"]) == 2
    assert len(asked["frames"]) == num_frames
    assert asked["unit"] == "relative"
    assert asked["untrained"]
    grounded, _ = run("ground", source, "the chair", *common, "--out", out / "ground", "--draw", out / "drawn.png")
    assert grounded["boxes"]
    assert np.isfinite([box["box"] for box in grounded["boxes"]]).all()
    assert (out / "drawn.png").is_file()
    assert (out / "drawn_map.png").is_file()
    check_exports(out / "ground", num_frames)
    place = grounded["boxes"][0]["box"][:3]
    captioned, _ = run("caption", source, "--point", *place, *common)
    assert np.allclose(captioned["point_room"], place, atol=1e-5)
    summary, _ = run("reconstruct", source, "--out", out / "recon", *common)
    assert len(summary["frames"]) == num_frames
    check_exports(out / "recon", num_frames)
    return said


def test_phone_video(realdata, nano, tmp_path):
    said = check_everything(realdata / "clips" / "room.mp4", nano, tmp_path, 3, "--frames", 3)
    assert "untrained weights" in said
    assert "geometry needs motion" not in said


@pytest.mark.slow
def test_phone_video_with_all_its_frames(realdata, nano, tmp_path):
    check_everything(realdata / "clips" / "room.mp4", nano, tmp_path, 8)


@pytest.mark.slow
def test_folder_of_timed_images(realdata, nano, tmp_path):
    check_everything(realdata / "tum_office", nano, tmp_path, 8)
    # File names are times in seconds, so a trajectory with the same clock can be given.
    times = sorted(float(path.stem) for path in (realdata / "tum_office").glob("*.png"))
    poses = tmp_path / "poses.tum"
    poses.write_text("".join(f"{time:.6f} {0.1 * index} 0 0 0 0 0 1\n" for index, time in enumerate(times)))
    summary, _ = run(
        "reconstruct", realdata / "tum_office", "--out", tmp_path / "given", "--model", nano, "--geometry", poses
    )
    assert summary["unit"] == "m"
    assert summary["path_length"] == pytest.approx(0.1 * (len(times) - 1), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("photo", ["01_HouseIndoor.jpg", "02_Office.jpg"])
def test_photograph(photo, realdata, nano, tmp_path):
    said = check_everything(realdata / "moge_indoor" / photo, nano, tmp_path, 1)
    assert "geometry needs motion" in said


def test_init_as_a_process(tmp_path):
    command = [sys.executable, "-c", "from vidllm.cli import main; main()"]
    made = subprocess.run(
        [*command, "init", "vidllm-nano", "--out", str(tmp_path / "nano")], capture_output=True, text=True, check=True
    )
    assert "untrained weights" in made.stderr


def test_with_true_geometry_pixels_lie_in_the_true_boxes(nano, tmp_path):
    """Decoding, resizing, given geometry, encoding, room frame and pictures, checked against a clip whose truth is known."""
    import torch

    from vidllm import commands, exporting
    from vidllm.processing.export_scene import LabelledBox
    from vidllm.processing.synthetic_clip import write_synthetic_clip

    truth = write_synthetic_clip(tmp_path / "room.mp4", seconds=0.75)
    model, processor = commands.load(nano)
    inputs = commands.read_video(processor, str(tmp_path / "room.mp4"), 4)
    arrays = {"cam_from_world": truth.cam_from_world, "intrinsics_px": truth.intrinsics_px, "depth_m": truth.depth_m}
    geometry = processor.prepare_geometry(arrays, inputs)
    geometry["room_from_world"] = torch.tensor(truth.room_from_world, dtype=torch.float32)[None]
    scene = commands.encode(model, inputs, geometry)
    assert scene.reconstruction.unit == "m"

    centres = truth.boxes_room[:, :3] @ truth.room_from_world  # room -> world: R^T x, for rows
    num_checked = 0
    frames = inputs.video_metadata[0]["frames_indices"]
    for position, index in enumerate(frames):
        intrinsics_px = scene.reconstruction.intrinsics_px[0, position].double().numpy()
        _, height, width = scene.reconstruction.video_size_shw[0].tolist()
        cameras = centres @ truth.cam_from_world[index, :3, :3].T + truth.cam_from_world[index, :3, 3]
        for label, camera, box in zip(truth.labels, cameras, truth.boxes_room, strict=True):
            u, v, depth = intrinsics_px @ camera
            if depth < 0.3 or not (2 < u / depth < width - 3 and 2 < v / depth < height - 3):
                continue
            found = scene.point_at(position, u / depth, v / depth, frame_of="room").double().numpy()
            # What is seen there is the object itself, or something before it; tables are open below.
            if label != "table" and np.linalg.norm(found) > np.linalg.norm(box[:3]) - np.linalg.norm(box[3:]) / 2:
                assert (np.abs(found - box[:3]) <= box[3:] / 2 + 0.06).all(), (label, index, found, box)
                num_checked += 1
    assert num_checked >= 6

    boxes = [LabelledBox(label, tuple(box)) for label, box in zip(truth.labels, truth.boxes_room, strict=True)]
    plain = exporting.plain_scene(processor, inputs, scene.reconstruction, boxes)
    for path in exporting.draw(exporting.drawing_paths(tmp_path), plain):
        assert path.is_file()

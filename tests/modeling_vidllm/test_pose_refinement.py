"""Poses made exact against the pictures: on a scene that is known everywhere, and inside the model."""

import pytest
import torch

from vidllm.modeling_vidllm import pose_refinement_vidllm as refinement
from vidllm.modeling_vidllm.geometry_vidllm import unproject_depth
from vidllm.modeling_vidllm.pose_refinement_vidllm import refine_poses
from vidllm.train.initialise import build_untrained
from vidllm.train.presets import PRESETS

from .filmed_room import SIZES, away, filmed_scene, motion


@pytest.fixture(scope="module")
def scene():
    return filmed_scene()


def test_poses_become_those_of_the_film(scene):
    given, true = scene
    before = away(given["cam_from_world"], true)
    poses, changed = refine_poses(**given, sizes=SIZES, steps=10)
    after = away(poses, true)
    assert before[0] > 3
    assert before[1] > 0.1
    assert after[0] < 0.1
    assert after[1] < 0.005
    assert changed.all()
    assert torch.equal(poses[:, 0], torch.eye(4).expand(2, 4, 4))
    rotations = poses[..., :3, :3]
    torch.testing.assert_close(rotations @ rotations.mT, torch.eye(3).expand_as(rotations), atol=1e-5, rtol=0)
    # each video for itself
    for row in range(2):
        alone, _ = refine_poses(**{name: value[row : row + 1] for name, value in given.items()}, sizes=SIZES, steps=10)
        torch.testing.assert_close(alone[0], poses[row], atol=1e-4, rtol=1e-4)


def test_a_small_picture_brings_most_of_it(scene):
    given, true = scene
    poses, _ = refine_poses(**given, sizes=(12, 24))
    assert away(poses, true)[0] < 0.3 * away(given["cam_from_world"], true)[0]


def test_true_poses_stay(scene):
    given, true = scene
    poses, _ = refine_poses(**{**given, "cam_from_world": true}, sizes=SIZES)
    assert away(poses, true)[0] < 0.1
    assert away(poses, true)[1] < 0.005


def test_units_and_exposure_do_not_matter(scene):
    given, _ = scene
    poses, _ = refine_poses(**given, sizes=SIZES)
    larger = given["cam_from_world"].clone()
    larger[..., :3, 3] *= 7.5
    scaled, _ = refine_poses(**{**given, "depth": given["depth"] * 7.5, "cam_from_world": larger}, sizes=SIZES)
    torch.testing.assert_close(scaled[..., :3, 3], poses[..., :3, 3] * 7.5, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(scaled[..., :3, :3], poses[..., :3, :3], atol=2e-4, rtol=0)
    normalised, _ = refine_poses(**{**given, "frames": given["frames"] * 4.4 - 2.1}, sizes=SIZES)
    torch.testing.assert_close(normalised, poses, atol=1e-3, rtol=0)
    exposed = given["frames"] + torch.tensor([0.0, 0.08, -0.05]).view(1, 3, 1, 1, 1)
    brighter, _ = refine_poses(**{**given, "frames": exposed}, sizes=SIZES)
    torch.testing.assert_close(brighter, poses, atol=5e-3, rtol=0)


def test_unknown_depth_is_left_out(scene):
    given, true = scene
    depth = given["depth"].clone()
    depth[:, :, :20, :30] = 0
    depth[:, 1, 30:] = float("nan")
    poses, changed = refine_poses(**{**given, "depth": depth}, sizes=SIZES, steps=10)
    assert torch.isfinite(poses).all()
    assert changed.all()
    assert away(poses, true)[0] < 0.5
    nothing, changed = refine_poses(**{**given, "depth": torch.zeros_like(depth)}, sizes=SIZES)
    assert torch.equal(nothing, given["cam_from_world"])
    assert not changed.any()


def test_what_cannot_be_judged_stays(scene):
    given, _ = scene
    flat, changed = refine_poses(**{**given, "frames": torch.full_like(given["frames"], 0.4)}, sizes=SIZES)
    assert torch.equal(flat, given["cam_from_world"])
    assert not changed.any()
    one = {name: value[:, :1] for name, value in given.items()}
    poses, changed = refine_poses(**one, sizes=SIZES)
    assert torch.equal(poses, one["cam_from_world"])
    assert not changed.any()
    # frames that share nothing
    behind = given["cam_from_world"].clone()
    behind[:, 1:] = torch.diag(torch.tensor([-1.0, 1.0, -1.0, 1.0])) @ behind[:, 1:]
    poses, _ = refine_poses(**{**given, "cam_from_world": behind}, sizes=SIZES)
    assert torch.isfinite(poses).all()


def test_a_video_that_ends_less_alike_keeps_its_poses(scene, monkeypatch):
    """Steps that lead astray are noticed by what the frames look like afterwards."""
    given, true = scene
    astray = motion(0.0, 0.08, 0.0, 0.1, 0.0, 0.0)
    monkeypatch.setattr(
        refinement, "_step", lambda view, poses, pairs: torch.cat([poses[:, :1], astray @ poses[:, 1:]], 1)
    )
    poses, changed = refine_poses(**{**given, "cam_from_world": true}, sizes=SIZES, steps=1)
    assert torch.equal(poses, true)
    assert not changed.any()


def test_pairs_are_cut_and_limited(scene, monkeypatch):
    given, true = scene
    wanted, _ = refine_poses(**given, sizes=SIZES)
    monkeypatch.setattr(refinement, "_CHUNK", 4)
    got, _ = refine_poses(**given, sizes=SIZES)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)
    source, target = refinement._pairs(4, 1, torch.device("cpu"))
    assert list(zip(source.tolist(), target.tolist(), strict=True)) == [(0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2)]
    near, _ = refine_poses(**given, sizes=SIZES, window=1, steps=10)
    assert away(near, true)[0] < 0.3


@pytest.mark.parametrize("wrong", [{"sizes": ()}, {"sizes": (12, 0)}, {"steps": 0}, {"window": 0}])
def test_wrong_settings(scene, wrong):
    with pytest.raises(ValueError, match="wanted positive sizes, steps and window"):
        refine_poses(**scene[0], **wrong)


def test_how_pixels_and_points_move_is_the_derivative():
    """Against differences of whole projections."""
    generator = torch.Generator().manual_seed(3)
    points = torch.rand(1, 1, 3, 5, generator=generator, dtype=torch.float64) + torch.tensor([[0.0], [0.0], [1.0]])
    focal = torch.tensor([[[60.0, 70.0]]], dtype=torch.float64)
    # three colours that rise along x, along y, and along both
    slopes = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -3.0]], dtype=torch.float64)[None, None, ..., None]
    moves = refinement._by_motion(slopes.expand(1, 1, 2, 3, 5), focal, points)

    def places(change):
        moved = refinement._rigid(change)[:3, :3] @ points + refinement._rigid(change)[:3, 3:]
        x, y = (moved[:, :, :2] / moved[:, :, 2:] * focal[..., None]).unbind(2)
        return torch.stack([x, y, 2 * x - 3 * y], 2)

    step = 1e-6
    for number in range(6):
        change = torch.zeros(6, dtype=torch.float64)
        change[number] = step
        wanted = (places(change) - places(-change)) / (2 * step)
        torch.testing.assert_close(moves[:, :, number], wanted, atol=1e-5, rtol=1e-6)
    pose = refinement._rigid(torch.tensor([0.3, -0.2, 0.5, 0.4, -0.6, 0.2], dtype=torch.float64))
    change = torch.tensor([0.2, 0.1, -0.3, 0.5, 0.2, -0.1], dtype=torch.float64) * 1e-6
    moved = pose @ refinement._rigid(change) @ torch.linalg.inv(pose)
    torch.testing.assert_close(moved, refinement._rigid(refinement._carried(pose) @ change), atol=1e-11, rtol=0)


# ---------------------------------------------------------------------- inside the model


@pytest.fixture(scope="module")
def tiny():
    model, _ = build_untrained("vidllm-tiny", seed=2)
    model.config.is_metric = True
    return model.eval()


@pytest.fixture
def refining(tiny):
    tiny.config.pose_refinement_sizes = [8, 14]
    yield tiny
    tiny.config.pose_refinement_sizes = []


def pictures(batch, frames):
    """Smooth noise, so that there is something to align by."""
    noise = torch.randn(batch * frames, 3, 5, 7, generator=torch.Generator().manual_seed(batch))
    return torch.nn.functional.interpolate(noise, (28, 42), mode="bicubic").unflatten(0, (batch, frames))


def test_the_model_gives_refined_poses_and_points_at_them(refining, monkeypatch):
    pixels = pictures(2, 3)
    seen = []

    def refine(frames, depth, intrinsics_px, cam_from_world, *settings):
        seen.append((frames, settings))
        poses = cam_from_world.clone()
        poses[:, 1:] = motion(0.1, 0.2, 0.0, 0.3, 0.0, 0.1) @ poses[:, 1:]
        return poses, torch.ones(len(poses), dtype=torch.bool)

    sizes, refining.config.pose_refinement_sizes = refining.config.pose_refinement_sizes, []
    plain = refining.reconstruct(pixels)
    refining.config.pose_refinement_sizes = sizes
    monkeypatch.setattr(refinement, "refine_poses", refine)
    got = refining.reconstruct(pixels)
    assert seen[0][1] == ([8, 14], 8, 8)
    assert torch.equal(seen[0][0], pixels)
    torch.testing.assert_close(
        got.cam_from_world[:, 1:], motion(0.1, 0.2, 0.0, 0.3, 0.0, 0.1) @ plain.cam_from_world[:, 1:]
    )
    assert torch.equal(got.cam_from_world[:, 0], plain.cam_from_world[:, 0])
    assert torch.equal(got.depth, plain.depth)
    torch.testing.assert_close(got.points_world, unproject_depth(got.depth, got.intrinsics_px, got.cam_from_world))
    # in half precision the pictures stay exact
    half = refining.to(torch.bfloat16)
    try:
        half.reconstruct(pixels)
        assert torch.equal(seen[-1][0], pixels)
    finally:
        refining.to(torch.float32)


def test_given_poses_are_never_touched(refining):
    pixels = pictures(2, 3)
    given = torch.stack([torch.eye(4), motion(0.0, 0.1, 0.0, 0.2, 0.0, 0.0), motion(0.0, 0.2, 0.0, 0.5, 0.0, 0.0)])
    geometry = {"cam_from_world": given.expand(2, 3, 4, 4)}
    torch.testing.assert_close(
        refining.reconstruct(pixels, geometry=geometry).cam_from_world, geometry["cam_from_world"], atol=1e-6, rtol=0
    )
    mixed = refining.reconstruct(pixels, geometry={**geometry, "mask": torch.tensor([False, True])})
    alone = refining.reconstruct(pixels[:1])
    torch.testing.assert_close(mixed.cam_from_world[1], given, atol=1e-6, rtol=0)
    torch.testing.assert_close(mixed.cam_from_world[0], alone.cam_from_world[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mixed.points_world[0], alone.points_world[0], atol=1e-3, rtol=1e-3)


def test_videos_of_unlike_length_are_refined_without_their_padding(refining):
    pixels = pictures(2, 3)
    sizes = torch.tensor([[3, 28, 42], [2, 28, 28]])
    together = refining.reconstruct(pixels, sizes)
    alone = refining.reconstruct(pixels[1:, :2, :, :, :28])
    torch.testing.assert_close(together.cam_from_world[1, :2], alone.cam_from_world[0], atol=1e-4, rtol=1e-4)
    assert torch.equal(together.cam_from_world[1, 2], torch.eye(4))


def test_what_trains_sees_the_networks_own_poses(refining):
    """Losses are on the raw encodings; refinement neither changes them nor takes part in the gradient."""
    pixels = pictures(2, 3)
    out = refining(pixel_values_videos=pixels, output_scene_tokens=False)
    refining.config.pose_refinement_sizes = []
    plain = refining(pixel_values_videos=pixels, output_scene_tokens=False)
    assert torch.equal(out.raw_reconstruction.pose_encodings, plain.raw_reconstruction.pose_encodings)
    assert not out.scene.reconstruction.cam_from_world.requires_grad


def test_it_is_off_unless_a_config_asks_for_it():
    for name, preset in PRESETS.items():
        assert bool(preset.config().pose_refinement_sizes) == (name == "vidllm-nano")
    with pytest.raises(ValueError, match="pose_refinement_sizes: wanted positive numbers"):
        PRESETS["vidllm-tiny"].config(pose_refinement_sizes=[12, 0])

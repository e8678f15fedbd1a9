"""Depth that bends, and a focal length that is found, while poses are made exact: on a scene that is known everywhere, against equations written
out, and inside the model."""

import pytest
import torch

from vidllm.modeling_vidllm import pose_refinement_vidllm as refinement
from vidllm.modeling_vidllm.geometry_vidllm import invert_rigid, unproject_depth
from vidllm.modeling_vidllm.pose_refinement_vidllm import refine_poses, refine_poses_and_depth
from vidllm.train.initialise import build_untrained
from vidllm.train.presets import PRESETS

from .filmed_room import SIZES, away, filmed_scene, motion


GRID = (4, 5)


def bent(depth, seed=0, spread=0.12):
    """Depth `(B, S, H, W)` off by smooth factors, none of a whole video."""
    coarse = torch.randn(*depth.shape[:2], 3, 4, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, depth.shape[-2:], mode="bicubic", align_corners=True)
    smooth = smooth - smooth.mean(dim=(1, 2, 3), keepdim=True)
    return depth * (spread * smooth).exp()


def off(depth, true):
    """Mean absolute logarithm of the error of depth, but for a factor of each video, which no picture tells."""
    error = (depth / true).log()
    return float((error - error.flatten(1).median(1).values[:, None, None, None]).abs().mean())


@pytest.fixture(scope="module")
def scene():
    """What is predicted of two videos, its depth bent; true poses; true depth."""
    given, true = filmed_scene()
    return {**given, "depth": bent(given["depth"])}, true, given["depth"]


def test_depth_and_poses_become_those_of_the_film(scene):
    given, true, true_depth = scene
    poses, depth, intrinsics_px, changed = refine_poses_and_depth(**given, grid=GRID, sizes=SIZES, steps=10)
    assert changed.all()
    assert torch.equal(intrinsics_px, given["intrinsics_px"])
    assert depth.dtype == poses.dtype == torch.float32
    assert off(depth, true_depth) < 0.6 * off(given["depth"], true_depth)
    alone, _ = refine_poses(**given, sizes=SIZES, steps=10)
    assert away(poses, true)[0] < 0.7 * away(alone, true)[0]
    assert torch.equal(poses[:, 0], given["cam_from_world"][:, 0])
    # each video for itself
    for row in range(2):
        one = {name: value[row : row + 1] for name, value in given.items()}
        got = refine_poses_and_depth(**one, grid=GRID, sizes=SIZES, steps=10)
        torch.testing.assert_close(got[0][0], poses[row], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(got[1][0], depth[row], atol=1e-2, rtol=1e-3)


def test_true_depth_and_poses_stay(scene):
    given, true, true_depth = scene
    exact = {**given, "depth": true_depth, "cam_from_world": true}
    poses, depth, _, _ = refine_poses_and_depth(**exact, grid=GRID, sizes=SIZES)
    assert away(poses, true)[0] < 0.2
    assert off(depth, true_depth) < 0.01


def test_units_do_not_matter(scene):
    given, _, _ = scene
    poses, depth, _, _ = refine_poses_and_depth(**given, grid=GRID, sizes=SIZES)
    larger = given["cam_from_world"].clone()
    larger[..., :3, 3] *= 7.5
    other = {**given, "depth": given["depth"] * 7.5, "cam_from_world": larger, "frames": given["frames"] * 4.4 - 2.1}
    scaled, deeper, _, _ = refine_poses_and_depth(**other, grid=GRID, sizes=SIZES)
    torch.testing.assert_close(scaled[..., :3, 3], poses[..., :3, 3] * 7.5, atol=2e-2, rtol=5e-3)
    torch.testing.assert_close(deeper, depth * 7.5, atol=0, rtol=5e-3)


def test_what_is_not_known_stays_unknown(scene):
    given, _, _ = scene
    depth = given["depth"].clone()
    depth[:, :, :20, :30] = 0
    depth[:, 1, 30:] = float("nan")
    poses, got, _, changed = refine_poses_and_depth(**{**given, "depth": depth}, grid=GRID, sizes=SIZES)
    unknown = ~(depth > 0)
    assert changed.all()
    assert torch.isfinite(poses).all()
    torch.testing.assert_close(got[unknown], depth[unknown], equal_nan=True, atol=0, rtol=0)
    assert not torch.equal(got[~unknown], depth[~unknown])


def test_what_cannot_be_judged_stays(scene):
    given, _, _ = scene
    flat = {**given, "frames": torch.full_like(given["frames"], 0.4)}
    one = {name: value[:, :1] for name, value in given.items()}
    blind = {**given, "depth": torch.zeros_like(given["depth"])}
    for inputs in (flat, one, blind):
        poses, depth, intrinsics_px, changed = refine_poses_and_depth(
            **inputs, grid=GRID, sizes=SIZES, focal_spread=0.2
        )
        assert torch.equal(poses, inputs["cam_from_world"])
        assert torch.equal(depth, inputs["depth"])
        assert torch.equal(intrinsics_px, inputs["intrinsics_px"])
        assert not changed.any()


def test_steps_that_lead_astray_are_taken_back(scene, monkeypatch):
    given, true, true_depth = scene
    exact = {**given, "depth": true_depth, "cam_from_world": true}
    monkeypatch.setattr(
        refinement,
        "_joint_step",
        lambda view, poses, pairs, field, *rest: (poses, field + 0.2 * torch.rand(field.shape), rest[2] + 0.3),
    )
    poses, depth, intrinsics_px, changed = refine_poses_and_depth(**exact, grid=GRID, sizes=SIZES, steps=1)
    assert torch.equal(poses, true)
    assert torch.equal(intrinsics_px, given["intrinsics_px"])
    assert torch.equal(depth, true_depth)
    assert not changed.any()


def test_pairs_may_be_cut(scene, monkeypatch):
    given, _, _ = scene
    wanted = refine_poses_and_depth(**given, grid=GRID, sizes=(12, 24), steps=4)
    monkeypatch.setattr(refinement, "_CHUNK", 4)
    got = refine_poses_and_depth(**given, grid=GRID, sizes=(12, 24), steps=4)
    torch.testing.assert_close(got[0], wanted[0], atol=1e-3, rtol=0)
    torch.testing.assert_close(got[1], wanted[1], atol=0, rtol=5e-3)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"sizes": ()}, "wanted positive sizes, steps and window"),
        ({"window": 0}, "wanted positive sizes, steps and window"),
        ({"grid": (1, 4)}, r"wanted a grid of at least 2 rows and 2 columns; got \[1, 4\]"),
        ({"grid": (3,)}, r"wanted a grid of at least 2 rows and 2 columns; got \[3\]"),
        ({"focal_spread": -0.1}, "wanted a spread and a power of at least 0; got -0.1, 1.0"),
        ({"focal_spread": float("nan")}, "wanted a spread and a power of at least 0; got nan, 1.0"),
        (
            {"focal_spread": 0.1, "depth_per_focal": float("inf")},
            "wanted a spread and a power of at least 0; got 0.1, inf",
        ),
    ],
)
def test_wrong_settings(scene, wrong, words):
    with pytest.raises(ValueError, match=words):
        refine_poses_and_depth(**{**scene[0], "grid": GRID, **wrong})


# ---------------------------------------------------------------------- focal lengths


@pytest.fixture(scope="module")
def misread(scene):
    """The videos with focal lengths 15 % too long and 12 % too short; the true ones."""
    given, true, true_depth = scene
    wrong = given["intrinsics_px"].clone()
    wrong[..., :2, :2] *= torch.tensor([1.15, 0.88])[:, None, None, None]
    return {**given, "intrinsics_px": wrong}, true, true_depth, given["intrinsics_px"]


def focal_error(intrinsics_px, true):
    """Logarithm of found over true focal length of each video."""
    return (intrinsics_px[:, 0, 0, 0] / true[:, 0, 0, 0]).log()


def test_focal_lengths_become_those_of_the_film(misread):
    given, true, true_depth, true_intrinsics = misread
    found = refine_poses_and_depth(**given, grid=GRID, sizes=SIZES, steps=10, focal_spread=0.2, depth_per_focal=0.0)
    poses, depth, intrinsics_px, changed = found
    assert changed.all()
    before, after = (focal_error(k, true_intrinsics).abs() for k in (given["intrinsics_px"], intrinsics_px))
    assert (after < 0.7 * before).all()
    # one factor for both axes and all frames of a video; the centres stay
    ratio = intrinsics_px[..., [0, 1], [0, 1]] / given["intrinsics_px"][..., [0, 1], [0, 1]]
    torch.testing.assert_close(ratio, ratio[:, :1, :1].expand_as(ratio))
    assert torch.equal(intrinsics_px[..., 2], given["intrinsics_px"][..., 2])
    alone = refine_poses_and_depth(**given, grid=GRID, sizes=SIZES, steps=10)
    assert off(depth, true_depth) < 0.7 * off(alone[1], true_depth)
    assert away(poses, true)[0] < 0.7 * away(alone[0], true)[0]
    # and where depth is right, the whole of it
    exact = refine_poses_and_depth(**{**given, "depth": true_depth}, grid=GRID, sizes=SIZES, focal_spread=0.2)
    assert focal_error(exact[2], true_intrinsics).abs().max() < 0.02
    assert away(exact[0], true)[0] < 0.2
    # the same film from depth and ways that follow the focal length by its square root
    half = refine_poses_and_depth(**given, grid=GRID, sizes=SIZES, steps=10, focal_spread=0.2, depth_per_focal=0.5)
    longer = (intrinsics_px / given["intrinsics_px"])[:, 0, 0, 0].sqrt()
    torch.testing.assert_close(half[1], depth * longer[:, None, None, None])
    torch.testing.assert_close(half[0][..., :3, 3], poses[..., :3, 3] * longer[:, None, None])
    torch.testing.assert_close(half[0][..., :3, :3], poses[..., :3, :3])
    assert torch.equal(half[2], intrinsics_px)


def test_a_small_spread_holds_the_focal_length(misread):
    given = misread[0]
    moved = []
    for spread in (0.2, 0.02, 0.002):
        found = refine_poses_and_depth(**given, grid=GRID, sizes=(12, 24), focal_spread=spread)[2]
        moved.append(focal_error(found, given["intrinsics_px"]).abs())
    assert (moved[0] > moved[1]).all()
    assert (moved[1] > moved[2]).all()
    assert (moved[2] < 0.03).all()


def test_true_focal_lengths_stay(scene):
    given, true, true_depth = scene
    exact = {**given, "depth": true_depth, "cam_from_world": true}
    poses, depth, intrinsics_px, _ = refine_poses_and_depth(**exact, grid=GRID, sizes=SIZES, focal_spread=0.2)
    assert focal_error(intrinsics_px, given["intrinsics_px"]).abs().max() < 0.01
    assert away(poses, true)[0] < 0.2
    assert off(depth, true_depth) < 0.01


# ---------------------------------------------------------------------- the equations


def slow_step(view, poses, pairs, field, weights, prior, zoom, spread):
    """All unknowns of a video in one system, residual by residual; the last of them is the logarithm of the focal factor."""
    batch, num_frames = poses.shape[:2]
    size = field.shape[-1]
    moved_poses, moved_field, moved_zoom = poses.clone(), field.clone(), zoom.clone()
    for row in range(batch):
        unknowns = 6 * num_frames + size * num_frames + 1
        hessian, slope = torch.zeros(unknowns, unknowns), torch.zeros(unknowns)
        for source, target in zip(*(part.tolist() for part in pairs), strict=True):
            relative = poses[row, target] @ torch.linalg.inv(poses[row, source])
            look = view.look(
                (poses[:, target] @ invert_rigid(poses[:, source]))[:, None],
                torch.tensor([source]),
                torch.tensor([target]),
            )
            apart, seen, slopes, points = (part[row, 0] for part in look)
            # pixels first
            apart, slopes, points = apart.T, slopes.permute(2, 1, 0), points.T
            usual = (apart.norm(dim=-1) * seen).sum() / seen.sum().clamp_min(1)
            back = refinement._carried(relative)
            for pixel in range(len(points)):
                if not seen[pixel]:
                    continue
                weight = 1 / (1 + (apart[pixel].norm() / usual) ** 2) / usual**2
                x, y, z = points[pixel].tolist()
                fx, fy = view.focal[row, target].tolist()
                moves = torch.tensor([[fx / z, 0, -fx * x / z**2], [0, fy / z, -fy * y / z**2]])
                by_turn = -moves @ refinement._cross(points[pixel])
                jacobian = torch.zeros(3, unknowns)
                by_target = slopes[pixel] @ torch.cat([by_turn, moves], 1)
                jacobian[:, 6 * target : 6 * target + 6] = by_target
                jacobian[:, 6 * source : 6 * source + 6] -= by_target @ back
                # a point at 1.001 times its depth
                ray = points[pixel] - relative[:3, 3]
                place, further = (relative[:3, 3] + factor * ray for factor in (1.0, 1.001))
                shift = view.focal[row, target] * (further[:2] / further[2] - place[:2] / place[2]) / 0.001
                start = 6 * num_frames + size * source
                jacobian[:, start : start + size] = (slopes[pixel] @ shift)[:, None] * weights[pixel]
                if spread:
                    jacobian[:, -1] = slopes[pixel] @ shift_by_focal(view, row, source, target, relative, pixel)
                hessian += weight * jacobian.T @ jacobian
                slope += weight * jacobian.T @ apart[pixel]
        for frame in range(num_frames):
            part = slice(6 * num_frames + size * frame, 6 * num_frames + size * (frame + 1))
            hessian[part, part] += prior
            slope[part] += prior @ field[row, frame]
        if spread:
            hessian[-1, -1] += 1 / spread**2
            slope[-1] += zoom[row] / spread**2
        hessian += torch.diag(hessian.diagonal() * refinement._DAMPING + refinement._FLOOR)
        change = torch.zeros(unknowns)
        change[6:] = -torch.linalg.solve(hessian[6:, 6:], slope[6:])
        for frame in range(1, num_frames):
            step = change[6 * frame : 6 * frame + 6].clamp(-refinement._LONGEST, refinement._LONGEST)
            moved_poses[row, frame] = refinement._rigid(step) @ poses[row, frame]
        deeper = change[6 * num_frames : -1].unflatten(0, (num_frames, size))
        moved_field[row] += deeper.clamp(-refinement._DEEPEST, refinement._DEEPEST)
        moved_zoom[row] += change[-1].clamp(-refinement._DEEPEST, refinement._DEEPEST)
    return moved_poses, moved_field, moved_zoom


def shift_by_focal(view, row, source, target, relative, pixel, step=1e-3):
    """Where a source pixel is drawn when both focal lengths are 1.001 times as long, less where it is drawn now, `(2,)`; by difference."""
    places = []
    for factor in (1.0, 1 + step):
        point = view.points[row, source, :, pixel].double()
        point = torch.cat([point[:2] / factor, point[2:]])
        point = relative[:3, :3].double() @ point + relative[:3, 3].double()
        places.append(view.focal[row, target].double() * factor * point[:2] / point[2])
    return ((places[1] - places[0]) / step).float()


@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_a_step_solves_the_equations_of_all_unknowns(scene, spread):
    given, _, _ = scene
    grid = (2, 3)
    start = given["cam_from_world"].clone()
    unit = refinement._median_depth(given["depth"])
    view = refinement._View(given["frames"], given["depth"] / unit[:, None, None, None], given["intrinsics_px"], 8)
    weights, prior = refinement._weights(grid, view.hw, start.device), refinement._prior(grid, start.device)
    field = 0.05 * torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))
    poses, pairs = refinement._moved(start, 1 / unit), refinement._pairs(3, 8, start.device)
    zoom = torch.tensor([0.05, -0.08]) if spread else torch.zeros(2)
    seen = view.bent(field @ weights.T).zoomed(zoom)
    got = refinement._joint_step(seen, poses, pairs, field, weights, prior, zoom, spread)
    wanted = slow_step(seen, poses, pairs, field, weights, prior, zoom, spread)
    assert (got[0] - poses).abs().max() > 0.01
    assert (got[1] - field).abs().max() > 0.01
    torch.testing.assert_close(got[0], wanted[0], atol=2e-4, rtol=0)
    torch.testing.assert_close(got[1], wanted[1], atol=5e-4, rtol=0)
    torch.testing.assert_close(got[2], wanted[2], atol=2e-4, rtol=0)
    assert ((got[2] - zoom).abs() > 0.01).any() == (spread > 0)


def test_factors_are_interpolated_between_the_points_of_the_grid():
    weights = refinement._weights((2, 3), (5, 9), torch.device("cpu"))
    assert weights.shape == (45, 6)
    torch.testing.assert_close(weights.sum(1), torch.ones(45))
    middle = weights.unflatten(0, (5, 9))[2, 4]
    torch.testing.assert_close(middle, torch.tensor([0, 0.5, 0, 0, 0.5, 0]))
    assert torch.equal(weights.unflatten(0, (5, 9))[4, 8], torch.tensor([0.0, 0, 0, 0, 0, 1]))
    prior = refinement._prior((2, 3), torch.device("cpu"))
    assert torch.equal(prior, prior.T)
    values = torch.tensor([0.3, -0.1, 0.2, 0.5, 0.0, -0.4])
    unlike = [(0, 1), (1, 2), (3, 4), (4, 5), (0, 3), (1, 4), (2, 5)]
    wanted = sum(float(v) ** 2 for v in values) / refinement._DEPTH_SPREAD**2
    wanted += sum(float(values[a] - values[b]) ** 2 for a, b in unlike) / refinement._DEPTH_BEND**2
    assert float(values @ prior @ values) == pytest.approx(wanted, rel=1e-5)


# ---------------------------------------------------------------------- inside the model


@pytest.fixture(scope="module")
def tiny():
    model, _ = build_untrained("vidllm-tiny", seed=2)
    model.config.is_metric = True
    return model.eval()


@pytest.fixture
def refining(tiny):
    tiny.config.pose_refinement_sizes, tiny.config.pose_refinement_depth_grid = [8, 14], [2, 3]
    yield tiny
    tiny.config.pose_refinement_sizes, tiny.config.pose_refinement_depth_grid = [], []


@pytest.fixture(scope="module")
def pixels():
    noise = torch.randn(6, 3, 5, 7, generator=torch.Generator().manual_seed(2))
    return torch.nn.functional.interpolate(noise, (28, 42), mode="bicubic").unflatten(0, (2, 3))


def shifted(frames, depth, intrinsics_px, cam_from_world, grid, *settings):
    """In place of the real refinement: what must be found again in what the model gives."""
    settings, focal = settings[:3], settings[3:]
    if focal:
        intrinsics_px = intrinsics_px.clone()
        intrinsics_px[..., :2, :2] *= 1.21
        depth = depth * 1.1
        assert focal == (0.3, 0.5)
    poses = cam_from_world.clone()
    poses[:, 1:] = motion(0.1, 0.2, 0.0, 0.3, 0.0, 0.1) @ poses[:, 1:]
    assert (grid, settings) == ([2, 3], ([8, 14], 8, 8))
    return poses, depth * 1.5, intrinsics_px, torch.ones(len(poses), dtype=torch.bool)


def test_the_model_gives_refined_depth_and_points_at_it(refining, pixels, monkeypatch):
    refining.config.pose_refinement_sizes, refining.config.pose_refinement_depth_grid = [], []
    plain = refining.reconstruct(pixels)
    refining.config.pose_refinement_sizes, refining.config.pose_refinement_depth_grid = [8, 14], [2, 3]
    monkeypatch.setattr(refinement, "refine_poses_and_depth", shifted)
    got = refining.reconstruct(pixels)
    torch.testing.assert_close(got.depth, plain.depth * 1.5)
    torch.testing.assert_close(got.points_world, unproject_depth(got.depth, got.intrinsics_px, got.cam_from_world))
    assert (got.cam_from_world - plain.cam_from_world).abs().max() > 0.1


def test_given_depth_stays_while_its_poses_are_refined(refining, pixels, monkeypatch):
    called = []
    real = refinement.refine_poses
    monkeypatch.setattr(refinement, "refine_poses_and_depth", shifted)
    monkeypatch.setattr(refinement, "refine_poses", lambda *args: called.append(len(args[0])) or real(*args))
    depth_m = 1 + torch.rand(2, 3, 28, 42, generator=torch.Generator().manual_seed(3))
    got = refining.reconstruct(pixels, geometry={"depth_m": depth_m})
    torch.testing.assert_close(got.depth, depth_m)
    assert called == [2]
    mixed = refining.reconstruct(pixels, geometry={"depth_m": depth_m, "mask": torch.tensor([True, False])})
    assert called == [2, 1]
    torch.testing.assert_close(mixed.depth[0], depth_m[0])
    torch.testing.assert_close(mixed.depth[1], refining.reconstruct(pixels[1:]).depth[0])
    # all of it given: nothing is refined
    poses = torch.stack([torch.eye(4), motion(0.0, 0.1, 0.0, 0.2, 0.0, 0.0), motion(0.0, 0.2, 0.0, 0.5, 0.0, 0.0)])
    both = {"depth_m": depth_m, "cam_from_world": poses.expand(2, 3, 4, 4)}
    got = refining.reconstruct(pixels, geometry=both)
    torch.testing.assert_close(got.depth, depth_m)
    torch.testing.assert_close(got.cam_from_world, both["cam_from_world"], atol=1e-6, rtol=0)


@pytest.fixture
def zooming(refining):
    refining.config.pose_refinement_focal_spread, refining.config.pose_refinement_depth_per_focal = 0.3, 0.5
    yield refining
    refining.config.pose_refinement_focal_spread, refining.config.pose_refinement_depth_per_focal = 0.0, 1.0


def test_the_model_gives_found_focal_lengths_and_points_by_them(zooming, pixels, monkeypatch):
    monkeypatch.setattr(refinement, "refine_poses_and_depth", shifted)
    zooming.config.pose_refinement_focal_spread = 0.0
    plain = zooming.reconstruct(pixels)
    zooming.config.pose_refinement_focal_spread = 0.3
    got = zooming.reconstruct(pixels)
    torch.testing.assert_close(got.intrinsics_px[..., 0, 0], plain.intrinsics_px[..., 0, 0] * 1.21)
    torch.testing.assert_close(got.depth, plain.depth * 1.1)
    torch.testing.assert_close(got.scale, plain.scale * 1.1)
    torch.testing.assert_close(got.points_world, unproject_depth(got.depth, got.intrinsics_px, got.cam_from_world))


def test_given_intrinsics_stay(zooming, pixels, monkeypatch):
    monkeypatch.setattr(refinement, "refine_poses_and_depth", shifted)
    intrinsics_px = torch.tensor([[31.0, 0, 21], [0, 30, 14], [0, 0, 1]]).expand(2, 3, 3, 3)
    got = zooming.reconstruct(pixels, geometry={"intrinsics_px": intrinsics_px})
    assert torch.equal(got.intrinsics_px, intrinsics_px)
    mixed = zooming.reconstruct(pixels, geometry={"intrinsics_px": intrinsics_px, "mask": torch.tensor([False, True])})
    predicted = zooming.reconstruct(pixels[:1])
    assert torch.equal(mixed.intrinsics_px[1], intrinsics_px[1])
    torch.testing.assert_close(mixed.intrinsics_px[0], predicted.intrinsics_px[0])
    torch.testing.assert_close(mixed.depth[0], predicted.depth[0])
    torch.testing.assert_close(mixed.depth[1], got.depth[1])
    # given depth has its own scale, and its focal length stays
    depth_m = 1 + torch.rand(2, 3, 28, 42, generator=torch.Generator().manual_seed(3))
    of_depth = zooming.reconstruct(pixels, geometry={"depth_m": depth_m})
    torch.testing.assert_close(of_depth.depth, depth_m)
    zooming.config.pose_refinement_focal_spread = 0.0
    plain = zooming.reconstruct(pixels)
    assert torch.equal(of_depth.intrinsics_px, plain.intrinsics_px)


def test_losses_see_the_networks_own_depth(refining, pixels):
    out = refining(pixel_values_videos=pixels, output_scene_tokens=False)
    refining.config.pose_refinement_sizes, refining.config.pose_refinement_depth_grid = [], []
    plain = refining(pixel_values_videos=pixels, output_scene_tokens=False)
    assert torch.equal(out.raw_reconstruction.depth_relative, plain.raw_reconstruction.depth_relative)
    assert torch.equal(out.metric_depth_m, plain.metric_depth_m)
    assert not out.scene.reconstruction.depth.requires_grad


def test_it_is_off_unless_a_config_asks_for_it():
    for name, preset in PRESETS.items():
        assert bool(preset.config().pose_refinement_depth_grid) == (name == "vidllm-nano")
        assert (preset.config().pose_refinement_focal_spread > 0) == (name == "vidllm-nano")
    for grid, sizes in (([6], [12]), ([1, 8], [12]), ([6, 8], [])):
        with pytest.raises(ValueError, match="pose_refinement_depth_grid: wanted at least 2 rows and 2 columns, and"):
            PRESETS["vidllm-tiny"].config(pose_refinement_depth_grid=grid, pose_refinement_sizes=sizes)
    grid = {"pose_refinement_sizes": [12], "pose_refinement_depth_grid": [6, 8]}
    for wrong in (
        {"pose_refinement_focal_spread": 0.1},
        {**grid, "pose_refinement_focal_spread": -0.1},
        {**grid, "pose_refinement_focal_spread": 0.1, "pose_refinement_depth_per_focal": float("nan")},
    ):
        with pytest.raises(ValueError, match="pose_refinement_focal_spread, pose_refinement_depth_per_focal: wanted"):
            PRESETS["vidllm-tiny"].config(**wrong)

"""From raw outputs and given geometry to one frame and one unit."""

import pytest
import torch
from tiny import tiny_config, tiny_model, tiny_videos

from vidllm.modeling_vidllm.assembly_vidllm import assemble_reconstruction, check_given_geometry
from vidllm.modeling_vidllm.geometry_vidllm import (
    cameras_from_pose_encoding,
    invert_rigid,
    pose_encoding_from_cameras,
    project_points,
    rotation_from_quat_xyzw,
    to_homogeneous,
    unproject_depth,
)
from vidllm.modeling_vidllm.reconstruction_vidllm import VidLLMRawReconstruction


B, S, H, W = 2, 3, 28, 42


def random_poses(batch=B, frames=S, spread=1.0):
    quaternion = torch.randn(batch, frames, 4)
    rotation = rotation_from_quat_xyzw(quaternion)
    return to_homogeneous(rotation, spread * torch.randn(batch, frames, 3))


def raw_outputs(scale=1.0):
    """A consistent relative scene: true poses in the first camera's frame and true depth, both divided by `scale`."""
    poses = random_poses()
    poses = poses @ invert_rigid(poses[:, :1])
    focal = torch.full((B, S), 30.0)
    intrinsics = torch.zeros(B, S, 3, 3)
    intrinsics[..., 0, 0], intrinsics[..., 1, 1], intrinsics[..., 2, 2] = focal, focal * 1.1, 1
    intrinsics[..., 0, 2], intrinsics[..., 1, 2] = W / 2, H / 2
    depth_m = 1 + 3 * torch.rand(B, S, H, W)
    relative = poses.clone()
    relative[..., :3, 3] /= scale
    encoding = pose_encoding_from_cameras(relative, intrinsics, (H, W))
    raw = VidLLMRawReconstruction(
        pose_encodings=encoding[:, None].repeat(1, 4, 1, 1),
        depth_relative=depth_m / scale,
        depth_confidence=1 + torch.rand(B, S, H, W),
        room_from_world=torch.eye(3).repeat(B, 1, 1),
    )
    return raw, poses, intrinsics, depth_m


def test_frame_0_is_exactly_the_identity_whatever_the_network_says():
    model = tiny_model()
    recon = model.reconstruct(*tiny_videos())
    assert torch.equal(recon.cam_from_world[:, 0], torch.eye(4).expand(2, 4, 4))


def test_reconstruct_project_and_return():
    recon = tiny_model().reconstruct(*tiny_videos())
    pixels, depth = project_points(recon.points_world, recon.intrinsics_px, recon.cam_from_world)
    rows, columns = torch.meshgrid(torch.arange(28.0), torch.arange(42.0), indexing="ij")
    torch.testing.assert_close(pixels, torch.stack([columns, rows], -1).expand_as(pixels), atol=2e-3, rtol=1e-4)
    torch.testing.assert_close(depth, recon.depth, atol=1e-4, rtol=1e-4)


def test_metric_alignment_restores_metres_of_depth_and_translation():
    raw, poses, _, depth_m = raw_outputs(scale=2.5)
    config = tiny_config(is_metric=True)
    recon = assemble_reconstruction(raw, depth_m, config)
    torch.testing.assert_close(recon.scale, torch.full((B,), 2.5))
    torch.testing.assert_close(recon.depth, depth_m)
    torch.testing.assert_close(recon.cam_from_world, poses, atol=1e-5, rtol=1e-5)
    assert recon.is_metric
    assert recon.unit == "m"


def test_without_alignment_the_metric_head_is_used_and_translations_follow_the_medians():
    raw, poses, _, depth_m = raw_outputs(scale=2.5)
    recon = assemble_reconstruction(raw, depth_m, tiny_config(is_metric=True, use_scale_alignment=False))
    assert torch.equal(recon.depth, depth_m)
    torch.testing.assert_close(recon.cam_from_world, poses, atol=1e-5, rtol=1e-5)


def test_weights_not_trained_for_metres_stay_relative_and_refuse_metres():
    raw, _, _, depth_m = raw_outputs(scale=2.5)
    recon = assemble_reconstruction(raw, depth_m, tiny_config())
    assert torch.equal(recon.depth, raw.depth_relative)
    assert torch.equal(recon.scale, torch.ones(B))
    assert recon.unit == "relative"
    with pytest.raises(ValueError, match="not trained for them"):
        assemble_reconstruction(raw, depth_m, tiny_config(), metric=True)
    asked_not_to = assemble_reconstruction(raw, depth_m, tiny_config(is_metric=True), metric=False)
    assert asked_not_to.unit == "relative"
    assert torch.equal(asked_not_to.depth, raw.depth_relative)


def test_relative_geometry_trained_without_a_metric_head_is_metric_when_the_config_says_so():
    raw, _, _, _ = raw_outputs()
    recon = assemble_reconstruction(raw, None, tiny_config(is_metric=True, use_metric_depth=False))
    assert recon.is_metric
    assert torch.equal(recon.depth, raw.depth_relative)


def test_given_depth_sets_the_scale_of_the_poses():
    raw, poses, _, depth_m = raw_outputs(scale=3.0)
    given = depth_m.clone()
    given[:, :, :5] = 0
    recon = assemble_reconstruction(raw, torch.rand(B, S, H, W), tiny_config(), {"depth_m": given})
    assert torch.equal(recon.depth, given)
    torch.testing.assert_close(recon.cam_from_world, poses, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(recon.scale, torch.full((B,), 3.0))
    assert recon.is_metric
    assert torch.equal(recon.depth_confidence, torch.ones(B, S, H, W))


def test_given_poses_set_the_scale_of_the_depth_in_any_world():
    raw, poses, _, depth_m = raw_outputs(scale=3.0)
    elsewhere = random_poses(frames=1, spread=5.0)
    recon = assemble_reconstruction(raw, torch.rand(B, S, H, W), tiny_config(), {"cam_from_world": poses @ elsewhere})
    torch.testing.assert_close(recon.cam_from_world, poses, atol=1e-4, rtol=1e-4)
    assert torch.equal(recon.cam_from_world[:, 0], torch.eye(4).expand(B, 4, 4))
    torch.testing.assert_close(recon.depth, depth_m, atol=1e-4, rtol=1e-4)
    assert recon.is_metric


def test_given_poses_without_a_baseline_set_no_scale():
    raw, poses, _, depth_m = raw_outputs(scale=3.0)
    still = poses.clone()
    still[..., :3, 3] *= 1e-3
    recon = assemble_reconstruction(raw, depth_m, tiny_config(), {"cam_from_world": still})
    assert not recon.is_metric
    assert torch.equal(recon.depth, raw.depth_relative)
    metric = assemble_reconstruction(raw, depth_m, tiny_config(is_metric=True), {"cam_from_world": still})
    torch.testing.assert_close(metric.depth, depth_m)
    assert metric.is_metric


def test_everything_given_is_used_as_it_is():
    raw, _, intrinsics, depth_m = raw_outputs()
    poses, room = random_poses(), rotation_from_quat_xyzw(torch.randn(B, 4))
    intrinsics = intrinsics * torch.tensor([[1.5, 1, 1.2], [1, 1.4, 0.9], [1, 1, 1]])
    given = {"cam_from_world": poses, "intrinsics_px": intrinsics, "depth_m": depth_m * 7, "room_from_world": room}
    recon = assemble_reconstruction(raw, torch.rand(B, S, H, W), tiny_config(), given)
    expected = poses @ invert_rigid(poses[:, :1])
    torch.testing.assert_close(recon.cam_from_world, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(recon.depth, depth_m * 7)
    assert torch.equal(recon.intrinsics_px, intrinsics)
    assert torch.equal(recon.room_from_world, room)
    torch.testing.assert_close(
        recon.points_world, unproject_depth(depth_m * 7, intrinsics, expected), atol=1e-4, rtol=1e-4
    )


def test_mask_mixes_given_and_predicted_rows():
    raw, poses, _, depth_m = raw_outputs(scale=2.0)
    given = {"depth_m": depth_m * 5, "cam_from_world": poses, "mask": torch.tensor([False, True])}
    mixed = assemble_reconstruction(raw, depth_m, tiny_config(is_metric=True), given)
    alone = assemble_reconstruction(raw, depth_m, tiny_config(is_metric=True))
    assert torch.equal(mixed.depth[0], alone.depth[0])
    assert torch.equal(mixed.cam_from_world[0], alone.cam_from_world[0])
    assert torch.equal(mixed.depth[1], depth_m[1] * 5)


def test_unusable_scale_is_flagged_never_nan():
    raw, _, _, depth_m = raw_outputs(scale=2.0)
    recon = assemble_reconstruction(raw, torch.full_like(depth_m, torch.nan), tiny_config(is_metric=True))
    assert torch.equal(recon.scale, torch.ones(B))
    assert not recon.scale_valid_mask.any()
    assert not recon.is_metric
    assert torch.isfinite(recon.points_world).all()


def test_scale_frames_choose_who_votes():
    raw, _, _, depth_m = raw_outputs(scale=2.0)
    wrong = depth_m.clone()
    wrong[:, 1:] *= 9
    frames = torch.tensor([[0, -1], [0, -1]])
    recon = assemble_reconstruction(raw, wrong, tiny_config(is_metric=True), scale_frames=frames)
    torch.testing.assert_close(recon.scale, torch.full((B,), 2.0))


def test_nothing_here_carries_gradient():
    model = tiny_model(is_metric=True).train()
    pixels, sizes = tiny_videos()
    recon = model.model(pixel_values_videos=pixels, video_size_shw=sizes).scene.reconstruction
    assert not any(value.requires_grad for value in recon._tensors().values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda g: g["cam_from_world"][1, 2].fill_(torch.nan), r"video 1, frame 2: wanted a rigid transform"),
        (lambda g: g["cam_from_world"][0, 1, :3, :3].mul_(1.1), r"video 0, frame 1: wanted a rotation"),
        (lambda g: g["cam_from_world"][0, 1, 0].mul_(-1), r"video 0, frame 1: wanted a rotation"),
        (lambda g: g["cam_from_world"][0, 2, 3].fill_(1), r"video 0, frame 2: wanted a last row"),
        (lambda g: g["intrinsics_px"][1, 0].zero_(), r"video 1, frame 0: wanted positive focal"),
        (lambda g: g["depth_m"][0, 1, 4, 5].fill_(torch.inf), r"video 0, frame 1: wanted finite depth"),
        (lambda g: g["depth_m"][0, 1, 4, 5].fill_(-1), r"video 0, frame 1: wanted depth >= 0"),
        (lambda g: g.update(depth_m=g["depth_m"][:, :2]), r"wanted shape \(2, 3, 28, 42\)"),
        (lambda g: g.update(cam_from_world=g["cam_from_world"][:, :2]), r"wanted shape \(2, 3, 4, 4\)"),
        (lambda g: g.update(poses=1), r"wanted parts among"),
    ],
)
def test_wrong_given_geometry_is_refused_and_names_the_frame(change, words):
    model = tiny_model()
    _, poses, intrinsics, depth_m = raw_outputs()
    geometry = {"cam_from_world": poses, "intrinsics_px": intrinsics, "depth_m": depth_m}
    change(geometry)
    with pytest.raises(ValueError, match=words):
        model.encode_scene(*tiny_videos(), geometry=geometry)


def test_given_geometry_in_a_ragged_batch_uses_each_videos_own_part():
    model = tiny_model()
    sizes = [(3, 28, 42), (2, 42, 28)]
    pixels, shw = tiny_videos(sizes)
    poses, depth = random_poses(), 1 + torch.rand(B, S, 42, 42)
    depth[1, 2:] = torch.nan  # padding is not looked at
    recon = model.encode_scene(pixels, shw, geometry={"cam_from_world": poses, "depth_m": depth}).reconstruction
    for row, (frames, height, width) in enumerate(sizes):
        assert torch.equal(recon.depth[row, :frames, :height, :width], depth[row, :frames, :height, :width])
        expected = poses[row, :frames] @ invert_rigid(poses[row, :1])
        torch.testing.assert_close(recon.cam_from_world[row, :frames], expected, atol=1e-5, rtol=1e-5)


def test_pose_encoding_round_trip_of_this_file():
    """The helper above must itself be right: encode and decode give the cameras back."""
    raw, poses, intrinsics, _ = raw_outputs()
    back, back_intrinsics = cameras_from_pose_encoding(raw.pose_encodings[:, -1], (H, W))
    torch.testing.assert_close(back, poses, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(back_intrinsics, intrinsics, atol=1e-4, rtol=1e-5)


def test_autocast_changes_no_bit_of_the_geometry():
    raw, poses, intrinsics, depth_m = raw_outputs(scale=2.5)
    given = {"cam_from_world": poses, "intrinsics_px": intrinsics, "room_from_world": poses[:, 1, :3, :3]}
    config = tiny_config(is_metric=True)
    sizes = torch.tensor([[S, H, W]]).repeat(B, 1)

    def assembled():
        checked = check_given_geometry(given, sizes)  # rounded to bfloat16 these rotations would be refused
        return assemble_reconstruction(raw, depth_m, config, checked)

    plain = assembled()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = assembled()
    for name in ("cam_from_world", "intrinsics_px", "depth", "points_world", "scale", "room_from_world"):
        assert torch.equal(cast[name], plain[name]), name

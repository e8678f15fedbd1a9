"""The losses on geometry against VGGT's own numbers, and the paper's equation 9."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_config

from vidllm.modeling_vidllm.geometry_vidllm import pose_encoding_from_cameras, to_homogeneous
from vidllm.modeling_vidllm.outputs_vidllm import VidLLMOutput
from vidllm.modeling_vidllm.reconstruction_vidllm import VidLLMRawReconstruction
from vidllm.train.geometry_losses import RegressionSettings, camera_losses, metric_depth_loss, regression_losses
from vidllm.train.losses import DEFAULT_WEIGHTS, JointLossSettings, joint_loss_terms
from vidllm.train.true_geometry import as_one_video, normalised_geometry


GOLDENS = Path(__file__).parents[1] / "goldens" / "losses"
VGGT = json.loads((GOLDENS / "vggt_losses.json").read_text())
METRIC = json.loads((GOLDENS / "metric_depth_loss.json").read_text())
VARIANTS = {
    "plain": "none",
    "grad": "grad",
    "grad_conf": "grad_conf",
    "normal": "normal",
    "normal_conf": "normal_conf",
}


def golden(case):
    """Arrays of a case of VGGT's losses, by name."""
    with np.load(GOLDENS / "vggt_losses.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files if name.startswith(f"{case}.")}
    arrays = {name.removeprefix(f"{case}."): value for name, value in arrays.items()}
    arrays["mask"] = arrays["batch.point_masks"].bool()
    extrinsics = arrays["batch.extrinsics"]
    arrays["cam_from_world"] = to_homogeneous(extrinsics[..., :3], extrinsics[..., 3])
    return arrays


def as_vggt(got, wanted):
    """Within the tolerance that the file states."""
    torch.testing.assert_close(
        got, torch.as_tensor(wanted).view_as(got), rtol=VGGT["tolerance_rel"], atol=VGGT["tolerance_abs"]
    )


def constants(variant):
    """Settings of a variant's name: what follows `depth_` or `point_`."""
    kind = variant.removesuffix("_valid98")
    return RegressionSettings(gradient=VARIANTS[kind], valid_range=0.98 if kind != variant else 0.0)


def test_goldens_are_the_files_that_the_manifest_names():
    manifest = json.loads((GOLDENS / "MANIFEST.json").read_text())
    assert {path.name for path in GOLDENS.iterdir()} == set(manifest) | {"MANIFEST.json"}
    for name, entry in manifest.items():
        assert hashlib.sha256((GOLDENS / name).read_bytes()).hexdigest() == entry["sha256"], name
        assert entry["source"]


@pytest.mark.parametrize("case", VGGT["cases"])
def test_targets_are_vggts(case):
    t = golden(case)
    size_hw = tuple(t["mask"].shape[-2:])
    as_vggt(pose_encoding_from_cameras(t["cam_from_world"], t["batch.intrinsics"], size_hw), t["expected.gt_pose_enc"])
    poses, depth, points, scale = normalised_geometry(
        t["cam_from_world"], t["batch.depths"], t["batch.world_points"], t["mask"]
    )
    as_vggt(poses[..., :3, :], t["expected.norm_extrinsics"])
    as_vggt(depth[:, :, ::2, ::2], t["expected.norm_depths_s2"])
    as_vggt(points[:, :, ::2, ::2], t["expected.norm_world_points_s2"])
    as_vggt(depth[0] * scale[0], t["batch.depths"][0])


@pytest.mark.parametrize("case", VGGT["cases"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_camera_losses_are_vggts(case, norm):
    t, expected = golden(case), VGGT["cases"][case][f"camera_{norm}"]
    part = t["mask"][:, 0].flatten(1).sum(1) > 100
    assert case != "few_valid" or not part.all()
    losses = camera_losses(
        # (iterations, B, S, 9) -> (1, iterations, B * S, 9)
        t["pred.pose_enc_list"].flatten(1, 2)[None],
        as_one_video(t["expected.gt_pose_enc"]),
        as_one_video(part[:, None].expand(t["mask"].shape[:2])),
        norm=norm,
    )
    for name, of_vggt in (("translation", "loss_T"), ("rotation", "loss_R"), ("fov", "loss_FL")):
        as_vggt(losses[name], expected[of_vggt])
    as_vggt(sum(DEFAULT_WEIGHTS[f"camera_{name}"] * value for name, value in losses.items()), expected["loss_camera"])


@pytest.mark.parametrize("case", VGGT["cases"])
@pytest.mark.parametrize(
    "variant", [name.removeprefix("point_") for name in VGGT["cases"]["a"] if name.startswith("point_")]
)
def test_point_losses_are_vggts(case, variant):
    t, expected = golden(case), VGGT["cases"][case][f"point_{variant}"]
    everywhere = torch.ones_like(as_one_video(t["mask"]))
    losses = regression_losses(
        *(as_one_video(t[name]) for name in ("pred.world_points", "batch.world_points", "pred.world_points_conf")),
        as_one_video(t["mask"]),
        everywhere,
        constants(variant),
    )
    for name, of_vggt in (("confidence", "conf"), ("regression", "reg"), ("gradient", "grad")):
        as_vggt(losses[name], expected[f"loss_{of_vggt}_point"])


@pytest.mark.parametrize("case", VGGT["cases"])
@pytest.mark.parametrize(
    "variant", [name.removeprefix("depth_") for name in VGGT["cases"]["a"] if name.startswith("depth_")]
)
def test_depth_losses_are_vggts_through_the_whole_function(case, variant):
    """`reduction="vggt"`; unnormalised, because VGGT's numbers are for depth as it is."""
    t, expected = golden(case), VGGT["cases"][case][f"depth_{variant}"]
    assert (t["batch.depths"][t["mask"]] > 0).all()
    depth = t["pred.depth"].squeeze(-1).requires_grad_()
    confidence = t["pred.depth_conf"].requires_grad_()
    batch = {
        "input_ids": torch.tensor([[3, 4, 5]]),
        "video_size_shw": torch.tensor([t["mask"].shape[1:]] * 2),
        "targets": {
            "depth_m": torch.where(t["mask"], t["batch.depths"], 0.0),
            "depth_mask": torch.tensor([True, True]),
            "cam_from_world": t["cam_from_world"],
            "intrinsics_px": t["batch.intrinsics"],
            "camera_mask": torch.tensor([True, True]),
        },
    }
    raw = VidLLMRawReconstruction(
        pose_encodings=t["pred.pose_enc_list"].transpose(0, 1),
        depth_relative=depth,
        depth_confidence=confidence,
        room_from_world=torch.eye(3).repeat(2, 1, 1),
    )
    settings = JointLossSettings(reduction="vggt", depth=constants(variant))
    terms = joint_loss_terms(
        VidLLMOutput(raw_reconstruction=raw), batch, tiny_config(use_metric_depth=False), settings
    )
    for name, of_vggt in (("confidence", "conf"), ("regression", "reg"), ("gradient", "grad")):
        value, count = terms[f"depth_{name}"]
        assert count == 1
        as_vggt(value, expected[f"loss_{of_vggt}_depth"])
    if variant == "grad":
        loss = sum(terms[f"depth_{name}"][0] for name in ("confidence", "regression", "gradient"))
        grads = torch.autograd.grad(loss, [depth, confidence])
        # single pixels share in a mean: their tolerance is the mean's
        for grad, name in zip(grads, ("grad_depth", "grad_depth_conf"), strict=True):
            wanted = t[f"expected.{name}"].view_as(grad)
            assert wanted.abs().max() > 1e-4
            torch.testing.assert_close(grad, wanted, rtol=VGGT["tolerance_rel"], atol=1e-8)


@pytest.mark.parametrize("case", METRIC["cases"])
def test_metric_depth_loss_is_equation_nine(case):
    with np.load(GOLDENS / "metric_depth_loss.npz") as file:
        pred, gt, valid = (torch.from_numpy(file[f"{case}.{name}"])[None] for name in ("pred", "gt", "valid"))
    for alpha, by_eps in METRIC["cases"][case].items():
        for eps, expected in by_eps.items():
            numbers = float(alpha.removeprefix("alpha_")), float(eps.removeprefix("eps_"))
            loss = metric_depth_loss(pred, gt, valid.bool(), *numbers)
            assert loss.item() == pytest.approx(expected["loss"], rel=METRIC["tolerance_rel"], abs=1e-12)
            # the whole array as one image, as VGGT's reduction takes it
            batch = {
                "input_ids": torch.tensor([[3, 4, 5]]),
                "targets": {
                    "depth_m": torch.where(valid.bool(), gt, 0.0),
                    "depth_mask": torch.tensor([True]),
                    "camera_mask": torch.tensor([False]),
                },
            }
            settings = JointLossSettings(reduction="vggt", metric_alpha=numbers[0], metric_eps_m=numbers[1])
            value, count = joint_loss_terms(VidLLMOutput(metric_depth_m=pred), batch, tiny_config(), settings)[
                "metric_depth"
            ]
            assert count == 1
            assert value.item() == pytest.approx(expected["loss"], rel=METRIC["tolerance_rel"], abs=1e-12)

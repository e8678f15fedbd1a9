"""The losses of stage 2: against slow loops, and against what must not matter (VGGT's own numbers: test_losses_of_vggt.py)."""

import dataclasses
import itertools

import pytest
import torch
from tiny import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.loss.loss_utils import ForCausalLMLoss

from vidllm.modeling_vidllm.geometry_vidllm import to_homogeneous
from vidllm.modeling_vidllm.grounding_vidllm import MASKED_LOGIT
from vidllm.modeling_vidllm.outputs_vidllm import VidLLMOutput
from vidllm.modeling_vidllm.reconstruction_vidllm import VidLLMRawReconstruction
from vidllm.train.box_losses import assign_boxes
from vidllm.train.geometry_losses import RegressionSettings
from vidllm.train.losses import (
    DEFAULT_WEIGHTS,
    TERMS,
    JointLossSettings,
    joint_loss_counts,
    joint_loss_terms,
    total_loss,
)

from .loss_batches import NUM_QUERIES, SIZES, made_batch, made_output, made_targets, turned
from .slow_losses import slow_boxes_of_loc, slow_terms, slow_truth


@pytest.fixture(scope="module")
def config():
    return tiny_config()


# ---------------------------------------------------------------------- slow loops


SETTINGS = {
    "default": JointLossSettings(),
    "confidence in the differences, no quantile": JointLossSettings(
        depth=RegressionSettings(gradient="grad_conf", valid_range=0.0),
        points=RegressionSettings(gradient="grad_conf", valid_range=0.0),
        camera_norm="l2",
    ),
    "other constants": JointLossSettings(
        iteration_decay=0.9,
        max_translation_error=0.4,
        min_first_frame_pixels=40,
        depth=RegressionSettings(valid_range=0.5, min_elements=100, max_error=0.3, confidence_alpha=0.7),
        metric_alpha=3.0,
        metric_eps_m=0.1,
        match_cost_l1=0.1,
        match_cost_score=9.0,
    ),
}


def choose_among_proposals(batch, output):
    """What a batch with proposals gives: two that are the first box of a `<loc>`, one that is nearly enough its second, and one somewhere."""
    rows = []
    for q, column in output.loc_index.tolist():
        block = int((batch["input_ids"][q, :column] == batch["input_ids"][q, column]).sum())
        true = slow_boxes_of_loc(output, batch, q, block)
        proposals = torch.tensor([[9.0, 9.0, 9.0, 1.0, 1.0, 1.0]]).repeat(NUM_QUERIES, 1)
        if true:
            proposals[0], proposals[3] = true[0], true[0]
            proposals[3, 5] *= 0.7
            # query 1 does not exist
            proposals[1], proposals[4] = true[-1], true[-1]
            proposals[4, 3] *= 0.4
        rows.append(proposals)
    output.grounding.boxes = torch.stack(rows)
    batch["proposal_boxes"] = torch.zeros(len(batch["video_size_shw"]), NUM_QUERIES, 6)


def test_among_proposals_terms_and_gradients_are_those_of_slow_loops(config):
    batch = made_batch(config)
    fast, slow = made_output(batch, config), made_output(batch, config, dtype=torch.float64)
    own = joint_loss_terms(fast[0], batch, config, JointLossSettings())
    for output in (fast[0], slow[0]):
        choose_among_proposals(batch, output)
    names = ("match", "box_l1", "box_diou")
    for settings in (JointLossSettings(), JointLossSettings(proposal_iou=0.8)):
        terms = joint_loss_terms(fast[0], batch, config, settings)
        wanted = slow_terms(slow[0], batch, config, settings)
        for name in names:
            assert terms[name][1] == own[name][1]
            assert terms[name][0].item() == pytest.approx(wanted[name].item(), rel=2e-5), name
            assert terms[name][0].item() != pytest.approx(own[name][0].item(), rel=1e-3), name
        for leaf in ("boxes_per_layer", "match_logits", "no_target_logit"):
            got, other = (
                torch.autograd.grad(sum(values), leaves[leaf], retain_graph=True, allow_unused=True)[0]
                for values, leaves in (
                    ([terms[name][0] for name in names], fast[1]),
                    ([wanted[name] for name in names], slow[1]),
                )
            )
            torch.testing.assert_close(got.double(), other, rtol=1e-3, atol=1e-5)


def test_a_box_that_no_proposal_fits_teaches_nothing(config):
    batch = made_batch(config)
    output, leaves = made_output(batch, config)
    choose_among_proposals(batch, output)
    output.grounding.boxes = torch.full_like(output.grounding.boxes, 9.0)
    terms = joint_loss_terms(output, batch, config, JointLossSettings())
    assert terms["box_l1"][0] == terms["box_diou"][0] == 0
    grad = torch.autograd.grad(terms["match"][0] + terms["box_l1"][0] + terms["box_diou"][0], leaves["match_logits"])[
        0
    ]
    # only where nothing is meant, which is known without any proposal
    empty = [row for row, (q, _) in enumerate(output.loc_index.tolist()) if not batch["targets"]["box_mask"][q].any()]
    known = [row for row in empty if batch["targets"]["boxes_known"][output.loc_index[row, 0]]]
    assert known
    assert grad[known].abs().sum() > 0
    others = [row for row in range(len(grad)) if row not in known]
    assert torch.equal(grad[others], torch.zeros_like(grad[others]))
    assert torch.isfinite(grad).all()


GROUPS = [TERMS[:3], TERMS[3:6], TERMS[6:9], *([name] for name in TERMS[9:])]


@pytest.mark.parametrize(
    ("name", "use_metric_depth"), [*((name, True) for name in SETTINGS), ("default", False)], ids=str
)
def test_terms_and_gradients_are_those_of_slow_loops(name, use_metric_depth):
    settings, config = SETTINGS[name], tiny_config(use_metric_depth=use_metric_depth)
    batch = made_batch(config)
    fast, slow = made_output(batch, config), made_output(batch, config, dtype=torch.float64)
    terms = joint_loss_terms(fast[0], batch, config, settings)
    wanted = slow_terms(slow[0], batch, config, settings)
    assert set(wanted) == set(TERMS) - (set() if use_metric_depth else {"metric_depth"})
    for term, value in wanted.items():
        assert terms[term][0].item() == pytest.approx(value.item(), rel=2e-5), term
        assert terms[term][0].dtype == torch.float32
    for group in GROUPS:
        shares = {term: 1 + 0.3 * i for i, term in enumerate(group) if term in wanted}
        if not shares:
            continue
        got = sum(share * terms[term][0] for term, share in shares.items())
        other = sum(share * wanted[term] for term, share in shares.items())
        got = torch.autograd.grad(got, list(fast[1].values()), retain_graph=True, allow_unused=True)
        other = torch.autograd.grad(other, list(slow[1].values()), retain_graph=True, allow_unused=True)
        reached = 0
        for leaf, a, b in zip(fast[1], got, other, strict=True):
            at = slow[1][leaf].detach()
            a, b = (torch.zeros_like(at) if grad is None else grad.double() for grad in (a, b))
            if leaf == "room_from_world":
                # only along rotations: formulas of an angle differ beside them
                a, b = (at.mT @ grad - grad.mT @ at for grad in (a, b))
            scale = b.abs().max().item()
            reached += scale > 0
            torch.testing.assert_close(
                a, b, rtol=1e-3, atol=1e-5 * scale, msg=lambda text, name=f"{group} to {leaf}": f"{name}: {text}"
            )
        assert reached > 0, group


def test_counts_are_what_the_batch_holds(config):
    batch = made_batch(config)
    counts = joint_loss_counts(batch, config, JointLossSettings())
    # videos: 0 all; 1 depth without cameras; 2 all; 3 has no first frame for the cameras
    wanted = dict.fromkeys(TERMS[:3], 2) | dict.fromkeys(TERMS[3:9], 3)
    # <loc>s: two, one without a box, one with three; not the one without a video, nor the one whose boxes are not known
    wanted |= {"room_rotation": 3, "metric_depth": 4, "box_l1": 6, "box_diou": 6, "match": 4}
    wanted["token"] = int((batch["labels"] != -100).sum())
    assert {name: count.item() for name, count in counts.items()} == wanted
    assert all(count.dtype == torch.float32 and count.ndim == 0 for count in counts.values())
    without = joint_loss_counts(batch, tiny_config(use_metric_depth=False), JointLossSettings())
    assert without["metric_depth"] == 0
    assert without["depth_regression"] == 4
    as_text = joint_loss_counts(batch, tiny_config(box_output="text"), JointLossSettings())
    assert as_text["match"] == as_text["box_l1"] == as_text["box_diou"] == 0


def same_terms(got, wanted, rel=1e-5):
    for name in TERMS:
        assert got[name][1] == wanted[name][1], name
        assert got[name][0].item() == pytest.approx(wanted[name][0].item(), rel=rel, abs=1e-6), name


# ---------------------------------------------------------------------- what must not matter


VIDEO_TARGETS = ("cam_from_world", "intrinsics_px", "depth_m")
PROMPT_TARGETS = ("boxes_annotation", "box_mask", "box_block", "boxes_known")


def alone(batch, output, row):
    """A video with its prompts, in its own size; prompts without a video go with the first."""
    frames, height, width = SIZES[row]
    chosen = (batch["scene_index"] == row) | ((batch["scene_index"] < 0) & (row == 0))
    targets = {name: value[row : row + 1] for name, value in batch["targets"].items() if name not in PROMPT_TARGETS}
    targets |= {name: targets[name][:, :frames] for name in VIDEO_TARGETS}
    targets["depth_m"] = targets["depth_m"][..., :height, :width]
    targets |= {name: batch["targets"][name][chosen] for name in PROMPT_TARGETS}
    names = ("input_ids", "labels", "attention_mask", "scene_index")
    single = {name: batch[name][chosen] for name in names}
    single |= {"targets": targets, "video_size_shw": batch["video_size_shw"][row : row + 1]}
    single["scene_index"] = torch.where(single["scene_index"] < 0, -1, 0)
    raw, found = output.raw_reconstruction, output.grounding
    of_chosen = chosen[output.loc_index[:, 0]]
    number = chosen.long().cumsum(0) - 1
    loc_index = output.loc_index[of_chosen].clone()
    loc_index[:, 0] = number[loc_index[:, 0]]
    return single, VidLLMOutput(
        logits=output.logits[chosen],
        scene=output.scene.select(row),
        scene_index=single["scene_index"],
        raw_reconstruction=VidLLMRawReconstruction(
            pose_encodings=raw.pose_encodings[row : row + 1, :, :frames],
            depth_relative=raw.depth_relative[row : row + 1, :frames, :height, :width],
            depth_confidence=raw.depth_confidence[row : row + 1, :frames, :height, :width],
            room_from_world=raw.room_from_world[row : row + 1],
        ),
        metric_depth_m=output.metric_depth_m[row : row + 1, :frames, :height, :width],
        grounding=type(found)(**{name: value[of_chosen] for name, value in found.items()}),
        loc_index=loc_index,
    )


def test_a_batch_is_its_videos_one_by_one(config):
    batch, settings = made_batch(config), JointLossSettings()
    output, leaves = made_output(batch, config)
    together = joint_loss_terms(output, batch, config, settings)
    parts = []
    for row in range(len(SIZES)):
        single, of_it = alone(batch, output, row)
        parts.append(joint_loss_terms(of_it, single, config, settings))
        counts = joint_loss_counts(single, config, settings)
        assert {name: count.item() for name, count in counts.items()} == {
            name: count.item() for name, (_, count) in parts[-1].items()
        }
    added = {name: tuple(sum(part[name][i] for part in parts) for i in range(2)) for name in TERMS}
    same_terms(added, together)
    grads = [
        torch.autograd.grad(sum(value for value, _ in terms.values()), list(leaves.values()))
        for terms in (together, added)
    ]
    for name, a, b in zip(leaves, *grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def padded(value, sizes, fill):
    """More rows at the end of each axis: `sizes` gives how many."""
    pads = [pad for size in reversed(sizes) for pad in (0, size)]
    return torch.nn.functional.pad(value, pads, value=fill)


def test_padding_of_any_kind_does_not_matter(config):
    batch, settings = made_batch(config), JointLossSettings()
    output, _ = made_output(batch, config)
    wanted = joint_loss_terms(output, batch, config, settings)
    more = {**batch, "targets": dict(batch["targets"])}
    # three tokens on the left, two on the right
    for name, fill in (("input_ids", 0), ("labels", -100), ("attention_mask", 0)):
        more[name] = torch.nn.functional.pad(batch[name], (3, 2), value=fill)
    output.logits = torch.nn.functional.pad(output.logits, (0, 0, 3, 2), value=4.0)
    output.loc_index = output.loc_index + torch.tensor([0, 3])
    # boxes that are none, two frames, one row and four columns of pixels; wrong values where nobody looks
    targets = more["targets"]
    targets["boxes_annotation"] = padded(targets["boxes_annotation"], (0, 2, 0), 5.0)
    targets["box_mask"], targets["box_block"] = (
        padded(targets[name], (0, 2), 0) for name in ("box_mask", "box_block")
    )
    targets["depth_m"] = padded(targets["depth_m"], (0, 2, 1, 4), 2.5)
    targets["cam_from_world"] = torch.cat([targets["cam_from_world"], torch.eye(4).expand(len(SIZES), 2, 4, 4)], dim=1)
    targets["intrinsics_px"] = torch.cat([targets["intrinsics_px"], torch.eye(3).expand(len(SIZES), 2, 3, 3)], dim=1)
    raw = output.raw_reconstruction
    raw.pose_encodings = padded(raw.pose_encodings, (0, 0, 2, 0), 0.0)
    raw.depth_relative, raw.depth_confidence, output.metric_depth_m = (
        padded(value, (0, 2, 1, 4), 0.0) for value in (raw.depth_relative, raw.depth_confidence, output.metric_depth_m)
    )
    same_terms(joint_loss_terms(output, more, config, settings), wanted)


def test_the_world_of_the_true_cameras_does_not_matter(config):
    batch = made_batch(config)
    output, _ = made_output(batch, config)
    wanted = joint_loss_terms(output, batch, config, JointLossSettings())
    generator = torch.Generator().manual_seed(8)
    other_world = to_homogeneous(turned(generator, len(SIZES)), torch.randn(len(SIZES), 3, generator=generator))
    batch["targets"]["cam_from_world"] = batch["targets"]["cam_from_world"] @ other_world[:, None]
    same_terms(joint_loss_terms(output, batch, config, JointLossSettings()), wanted, rel=1e-4)


@pytest.mark.parametrize("use_metric_depth", [True, False])
def test_the_unit_of_the_truth_matters_only_without_metric_depth(use_metric_depth):
    config = tiny_config(use_metric_depth=use_metric_depth)
    batch = made_batch(config)
    output, _ = made_output(batch, config)
    wanted = joint_loss_terms(output, batch, config, JointLossSettings())
    targets = batch["targets"]
    targets["depth_m"] = targets["depth_m"] * 3
    poses = targets["cam_from_world"].clone()
    poses[..., :3, 3] *= 3
    targets["cam_from_world"] = poses
    got = joint_loss_terms(output, batch, config, JointLossSettings())
    for name in ("camera_translation", "depth_regression", "points_regression", "depth_gradient"):
        same = got[name][0].item() == pytest.approx(wanted[name][0].item(), rel=1e-4)
        assert same == use_metric_depth, name
    assert got["camera_rotation"][0].item() == pytest.approx(wanted["camera_rotation"][0].item(), rel=1e-5)


def test_a_quarter_turn_of_the_annotated_scene_does_not_matter(config):
    """North is not told by a picture; boxes turn with their scene."""
    batch, settings = made_batch(config), JointLossSettings()
    output, _ = made_output(batch, config)
    wanted = joint_loss_terms(output, batch, config, settings)
    turn = torch.eye(4)
    turn[:2, :2] = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    targets = batch["targets"]
    targets["annotation_from_world"] = turn @ targets["annotation_from_world"]
    boxes = targets["boxes_annotation"]
    turned_boxes = torch.stack(
        [-boxes[..., 1], boxes[..., 0], boxes[..., 2], boxes[..., 4], boxes[..., 3], boxes[..., 5]], -1
    )
    targets["boxes_annotation"] = turned_boxes
    same_terms(joint_loss_terms(output, batch, config, settings), wanted)
    targets["boxes_annotation"] = boxes
    assert joint_loss_terms(output, batch, config, settings)["box_l1"][0] != wanted["box_l1"][0]


def test_autocast_does_not_matter(config):
    batch, settings = made_batch(config), JointLossSettings()
    output, _ = made_output(batch, config)
    wanted = joint_loss_terms(output, batch, config, settings)
    with torch.autocast("cpu", torch.bfloat16):
        got = joint_loss_terms(output, batch, config, settings)
    for name in TERMS:
        assert torch.equal(got[name][0], wanted[name][0]), name


def test_only_the_largest_errors_of_a_long_video_are_left_out(config):
    batch, settings = made_batch(config), JointLossSettings()
    output, _ = made_output(batch, config)
    wanted = joint_loss_terms(output, batch, config, settings)["depth_regression"][0].item()
    depth = output.raw_reconstruction.depth_relative.detach().clone()
    valid = batch["targets"]["depth_m"][0, 0] > 0
    largest = (depth[0, 0] - batch["targets"]["depth_m"][0, 0]).abs().masked_fill(~valid, 0).argmax()
    assert batch["targets"]["depth_m"][0].count_nonzero() > 1000
    for row, changes in ((0, False), (2, True)):
        wild = depth.clone()
        place = largest if row == 0 else int((batch["targets"]["depth_m"][2, 0].flatten() > 0).nonzero()[5])
        wild[row, 0].view(-1)[place] += 50
        output.raw_reconstruction.depth_relative = wild
        got = joint_loss_terms(output, batch, config, settings)["depth_regression"][0].item()
        assert (got != pytest.approx(wanted, abs=0.01)) == changes, row


# ---------------------------------------------------------------------- perfect and degenerate


@pytest.mark.parametrize("use_metric_depth", [True, False])
def test_the_truth_has_no_loss_and_finite_gradients(use_metric_depth):
    config = tiny_config(use_metric_depth=use_metric_depth)
    batch = made_batch(config)
    targets = batch["targets"]
    # the encoding has no principal point but the middle
    for row, (_, height, width) in enumerate(SIZES):
        targets["intrinsics_px"][row, :, :2, 2] = torch.tensor([width / 2, height / 2])
    output, leaves = made_output(batch, config)
    raw, found = output.raw_reconstruction, output.grounding
    with torch.no_grad():
        for row, (frames, height, width) in enumerate(SIZES):
            depth_m = targets["depth_m"][row, :frames, :height, :width]
            truth = slow_truth(
                depth_m,
                targets["intrinsics_px"][row, :frames],
                targets["cam_from_world"][row, :frames],
                use_metric_depth,
            )
            raw.pose_encodings[row, :, :frames] = truth["encodings"].float()
            raw.depth_relative[row, :frames, :height, :width] = truth["depth"].float()
            raw.depth_confidence[row] = 1
            output.metric_depth_m[row, :frames, :height, :width] = depth_m
            raw.room_from_world[row] = targets["annotation_from_world"][row, :3, :3]
        for block in range(2):
            for t, box in zip((4, 0), slow_boxes_of_loc(output, batch, 0, block), strict=False):
                found.boxes_per_layer[block, :, t] = box.float()
        # no query starts near a box: the assigned ones are alone
        found.query_positions.fill_(1e3)
    terms = joint_loss_terms(output, batch, config, JointLossSettings())
    for name in TERMS[:11]:
        assert terms[name][0].item() == pytest.approx(0, abs=2e-5), name
    # what is left of the boxes is the third prompt's
    single, of_it = alone(batch, output, 0)
    boxes = joint_loss_terms(of_it, single, config, JointLossSettings())
    assert boxes["box_l1"][1] == 3
    assert boxes["box_l1"][0].item() == pytest.approx(0, abs=2e-5)
    assert boxes["box_diou"][0].item() == pytest.approx(0, abs=2e-5)
    pull = torch.autograd.grad(boxes["match"][0], leaves["match_logits"], retain_graph=True)[0]
    # each of the two queries of the second <loc> should have half of the probability, all others none
    share = torch.cat([found.match_logits[1], found.no_target_logit[1:2]]).softmax(0)[:-1]
    torch.testing.assert_close(pull[1], share - torch.tensor([0.5, 0, 0, 0, 0.5]))
    for grad in torch.autograd.grad(
        sum(value for value, _ in terms.values()), list(leaves.values()), allow_unused=True
    ):
        assert grad is None or grad.isfinite().all()


def without_depth(batch, output):
    del batch["targets"]["depth_m"]
    batch["targets"]["depth_mask"] = torch.zeros(len(SIZES), dtype=torch.bool)


def without_valid_depth(batch, output):
    batch["targets"]["depth_m"] = torch.zeros_like(batch["targets"]["depth_m"])


def with_broken_depth(batch, output):
    batch["targets"]["depth_m"][0, 0, 3:, :] = float("nan")
    batch["targets"]["depth_m"][2] = float("inf")


def without_poses(batch, output):
    targets = batch["targets"]
    targets["camera_mask"] = torch.zeros(len(SIZES), dtype=torch.bool)
    targets["cam_from_world"] = torch.eye(4).expand_as(targets["cam_from_world"])
    targets["intrinsics_px"] = torch.eye(3).expand_as(targets["intrinsics_px"])


def without_annotation(batch, output):
    targets = batch["targets"]
    targets["annotation_mask"] = torch.zeros(len(SIZES), dtype=torch.bool)
    targets["annotation_from_world"] = torch.eye(4).expand_as(targets["annotation_from_world"])
    without_boxes(batch, output)


def without_boxes(batch, output):
    for name in ("boxes_annotation", "box_mask", "box_block"):
        batch["targets"][name] = batch["targets"][name][:, :0]


def without_locs(batch, output):
    batch["input_ids"] = batch["input_ids"].clamp(max=9)
    without_boxes(batch, output)
    output.loc_index = output.loc_index[:0]
    output.grounding = type(output.grounding)(**{name: value[:0] for name, value in output.grounding.items()})


def without_queries(batch, output):
    found = output.grounding
    found.query_mask = torch.zeros_like(found.query_mask)
    found.match_logits = found.match_logits.masked_fill(~found.query_mask, MASKED_LOGIT)


def without_labels(batch, output):
    batch["labels"] = torch.full_like(batch["labels"], -100)


def untrained(batch, output):
    raw = output.raw_reconstruction
    raw.pose_encodings = raw.pose_encodings * 0
    raw.depth_relative = raw.depth_relative * 0


def far_off(batch, output):
    raw = output.raw_reconstruction
    raw.pose_encodings = raw.pose_encodings * 1e4
    raw.depth_relative = raw.depth_relative * 1e6
    output.grounding.boxes_per_layer = output.grounding.boxes_per_layer * 1e6
    output.logits = output.logits * 1e4


@pytest.mark.parametrize("reduction", ["sample", "vggt"])
@pytest.mark.parametrize(
    "change",
    [
        without_depth, without_valid_depth, with_broken_depth, without_poses, without_annotation, without_boxes, without_locs,
        without_queries, without_labels, untrained, far_off,
    ],
)  # fmt: skip
def test_whatever_a_batch_lacks_everything_is_finite_and_hangs_on_the_outputs(config, change, reduction):
    batch = made_batch(config)
    output, leaves = made_output(batch, config)
    change(batch, output)
    for points in ("grad", "grad_conf", "normal", "normal_conf"):
        settings = JointLossSettings(reduction=reduction, points=RegressionSettings(gradient=points))
        terms = joint_loss_terms(output, batch, config, settings)
        counts = joint_loss_counts(batch, config, settings)
        assert set(terms) == set(counts) == set(TERMS)
        for name, (value, count) in terms.items():
            assert value.isfinite(), name
            assert value.requires_grad, name
            assert not count.requires_grad
            assert count == counts[name], name
            if count == 0:
                assert value == 0, name
        # raises where one is not reached
        grads = torch.autograd.grad(total_loss(terms, settings), list(leaves.values()), retain_graph=True)
        for name, grad in zip(leaves, grads, strict=True):
            assert grad.isfinite().all(), name


def test_prompts_without_any_video(config):
    batch = {
        "input_ids": torch.tensor([[3, config.loc_token_id, 5, 0], [4, 5, 6, 7]]),
        "labels": torch.tensor([[-100, -100, 5, -100], [-100, 5, 6, 7]]),
        "scene_index": torch.tensor([-1, -1]),
    }
    logits = torch.randn(2, 4, 19, requires_grad=True)
    terms = joint_loss_terms(VidLLMOutput(logits=logits), batch, config, JointLossSettings())
    assert set(terms) == set(TERMS)
    assert {name for name, (_, count) in terms.items() if count > 0} == {"token"}
    assert all(value == 0 for name, (value, _) in terms.items() if name != "token")
    total_loss(terms, JointLossSettings()).backward()
    assert logits.grad.abs().sum() > 0


def test_one_video_of_one_frame(config):
    batch = made_batch(config)
    output, _ = made_output(batch, config)
    single, of_it = alone(batch, output, 2)
    assert single["video_size_shw"].tolist() == [[1, 12, 17]]
    terms = joint_loss_terms(of_it, single, config, JointLossSettings())
    assert all(value.isfinite() for value, _ in terms.values())
    assert terms["camera_fov"][1] == 1


class NobodyAsks(TorchDispatchMode):
    """Refuses operations whose result the host must know before it goes on, for which a GPU would be waited for."""

    ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "bincount")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        assert not by_mask, f"{name} with a mask"
        assert not name.startswith(self.ASKING), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reduction", ["sample", "vggt"])
def test_the_device_is_never_waited_for(config, reduction):
    batch, settings = made_batch(config), JointLossSettings(reduction=reduction)
    output, leaves = made_output(batch, config)
    with NobodyAsks():
        terms = joint_loss_terms(output, batch, config, settings)
        joint_loss_counts(batch, config, settings)
        torch.autograd.grad(total_loss(terms, settings), list(leaves.values()))
    with NobodyAsks(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        float(output.logits.detach().sum())


# ---------------------------------------------------------------------- language and boxes


def test_token_term_is_the_loss_of_transformers(config):
    batch = made_batch(config)
    output, _ = made_output(batch, config)
    for dtype in (torch.float32, torch.bfloat16):
        output.logits = output.logits.detach().to(dtype)
        value, count = joint_loss_terms(output, batch, config, JointLossSettings())["token"]
        wanted = ForCausalLMLoss(output.logits, batch["labels"], vocab_size=output.logits.shape[-1])
        assert (value / count).item() == pytest.approx(wanted.item(), rel=1e-6)
        summed = ForCausalLMLoss(output.logits, batch["labels"], output.logits.shape[-1], num_items_in_batch=count)
        assert (value / count).item() == pytest.approx(summed.item(), rel=1e-6)
    output.logits = output.logits[:, 2:]
    with pytest.raises(ValueError, match=r"labels: wanted those of the logits' positions \(6, 5\); got \(6, 7\)"):
        joint_loss_terms(output, batch, config, JointLossSettings())
    # a forward that kept the last logits, with the labels of these
    kept = {**batch, "labels": batch["labels"][:, 2:]}
    value, _ = joint_loss_terms(output, kept, config, JointLossSettings())["token"]
    wanted = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].float().flatten(0, 1), kept["labels"][:, 1:].flatten(), reduction="sum"
    )
    assert value.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_boxes_do_not_train_the_rotation_that_they_are_told_in(config):
    batch = made_batch(config)
    output, _ = made_output(batch, config)
    rotation = output.scene.reconstruction.room_from_world.requires_grad_()
    terms = joint_loss_terms(output, batch, config, JointLossSettings())
    loss = terms["box_l1"][0] + terms["box_diou"][0] + terms["match"][0]
    assert torch.autograd.grad(loss, rotation, allow_unused=True) == (None,)


def cheapest(cost, box_mask, query_mask):
    """Cost of the best assignment by trying all."""
    boxes, queries = box_mask.nonzero().flatten().tolist(), query_mask.nonzero().flatten().tolist()
    number = min(len(boxes), len(queries))
    return min(
        sum(cost[b, t].item() for b, t in zip(chosen, order, strict=True))
        for chosen in itertools.combinations(boxes, number)
        for order in itertools.permutations(queries, number)
    ), number


def test_no_assignment_is_cheaper():
    generator = torch.Generator().manual_seed(5)
    for num_boxes, num_queries in [(1, 6), (2, 5), (3, 6), (4, 5), (5, 3), (4, 1)]:
        cost = 2 * torch.randn(7, num_boxes, num_queries, generator=generator)
        box_mask = torch.rand(7, num_boxes, generator=generator) < 0.8
        query_mask = torch.rand(7, num_queries, generator=generator) < 0.8
        query_mask[3] = False
        query, matched = assign_boxes(cost, box_mask, query_mask)
        assert query.shape == matched.shape == (7, num_boxes)
        for row in range(7):
            wanted, number = cheapest(cost[row], box_mask[row], query_mask[row])
            pairs = [(b, query[row, b].item()) for b in range(num_boxes) if matched[row, b]]
            assert len(pairs) == number
            assert len({t for _, t in pairs}) == number
            assert all(box_mask[row, b] and query_mask[row, t] for b, t in pairs)
            assert sum(cost[row, b, t].item() for b, t in pairs) == pytest.approx(wanted, abs=1e-5)


def test_many_boxes_are_assigned_as_planted():
    """A price of each box and query proves which assignment is the only best one."""
    generator = torch.Generator().manual_seed(6)
    num_locs, num_boxes, num_queries = 3, 19, 31
    cost = 0.5 + torch.rand(num_locs, num_boxes, num_queries, generator=generator, dtype=torch.float64)
    planted = torch.stack([torch.randperm(num_queries, generator=generator)[:num_boxes] for _ in range(num_locs)])
    cost.scatter_(2, planted[..., None], 0.0)
    price = torch.zeros(num_locs, num_queries, dtype=torch.float64)
    price.scatter_(1, planted, -5 * torch.rand(num_locs, num_boxes, generator=generator, dtype=torch.float64))
    cost = cost + price[:, None] + 5 * torch.rand(num_locs, num_boxes, 1, generator=generator, dtype=torch.float64)
    assert not torch.equal(cost.argmin(2), planted)
    query, matched = assign_boxes(
        cost, torch.ones_like(planted, dtype=torch.bool), torch.ones_like(price, dtype=torch.bool)
    )
    assert matched.all()
    assert torch.equal(query, planted)


def test_costs_that_are_not_finite_come_last():
    cost = torch.tensor([[[float("nan"), 3.0, float("inf")], [float("nan"), 1.0, float("inf")]]])
    everything = torch.ones(1, 3, dtype=torch.bool)
    query, matched = assign_boxes(cost, everything[:, :2], everything)
    assert matched.all()
    assert sorted(query[0].tolist()) != [0, 2]


# ---------------------------------------------------------------------- settings and total


def test_total_is_the_weighted_sum_of_means(config):
    batch = made_batch(config)
    output, _ = made_output(batch, config)
    settings = JointLossSettings(weights={"token": 0.25, "camera_fov": 3.0, "match": 0.0})
    terms = joint_loss_terms(output, batch, config, settings)
    weight = {**DEFAULT_WEIGHTS, "token": 0.25, "camera_fov": 3.0, "match": 0.0}
    wanted = sum(weight[name] * value.item() / count.item() for name, (value, count) in terms.items())
    assert total_loss(terms, settings).item() == pytest.approx(wanted, rel=1e-6)
    halves = {name: 2 * count for name, (_, count) in terms.items()}
    assert total_loss(terms, settings, halves).item() == pytest.approx(wanted / 2, rel=1e-6)
    assert [name for name, number in DEFAULT_WEIGHTS.items() if number != 1] == ["camera_fov"]
    assert set(DEFAULT_WEIGHTS) == set(TERMS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weights": {"tokens": 1.0}}, "did you mean 'token'"),
        ({"weights": {"token": -1.0}}, "wanted a finite number from 0; got -1.0"),
        ({"weights": {"token": float("nan")}}, "wanted a finite number from 0; got nan"),
        ({"reduction": "video"}, "losses.reduction: wanted one of sample, vggt"),
        ({"camera_norm": "huber"}, "losses.camera_norm: wanted one of l1, l2"),
        ({"metric_eps_m": 0.0}, "metric_eps_m above 0"),
        ({"proposal_iou": 0.0}, "losses.proposal_iou: wanted an overlap above 0, at most 1; got 0.0"),
        ({"match_margin": -0.1}, "losses.match_margin: wanted a length from 0; got -0.1"),
    ],
)
def test_settings_out_of_range_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        JointLossSettings(**change)


def test_regression_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="did you mean 'grad'"):
        RegressionSettings(gradient="gradd")
    with pytest.raises(ValueError, match="valid_range: wanted a number from 0 to below 1; got 1"):
        RegressionSettings(valid_range=1.0)
    with pytest.raises(ValueError, match=r"losses.depth.gradient: wanted one of none, grad, grad_conf; got 'normal'"):
        JointLossSettings(depth=RegressionSettings(gradient="normal"))
    assert (
        dataclasses.replace(JointLossSettings(), points=RegressionSettings(gradient="normal")).points.gradient
        == "normal"
    )


def test_true_depth_of_another_size_is_refused(config):
    batch = made_batch(config)
    output, _ = made_output(batch, config)
    batch["targets"] |= made_targets([(2, 22, 25)] * 4, torch.Generator().manual_seed(0))
    with pytest.raises(
        ValueError, match=r"depth_m: wanted the shape of the videos \(4, 3, 22, 27\); got \(4, 2, 22, 25\)"
    ):
        joint_loss_terms(output, batch, config, JointLossSettings())

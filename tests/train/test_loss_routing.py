"""Which loss trains what (paper section 3.4): every cell of the design's table, with the losses themselves on a whole model."""

import pytest
import torch
from tiny import tiny_model, tiny_prompts, tiny_videos

from vidllm.train.collator import model_inputs
from vidllm.train.joint_trainer import freeze_for_joint
from vidllm.train.losses import TERMS, JointLossSettings, joint_loss_terms, total_loss

from .loss_batches import made_targets


ADAPTERS = ["bridge", "none", "concat_self_attention", "cross_attention"]
SIZES = [(3, 28, 42), (2, 42, 28)]
GROUPS = ("encoder", "phi_geom", "phi_lang", "reconstruction", "room_head", "metric_depth", "language")
# "coupled": only where the adapter couples the two streams
GEOMETRY = {"encoder": True, "phi_geom": True, "phi_lang": "coupled", "reconstruction": True}
LANGUAGE = {"encoder": True, "phi_geom": "coupled", "phi_lang": True, "language": True}
TABLE = {
    **dict.fromkeys(TERMS[:9], GEOMETRY),
    "room_rotation": {**GEOMETRY, "room_head": True},
    "metric_depth": {"encoder": True, "metric_depth": True},
    **dict.fromkeys(("token", "box_l1", "box_diou", "match"), LANGUAGE),
}


def group_of(name):
    """Column of the table that a parameter belongs to; what couples the streams of the adapter is the bridge."""
    part, _, rest = name.removeprefix("model.").partition(".")
    if part == "adapter":
        return next((phi for phi in ("phi_geom", "phi_lang") if phi in rest), "bridge")
    if part == "reconstruction":
        return "room_head" if rest.startswith("room_head") else "reconstruction"
    return part if part in ("encoder", "metric_depth") else "language"


def batch_for(config, seed=2):
    """Two videos of different length and size, three prompts: points, `<loc>`s with one, no and two boxes."""
    generator = torch.Generator().manual_seed(seed)
    pixels, sizes = tiny_videos(SIZES)
    loc, coord = config.loc_token_id, config.coord_token_id
    ids, mask = tiny_prompts(config, [[7, coord, 9, loc, 11], [10, loc, 2], [3, loc, 4, loc]])
    targets = made_targets(SIZES, generator)
    boxes = torch.cat([torch.randn(3, 2, 3, generator=generator), 0.3 + torch.rand(3, 2, 3, generator=generator)], -1)
    targets |= {
        "boxes_annotation": boxes,
        "box_mask": torch.tensor([[True, False], [False, False], [True, True]]),
        "box_block": torch.tensor([[0, 0], [0, 0], [1, 1]]),
        "boxes_known": torch.tensor([True, True, True]),
    }
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill((ids == config.video_token_id) | (mask == 0), -100),
        "scene_index": torch.tensor([0, 1, 0]),
        "coord_points_world": torch.randn(3, 1, 3, generator=generator),
        "coord_mask": torch.tensor([[True], [False], [False]]),
        "pixel_values_videos": pixels,
        "video_size_shw": sizes,
        "targets": targets,
        "sample_ids": ["a", "b", "c"],
    }


def terms_of(model, batch, settings):
    """Terms of one forward, as the trainer computes them: the loss of the forward itself is not asked for."""
    inputs = {name: value for name, value in model_inputs(batch).items() if name != "labels"}
    return joint_loss_terms(model(**inputs, use_cache=False), batch, model.config, settings)


def gradients(model, loss):
    """Gradient of each parameter that is trained; None where the loss does not hang on it."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True, retain_graph=True)
    return dict(zip(trained, grads, strict=True))


@pytest.mark.parametrize("adapter_type", ADAPTERS)
def test_every_cell_of_the_table(adapter_type):
    model = tiny_model(adapter_type=adapter_type).train()
    terms = terms_of(model, batch_for(model.config), JointLossSettings())
    assert set(TABLE) == set(terms) == set(TERMS)
    coupled, reached = adapter_type != "none", set()
    for term, (value, count) in terms.items():
        assert count > 0, term
        hit = {name for name, grad in gradients(model, value).items() if grad is not None and grad.abs().max() > 0}
        reached |= hit
        for group in GROUPS:
            wanted = TABLE[term].get(group, False)
            wanted = coupled if wanted == "coupled" else wanted
            assert any(group_of(name) == group for name in hit) == wanted, f"{adapter_type}: {term} on {group}"
        through_bridge = any(group_of(name) == "bridge" for name in hit)
        assert through_bridge == (coupled and term != "metric_depth"), f"{adapter_type}: {term} on the bridge"
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == reached


@pytest.mark.parametrize(
    "change", [{}, {"use_metric_depth": False}, {"box_output": "text"}, {"is_metric": True}], ids=str
)
def test_every_trained_parameter_gets_a_gradient_also_from_a_batch_that_lacks_everything(change):
    model = tiny_model(**change).train()
    batch = batch_for(model.config)
    bare = {**batch, "targets": dict(batch["targets"])}
    targets = bare["targets"]
    del targets["depth_m"]
    for name in ("depth_mask", "camera_mask", "annotation_mask"):
        targets[name] = torch.zeros_like(targets[name])
    for name in ("boxes_annotation", "box_mask", "box_block"):
        targets[name] = targets[name][:, :0]
    bare["labels"] = torch.full_like(batch["labels"], -100)
    for made in (batch, bare):
        terms = terms_of(model, made, JointLossSettings())
        grads = gradients(model, total_loss(terms, JointLossSettings()))
        assert [name for name, grad in grads.items() if grad is None] == []
        assert all(grad.isfinite().all() for grad in grads.values())
        assert all(value.isfinite() for value, _ in terms.values())
    assert all(value == 0 for name, (value, _) in terms.items() if name != "match")


@pytest.mark.parametrize("adapter_type", ADAPTERS)
def test_without_true_geometry_what_language_reaches_is_trained_and_nothing_else(adapter_type):
    """Weight decay would be all that changes the rest."""
    model = tiny_model(adapter_type=adapter_type).train()
    freeze_for_joint(model, freeze_encoder=False, freeze_geometry=True)
    terms = terms_of(model, batch_for(model.config), JointLossSettings())
    loss = sum(terms[name][0] for name in ("token", "box_l1", "box_diou", "match"))
    hit = {name for name, grad in gradients(model, loss).items() if grad is not None and grad.abs().max() > 0}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == hit
    assert any(group_of(name) == "phi_geom" for name in hit) == (adapter_type != "none")


def test_a_fresh_model_learns_a_batch_with_every_loss_finite():
    model = tiny_model(random_everything=False).train()
    batch, settings = batch_for(model.config), JointLossSettings()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    totals = []
    for _ in range(20):
        terms = terms_of(model, batch, settings)
        assert all(value.isfinite() for value, _ in terms.values())
        loss = total_loss(terms, settings)
        totals.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert totals[-1] < 0.7 * totals[0], totals

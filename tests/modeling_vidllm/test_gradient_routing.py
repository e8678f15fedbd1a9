"""Which loss trains what (paper section 3.4): every cell of the table, with a stand-in scalar on each output."""

import pytest
import torch
from tiny import tiny_model, tiny_prompts, tiny_videos


ADAPTERS = ["bridge", "none", "concat_self_attention", "cross_attention"]

# loss -> groups that it trains; "coupled" = only where the adapter couples the two streams
TABLE = {
    "camera": {"encoder": True, "phi_geom": True, "phi_lang": "coupled", "reconstruction": True},
    "depth": {"encoder": True, "phi_geom": True, "phi_lang": "coupled", "reconstruction": True},
    "point_map": {"encoder": True, "phi_geom": True, "phi_lang": "coupled", "reconstruction": True},
    "room": {"encoder": True, "phi_geom": True, "phi_lang": "coupled", "reconstruction": True, "room_head": True},
    "metric": {"encoder": True, "metric_depth": True},
    "token": {"encoder": True, "phi_geom": "coupled", "phi_lang": True, "language": True},
    "box": {"encoder": True, "phi_geom": "coupled", "phi_lang": True, "language": True},
    "matching": {"encoder": True, "phi_geom": "coupled", "phi_lang": True, "language": True},
}


def group_of(name: str) -> str:
    """Column of the table that a parameter belongs to."""
    part = name.removeprefix("model.").split(".")[0]
    if part == "encoder":
        return "encoder"
    if part == "adapter":
        if "phi_geom" in name:
            return "phi_geom"
        if "phi_lang" in name:
            return "phi_lang"
        return "coupling"
    if part == "reconstruction":
        return "room_head" if "room_head" in name else "reconstruction"
    if part == "metric_depth":
        return "metric_depth"
    return "language"


def stand_in(tensor: torch.Tensor) -> torch.Tensor:
    """Weighted sum of squares: no cell is zero by symmetry."""
    weights = torch.linspace(0.5, 1.5, tensor.numel()).view(tensor.shape)
    return (weights * tensor.float().square()).sum()


def inputs_for(config):
    pixels, sizes = tiny_videos([(3, 28, 42), (2, 42, 28)])
    loc, coord = config.loc_token_id, config.coord_token_id
    ids, mask = tiny_prompts(config, [[7, coord, 9, loc, 11], [10, loc], [3, loc, 4, loc]])
    points = torch.randn(3, 1, 3)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values_videos": pixels,
        "video_size_shw": sizes,
        "scene_index": torch.tensor([0, 1, 0]),
        "coord_points_world": points,
        "coord_mask": torch.tensor([[True], [False], [False]]),
    }


def losses_of(model, inputs):
    from vidllm.modeling_vidllm.geometry_vidllm import cameras_from_pose_encoding, unproject_depth

    output = model(**inputs, use_cache=False)
    raw = output.raw_reconstruction
    cam_from_world, intrinsics = cameras_from_pose_encoding(raw.pose_encodings[:, -1], raw.depth_relative.shape[-2:])
    points = unproject_depth(raw.depth_relative, intrinsics, cam_from_world)
    losses = {
        "camera": stand_in(raw.pose_encodings),
        "depth": stand_in(raw.depth_relative) + stand_in(raw.depth_confidence),
        "point_map": stand_in(points),
        "room": stand_in(raw.room_from_world @ torch.tensor([[0.3, 0.1], [0.7, -0.2], [0.2, 0.9]])),
        "token": torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), inputs["input_ids"].flatten()),
    }
    if output.metric_depth_m is not None:
        losses["metric"] = stand_in(output.metric_depth_m)
    if output.grounding is not None:
        losses["box"] = stand_in(output.grounding.boxes_per_layer)
        logits = output.grounding.match_logits.masked_fill(~output.grounding.query_mask, 0)
        losses["matching"] = stand_in(logits) + stand_in(output.grounding.no_target_logit)
    return losses


def touched(model, loss):
    """Groups that receive a nonzero gradient, and the same per parameter."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True, retain_graph=True)
    return {name: grad is not None and bool(grad.abs().max() > 0) for name, grad in zip(trainable, grads, strict=True)}


@pytest.mark.parametrize("adapter_type", ADAPTERS)
def test_every_cell_of_the_table(adapter_type):
    model = tiny_model(adapter_type=adapter_type).train()
    losses = losses_of(model, inputs_for(model.config))
    assert set(losses) == set(TABLE)
    coupled = adapter_type != "none"
    for name, loss in losses.items():
        hit = touched(model, loss)
        for group in ("encoder", "phi_geom", "phi_lang", "reconstruction", "room_head", "metric_depth", "language"):
            members = {parameter: value for parameter, value in hit.items() if group_of(parameter) == group}
            wanted = TABLE[name].get(group, False)
            wanted = coupled if wanted == "coupled" else wanted
            assert any(members.values()) == wanted, f"{adapter_type}: loss {name} on {group}: wanted {wanted}"
        if name in ("metric",):
            assert not any(value for parameter, value in hit.items() if group_of(parameter) == "coupling")


@pytest.mark.parametrize("adapter_type", ADAPTERS)
def test_every_trainable_parameter_is_reached_by_some_loss(adapter_type):
    model = tiny_model(adapter_type=adapter_type).train()
    hit = touched(model, sum(losses_of(model, inputs_for(model.config)).values()))
    assert [name for name, value in hit.items() if not value] == []


def test_frozen_encoder_keeps_no_graph():
    model = tiny_model().train()
    model.model.encoder.requires_grad_(False)
    losses = losses_of(model, inputs_for(model.config))
    sum(losses.values()).backward()
    assert all(p.grad is None for p in model.model.encoder.parameters())
    assert model.model.adapter.phi_geom.mlp.fc1.weight.grad.abs().max() > 0


SWITCHES = [
    {},
    *({"adapter_type": kind} for kind in ADAPTERS[1:]),
    {"num_bridge_tokens": 2},
    {"bridge_scope": "frame"},
    {"num_adapter_layers": 2},
    {"use_metric_depth": False},
    {"use_scale_alignment": False},
    {"position_embedding": False},
    {"shared_encoder": False},
    {"box_output": "text"},
    {"is_metric": True},
    {"is_metric": True, "use_scale_alignment": False},
]


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items()) or "default")
def test_each_switch_trains_and_every_trainable_parameter_moves_within_three_steps(switch):
    """From fresh weights: zero gates let the gradient through one step later each, so three steps of plain SGD."""
    model = tiny_model(random_everything=False, **switch).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    inputs = inputs_for(model.config)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        # every term near 1, so that none drowns another
        loss = sum(term / term.detach().clamp_min(1e-3) for term in losses_of(model, inputs).values())
        assert torch.isfinite(loss)
        loss.backward()
        optimizer.step()
    stuck = [name for name, p in model.named_parameters() if p.requires_grad and torch.equal(p, before[name])]
    assert stuck == []
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if not p.requires_grad)

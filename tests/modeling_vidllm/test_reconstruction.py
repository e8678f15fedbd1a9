"""Reconstruction network: blocks, camera, dense and room heads."""

import gc
import math

import pytest
import torch
from tiny import tiny_config
from torch import nn
from torch.utils.checkpoint import checkpoint

from vidllm.modeling_vidllm import dense_head_vidllm
from vidllm.modeling_vidllm.camera_head_vidllm import VidLLMCameraHead
from vidllm.modeling_vidllm.dense_head_vidllm import VidLLMDenseHead, VidLLMResidualConvUnit, uv_embedding
from vidllm.modeling_vidllm.geometry_vidllm import START_ROOM_FROM_CAM
from vidllm.modeling_vidllm.reconstruction_blocks_vidllm import (
    VidLLMReconstructionBlock,
    apply_rope_2d,
    rope_2d,
    token_positions,
)
from vidllm.modeling_vidllm.reconstruction_vidllm import (
    VidLLMReconstructionTokens,
    VidLLMReconstructor,
    VidLLMRoomHead,
)


GRID, SIZE, WIDTH = (2, 3), (28, 42), 32
FIELDS = ("pose_encodings", "depth_relative", "depth_confidence", "room_from_world")


@torch.no_grad()
def draw(module, scale=0.15):
    """Every parameter at random: zero gates and tiny tokens would hide paths."""
    generator = torch.Generator().manual_seed(5)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return module.eval()


def make(**changes):
    changes = {"num_reconstruction_layers": 3, "reconstruction_tap_layers": [0, 1, 2, 2], **changes}
    return draw(VidLLMReconstructor(tiny_config(**changes)))


def make_tokens(num_videos=2, num_frames=4, grid=GRID):
    return torch.randn(num_videos, num_frames, grid[0] * grid[1], WIDTH)


def fresh(module):
    """Initial values as `_init_weights` sets them: parents after children."""
    for child in reversed(list(module.modules())):
        if hasattr(child, "init_weights"):
            child.init_weights()
    return module.eval()


def assert_same(found, wanted, tolerance=2e-5):
    for field in FIELDS:
        torch.testing.assert_close(
            found[field], wanted[field], rtol=tolerance, atol=tolerance, msg=lambda m, f=field: f"{f}: {m}"
        )


# ---------------------------------------------------------------- whole network


@pytest.mark.parametrize("grid", [(2, 3), (4, 1), (1, 5)])
@torch.no_grad()
def test_shapes_and_ranges(grid):
    size = (14 * grid[0], 14 * grid[1])
    output = make()(make_tokens(grid=grid), grid, size)
    assert output.pose_encodings.shape == (2, 4, 4, 9)
    assert output.depth_relative.shape == output.depth_confidence.shape == (2, 4, *size)
    assert (output.depth_relative > 0).all()
    assert (output.depth_confidence > 1).all()
    assert (output.pose_encodings[..., 7:] >= 0).all()
    rotation = output.room_from_world
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand(2, 3, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(2), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_video_alone_equals_itself_in_a_batch():
    model, tokens = make(), make_tokens(num_videos=3)
    together = model(tokens, GRID, SIZE)
    for index in range(3):
        alone = model(tokens[index : index + 1], GRID, SIZE)
        assert_same(alone, {field: together[field][index : index + 1] for field in FIELDS})
    assert (together.depth_relative[0] - together.depth_relative[1]).abs().max() > 1e-3


@torch.no_grad()
def test_only_the_first_frame_has_a_place_in_time():
    model, tokens = make(), make_tokens()
    wanted = model(tokens, GRID, SIZE)
    order = [0, 3, 1, 2]
    permuted = model(tokens[:, order], GRID, SIZE)
    assert_same(
        permuted,
        {
            "pose_encodings": wanted.pose_encodings[:, :, order],
            "depth_relative": wanted.depth_relative[:, order],
            "depth_confidence": wanted.depth_confidence[:, order],
            "room_from_world": wanted.room_from_world,
        },
    )
    other_reference = model(tokens[:, [1, 0, 2, 3]], GRID, SIZE)
    assert (other_reference.depth_relative[:, [1, 0, 2, 3]] - wanted.depth_relative).abs().max() > 1e-3


@torch.no_grad()
def test_four_kept_layers_give_the_bits_that_all_layers_give():
    taps = [1, 2, 4, 5]
    model = make(num_reconstruction_layers=6, reconstruction_tap_layers=taps)
    tokens = make_tokens()
    outputs = {"frame_blocks": {}, "global_blocks": {}}
    alive = []

    def count_pairs(module, inputs):
        # (batch, frames, tokens, 2 * channels) tensors that are held while the last block starts
        shape = (2, 4, model.num_special_tokens + 6, 2 * WIDTH)
        alive.append(sum(type(thing) is torch.Tensor and thing.shape == shape for thing in gc.get_objects()))

    model.global_blocks[-1].register_forward_pre_hook(count_pairs)
    for name, store in outputs.items():
        for layer, block in enumerate(getattr(model, name)):
            block.register_forward_hook(lambda m, i, output, store=store, layer=layer: store.update({layer: output}))
    found = model(tokens, GRID, SIZE)
    assert alive == [3]
    everything = [
        torch.cat(
            [outputs[name][layer].reshape(2, 4, -1, WIDTH) for name in ("frame_blocks", "global_blocks")], dim=-1
        )
        for layer in range(6)
    ]
    special = model.num_special_tokens
    patches = tuple(everything[layer][:, :, special:] for layer in taps)
    depth, confidence = model.depth_head(patches, GRID, SIZE)
    assert torch.equal(found.depth_relative, depth)
    assert torch.equal(found.depth_confidence, confidence)
    assert torch.equal(found.pose_encodings, model.camera_head(everything[-1][:, :, 0]))
    assert torch.equal(found.room_from_world, model.room_head(everything[-1][:, 0, 0]))


@torch.no_grad()
def test_eager_attention_equals_sdpa():
    outputs = []
    tokens = make_tokens()
    for backend in ("eager", "sdpa"):
        config = tiny_config(num_reconstruction_layers=3, reconstruction_tap_layers=[0, 1, 2, 2])
        config._attn_implementation = backend
        outputs.append(draw(VidLLMReconstructor(config))(tokens, GRID, SIZE))
    assert_same(*outputs)


@torch.no_grad()
def test_bfloat16_blocks_with_float32_heads_and_tokens():
    model = make()
    tokens = make_tokens()
    wanted = model(tokens, GRID, SIZE)
    model.frame_blocks.bfloat16()
    model.global_blocks.bfloat16()
    found = model(tokens.bfloat16(), GRID, SIZE)
    for field in FIELDS:
        assert found[field].dtype == torch.float32
        torch.testing.assert_close(found[field], wanted[field], rtol=0.1, atol=0.1)


@torch.no_grad()
def test_heads_ignore_autocast_and_blocks_run_under_it():
    model, tokens = make(), make_tokens()
    taps = model.tapped_layers(tokens, GRID)
    patches = tuple(tap[:, :, model.num_special_tokens :] for tap in taps)
    plain = (
        *model.depth_head(patches, GRID, SIZE),
        model.camera_head(taps[-1][:, :, 0]),
        model.room_head(taps[-1][:, 0, 0]),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = (
            *model.depth_head(patches, GRID, SIZE),
            model.camera_head(taps[-1][:, :, 0]),
            model.room_head(taps[-1][:, 0, 0]),
        )
        whole = model(tokens, GRID, SIZE)
    for ours, wanted in zip(cast, plain, strict=True):
        assert torch.equal(ours, wanted)
    assert whole.depth_relative.dtype == torch.float32


def test_activation_checkpointing_changes_no_gradient():
    tokens = make_tokens()
    gradients = []
    for on in (False, True):
        model = make().train()
        for block in model.modules():
            if isinstance(block, VidLLMReconstructionBlock):
                block.gradient_checkpointing = on
                block._gradient_checkpointing_func = lambda *args, **kwargs: checkpoint(
                    *args, use_reentrant=False, **kwargs
                )
        output = model(tokens, GRID, SIZE)
        sum(output[field].square().mean() for field in FIELDS).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_contradicting_sizes_are_refused():
    model = make()
    with pytest.raises(ValueError, match=r"size_hw: wanted \(28, 42\).*got \(42, 28\)"):
        model(make_tokens(), (2, 3), (42, 28))
    with pytest.raises(ValueError, match=r"geom_tokens: wanted \(batch, frames, 6, channels\)"):
        model(make_tokens(grid=(2, 4)), (2, 3), (28, 42))
    with pytest.raises(ValueError, match="dense_head_channels, dense_head_features"):
        VidLLMDenseHead(tiny_config(dense_head_channels=[6, 8, 8, 8]))


# ---------------------------------------------------------------- tokens, rotary embedding, blocks


def test_first_frame_takes_slot_zero_and_all_others_slot_one():
    tokens = draw(VidLLMReconstructionTokens(tiny_config()))
    made = tokens(2, 3)
    assert made.shape == (2, 3, 3, WIDTH)
    for video in range(2):
        for frame in range(3):
            slot = 0 if frame == 0 else 1
            assert torch.equal(made[video, frame, 0], tokens.camera_token[0, slot, 0])
            assert torch.equal(made[video, frame, 1:], tokens.register_token[0, slot])
    tokens(2, 1).square().sum().backward()
    assert tokens.camera_token.grad[:, 0].abs().min() > 0
    assert tokens.camera_token.grad[:, 1].abs().max() == 0


def test_initial_tokens_are_almost_zero_but_not_zero():
    tokens = fresh(VidLLMReconstructionTokens(tiny_config()))
    for parameter in tokens.parameters():
        assert 0 < parameter.abs().max() < 1e-5


def test_rotary_embedding_equals_rotation_of_single_pairs():
    head_dim, base = 16, 50.0
    positions = token_positions((2, 3), 3, torch.device("cpu"))
    assert positions.tolist() == [[0, 0]] * 3 + [[y, x] for y in (1, 2) for x in (1, 2, 3)]
    states = torch.randn(2, 3, 9, head_dim)
    made = apply_rope_2d(states, *rope_2d(positions, head_dim, base))
    quarter = head_dim // 4
    for token, position in enumerate(positions.tolist()):
        for axis, place in enumerate(position):
            for pair in range(quarter):
                angle = place * base ** (-pair / quarter)
                low, high = axis * 2 * quarter + pair, axis * 2 * quarter + quarter + pair
                a, b = states[:, :, token, low], states[:, :, token, high]
                cos, sin = math.cos(angle), math.sin(angle)
                torch.testing.assert_close(made[:, :, token, low], a * cos - b * sin, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(made[:, :, token, high], b * cos + a * sin, rtol=1e-5, atol=1e-5)
    assert torch.equal(made[:, :, :3], states[:, :, :3])


@torch.no_grad()
def test_block_equals_the_obvious_version():
    config = tiny_config()
    config._attn_implementation = "sdpa"
    block = draw(VidLLMReconstructionBlock(config, WIDTH, 2))
    cos, sin = rope_2d(token_positions(GRID, 3, torch.device("cpu")), 16, 100.0)
    states = torch.randn(2, 9, WIDTH)

    normed = block.norm1(states)
    heads = []
    for head in range(2):
        part = slice(16 * head, 16 * head + 16)
        query, key, value = (
            block.attn.qkv(normed)[..., start * WIDTH : (start + 1) * WIDTH][..., part] for start in range(3)
        )
        query, key = block.attn.q_norm(query), block.attn.k_norm(key)
        query, key = (apply_rope_2d(tensor.unsqueeze(1), cos, sin).squeeze(1) for tensor in (query, key))
        heads.append(torch.softmax(query @ key.mT / 4, dim=-1) @ value)
    wanted = states + block.ls1.gamma * block.attn.proj(torch.cat(heads, dim=-1))
    wanted = wanted + block.ls2.gamma * block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(block.norm2(wanted))))
    torch.testing.assert_close(block(states, cos, sin), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@torch.no_grad()
def test_one_frame_block_compiles_as_a_full_graph_at_two_shapes(backend):
    torch._dynamo.reset()
    config = tiny_config()
    config._attn_implementation = "sdpa"
    block = draw(VidLLMReconstructionBlock(config, WIDTH, 2))
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for batch, grid in ((4, (2, 3)), (6, (3, 5))):
        cos, sin = rope_2d(token_positions(grid, 3, torch.device("cpu")), 16, 100.0)
        states = torch.randn(batch, 3 + grid[0] * grid[1], WIDTH)
        torch.testing.assert_close(compiled(states, cos, sin), block(states, cos, sin), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


# ---------------------------------------------------------------- camera and room head


def test_camera_iterations_refine_and_pass_no_gradient_through_the_previous_pose():
    head = draw(VidLLMCameraHead(tiny_config()), scale=0.3)
    encodings = head(torch.randn(2, 3, 2 * WIDTH))
    assert (encodings[:, 1:, ..., :7] - encodings[:, :-1, ..., :7]).abs().amax(dim=(0, 2, 3)).min() > 1e-3
    (later,) = torch.autograd.grad(encodings[:, 1:].sum(), head.empty_pose.pose, retain_graph=True)
    (first,) = torch.autograd.grad(encodings[:, 0].sum(), head.empty_pose.pose)
    assert later.abs().max() == 0
    assert first.abs().max() > 0


@torch.no_grad()
def test_camera_head_equals_the_obvious_version():
    head = draw(VidLLMCameraHead(tiny_config(num_camera_iterations=3)), scale=0.3)
    camera_tokens = torch.randn(2, 3, 2 * WIDTH)
    tokens = head.token_norm(camera_tokens)
    normed = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    pose = torch.zeros(2, 3, 9)
    for iteration in range(3):
        previous = head.empty_pose.pose.expand(2, 3, 9) if iteration == 0 else pose
        modulation = head.modulation[1](nn.functional.silu(head.embed_pose(previous)))
        shift, scale, gate = modulation[..., :64], modulation[..., 64:128], modulation[..., 128:]
        states = gate * (normed * (1 + scale) + shift) + tokens
        for block in head.trunk:
            states = block(states)
        pose = pose + head.pose_branch(head.trunk_norm(states))
        activated = torch.cat([pose[..., :7], pose[..., 7:].clamp(min=0)], dim=-1)
        torch.testing.assert_close(head(camera_tokens)[:, iteration], activated, rtol=1e-5, atol=1e-5)


def test_a_fresh_room_head_gives_the_start_rotation_and_learns():
    head = draw(VidLLMRoomHead(tiny_config()))
    assert (head(torch.randn(2, 2 * WIDTH)) - torch.tensor(START_ROOM_FROM_CAM)).abs().max() > 1e-2
    fresh(head)
    rotation = head(torch.randn(2, 2 * WIDTH))
    assert rotation.dtype == torch.float32
    torch.testing.assert_close(rotation, torch.tensor(START_ROOM_FROM_CAM).expand(2, 3, 3), rtol=0, atol=1e-6)
    (rotation * torch.randn(2, 3, 3)).sum().backward()
    assert head.mlp.fc2.bias.grad.abs().max() > 0


@torch.no_grad()
def test_a_fresh_camera_head_looks_ahead_with_an_open_eye():
    head = draw(VidLLMCameraHead(tiny_config(num_camera_iterations=3)), scale=0.02)
    fresh(head)
    encodings = head(torch.randn(2, 4, 2 * WIDTH))
    wanted = torch.tensor([0.0, 0, 0, 0, 0, 0, 1, 1, 1])
    # The iterations add up to it; none starts where a gradient is infinite or gone.
    torch.testing.assert_close(encodings[:, -1], wanted.expand(2, 4, 9), rtol=0, atol=0.1)
    assert encodings[..., 6:].min() > 0.2


# ---------------------------------------------------------------- dense head


@torch.no_grad()
@pytest.mark.parametrize(("grid", "size"), [((2, 3), (28, 42)), ((3, 1), (42, 14))])
def test_dense_chunks_change_nothing(grid, size):
    taps = tuple(torch.randn(2, 5, grid[0] * grid[1], 2 * WIDTH) for _ in range(4))
    whole = draw(VidLLMDenseHead(tiny_config(dense_frame_chunk=100)))(taps, grid, size)
    for chunk in (1, 3):
        parts = draw(VidLLMDenseHead(tiny_config(dense_frame_chunk=chunk)))(taps, grid, size)
        for ours, wanted in zip(parts, whole, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_maps_beyond_the_interpolation_limit_go_frame_by_frame(monkeypatch):
    head = draw(VidLLMDenseHead(tiny_config(dense_frame_chunk=100)))
    taps = tuple(torch.randn(2, 2, 6, 2 * WIDTH) for _ in range(4))
    wanted = head(taps, GRID, SIZE)
    sizes = []
    head.neck_conv.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    largest = max(8 * SIZE[0] * SIZE[1], 16 * 64 * GRID[0] * GRID[1])
    monkeypatch.setattr(dense_head_vidllm, "MAX_INTERPOLATION_ELEMENTS", 3 * largest + 1)
    found = head(taps, GRID, SIZE)
    assert sizes == [3, 1]
    for ours, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(dense_head_vidllm, "MAX_INTERPOLATION_ELEMENTS", 1)
    head(taps, GRID, SIZE)
    assert sizes == [3, 1, 1, 1, 1, 1]


@torch.no_grad()
def test_residual_unit_adds_what_an_in_place_relu_leaves():
    unit = draw(VidLLMResidualConvUnit(6))
    features = torch.randn(2, 6, 4, 5)
    kept = features.clone()
    made = unit(features)
    assert torch.equal(features, kept)
    in_place = features.clone()
    wanted = unit.conv1(nn.ReLU(inplace=True)(in_place))
    wanted = unit.conv2(wanted.relu()) + in_place
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-6)
    assert (made - (unit.conv2(unit.conv1(features.relu()).relu()) + features)).abs().max() > 0.5


def test_uv_embedding_equals_its_formula_in_portrait():
    rows, columns, channels, aspect = 5, 3, 16, 3 / 5
    made = uv_embedding((rows, columns), channels, aspect, torch.device("cpu"))
    assert made.shape == (channels, rows, columns)
    diagonal = math.sqrt(aspect**2 + 1)
    for row in range(rows):
        for column in range(columns):
            x = aspect / diagonal * (2 * column - (columns - 1)) / columns
            y = 1 / diagonal * (2 * row - (rows - 1)) / rows
            for index in range(channels // 4):
                omega = 100 ** (-index / (channels // 4))
                wanted = (math.sin(x * omega), math.cos(x * omega), math.sin(y * omega), math.cos(y * omega))
                for block, value in enumerate(wanted):
                    assert made[block * channels // 4 + index, row, column].item() == pytest.approx(value, abs=1e-6)

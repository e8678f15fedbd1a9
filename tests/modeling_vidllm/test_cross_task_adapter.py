"""Cross-Task Adapter: identity when fresh, the bridge formula, who reaches whom with a gradient."""

import pytest
import torch
from tiny import tiny_config
from torch import nn

from vidllm.modeling_vidllm.configuration_vidllm import ADAPTER_TYPES
from vidllm.modeling_vidllm.cross_task_adapter_vidllm import VidLLMCrossTaskAdapter


B, S, P, C = 2, 3, 6, 32
COUPLED = [name for name in ADAPTER_TYPES if name != "none"]


def fresh(**changes):
    """An adapter as `_init_weights` leaves it: linears drawn, children before parents."""
    torch.manual_seed(0)
    config = tiny_config(**changes)
    adapter = VidLLMCrossTaskAdapter(config)

    def initialise(module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if hasattr(module, "init_weights"):
            module.init_weights()

    return adapter.apply(initialise)


def randomised(seed=1, **changes):
    """An adapter with every parameter random, so that zero gates hide nothing."""
    adapter = fresh(**changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapter


def tokens(seed=3, batch=B):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, S, P, C, generator=generator)


def squares(tensor, seed=11):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(tensor.shape, generator=generator) * tensor.square()).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_adapter_layers", [1, 2])
@pytest.mark.parametrize("adapter_type", ADAPTER_TYPES)
def test_fresh_adapter_is_the_identity(adapter_type, num_adapter_layers, dtype):
    adapter = fresh(adapter_type=adapter_type, num_adapter_layers=num_adapter_layers).to(dtype)
    geom_base, lang_base = tokens(3).to(dtype), tokens(4).to(dtype)
    geom, lang = adapter(geom_base, lang_base)
    assert geom.dtype == dtype
    assert torch.equal(geom, geom_base)
    assert torch.equal(lang, lang_base)
    changed, _ = randomised(adapter_type=adapter_type)(tokens(3), tokens(4))
    assert not torch.allclose(changed, tokens(3), atol=0.1)


def slow_attention(attention, queries, context):
    """One query and one head at a time."""
    normed = attention.norm_context(context)
    keys, values = attention.k_proj(normed), attention.v_proj(normed)
    asked = attention.q_proj(attention.norm_query(queries))
    width = C // attention.num_heads
    rows = []
    for row in asked:
        parts = []
        for head in range(attention.num_heads):
            span = slice(head * width, (head + 1) * width)
            weights = torch.softmax(keys[:, span] @ row[span] / width**0.5, dim=0)
            parts.append(weights @ values[:, span])
        rows.append(torch.cat(parts))
    return attention.o_proj(torch.stack(rows))


def slow_bridge(adapter, geom, lang):
    """Paper eq. 1-2 for the tokens `(M, C)` of one video or one frame."""
    geom = geom + adapter.phi_geom.mlp.fc2(nn.functional.gelu(adapter.phi_geom.mlp.fc1(geom)))
    lang = lang + adapter.phi_lang.mlp.fc2(nn.functional.gelu(adapter.phi_lang.mlp.fc1(lang)))
    bridge = adapter.bridge.tokens
    for layer in adapter.layers:
        bridge = (
            bridge
            + slow_attention(layer.bridge_from_geom, bridge, geom)
            + slow_attention(layer.bridge_from_lang, bridge, lang)
        )
        geom = geom + slow_attention(layer.geom_from_bridge, geom, bridge)
        lang = lang + slow_attention(layer.lang_from_bridge, lang, bridge)
    return geom, lang


@pytest.mark.parametrize("num_adapter_layers", [1, 2])
@pytest.mark.parametrize("bridge_scope", ["scene", "frame"])
def test_bridge_equals_the_formula(bridge_scope, num_adapter_layers):
    adapter = randomised(bridge_scope=bridge_scope, num_adapter_layers=num_adapter_layers)
    geom_base, lang_base = tokens(3), tokens(4)
    geom, lang = adapter(geom_base, lang_base)
    for video in range(B):
        if bridge_scope == "scene":
            wanted = slow_bridge(adapter, geom_base[video].flatten(0, 1), lang_base[video].flatten(0, 1))
            torch.testing.assert_close(geom[video].flatten(0, 1), wanted[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(lang[video].flatten(0, 1), wanted[1], rtol=1e-4, atol=1e-5)
        else:
            for frame in range(S):
                wanted = slow_bridge(adapter, geom_base[video, frame], lang_base[video, frame])
                torch.testing.assert_close(geom[video, frame], wanted[0], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(lang[video, frame], wanted[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("adapter_type", "bridge_scope", "crosses_frames"),
    [
        ("bridge", "scene", True),
        ("bridge", "frame", False),
        ("concat_self_attention", "scene", False),
        ("cross_attention", "scene", False),
        ("none", "scene", False),
    ],
)
def test_what_a_token_can_see(adapter_type, bridge_scope, crosses_frames):
    adapter = randomised(adapter_type=adapter_type, bridge_scope=bridge_scope)
    geom, lang = adapter(tokens(3), tokens(4))
    moved = tokens(4)
    moved[0, 1, 2] += 1.0
    geom_moved, lang_moved = adapter(tokens(3), moved)
    changed = (geom_moved - geom).abs().amax(-1) > 0
    lang_changed = (lang_moved - lang).abs().amax(-1) > 0
    coupled = adapter_type != "none"
    assert not changed[1].any(), "videos are independent"
    assert not lang_changed[1].any(), "videos are independent"
    assert changed[0, 1].all() == coupled
    assert changed[0, 0].any() == crosses_frames
    assert lang_changed[0, 1, 2]
    # With direct cross-attention a language token reads geometry tokens only.
    assert lang_changed[0, 1, 3] == (coupled and adapter_type != "cross_attention")


@pytest.mark.parametrize("num_adapter_layers", [1, 2])
@pytest.mark.parametrize("adapter_type", ADAPTER_TYPES)
def test_every_parameter_gets_a_gradient(adapter_type, num_adapter_layers):
    adapter = randomised(adapter_type=adapter_type, num_adapter_layers=num_adapter_layers)
    geom, lang = adapter(tokens(3), tokens(4))
    (squares(geom) + squares(lang, 12)).backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-4, name


@pytest.mark.parametrize("bridge_scope", ["scene", "frame"])
@pytest.mark.parametrize("adapter_type", ADAPTER_TYPES)
@pytest.mark.parametrize("stream", ["geom", "lang"])
def test_one_stream_reaches_the_other_mlp_only_through_the_coupling(stream, adapter_type, bridge_scope):
    adapter = randomised(adapter_type=adapter_type, bridge_scope=bridge_scope)
    base = tokens(3)
    own = {"geom": adapter.phi_geom, "lang": adapter.phi_lang}
    other = own["lang" if stream == "geom" else "geom"]
    wanted = [*other.parameters()]

    def gradients():
        geom, lang = adapter(base, base)
        return torch.autograd.grad(squares(geom if stream == "geom" else lang), wanted, allow_unused=True)

    reached = gradients()
    if adapter_type == "none":
        assert all(gradient is None for gradient in reached)
        return
    assert all(gradient.abs().max() > 1e-6 for gradient in reached)
    # Cut the write-backs: nothing may be left.
    with torch.no_grad():
        for name, parameter in adapter.layers.named_parameters():
            if ".o_proj." in name and "bridge_from" not in name:
                parameter.zero_()
    reached = gradients()
    assert all(gradient is None or not gradient.any() for gradient in reached)


def test_sdpa_equals_eager_and_checkpointing_changes_nothing():
    for adapter_type in COUPLED:
        results = []
        for implementation, checkpointing in (("eager", False), ("sdpa", False), ("eager", True)):
            adapter = randomised(adapter_type=adapter_type, num_adapter_layers=2)
            for module in adapter.modules():
                if hasattr(module, "config"):
                    module.config._attn_implementation = implementation
            if checkpointing:
                for layer in adapter.layers:
                    layer.gradient_checkpointing = True
                    layer._gradient_checkpointing_func = lambda function, *args: torch.utils.checkpoint.checkpoint(
                        function, *args, use_reentrant=False
                    )
            adapter.train()
            geom, lang = adapter(tokens(3), tokens(4))
            (squares(geom) + squares(lang)).backward()
            results.append((geom.detach(), lang.detach(), adapter.phi_geom.mlp.fc1.weight.grad))
        for plain, sdpa, checkpointed in zip(*results, strict=True):
            torch.testing.assert_close(sdpa, plain, rtol=1e-4, atol=1e-4)
            assert torch.equal(checkpointed, plain)


def test_a_row_alone_equals_the_row_in_a_batch():
    for adapter_type in ADAPTER_TYPES:
        adapter = randomised(adapter_type=adapter_type)
        geom, lang = adapter(tokens(3), tokens(4))
        geom_alone, lang_alone = adapter(tokens(3)[1:], tokens(4)[1:])
        torch.testing.assert_close(geom_alone, geom[1:], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lang_alone, lang[1:], rtol=1e-5, atol=1e-5)


def test_bridge_tokens_exist_only_where_they_are_used_and_start_different():
    bridge = fresh().bridge.tokens
    assert bridge.shape == (5, C)
    assert 0.8 < bridge.std() < 1.2
    assert (bridge[0] - bridge[1]).abs().max() > 0
    for adapter_type in ("none", "concat_self_attention", "cross_attention"):
        assert not any("bridge" in name for name, _ in fresh(adapter_type=adapter_type).named_parameters())
    assert len(fresh(adapter_type="none", num_adapter_layers=3).layers) == 0

"""The norm in front of camera and room head: what tokens share is taken away, and no loss can move it."""

import copy

import pytest
import torch
from tiny import tiny_config, tiny_model, tiny_videos

from vidllm.modeling_vidllm.layers_vidllm import VidLLMCentredNorm
from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration


def tokens_with_much_in_common(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 20 * torch.randn(16, generator=generator) + torch.randn(5, 3, 16, generator=generator)


def test_in_training_what_is_shared_goes_and_what_differs_stays():
    norm = VidLLMCentredNorm(16).train()
    out = norm(tokens_with_much_in_common())
    torch.testing.assert_close(out.mean(dim=(0, 1)), torch.zeros(16), atol=1e-5, rtol=0)
    assert 0.9 < out.flatten(0, 1).std(dim=0).mean() < 1.1


def test_equals_batch_norm_after_layer_norm():
    norm, reference = VidLLMCentredNorm(16).train(), torch.nn.BatchNorm1d(16, momentum=0.05).train()
    tokens = tokens_with_much_in_common().requires_grad_()
    wanted = reference(torch.nn.functional.layer_norm(tokens, (16,)).flatten(0, 1)).reshape(tokens.shape)
    out, weight = norm(tokens), torch.randn(5, 3, 16)
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    for value in (out, wanted):
        value.mul(weight).sum().backward(inputs=[tokens])
    # both backward passes added up: twice the gradient of one
    (alone,) = torch.autograd.grad((norm(tokens) * weight).sum(), tokens)
    torch.testing.assert_close(tokens.grad, 2 * alone, atol=1e-4, rtol=1e-4)


def test_evaluation_uses_what_training_saw_and_depends_on_no_other_token():
    norm = VidLLMCentredNorm(16).train()
    for seed in range(200):
        norm(tokens_with_much_in_common() + 0.1 * torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(seed)))
    norm.eval()
    tokens = tokens_with_much_in_common()
    out = norm(tokens)
    assert out.mean(dim=(0, 1)).abs().max() < 0.2
    torch.testing.assert_close(norm(tokens[2:3, :1]), out[2:3, :1])


@pytest.mark.parametrize("case", ["frozen", "without gradient", "evaluation"])
def test_statistics_stay_where_nothing_is_learned(case):
    norm = VidLLMCentredNorm(16).train(case != "evaluation")
    norm.requires_grad_(case != "frozen")
    before = copy.deepcopy(norm.state_dict())
    with torch.set_grad_enabled(case != "without gradient"):
        norm(tokens_with_much_in_common())
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_a_single_token_is_centred_on_what_was_seen_before_and_changes_none_of_it():
    """Centred on itself it would be nothing, and nothing would be learned from it: one video has one token for its room."""
    norm = VidLLMCentredNorm(16).train()
    for seed in range(3):
        norm(tokens_with_much_in_common() + 0.1 * torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(seed)))
    before = copy.deepcopy(norm.state_dict())
    token = tokens_with_much_in_common()[3, :1].requires_grad_()
    out = norm(token)
    out.square().sum().backward()
    assert token.grad.abs().max() > 0
    assert norm.weight.grad.abs().max() > 0
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    assert torch.equal(out, norm.eval()(token))
    assert out.abs().max() > 0.1


def test_a_model_with_it_saves_its_statistics_and_is_the_same_after_loading(tmp_path):
    model = tiny_model(camera_token_norm="centred").train()
    # the one of another size has a token of its own for its room, which says nothing
    pixels, sizes = tiny_videos([(3, 28, 42), (2, 28, 28), (3, 28, 42)])
    for _ in range(3):
        model.model(pixel_values_videos=pixels, video_size_shw=sizes, output_scene_tokens=False)
    model.eval().save_pretrained(tmp_path)
    again = VidLLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    for part in ("camera_head.token_norm", "room_head.norm"):
        norm, loaded = (m.get_submodule(f"model.reconstruction.{part}") for m in (model, again))
        assert norm.running_mean.abs().max() > 0
        assert torch.equal(norm.running_mean, loaded.running_mean)
    with torch.no_grad():
        wanted, got = (m.reconstruct(pixels, sizes) for m in (model, again))
    assert torch.equal(wanted.cam_from_world, got.cam_from_world)


def test_half_precision_statistics_are_read_in_float32():
    norm = tiny_model(camera_token_norm="centred").to(torch.float16).model.reconstruction.camera_head.token_norm
    assert norm.running_mean.dtype == torch.float16
    with torch.no_grad():
        assert norm(torch.randn(2, 3, 64)).dtype == torch.float32


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="camera_token_norm"):
        tiny_config(camera_token_norm="batch")

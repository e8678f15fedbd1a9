"""The structure loss at full size: its own gradient is right, what it keeps and what it needs at its highest are bounded, no teacher is a student."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from vidllm.train.distillation_losses import structure_loss


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_pairs(student, teacher):
    """With the matrices of all pairs, in float64, by autograd."""
    width = max(part.shape[-1] for part in teacher)
    z = torch.cat([nn.functional.normalize(part, dim=-1) for part in student], 1)
    y = [nn.functional.normalize(part, dim=-1) for part in teacher]
    y = torch.cat([nn.functional.pad(part, (0, width - part.shape[-1])) for part in y], 1)
    return ((z @ z.mT - y @ y.mT).square().sum((1, 2)) / z.shape[1] ** 2).sum()


@pytest.mark.parametrize(("patches", "widths"), [(3, (8, 5, 9)), (11, (4, 5, 3)), (4, (8, 8, 8))])
def test_value_and_gradient_are_those_of_all_pairs(patches, widths):
    """Fewer tokens than channels, more, and as many."""
    student = [drawn(3, patches, widths[0], seed=n).requires_grad_() for n in (1, 2)]
    teacher = drawn(3, patches, widths[1], seed=3), drawn(3, patches, widths[2], seed=4)
    value, count = structure_loss(tuple(student), teacher)
    wanted = of_pairs(student, teacher)
    assert count == 3
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(wanted.item(), rel=1e-6)
    got = torch.autograd.grad(5 * value, student)
    for mine, slow in zip(got, torch.autograd.grad(5 * wanted, student), strict=True):
        torch.testing.assert_close(mine, slow, rtol=1e-6, atol=1e-9)
    # teachers are given as features that want no gradient, whatever they say
    loud = tuple(part.clone().requires_grad_() for part in teacher)
    structure_loss(tuple(student), loud)[0].backward()
    assert [part.grad for part in loud] == [None, None]


def test_half_precision_and_features_of_no_length_give_finite_gradients():
    student = [drawn(2, 5, 4, seed=n).bfloat16() for n in (1, 2)]
    student[0][0, 2] = 0
    student = [part.requires_grad_() for part in student]
    teacher = drawn(2, 5, 4, seed=3), drawn(2, 5, 4, seed=4)
    value, _ = structure_loss(tuple(student), teacher)
    value.backward()
    assert value.isfinite()
    assert all(part.grad.dtype == torch.bfloat16 and part.grad.isfinite().all() for part in student)
    with torch.no_grad():
        assert structure_loss(tuple(student), teacher)[0].item() == pytest.approx(value.item())


def test_what_is_kept_is_as_large_as_the_students_streams():
    """Neither pairs of tokens (6 * 80 * 80) nor directions beside them."""
    student = [drawn(6, 40, 8, seed=n).float().requires_grad_() for n in (1, 2)]
    teacher = drawn(6, 40, 8, seed=3).float(), drawn(6, 40, 8, seed=4).float()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        structure_loss(tuple(student), teacher)
    assert sum(kept) == sum(part.nbytes for part in student)


_PEAK = """
import json, re, sys, torch
from pathlib import Path
from vidllm.train.distillation_losses import structure_loss

def status(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
frames, patches, width = map(int, sys.argv[1:])
# a small one first, so that libraries are loaded
warm = [torch.randn(1, 8, 4).requires_grad_() for _ in range(2)]
structure_loss(tuple(warm), tuple(part.detach() for part in warm))[0].backward()
student = [torch.randn(frames, patches, width).requires_grad_() for _ in range(2)]
teacher = [torch.randn(frames, patches, width) for _ in range(2)]
before = status("VmRSS")
value, count = structure_loss(tuple(student), tuple(teacher))
value.backward()
json.dump({"above": status("VmHWM") - before, "streams": sum(part.nbytes for part in student), "loss": value.item(), "count": count.item()}, sys.stdout)
"""


def peak(*shape):
    """Bytes above the inputs, of a fresh process."""
    done = subprocess.run([sys.executable, "-c", _PEAK, *map(str, shape)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_32_frames_at_full_size_need_twice_their_gradient_and_one_frames_work():
    """518 x 686 pixels: 37 x 49 patches, two streams of 1024 channels; all pairs of one frame are 105 MB in float64, of all frames together 108 GB."""
    measured = peak(32, 37 * 49, 1024)
    assert measured["count"] == 32
    assert 0 < measured["loss"] < 1
    # the gradient as it is kept and as it is given back; then a frame's directions, products and slope in float64
    assert measured["above"] < 2 * measured["streams"] + 500e6, measured
    print(
        f"\n32 frames of 37 x 49 patches: {measured['above'] / 1e6:.0f} MB above the inputs of {2 * measured['streams'] / 1e6:.0f} MB"
    )

"""Eight questions behind one video are eight questions behind eight copies of it: loss, gradients, and less work."""

import pytest
import torch

from . import packing_speed


QUESTIONS = 8


@pytest.mark.parametrize("freeze_encoder", [True, False])
def test_eight_questions_behind_one_video_are_behind_eight_copies(rooms_rows, tmp_path, freeze_encoder):
    trainer, processor = packing_speed.trainer_of("vidllm-tiny", tmp_path, freeze_encoder)
    rows = {name: rooms_rows[name] for name in packing_speed.BENCHMARKS}
    batches = packing_speed.batches_of(rows, processor, 2, QUESTIONS, 3)
    packed, unpacked = batches["packed"][0], batches["unpacked"][0]
    assert (len(packed["pixel_values_videos"]), len(unpacked["pixel_values_videos"])) == (2, 2 * QUESTIONS)
    assert len(packed["sample_ids"]) == len(unpacked["sample_ids"]) == 2 * QUESTIONS
    assert packed["targets"]["box_mask"].any()
    losses, gradients = [], []
    for kind in ("packed", "unpacked"):
        losses.append(packing_speed.step(trainer, batches[kind], with_optimizer=False))
        gradients.append({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert ("model.encoder.model.encoder.layer.0.norm1.weight" in gradients[0]) != freeze_encoder
    whole = sum(grad.double().square().sum() for grad in gradients[1].values()).sqrt()
    for name, wanted in gradients[1].items():
        error = (gradients[0][name] - wanted).double().norm()
        # what is nothing but rounding (a key's bias, say) is small beside the whole gradient
        assert error < 1e-3 * wanted.double().norm() + 1e-6 * whole, (name, float(error), float(wanted.norm()))


def test_the_script_measures_the_same_loss_and_a_third_of_the_work():
    torch.set_num_threads(1)
    found = packing_speed.measure("vidllm-tiny", 1, QUESTIONS, frames=3, size_hw=(28, 42), repeats=1)
    packed, unpacked = found["packed"], found["unpacked"]
    assert (packed["samples"], packed["videos"], unpacked["samples"], unpacked["videos"]) == (8, 1, 8, 8)
    assert packed["loss"] == pytest.approx(unpacked["loss"], rel=1e-5)
    assert unpacked["gflop_per_sample"] > 3 * packed["gflop_per_sample"] > 0
    assert min(packed["samples_per_second"], unpacked["samples_per_second"]) > 0

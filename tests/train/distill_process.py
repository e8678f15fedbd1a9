"""One process of a run of stage 1 that several share: `distill_process.py CLIPS OUT FIELD=VALUE...`; trains with plain SGD."""

import sys

import torch

from vidllm.train import distillation
from vidllm.train.distill_recipes import chosen_distill_recipe


def trained_with_sgd(settings, clips, out):
    """Train `debug_stage1`, with SGD instead of AdamW, which would blow differences in the last bit up."""
    arguments = distillation.training_arguments

    def with_sgd(*args, **kwargs):
        made = arguments(*args, **kwargs)
        made.optim = "sgd"
        return made

    distillation.training_arguments = with_sgd
    try:
        return distillation.train_distill(
            chosen_distill_recipe("debug_stage1", settings, str(clips)), out, use_cpu=True
        )
    finally:
        distillation.training_arguments = arguments


if __name__ == "__main__":
    torch.set_num_threads(1)
    trained_with_sgd(sys.argv[3:], sys.argv[1], sys.argv[2])

"""One process of a run that several share: `joint_process.py OUT FIELD=VALUE...`; trains `debug` with plain SGD."""

import json
import sys
from pathlib import Path

import torch

from vidllm.train import joint
from vidllm.train.recipes import chosen_recipe


def trained_with_sgd(settings, out):
    """Train `debug`, with SGD instead of AdamW, which would blow differences in the last bit up."""
    arguments = joint.training_arguments

    def with_sgd(*args, **kwargs):
        made = arguments(*args, **kwargs)
        made.optim = "sgd"
        return made

    joint.training_arguments = with_sgd
    try:
        return joint.train_joint(chosen_recipe("debug", settings), out, use_cpu=True)
    finally:
        joint.training_arguments = arguments


if __name__ == "__main__":
    torch.set_num_threads(1)
    trainer = trained_with_sgd(sys.argv[2:], sys.argv[1])
    facts = {"world_size": trainer.args.world_size, "wrapped": type(trainer.model_wrapped).__name__}
    (Path(sys.argv[1]) / f"process-{trainer.args.process_index}.json").write_text(json.dumps(facts))

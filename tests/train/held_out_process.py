"""One process of a look that several share: `held_out_process.py OUT CACHE`."""

import sys

import torch

from vidllm.train.joint import train_joint
from vidllm.train.recipes import chosen_recipe


if __name__ == "__main__":
    torch.set_num_threads(1)
    settings = ["steps=1", "batch_size=2", "held_out.scenes=3", "held_out.every=1", f"rooms_cache={sys.argv[2]}"]
    train_joint(chosen_recipe("debug", settings), sys.argv[1], use_cpu=True)

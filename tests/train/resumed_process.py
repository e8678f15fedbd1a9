"""One process of a run that two share and that may be stopped: `resumed_process.py OUT ROOMS STOP RESUME`; what `nano` has, on a tiny model."""

import sys

import torch
from stop_at import StopAt

from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.train import joint
from vidllm.train.initialise import build_untrained
from vidllm.train.presets import preset
from vidllm.train.recipes import chosen_recipe


SETTINGS = [
    "steps=5", "save_every=3", "keep_checkpoints=9", "prompts_per_scene=2", "optimizer=muon", "precision=bfloat16", "workers=1",
    "held_out.every=2", "held_out.scenes=2", "dense_labels=1", "loc_labels=0.5", "dense_matching=1", "freeze_encoder=false", "clip=1",
]  # fmt: skip


def centred_model(chosen, four_bits=False):
    """As wide as labels of patches want it, camera tokens centred over the batch."""
    processor = build_untrained("vidllm-tiny")[1]
    processor.video_processor.num_frames = chosen.num_frames
    torch.manual_seed(11)
    config = preset("vidllm-tiny").config(vision_config={"hidden_size": 48}, camera_token_norm="centred")
    return VidLLMForConditionalGeneration(config), processor


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, rooms, stop, resume = sys.argv[1:]
    joint.starting_model = centred_model
    recipe = chosen_recipe("debug", [*SETTINGS, f"rooms_cache={rooms}"])
    trainer = joint.train_joint(recipe, out, resume=resume == "1", use_cpu=True, callbacks=[StopAt(int(stop))])
    # gloo's threads are gone before the interpreter is
    trainer.accelerator.wait_for_everyone()

"""Samples per second with a video encoded once for all its questions, and once for each: `python tests/train/packing_speed.py [--help]`.

Every step is a whole one of the joint trainer (forward, all losses, backward, clipping, AdamW) on the same questions about the same procedural rooms.
Run it on a machine that does nothing else.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path

import datasets
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainingArguments

from vidllm.processing.benchmarks.load import load_benchmark
from vidllm.processing.rooms.write import write_rooms
from vidllm.train.initialise import build_untrained
from vidllm.train.joint_trainer import VidLLMJointTrainer
from vidllm.train.recipes import MixingSchedule
from vidllm.train.scene_data import SceneCollator, SceneDataset, SceneVisit


BENCHMARKS = ("scanqa", "sqa3d", "scanrefer")


def batches_of(rows, processor, videos, questions, frames):
    """The same questions twice: behind one copy of their video, and each behind its own."""
    scenes = SceneDataset(rows, prompts_per_scene=0, num_frames=frames)
    picked = []
    for scene in range(videos):
        # benchmark after benchmark: some of each
        all_of_them = scenes.prompts(scene, 0)
        picked.append(all_of_them[:: max(1, len(all_of_them) // questions)][:questions])
    assert all(len(samples) == questions for samples in picked), [len(samples) for samples in picked]
    collator = SceneCollator(processor, num_frames=frames)
    # Other epochs are other videos, here with the same frames.
    return {
        "packed": [collator([SceneVisit(samples, 0) for samples in picked])],
        "unpacked": [collator([SceneVisit([s], n) for samples in picked for n, s in enumerate(samples)])],
    }


def trainer_of(preset, folder, freeze_encoder=True):
    """A joint trainer of a fresh model."""
    model, processor = build_untrained(preset, seed=4)
    # some prompts are about boxes, in metres
    model.config.is_metric = True
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=not torch.cuda.is_available(), max_steps=100, remove_unused_columns=False, report_to="none",
        disable_tqdm=True, dataloader_pin_memory=False, save_strategy="no", learning_rate=1e-4, weight_decay=0.05,
    )  # fmt: skip
    trainer = VidLLMJointTrainer(
        model=model.train(), args=args, freeze_encoder=freeze_encoder, given_geometry=MixingSchedule(1.0, 1.0)
    )
    trainer.state.max_steps = 100
    trainer.create_optimizer()
    return trainer, processor


def step(trainer, batches, with_optimizer=True):
    """One training step; its loss."""
    device = trainer.args.device
    batches, counts = trainer.get_batch_samples(iter(batches), len(batches), device)
    trainer.model.zero_grad()
    total = sum(trainer.training_step(trainer.model, batch, counts) for batch in batches)
    if with_optimizer:
        torch.nn.utils.clip_grad_norm_([p for p in trainer.model.parameters() if p.requires_grad], 1.0)
        trainer.optimizer.step()
    # Waits for the device.
    return float(total)


def measure(preset="vidllm-nano", videos=1, questions=8, frames=4, size_hw=(96, 128), repeats=5, freeze_encoder=True):
    """Samples per second (the best of the repeats), FLOPs per sample and loss, packed and unpacked."""
    datasets.disable_progress_bars()
    found = {}
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(sys.stderr):
        write_rooms(Path(place) / "root", videos, seed=3, difficulty="easy", size_hw=size_hw)
        rows = {
            name: load_benchmark(name, Path(place) / "root", "train", cache_dir=Path(place) / "cache")
            for name in BENCHMARKS
        }
        batches = batches_of(rows, build_untrained(preset)[1], videos, questions, frames)
        for kind, batch in batches.items():
            trainer, _ = trainer_of(preset, Path(place) / kind, freeze_encoder)
            with FlopCounterMode(display=False) as counter:
                loss = step(trainer, batch, with_optimizer=False)
            seconds = []
            for _ in range(repeats):
                begun = time.perf_counter()
                step(trainer, batch)
                seconds.append(time.perf_counter() - begun)
            samples = len(batch[0]["sample_ids"])
            found[kind] = {
                "samples": samples,
                "videos": len(batch[0]["pixel_values_videos"]),
                "loss": loss,
                "gflop_per_sample": counter.get_total_flops() / samples / 1e9,
                "samples_per_second": samples / min(seconds) if seconds else None,
            }
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="vidllm-nano")
    parser.add_argument("--videos", type=int, default=1, help="videos per step")
    parser.add_argument("--questions", type=int, default=8, help="about each video")
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--size", default="96x128", help="height x width of the frames, pixels")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--train-encoder", action="store_true")
    given = parser.parse_args()
    size_hw = tuple(int(side) for side in given.size.split("x"))
    found = measure(
        given.preset, given.videos, given.questions, given.frames, size_hw, given.repeats, not given.train_encoder
    )
    sys.stdout.write(
        f"{given.preset}, {given.videos} videos of {given.frames} frames of {given.size}, {given.questions} questions each, "
        f"{torch.get_num_threads()} threads, {'cuda' if torch.cuda.is_available() else 'cpu'}\n"
    )
    for kind, of in found.items():
        sys.stdout.write(
            f"{kind:9} {of['samples_per_second']:8.2f} samples/s  {of['gflop_per_sample']:9.2f} GFLOP/sample  {of['videos']} videos in "
            f"a step  loss {of['loss']:.6f}\n"
        )
    packed, unpacked = found["packed"], found["unpacked"]
    sys.stdout.write(
        f"packed is {packed['samples_per_second'] / unpacked['samples_per_second']:.2f} times as fast, with "
        f"{unpacked['gflop_per_sample'] / packed['gflop_per_sample']:.2f} times fewer FLOPs\n"
    )


if __name__ == "__main__":
    main()

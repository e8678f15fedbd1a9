"""One process of a run whose processes see unlike things: `mixed_process.py ROOMS_ROOT CLIPS_JSONL OUT STEPS BATCH_SIZE [POISONED_STEP [CHECKPOINTING]]`.

Of two videos in a row the first has boxes and depth, the second neither: of two processes with one video each, the first sees the former alone.
"""

import json
import sys
from pathlib import Path

import datasets
import torch
from transformers import TrainingArguments

from vidllm.processing.benchmarks.load import load_benchmark
from vidllm.train.initialise import build_untrained
from vidllm.train.joint import RunLog
from vidllm.train.joint_trainer import VidLLMJointTrainer
from vidllm.train.recipes import MixingSchedule
from vidllm.train.scene_data import SceneCollator, SceneDataset, SceneVisit


FRAMES = 3


class Unlike(torch.utils.data.Dataset):
    """Rooms with boxes at even places; at odd places clips without cameras and depth, or questions about rooms, in turn."""

    def __init__(self, root, clips, num_visits):
        def of(**rows):
            return SceneDataset(rows, prompts_per_scene=2, num_frames=FRAMES)

        cache = Path(root).parent / "cache"
        boxes = of(scanrefer=load_benchmark("scanrefer", root, "train", cache_dir=cache))
        asked = of(scanqa=load_benchmark("scanqa", root, "train", cache_dir=cache))
        bare = of(jsonl=load_benchmark("jsonl", clips, "train", cache_dir=cache))
        self.sources, self.num_visits = [boxes, bare, boxes, asked], num_visits

    def __len__(self):
        return self.num_visits

    def __getitem__(self, visit):
        scenes = self.sources[visit % 4]
        return SceneVisit(scenes.prompts(visit // 2 % len(scenes), visit // 4), visit // 4)


class Watched(VidLLMJointTrainer):
    """Notes what each step of this process saw; from a step on, the first process's losses are not finite."""

    poisoned_step = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def weighted_terms(self, model, inputs):
        terms, weights, output = super().weighted_terms(model, inputs)
        targets = inputs["targets"]
        self.seen.append(
            {
                "ids": inputs["sample_ids"],
                "boxes": int(targets["box_mask"].sum()),
                "depth": "depth_m" in targets and int(targets["depth_mask"].sum()),
                "cameras": int(targets["camera_mask"].sum()),
                "points": "coord_points_world" in inputs,
                "finite": all(bool(value.isfinite()) for value, _ in terms.values()),
            }
        )
        if self._step == self.poisoned_step and self.args.process_index == 0:
            value, count = terms["token"]
            terms["token"] = (value * float("nan"), count)
        return terms, weights, output


def run(root, clips, out, steps, batch_size, poisoned_step=None, checkpointing=0):
    """Train a tiny model with plain SGD; facts of this process are left in `out`."""
    datasets.disable_progress_bars()
    model, processor = build_untrained("vidllm-tiny", seed=4)
    args = TrainingArguments(
        output_dir=str(out), use_cpu=True, max_steps=steps, remove_unused_columns=False, report_to="none", disable_tqdm=True,
        per_device_train_batch_size=batch_size, logging_steps=1, train_sampling_strategy="sequential", save_steps=2,
        dataloader_pin_memory=False, optim="sgd", learning_rate=0.05, lr_scheduler_type="constant", max_grad_norm=1.0,
        ddp_find_unused_parameters=False, save_total_limit=1, activation_checkpointing=bool(checkpointing),
    )  # fmt: skip
    trainer = Watched(
        model=model.train(), args=args, freeze_encoder=False, has_metric_depth=True, given_geometry=MixingSchedule(1.0, 1.0),
        train_dataset=Unlike(root, clips, 2 * steps), data_collator=SceneCollator(processor, num_frames=FRAMES),
        processing_class=processor, callbacks=[RunLog(out)],
    )  # fmt: skip
    trainer.poisoned_step = poisoned_step
    error = None
    try:
        trainer.train()
    except FloatingPointError as stopped:
        error = str(stopped)
    facts = {
        "world_size": trainer.args.world_size,
        "wrapped": type(trainer.model_wrapped).__name__,
        "seen": trainer.seen,
        "error": error,
    }
    Path(out, f"process-{trainer.args.process_index}.json").write_text(json.dumps(facts))
    if error is None and trainer.is_world_process_zero():
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(str(out))
    # As every run ends. A thread of gloo may still hold a tensor of the last exchange, and to let go of it while Python ends aborts the process.
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    torch.set_num_threads(1)
    places, numbers = sys.argv[1:4], [int(text) for text in sys.argv[4:]]
    run(*places, *numbers)

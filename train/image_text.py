"""A small image-text model on procedural rooms: the semantic teacher of stage 1 where none can be had.

A picture and a sentence that names what is in it ("a red chair, a blue table") are told from those of other rooms, as CLIP is trained.

`accelerate launch -m vidllm.train.image_text nano_image_text --out DIR`
"""

import argparse
import logging
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from vidllm.train.counted_trainer import CountedTrainer
from vidllm.train.joint import RunLog
from vidllm.train.plain_prompts import LEAST_PIXELS
from vidllm.train.presets import IMAGENET_MEAN, IMAGENET_STD
from vidllm.train.recipes import known_name, with_settings
from vidllm.train.room_source import (
    BACKGROUND,
    CATEGORY_NAMES,
    COLOUR_NAMES,
    RoomMakers,
    RoomScene,
    RoomScenes,
    RoomSource,
    RoomsSettings,
)
from vidllm.train.run_folder import checkpoint_to_resume, write_recipe
from vidllm.train.tokenizer import byte_level_tokenizer


logger = logging.getLogger(__name__)

NOTHING = "an empty corner of a room"
MOST_THINGS, MOST_TOKENS = 6, 64


@dataclass(frozen=True)
class ImageTextRecipe:
    """Everything that such a run depends on.

    Args:
        name (`str`): Of the recipe.
        rooms (`RoomsSettings`): The rooms.
        rooms_cache (`str`, *optional*): Folder that keeps them; by default `rooms` in the run's folder.
        width (`int`): Of both towers.
        layers (`int`): Of each tower.
        heads (`int`): Of each tower.
        patch_size (`int`): Pixels.
        merges (`str`, *optional*): Of the tokenizer, see `byte_level_tokenizer`.
        steps (`int`): Optimizer steps.
        batch_size (`int`): Pictures per process and step, each of another visit of a room.
        learning_rate (`float`): At its highest.
        warmup (`float`): Share of the steps in which it rises.
        weight_decay (`float`): Of matrices.
        precision (`str`): `float32` or `bfloat16`.
        workers (`int`): Processes that read rooms.
        seed (`int`): Of everything that is drawn.
        log_every (`int`): Steps between lines of the log.
        save_every (`int`): Steps between checkpoints.

    Raises:
        ValueError: A number is out of range.

    Source:
        Upstream: openai/CLIP (two towers, symmetric cross-entropy). Ours: sizes, sentences.
    """

    name: str
    rooms: RoomsSettings
    rooms_cache: str | None = None
    width: int = 192
    layers: int = 6
    heads: int = 3
    patch_size: int = 16
    merges: str | None = "nano_merges.json"
    steps: int = 1500
    batch_size: int = 32
    learning_rate: float = 8e-4
    warmup: float = 0.05
    weight_decay: float = 0.05
    precision: str = "bfloat16"
    workers: int = 1
    seed: int = 0
    log_every: int = 20
    save_every: int = 250

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "patch_size", "steps", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: wanted at least 1; got {getattr(self, name)}")
        if self.batch_size < 2:
            raise ValueError(f"batch_size: wanted at least 2 pictures to tell apart; got {self.batch_size}")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision: wanted float32 or bfloat16; got {self.precision!r}")


def debug_image_text() -> ImageTextRecipe:
    """Seconds on a laptop.

    Returns:
        `ImageTextRecipe`: complete.

    Source:
        Ours.
    """
    rooms = RoomsSettings(
        num_rooms=4, block_size=4, first_blocks=1, makers=0, size_hw=(28, 42), frames_kept=6, jpeg_share=0.0
    )
    return ImageTextRecipe(
        name="debug_image_text", rooms=rooms, width=24, layers=1, heads=2, patch_size=14, merges=None, steps=2, batch_size=4,
        precision="float32", workers=0, log_every=1, save_every=2,
    )  # fmt: skip


def nano_image_text() -> ImageTextRecipe:
    """The semantic teacher of `nano_stage1`.

    Returns:
        `ImageTextRecipe`: complete.

    Source:
        Ours.
    """
    rooms = RoomsSettings(
        num_rooms=12000,
        levels={"easy": 0.9, "standard": 0.1},
        frames_kept=8,
        first_blocks=64,
        unlocked_at=0.6,
        makers=1,
    )
    return ImageTextRecipe(name="nano_image_text", rooms=rooms)


IMAGE_TEXT_RECIPES: Mapping[str, Callable[[], ImageTextRecipe]] = types.MappingProxyType(
    {function.__name__: function for function in (debug_image_text, nano_image_text)}
)


def sentence_of(instance: np.ndarray, object_labels: np.ndarray) -> str:
    """What is in a picture, largest first.

    Args:
        instance (`np.ndarray` of shape `(H, W)`, uint8): Object id, `BACKGROUND` = none.
        object_labels (`np.ndarray` of shape `(objects, 2 or more)`, int64): Category, colour (-1 = none) and more by object id.

    Returns:
        `str`

    Source:
        Ours.
    """
    pixels = np.bincount(instance.reshape(-1), minlength=BACKGROUND + 1)[: len(object_labels)]
    # A picture of half the size shows a thing with a quarter of the pixels.
    least = LEAST_PIXELS * instance.size / (96 * 128)
    seen = [number for number in np.argsort(-pixels, kind="stable").tolist() if pixels[number] >= least][:MOST_THINGS]
    names = []
    for number in seen:
        category, colour, *_ = object_labels[number].tolist()
        words = ([] if colour < 0 else [COLOUR_NAMES[colour]]) + [CATEGORY_NAMES[category]]
        article = "an" if words[0][0] in "aeiou" else "a"
        names.append(" ".join([article, *words]))
    return ", ".join(names) if names else NOTHING


class ImageTextCollator:
    """Batches of pictures with their sentences.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Of the text tower.

    Source:
        Ours.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def __call__(self, scenes: Sequence[RoomScene]) -> dict[str, torch.Tensor]:
        """Make a batch of the first frame of each visit.

        Args:
            scenes (`Sequence[RoomScene]`): Visits with at least one frame.

        Returns:
            `dict`: `pixel_values (N, 3, H, W)` float32, normalised; `input_ids (N, L)`, `attention_mask (N, L)` int64; `sample_ids`, the
            pictures' names.

        Source:
            Ours.
        """
        pictures = torch.from_numpy(np.stack([scene.frames.rgb[0] for scene in scenes])).float() / 255
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        texts = [sentence_of(scene.instance[0], scene.object_labels) for scene in scenes]
        ends = [f"{text}{self.tokenizer.eos_token}" for text in texts]
        encoded = self.tokenizer(
            ends, padding=True, truncation=True, max_length=MOST_TOKENS, padding_side="right", return_tensors="pt"
        )
        return {
            # (N, H, W, 3) -> (N, 3, H, W)
            "pixel_values": (pictures.permute(0, 3, 1, 2) - mean) / std,
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "sample_ids": [f"{scene.frames.source}#{scene.frames.indices[0]}" for scene in scenes],
        }


class ImageTextTrainer(CountedTrainer):
    """Trains two towers to tell which sentence belongs to which picture of a batch.

    Args:
        **kwargs: As of `CountedTrainer`.

    Source:
        Upstream: openai/CLIP, huggingface/transformers `CLIPModel`.
    """

    def batch_counts(self, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Pairs of a batch; see `CountedTrainer.batch_counts`."""
        return {"pairs": torch.tensor(float(len(batch["sample_ids"])))}

    def weighted_terms(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, float], Any]:
        """Symmetric cross-entropy within the batch of a process.

        Args:
            model (`nn.Module`): A `CLIPModel`, as wrapped for distributed training.
            inputs (`dict`): From `ImageTextCollator`.

        Returns:
            `tuple`: sum over the pairs and their number, `()`; weight; `CLIPOutput`.

        Source:
            Upstream: openai/CLIP.
        """
        own = {name: value for name, value in inputs.items() if name != "sample_ids"}
        output = model(**own, interpolate_pos_encoding=True, return_loss=True)
        count = torch.tensor(float(len(inputs["sample_ids"])), device=output.loss.device)
        return {"pairs": (output.loss.float() * count, count)}, {"pairs": 1.0}, output


def build_image_text(chosen: ImageTextRecipe) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Two small towers with random weights, and a tokenizer.

    Args:
        chosen (`ImageTextRecipe`): Sizes and seed.

    Returns:
        `tuple`: `CLIPModel`, tokenizer.

    Source:
        Upstream: huggingface/transformers `CLIPModel`.
    """
    tokenizer = byte_level_tokenizer("chatml", chosen.merges)
    side = min(chosen.rooms.size_hw) // chosen.patch_size * chosen.patch_size
    tower = {
        "hidden_size": chosen.width,
        "intermediate_size": 3 * chosen.width,
        "num_hidden_layers": chosen.layers,
        "num_attention_heads": chosen.heads,
    }
    config = AutoConfig.for_model(
        "clip",
        vision_config={**tower, "image_size": side, "patch_size": chosen.patch_size},
        text_config={
            **tower,
            "vocab_size": -(-len(tokenizer) // 8) * 8,
            "max_position_embeddings": MOST_TOKENS,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        projection_dim=chosen.width,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(chosen.seed)
        return AutoModel.from_config(config), tokenizer


def train_image_text(
    chosen: ImageTextRecipe, out_dir: str | Path, resume: bool | str = False, use_cpu: bool = False
) -> ImageTextTrainer:
    """Run a recipe, on every process of a launch.

    Args:
        chosen (`ImageTextRecipe`): Complete.
        out_dir (`str` or `Path`): New or empty folder, unless a run is resumed.
        resume (`bool` or `str`): Go on from the last checkpoint, or from the one named.
        use_cpu (`bool`): Whether to leave accelerators alone.

    Returns:
        `ImageTextTrainer`: after training; `<out>` is a folder that `AutoModel` loads and stage 1 takes as a teacher.

    Raises:
        ValueError: The folder is not usable.
        FloatingPointError: A loss was not finite; names the pictures.

    Source:
        Ours.
    """
    out_dir = Path(out_dir).expanduser()
    args = TrainingArguments(
        output_dir=str(out_dir),
        use_cpu=use_cpu,
        max_steps=chosen.steps,
        per_device_train_batch_size=chosen.batch_size,
        train_sampling_strategy="sequential",
        learning_rate=chosen.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(chosen.warmup * chosen.steps),
        weight_decay=chosen.weight_decay,
        bf16=chosen.precision == "bfloat16",
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        dataloader_num_workers=chosen.workers,
        dataloader_pin_memory=torch.cuda.is_available() and not use_cpu,
        logging_steps=chosen.log_every,
        save_steps=chosen.save_every,
        save_total_limit=2,
        report_to="none",
        seed=chosen.seed,
        disable_tqdm=not sys.stderr.isatty(),
    )
    state = PartialState()
    checkpoint = checkpoint_to_resume(out_dir, resume) if resume or state.is_main_process else None
    # Nobody writes before everybody has looked.
    state.wait_for_everyone()
    model, tokenizer = build_image_text(chosen)
    source = RoomSource(chosen.rooms, chosen.rooms_cache or out_dir / "rooms")
    visits = RoomScenes(
        source,
        chosen.steps * chosen.batch_size * state.num_processes,
        num_frames=1,
        prompts_per_scene=0,
        seed=chosen.seed,
    )
    trainer = ImageTextTrainer(
        model=model, args=args, train_dataset=visits, data_collator=ImageTextCollator(tokenizer), processing_class=tokenizer,
        callbacks=[RunLog(out_dir)],
    )  # fmt: skip
    if state.is_main_process:
        for line in write_recipe(chosen, out_dir, checkpoint, {"processes": state.num_processes}):
            logger.warning("resumed with another recipe: %s", line)
    state.wait_for_everyone()
    if state.is_local_main_process:
        with RoomMakers(source):
            trainer.train(resume_from_checkpoint=checkpoint)
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(out_dir))
    state.wait_for_everyone()
    return trainer


def main(arguments: Sequence[str] | None = None) -> int:
    """The command.

    Args:
        arguments (`Sequence[str]`, *optional*): By default those of the process.

    Returns:
        `int`: exit code; 2 on bad input, with one line on stderr.

    Source:
        Ours.
    """
    parser = argparse.ArgumentParser(
        prog="python -m vidllm.train.image_text", description="Train an image-text model."
    )
    parser.add_argument("recipe", help=f"one of {', '.join(IMAGE_TEXT_RECIPES)}")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the run")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="FIELD=VALUE")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the folder")
    parser.add_argument("--cpu", action="store_true", help="leave accelerators alone")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    disable_progress_bar()
    try:
        chosen = with_settings(
            IMAGE_TEXT_RECIPES[known_name("recipe", given.recipe, IMAGE_TEXT_RECIPES)](), given.settings
        )
        train_image_text(chosen, given.out, resume=given.resume, use_cpu=given.cpu)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    return 0


__all__ = [
    "IMAGE_TEXT_RECIPES",
    "ImageTextCollator",
    "ImageTextRecipe",
    "ImageTextTrainer",
    "build_image_text",
    "debug_image_text",
    "main",
    "nano_image_text",
    "sentence_of",
    "train_image_text",
]


if __name__ == "__main__":
    sys.exit(main())

"""Parts of recipes of stage 2: how true geometry is mixed in, and adapters on the language model."""

import math
from dataclasses import dataclass

from vidllm.train.recipe_settings import check_expression, require


# Attention and feed-forward of the language model, by the names that most decoders of transformers use.
LANGUAGE_MODEL_LAYERS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass(frozen=True)
class MixingSchedule:
    """With which probability a video is given something true instead of what the model predicts.

    Args:
        start (`float`): At the first step.
        end (`float`): From `until` on.
        until (`float`): Share of the run after which the end is reached.
        shape (`str`): `linear` or `cosine` between them.

    Raises:
        ValueError: A number is not in 0..1, or the shape is unknown.

    Source:
        Ours: language can be learned while perception is not there yet; a model that is never told learns to live with its own.
    """

    start: float = 1.0
    end: float = 0.0
    until: float = 0.5
    shape: str = "cosine"

    def __post_init__(self) -> None:
        for name in ("start", "end", "until"):
            require(0 <= getattr(self, name) <= 1, f"mixing.{name}", "a number in 0..1", getattr(self, name))
        require(self.shape in ("linear", "cosine"), "mixing.shape", "linear or cosine", self.shape)

    def share(self, progress: float) -> float:
        """Probability at a point of the run.

        Args:
            progress (`float`): Steps done by steps of the run, 0..1.

        Returns:
            `float`: 0..1.

        Source:
            Ours.
        """
        done = 1.0 if progress >= self.until else progress / self.until
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters on the language model; its own weights stay as they are.

    Args:
        rank (`int`): Of the adapters.
        alpha (`float`): Their scale times the rank.
        dropout (`float`): On their input.
        targets (`str`): Regular expression of the names of the linear layers that get one.
        dora (`bool`): DoRA: the length of each row of a weight is learned apart from its direction.
        four_bits (`bool`): Hold the language model's own weights in 4 bits while it is trained (QLoRA); wants bitsandbytes. What is written at
            the end has the checkpoint's own weights.

    Raises:
        ValueError: A number is out of range.

    Source:
        Upstream: huggingface/peft LoraConfig.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str = LANGUAGE_MODEL_LAYERS
    dora: bool = False
    four_bits: bool = False

    def __post_init__(self) -> None:
        require(self.rank >= 1, "lora.rank", "at least 1", self.rank)
        require(self.alpha > 0, "lora.alpha", "a positive number", self.alpha)
        require(0 <= self.dropout < 1, "lora.dropout", "a number in 0..1", self.dropout)
        check_expression("lora.targets", self.targets)


__all__ = ["LANGUAGE_MODEL_LAYERS", "LoraSettings", "MixingSchedule"]

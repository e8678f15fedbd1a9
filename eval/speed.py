"""How long a model takes, and how much memory: reconstruction, scene, first token, tokens, questions with the scene kept and without.

```python
from vidllm.eval.speed import BenchSettings, bench
from vidllm.train.initialise import build_untrained

model, processor = build_untrained("vidllm-nano")
document = bench(model, processor, BenchSettings(frames=(4, 8), size_hw=(96, 128)))
```

Pixels are noise and answers are of a fixed length: both depend on shapes alone.
"""

import contextlib
import copy
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.modeling_vidllm.scene_vidllm import VidLLMScene
from vidllm.processing.processing_vidllm import VidLLMProcessor


# Height and width of a 4:3 video: as the paper resizes it (shorter side 518), as VGGT does (width 518), and small.
SIZES_HW: Mapping[str, tuple[int, int]] = {"paper": (518, 686), "vggt": (392, 518), "small": (224, 224)}
_QUESTIONS = (
    "What color is the chair next to the window?",
    "How many tables are in this room?",
    "Is the door open?",
    "What is on top of the desk beside the bed, and what is under it?",
)
_MIB = 2**20
_PROC = Path("/proc/self")


@dataclass(frozen=True)
class BenchSettings:
    """What is measured.

    Args:
        frames (`tuple[int, ...]`): Ladder of frames per scene.
        size_hw (`tuple[int, int]`): Height and width of the frames, pixels; multiples of the patch size.
        new_tokens (`int`): Length of each answer.
        questions (`int`): Asked one after another about one scene that is kept.
        questions_encoding (`int`): Asked with the scene encoded anew each time; their mean stands for all.
        repeats (`int`): Times that each stage is timed; the median counts.
        warmup (`int`): Times that each stage runs before.
        with_answers (`bool`): False stops after the reconstruction.

    Raises:
        ValueError: A number is too small.

    Source:
        Ours.
    """

    frames: tuple[int, ...] = (8, 16, 32)
    size_hw: tuple[int, int] = SIZES_HW["small"]
    new_tokens: int = 20
    questions: int = 66
    questions_encoding: int = 3
    repeats: int = 3
    warmup: int = 1
    with_answers: bool = True

    def __post_init__(self) -> None:
        for name, least in (
            ("new_tokens", 2),
            ("questions", 1),
            ("questions_encoding", 1),
            ("repeats", 1),
            ("warmup", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"bench: {name}: wanted at least {least}; got {getattr(self, name)}")
        if not self.frames or min(self.frames) < 1:
            raise ValueError(f"bench: frames: wanted numbers from 1; got {self.frames}")


def size_of(text: str) -> tuple[int, int]:
    """Height and width by a name, or as `HxW`.

    Args:
        text (`str`): `paper`, `vggt`, `small`, or such as `96x128`.

    Returns:
        `tuple[int, int]`

    Raises:
        ValueError: Neither.

    Source:
        Paper: shorter side 518. Upstream: facebookresearch/vggt (width 518).
    """
    if text in SIZES_HW:
        return SIZES_HW[text]
    parts = text.split("x")
    if len(parts) == 2 and all(part.isdigit() and int(part) > 0 for part in parts):
        return int(parts[0]), int(parts[1])
    raise ValueError(f"--size: wanted {', '.join(SIZES_HW)} or HEIGHTxWIDTH; got {text!r}")


class PeakMemory:
    """Largest memory of this process or of its device within a context; `bytes` afterwards, None where it cannot be told.

    Args:
        device (`torch.device`): CUDA: what torch allocated there; else resident memory of the process, which Linux tells.

    Source:
        Ours.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes: int | None = None
        self.bytes_before: int | None = None

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.bytes_before = torch.cuda.memory_allocated(self.device)
        else:
            # Linux: the high-water mark starts anew.
            with contextlib.suppress(OSError):
                (_PROC / "clear_refs").write_text("5")
            self.bytes_before = _resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        on_device = self.device.type == "cuda"
        self.bytes = torch.cuda.max_memory_allocated(self.device) if on_device else _resident("VmHWM")


def _resident(field: str) -> int | None:
    """A line of the process's status, bytes."""
    try:
        lines = (_PROC / "status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


class _Clock:
    """Times calls; waits for the device before and after."""

    def __init__(self, device: torch.device, settings: BenchSettings):
        self.device, self.settings = device, settings

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def once(self, call: Callable[[], Any]) -> float:
        """Seconds of one call."""
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start

    def median(self, call: Callable[[], Any]) -> float:
        """Median seconds of some calls, after some that do not count."""
        for _ in range(self.settings.warmup):
            call()
        return float(np.median([self.once(call) for _ in range(self.settings.repeats)]))


@torch.inference_mode()
def bench(
    model: VidLLMForConditionalGeneration,
    processor: VidLLMProcessor,
    settings: BenchSettings,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure a model over a ladder of frames.

    Args:
        model (`VidLLMForConditionalGeneration`): In evaluation mode, where it shall run.
        processor (`VidLLMProcessor`): Of the model.
        settings (`BenchSettings`): What is measured.
        progress (callable, *optional*): Told what comes next.

    Returns:
        `dict`: `settings`, `environment`, `fits` (by `peak_memory_mib` and `reconstruct_s` the coefficients of a polynomial in the frames, constant
        first; only with more rungs than coefficients), and `rungs`, a list with per number of frames: `frames`, `reconstruct_s`, `encode_s`,
        `first_token_s` (of the first question about a scene, whose tokens the language model has to read), `next_first_token_s` (of another question,
        scene kept), `tokens_per_s`, `answer_s` (from pixels to the last of `new_tokens` of the first question),
        `questions_per_minute_kept`, `questions_per_minute_encoding`, `ratio`, `peak_memory_mib`, `memory_before_mib`.

    Raises:
        ValueError: The size does not fit the patches, or a prompt is too long for the language model.

    Source:
        Ours.
    """
    patch = processor.video_processor.patch_size
    if any(side % patch for side in settings.size_hw):
        raise ValueError(f"bench: size: wanted multiples of the patch size {patch}; got {settings.size_hw}")
    rungs = []
    for frames in settings.frames:
        if progress is not None:
            progress(f"{frames} frames")
        rungs.append(_rung(model, processor, replace(settings, frames=(frames,))))
    return {
        "settings": asdict(settings),
        "environment": environment_of(model),
        "rungs": rungs,
        "fits": _fits(settings.frames, rungs),
    }


def _fits(frames: Sequence[int], rungs: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """How memory and time grow with the number of frames, where there are enough of them to tell."""
    fits = {}
    for name, degree in (("peak_memory_mib", 1), ("reconstruct_s", 2)):
        values = [rung[name] for rung in rungs]
        if None not in values and len(set(frames)) > degree + 1:
            fits[name] = fitted(frames, values, degree)
    return fits


def _rung(
    model: VidLLMForConditionalGeneration, processor: VidLLMProcessor, settings: BenchSettings
) -> dict[str, Any]:
    """One number of frames."""
    device, (frames,) = model.device, settings.frames
    clock = _Clock(device, settings)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, frames, 3, *settings.size_hw, generator=generator).to(device)
    rung: dict[str, Any] = {"frames": frames}
    with PeakMemory(device) as memory:
        rung["reconstruct_s"] = clock.median(lambda: model.reconstruct(pixels))
        if settings.with_answers:
            rung.update(_answers(model, processor, settings, pixels, clock))
    rung["peak_memory_mib"] = None if memory.bytes is None else memory.bytes / _MIB
    rung["memory_before_mib"] = None if memory.bytes_before is None else memory.bytes_before / _MIB
    return rung


def _answers(
    model: VidLLMForConditionalGeneration,
    processor: VidLLMProcessor,
    settings: BenchSettings,
    pixels: torch.Tensor,
    clock: _Clock,
) -> dict[str, float]:
    """Scene, first token, tokens, questions."""
    scene = model.encode_scene(pixels)

    def answer(of: VidLLMScene, question: str, new_tokens: int) -> None:
        model.generate(
            **_prompt(model, processor, of, question, new_tokens),
            scene=of,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
        )

    encode = clock.median(lambda: model.encode_scene(pixels))
    # A copy of a scene does not carry what the language model has read of it.
    first = clock.median(lambda: answer(copy.copy(scene), _QUESTIONS[0], 1))
    answer(scene, _QUESTIONS[0], 1)
    next_first = clock.median(lambda: answer(scene, _QUESTIONS[0], 1))
    rest = clock.median(lambda: answer(scene, _QUESTIONS[0], settings.new_tokens)) - next_first

    def ask_all(count: int, encode_each: bool) -> None:
        kept_scene = copy.copy(scene)
        for question in _some(count):
            answer(model.encode_scene(pixels) if encode_each else kept_scene, question, settings.new_tokens)

    kept = clock.once(lambda: ask_all(settings.questions, encode_each=False))
    anew = clock.once(lambda: ask_all(settings.questions_encoding, encode_each=True))
    # The scene that is kept was encoded once.
    minutes_kept = (encode + kept) / 60
    minutes_anew = anew / settings.questions_encoding * settings.questions / 60
    return {
        "encode_s": encode,
        "first_token_s": first,
        "next_first_token_s": next_first,
        "tokens_per_s": (settings.new_tokens - 1) / max(rest, 1e-9),
        "answer_s": encode + first + max(rest, 0.0),
        "questions_per_minute_kept": settings.questions / minutes_kept,
        "questions_per_minute_encoding": settings.questions / minutes_anew,
        "ratio": minutes_anew / minutes_kept,
    }


def _some(count: int) -> Iterator[str]:
    """Questions, over and over."""
    return (_QUESTIONS[number % len(_QUESTIONS)] for number in range(count))


def _prompt(
    model: VidLLMForConditionalGeneration,
    processor: VidLLMProcessor,
    scene: VidLLMScene,
    question: str,
    new_tokens: int,
) -> dict[str, Any]:
    """Inputs of a question about an encoded scene."""
    chat = [{"role": "user", "content": [{"type": "text", "text": question}]}]
    inputs = processor.apply_chat_template(
        [chat],
        scene=scene,
        scene_index=[0],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    most = getattr(model.config.text_config, "max_position_embeddings", None)
    length = inputs["input_ids"].shape[1] + new_tokens
    if most is not None and length > most:
        raise ValueError(f"bench: the prompt has {length} tokens with its answer; this model takes at most {most}")
    return dict(inputs.to(model.device))


def environment_of(model: VidLLMForConditionalGeneration) -> dict[str, Any]:
    """What a number holds for.

    Args:
        model (`VidLLMForConditionalGeneration`): That was measured.

    Returns:
        `dict`: `device`, `dtype`, `attention`, `threads`, `parameters`, `versions`.

    Source:
        Ours.
    """
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor_name()
    return {
        "device": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config.text_config._attn_implementation,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "cpus": os.cpu_count(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "versions": {package: version(package) for package in ("vidllm", "torch", "transformers")},
    }


def _processor_name() -> str:
    """Model name of the CPU, where Linux tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def fitted(frames: Sequence[int], values: Sequence[float], degree: int) -> list[float]:
    """Coefficients of a polynomial in the number of frames, by least squares, constant first.

    Args:
        frames (`Sequence[int]`): At least `degree + 1` different numbers.
        values (`Sequence[float]`): Memory or seconds.
        degree (`int`): 1 for memory, 2 for time.

    Returns:
        `list[float]`

    Raises:
        ValueError: There are too few numbers.

    Source:
        Ours.
    """
    if len(set(frames)) <= degree:
        raise ValueError(f"fit: wanted more than {degree} different numbers of frames; got {sorted(set(frames))}")
    return np.polynomial.polynomial.polyfit(np.asarray(frames, float), np.asarray(values, float), degree).tolist()


__all__ = ["SIZES_HW", "BenchSettings", "PeakMemory", "bench", "environment_of", "fitted", "size_of"]

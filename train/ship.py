"""A trained checkpoint as the folder that ships: weights in half the space, code, and the clip of the demonstration.

`python -m vidllm.train.ship --model DIR --out DIR --seed S --number N` makes the folder;
`python -m vidllm.train.ship --code-only DIR` brings code, templates and configs of one up to date and leaves its weights alone.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.utils.logging import disable_progress_bar

from vidllm.modeling_vidllm.configuration_vidllm import VidLLMConfig
from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.processing.processing_vidllm import VidLLMProcessor
from vidllm.processing.rooms.formats import write_json, write_video
from vidllm.train.demo_clip import CLIP_NAME, TRUTH_NAME, DemoClip, demo_clip
from vidllm.train.initialise import REPORT_NAME, count_parameters, is_untrained, save_checkpoint
from vidllm.train.tokenizer import CHAT_TEMPLATE_FAMILIES, byte_level_tokenizer, chat_template


WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "README.md"

_CARD = """---
library_name: transformers
pipeline_tag: video-text-to-text
license: apache-2.0
tags:
- vidllm
---

# {name}

{total:,} parameters, {weights}; from a plain video of a room to answers, 3D boxes, captions and a reconstruction. Weights are
stored in float16 and run in float32.

`{clip}` is a room that no training saw ({difficulty}, seed {seed}, number {number}); `{truth}` says what is true of it. `vidllm demo` shows
what the model makes of the clip, with the truth beside it.

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained(path, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
```
"""


def _load(folder: Path, dtype: torch.dtype | str = "auto") -> tuple[VidLLMForConditionalGeneration, VidLLMProcessor]:
    """Model and processor of a folder; every weight must be there and nothing else."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"model {folder}: wanted a checkpoint folder; there is no config.json")
    # Loading the tokenizer looks the config up, and would ask whether to run the checkpoint's own code.
    AutoConfig.register(VidLLMConfig.model_type, VidLLMConfig, exist_ok=True)
    model, info = VidLLMForConditionalGeneration.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    for what in ("missing_keys", "unexpected_keys"):
        names = sorted(info[what])
        if names:
            raise ValueError(
                f"model {folder}: {len(names)} {what.replace('_keys', '')} weights, such as {names[0]}; wanted those of this code"
            )
    processor = VidLLMProcessor.from_pretrained(folder)
    for note in ("is_local", "local_files_only"):
        # How a tokenizer was loaded is no property of it, but would be saved as one.
        processor.tokenizer.init_kwargs.pop(note, None)
    return model.eval(), processor


def float16_tensor(name: str, value: torch.Tensor) -> torch.Tensor:
    """A weight as it ships.

    Args:
        name (`str`): For the message.
        value (`torch.Tensor` of any shape): A weight.

    Returns:
        `torch.Tensor` of the same shape: float16 if it was floating, else as it is; running statistics keep their precision, for a mean can be
        a hundred times what is measured against it.

    Raises:
        ValueError: A value is not finite, or too large for float16.

    Source:
        Ours: an infinity among the weights would show as wrong answers only.
    """
    if not value.is_floating_point():
        return value
    if not torch.isfinite(value).all():
        raise ValueError(f"weights: {name}: wanted finite values; got NaN or infinity")
    if name.rpartition(".")[-1].startswith("running_"):
        return value
    half = value.to(torch.float16)
    if not torch.isfinite(half).all():
        raise ValueError(
            f"weights: {name}: wanted magnitudes that fit into float16 (at most 65504); got {value.abs().max().item():.6g}"
        )
    return half


def _store_as_float16(folder: Path) -> int:
    """Rewrite the weights of a folder; returns the bytes of the file."""
    files = sorted(folder.glob("*.safetensors"))
    if [path.name for path in files] != [WEIGHTS_NAME]:
        raise ValueError(f"weights: wanted a single {WEIGHTS_NAME}; got {', '.join(path.name for path in files)}")
    halves = {name: float16_tensor(name, value) for name, value in load_file(files[0]).items()}
    files[0].unlink()
    save_file(halves, files[0], metadata={"format": "pt"})
    files[0].chmod(0o644)
    return files[0].stat().st_size


def check_shipped(folder: str | Path, source: VidLLMForConditionalGeneration) -> None:
    """Load a folder as anybody would, and compare it with the model that it was made of.

    Args:
        folder (`str` or `Path`): What ships.
        source (`VidLLMForConditionalGeneration`): The trained model.

    Raises:
        ValueError: A parameter is not float32, or is not the source's value rounded to float16.

    Source:
        Ours.
    """
    loaded, _ = _load(Path(folder))
    wrong = sorted(name for name, value in loaded.named_parameters() if value.dtype != torch.float32)
    if wrong:
        raise ValueError(f"model {folder}: wanted float32 parameters after loading; {wrong[0]} is not")
    found, wanted = loaded.state_dict(), source.state_dict()
    for name, value in wanted.items():
        rounded = float16_tensor(name, value).to(value.dtype)
        if name not in found or not torch.equal(found[name], rounded):
            raise ValueError(f"model {folder}: {name} is not the trained weight rounded to float16")


def ship(model_folder: str | Path, out_dir: str | Path, clip: DemoClip) -> dict[str, Any]:
    """Write the folder that ships: a complete Hub repository that also holds the clip of the demonstration and its truth.

    Args:
        model_folder (`str` or `Path`): A trained checkpoint.
        out_dir (`str` or `Path`): New or empty folder.
        clip (`DemoClip`): From `demo_clip`.

    Returns:
        `dict`: `folder`, `parameters`, `weight_bytes`, `clip_bytes`, and of the clip's truth `scene_id` and the number of `questions`,
        `descriptions`, `places`.

    Raises:
        ValueError: The checkpoint cannot be loaded or does not fit the code, a weight does not fit into float16, or the folder holds
            something already.

    Source:
        Ours: every floating weight is stored as float16, also those that a half-precision model would keep in float32; `config.json`
        says float32, so that loading gives float32 back.
    """
    model_folder, out_dir = Path(model_folder), Path(out_dir).absolute()
    if out_dir.is_file() or (out_dir.is_dir() and any(out_dir.iterdir())):
        raise ValueError(f"output folder: wanted a new or empty folder; got {out_dir}, which holds something already")
    model, processor = _load(model_folder, torch.float32)
    for config in (model.config, model.config.text_config, model.config.vision_config):
        config.dtype = torch.float32
    parameters = sum(count_parameters(model).values())
    untrained = is_untrained(model_folder)
    card = _CARD.format(
        name=out_dir.name,
        total=parameters,
        weights="random weights, untrained" if untrained else "trained on procedural rooms",
        clip=CLIP_NAME,
        truth=TRUTH_NAME,
        **{name: clip.truth["room"][name] for name in ("seed", "number", "difficulty")},
    )
    extra = {CARD_NAME: card}
    if untrained:
        # Every command reads it, and says so.
        extra[REPORT_NAME] = (model_folder / REPORT_NAME).read_text(encoding="utf-8")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}.", suffix=".partial", dir=out_dir.parent) as work:
        made = save_checkpoint(model, processor, Path(work) / "made", extra)
        weight_bytes = _store_as_float16(made)
        write_video(made / CLIP_NAME, clip.rgb)
        write_json(made / TRUTH_NAME, clip.truth, indent=1)
        check_shipped(made, model)
        clip_bytes = (made / CLIP_NAME).stat().st_size
        made.replace(out_dir)
    return {
        "folder": str(out_dir),
        "parameters": parameters,
        "weight_bytes": weight_bytes,
        "clip_bytes": clip_bytes,
        "scene_id": clip.truth["room"]["scene_id"],
        **{name: len(clip.truth[name]) for name in ("questions", "descriptions", "places")},
    }


def _template_family(processor: VidLLMProcessor) -> str:
    """The family whose end of turn the tokenizer has."""
    for family in CHAT_TEMPLATE_FAMILIES:
        if byte_level_tokenizer(family).eos_token == processor.tokenizer.eos_token:
            return family
    raise ValueError(
        f"chat template: wanted a tokenizer of one of the families {', '.join(CHAT_TEMPLATE_FAMILIES)}; this one ends turns with "
        f"{processor.tokenizer.eos_token!r}"
    )


def refresh_code(folder: str | Path) -> list[str]:
    """Bring code files, chat template and configs of a shipped folder up to date; weights, card and clip stay as they are.

    Args:
        folder (`str` or `Path`): A shipped folder, whose weights fit the code.

    Returns:
        `list` of `str`: names of the files that changed, appeared or went.

    Raises:
        ValueError: It is no such folder, or its weights do not fit the code any more.

    Source:
        Ours: the folder holds copies of the code, which must not fall behind it.
    """
    folder = Path(folder)
    model, processor = _load(folder)
    template = chat_template(_template_family(processor))
    processor.chat_template = processor.tokenizer.chat_template = template
    changed = []
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.absolute().parent) as work:
        made = save_checkpoint(model, processor, Path(work) / "made")
        new = {path.name: path for path in made.iterdir() if path.suffix != ".safetensors"}
        for name, path in sorted(new.items()):
            old = folder / name
            if not old.is_file() or old.read_bytes() != path.read_bytes():
                os.replace(path, old)
                changed.append(name)
    for path in sorted(folder.glob("*.py")):
        if path.name not in new:
            path.unlink()
            changed.append(path.name)
    return changed


def main(arguments: Sequence[str] | None = None) -> int:
    """The command.

    Args:
        arguments (`Sequence[str]`, *optional*): By default those of the process.

    Returns:
        `int`: exit code; 2 on bad input, with one line on stderr.

    Source:
        Ours.
    """
    parser = argparse.ArgumentParser(prog="python -m vidllm.train.ship", description="Write the folder that ships.")
    parser.add_argument("--model", metavar="DIR", help="trained checkpoint")
    parser.add_argument("--out", metavar="DIR", help="new or empty folder")
    parser.add_argument("--seed", type=int, help="of the room of the demonstration")
    parser.add_argument("--number", type=int, help="of that room, in the split val (7000 to 9999)")
    parser.add_argument("--difficulty", default="easy", help="of that room (default: easy)")
    parser.add_argument("--code-only", metavar="DIR", help="refresh code, template and configs of a shipped folder")
    given = parser.parse_args(arguments)
    wanted = {name: getattr(given, name) for name in ("model", "out", "seed", "number")}
    if given.code_only is None and None in wanted.values():
        parser.error("wanted --model, --out, --seed and --number, or --code-only alone")
    if given.code_only is not None and any(value is not None for value in wanted.values()):
        parser.error("--code-only takes no other option")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    disable_progress_bar()
    try:
        if given.code_only is not None:
            report: Any = {"folder": given.code_only, "changed": refresh_code(given.code_only)}
        else:
            report = ship(given.model, given.out, demo_clip(given.seed, given.number, given.difficulty))
    except (ValueError, OSError, RuntimeError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    sys.stdout.write(json.dumps(report, indent=1) + "\n")
    return 0


__all__ = ["check_shipped", "float16_tensor", "main", "refresh_code", "ship"]


if __name__ == "__main__":
    sys.exit(main())

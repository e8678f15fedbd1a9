"""Starting checkpoints: a complete Hub folder with fresh weights.

A folder appears under its name only when everything is in it.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.processing.processing_vidllm import VidLLMProcessor
from vidllm.processing.video_processing_vidllm import VidLLMVideoProcessor
from vidllm.train.compose import compose, part_report, reconstruction_of, write_code, write_weights
from vidllm.train.fresh_weights import draw_for_training_from_nothing
from vidllm.train.presets import VidLLMPreset, preset
from vidllm.train.shard_writer import HIDDEN, MAX_SHARD_BYTES, reveal_weights
from vidllm.train.tokenizer import add_vidllm_tokens, byte_level_tokenizer


REPORT_NAME = "initialisation.json"
MAX_NEW_TOKENS = 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What a folder must hold to be a Hub repository that loads with trust_remote_code.
_REQUIRED_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "configuration_vidllm.py",
    "modeling_vidllm.py",
    "processing_vidllm.py",
    "video_processing_vidllm.py",
)

_CARD = """---
library_name: transformers
pipeline_tag: video-text-to-text
license: apache-2.0
tags:
- vidllm
- untrained
---

# {name}: untrained weights

Every weight of this checkpoint was drawn at random (seed {seed}). It has the shapes of `{name}` ({description}) and runs through all of
`vidllm`, but its answers, boxes and reconstructions mean nothing until it is trained.

Tokenizer: {tokenizer}. Parameters: {total:,}. Details: `initialisation.json`.

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained(path, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
```
"""


_COMPOSED_CARD = """---
library_name: transformers
pipeline_tag: video-text-to-text
tags:
- vidllm
- untrained
---

# {name}: a starting checkpoint

Made of pretrained parts, whose licences hold for it:

{sources}

Reconstruction: {reconstruction}. {fresh:,} of {total:,} parameters are fresh, among them everything between the encoder and the language model:
answers about a video, boxes and metres mean nothing until it is trained. Checksums, keys and dtypes: `initialisation.json`.

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained(path, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
```
"""


@contextmanager
def _complete_folder(out_dir: str | Path) -> Iterator[Path]:
    """A hidden folder beside `out_dir` that takes its name at the end; nothing of that name exists before."""
    out_dir = Path(out_dir).absolute()
    if out_dir.is_file() or (out_dir.is_dir() and any(out_dir.iterdir())):
        raise ValueError(f"output folder: wanted a new or empty folder; got {out_dir}, which holds something already")
    partial = None
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", suffix=".partial", dir=out_dir.parent))
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o777 & ~mask)
    except OSError as error:
        raise ValueError(f"output folder {out_dir}: cannot be made: {error.strerror or error}") from error
    try:
        yield partial
        # Takes the place of an empty folder too.
        partial.replace(out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_files(
    model: VidLLMForConditionalGeneration, processor: VidLLMProcessor, folder: Path, extra: dict[str, str]
) -> None:
    """All files of a checkpoint into an existing folder, checked for completeness; weights appear last, and without them nothing loads."""
    model.save_pretrained(str(folder), variant=HIDDEN)
    processor.save_pretrained(str(folder))
    for name, text in extra.items():
        (folder / name).write_text(text, encoding="utf-8")
    reveal_weights(folder)
    _check_complete(folder)


def _check_complete(folder: Path) -> None:
    """Every file of a Hub folder must be there."""
    missing = [name for name in _REQUIRED_FILES if not (folder / name).is_file()]
    if missing or not list(folder.glob("*.safetensors")):
        raise RuntimeError(f"checkpoint: saving left out {', '.join(missing) or 'the weights'}")


def save_checkpoint(
    model: VidLLMForConditionalGeneration,
    processor: VidLLMProcessor,
    out_dir: str | Path,
    extra_files: dict[str, str] | None = None,
) -> Path:
    """Write a complete Hub folder: weights, config with every Auto class, code files, tokenizer, processor, generation config.

    Args:
        model (`VidLLMForConditionalGeneration`): With its `generation_config`.
        processor (`VidLLMProcessor`): Fits the model's token ids and slots.
        out_dir (`str` or `Path`): New or empty folder; parents are made.
        extra_files (`dict[str, str]`, *optional*): Further text files by name, such as `README.md`.

    Returns:
        `Path`: the folder.

    Raises:
        ValueError: The folder holds something already or cannot be made, or processor and model disagree.

    Source:
        Ours: written beside and renamed, so that a killed run leaves nothing that loads.
    """
    for name in ("video_token_id", "coord_token_id", "loc_token_id"):
        if getattr(model.config, name) != getattr(processor, name):
            raise ValueError(
                f"checkpoint: {name}: the model's config says {getattr(model.config, name)}, the processor {getattr(processor, name)}"
            )
    if model.config.num_scene_tokens != processor.num_scene_tokens:
        raise ValueError(
            f"checkpoint: num_scene_tokens: the model's config says {model.config.num_scene_tokens}, the processor "
            f"{processor.num_scene_tokens}"
        )
    with _complete_folder(out_dir) as partial:
        _write_files(model, processor, partial, extra_files or {})
    return Path(out_dir)


def build_processor(recipe: VidLLMPreset, tokenizer: Any, num_scene_tokens: int) -> VidLLMProcessor:
    """The processor of a preset.

    Args:
        recipe (`VidLLMPreset`): Frame count, size, patch size, normalisation.
        tokenizer (`PreTrainedTokenizerBase`): Knows the three tokens and has a chat template.
        num_scene_tokens (`int`): `config.num_scene_tokens`.

    Returns:
        `VidLLMProcessor`: ready to save.

    Source:
        Ours.
    """
    video_processor = VidLLMVideoProcessor(
        num_frames=recipe.num_frames,
        size={"shortest_edge": recipe.shortest_edge},
        patch_size=recipe.patch_size,
        image_mean=recipe.image_mean,
        image_std=recipe.image_std,
    )
    return VidLLMProcessor(
        video_processor, tokenizer, num_scene_tokens=num_scene_tokens, chat_template=tokenizer.chat_template
    )


def count_parameters(model: torch.nn.Module) -> dict[str, int]:
    """Parameters per part of a model, each counted once.

    Args:
        model (`VidLLMForConditionalGeneration`): May lie on the meta device.

    Returns:
        `dict[str, int]`: part (`encoder`, `adapter`, `reconstruction`, ..., `lm_head`) to number of values; a tied head counts 0.

    Source:
        Ours.
    """
    parts: dict[str, int] = {}
    seen: set[int] = set()
    named = [*model.model.named_children(), ("lm_head", model.lm_head)]
    for name, module in named:
        new = {id(value): value.numel() for value in module.parameters() if id(value) not in seen}
        seen.update(new)
        parts[name] = sum(new.values())
    return parts


def build_untrained(
    preset_name: str, seed: int = 0, dtype: torch.dtype | str | None = None, only_geometry: bool = False
) -> tuple[VidLLMForConditionalGeneration, VidLLMProcessor]:
    """A model with random weights and its processor with a byte-level tokenizer, in memory.

    Args:
        preset_name (`str`): One of the presets.
        seed (`int`): Of torch's generator; the same seed gives the same weights. The caller's random state is left as it was.
        dtype (`torch.dtype` or `str`, *optional*): Of what is not kept in float32; float32 if not given.
        only_geometry (`bool`): Whether the language model is cut down to one layer and the words of the tokenizer: a reconstruction does not
            use it.

    Returns:
        `tuple`: model in evaluation mode, processor.

    Raises:
        ValueError: Unknown preset or dtype.

    Source:
        Ours.
    """
    recipe = preset(preset_name)
    dtype = _checked_dtype(dtype)
    tokenizer = byte_level_tokenizer(recipe.chat_template_family, recipe.merges)
    ids = add_vidllm_tokens(tokenizer)
    text_changes = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    text_changes["bos_token_id"] = tokenizer.bos_token_id
    if not recipe.keeps_vocabulary or only_geometry:
        text_changes["vocab_size"] = -(-len(tokenizer) // 8) * 8
    if only_geometry:
        text_changes.update(num_hidden_layers=1, layer_types=None)
    config = recipe.config(text_config=text_changes, **ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VidLLMForConditionalGeneration._from_config(config, dtype=torch.float32).eval()
        if recipe.from_nothing:
            draw_for_training_from_nothing(model)
    _cast(model, dtype)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    return model, build_processor(recipe, tokenizer, config.num_scene_tokens)


def _cast(model: VidLLMForConditionalGeneration, dtype: torch.dtype) -> None:
    """Change what `from_pretrained(dtype=)` would change: all parameters but those of the modules kept in float32."""
    model.config.dtype = model.config.text_config.dtype = model.config.vision_config.dtype = dtype
    for name, value in model.named_parameters():
        if not any(kept in name for kept in model._keep_in_fp32_modules_strict):
            value.data = value.data.to(dtype)


def _checked_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """A floating dtype by name or itself."""
    if dtype is None:
        return torch.float32
    wanted = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if wanted not in DTYPES.values():
        raise ValueError(f"dtype: wanted one of {', '.join(DTYPES)}; got {dtype}")
    return wanted


def initialise(
    preset_name: str, out_dir: str | Path, seed: int = 0, dtype: torch.dtype | str | None = None
) -> dict[str, Any]:
    """Write an untrained checkpoint folder.

    Args:
        preset_name (`str`): One of the presets.
        out_dir (`str` or `Path`): New or empty folder.
        seed (`int`): Of the random weights.
        dtype (`torch.dtype` or `str`, *optional*): Of what is not kept in float32; float32 if not given.

    Returns:
        `dict`: what `initialisation.json` holds: preset, seed, `untrained`, total, and per part its source, seed, dtypes and
        number of fresh parameters.

    Raises:
        ValueError: Unknown preset or dtype, or a folder that holds something already.

    Source:
        Ours.
    """
    recipe = preset(preset_name)
    out_dir = Path(out_dir)
    with _complete_folder(out_dir) as partial:
        model, processor = build_untrained(preset_name, seed, dtype)
        counts = count_parameters(model)
        modules = {**dict(model.model.named_children()), "lm_head": model.lm_head}
        report = {
            "preset": preset_name,
            "untrained": True,
            "seed": seed,
            "tokenizer": "byte-level" if recipe.merges is None else f"byte-level with {recipe.merges}",
            "total_parameters": sum(counts.values()),
            "parts": {
                name: {
                    "source": "random",
                    "seed": seed,
                    "fresh_parameters": count,
                    "dtypes": sorted(
                        {str(value.dtype).removeprefix("torch.") for value in modules[name].parameters()}
                    ),
                }
                for name, count in counts.items()
            },
        }
        card = _CARD.format(
            name=preset_name,
            seed=seed,
            description=recipe.description,
            tokenizer=report["tokenizer"],
            total=report["total_parameters"],
        )
        extra = {REPORT_NAME: json.dumps(report, indent=1) + "\n", "README.md": card}
        _write_files(model, processor, partial, extra)
    return report


def initialise_from_sources(
    preset_name: str,
    out_dir: str | Path,
    geometry: str | None = None,
    vision: str | None = None,
    language_model: str | None = None,
    seed: int = 0,
    dtype: torch.dtype | str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Write a starting checkpoint from pretrained parts. At least one source is given; what none has is drawn.

    Args:
        preset_name (`str`): Shapes of what the sources do not say; a source with a config brings its own, an encoder also its patch size and
            the normalisation of its pixels, which become the processor's.
        out_dir (`str` or `Path`): New or empty folder.
        geometry (`str`, *optional*): VGGT: a Hub id, a folder, or a `.safetensors` or `.pt` file.
        vision (`str`, *optional*): An image encoder with a config, or CLIP or SigLIP, of which it is a part: a Hub id or folder. Then VGGT's
            own encoder is left out.
        language_model (`str`, *optional*): A decoder with its tokenizer: a Hub id or folder.
        seed (`int`): Of what is drawn.
        dtype (`torch.dtype` or `str`, *optional*): Of everything but what stays in float32; by default each source's own. The checkpoint loads
            in one dtype, the language model's: VGGT's float32 is kept in its files and comes back with `from_pretrained(dtype=torch.float32)`;
            beside a language model in bfloat16, a load without `dtype` rounds it to that.
        max_shard_bytes (`int`): A shard of weights grows up to this.
        progress (callable, *optional*): Told what is being done, in a few words.

    Returns:
        `dict`: what `initialisation.json` holds: per source its place, checksums, keys used and left out, dtypes as written; fresh parameters
        and rows of word vectors; `reconstruction`, in words.

    Raises:
        ValueError: No source, or one that is not what it should be; nothing is left behind.

    Source:
        Ours. Peak memory is that of the largest file of a source, whose pages count while it is mapped, of what is drawn, of one copy of the
        word vectors where rows are added, and of an encoder of one's own, which transformers reads whole.
    """
    recipe = preset(preset_name)
    given = {"geometry": geometry, "vision": vision, "language_model": language_model}
    given = {name: place for name, place in given.items() if place is not None}
    if not given:
        raise ValueError("initialise: wanted at least one source; got none")
    with _complete_folder(out_dir) as partial:
        tell = progress or (lambda what: None)
        made = compose(recipe, geometry, vision, language_model, None if dtype is None else _checked_dtype(dtype))
        write_weights(made, partial, seed, max_shard_bytes, lambda part: tell(f"writing {part}"))
        tell("checksums of the sources")
        parts = part_report(made)
        report = {
            "preset": preset_name,
            # Whatever else is given: without training nothing connects the parts.
            "untrained": True,
            "reconstruction": reconstruction_of(made),
            "seed": seed,
            "tokenizer": f"of the language model, chat template {made.family}" if language_model else "byte-level",
            "total_parameters": sum(torch.Size(shape).numel() for shape in made.shapes.values()),
            "parts": parts,
        }
        write_code(made, partial, MAX_NEW_TOKENS)
        build_processor(made.preset, made.tokenizer, made.config.num_scene_tokens).save_pretrained(str(partial))
        (partial / REPORT_NAME).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        card = _COMPOSED_CARD.format(
            name=preset_name,
            sources="\n".join(f"- {name}: `{Path(place).name}`" for name, place in given.items()),
            reconstruction=report["reconstruction"],
            fresh=parts["fresh"]["parameters"],
            total=report["total_parameters"],
        )
        (partial / "README.md").write_text(card, encoding="utf-8")
        made.config.save_pretrained(partial)
        reveal_weights(partial)
        _check_complete(partial)
    return report


def is_untrained(folder: str | Path) -> bool:
    """Whether a checkpoint folder says that it has not been trained.

    Args:
        folder (`str` or `Path`): Local folder; anything else, such as a Hub id, counts as trained.

    Returns:
        `bool`: True if `initialisation.json` is there and marks it untrained.

    Raises:
        ValueError: The file is there but is not what this package writes.

    Source:
        Ours.
    """
    return untrained_notice(folder) is not None


def untrained_notice(folder: str | Path) -> str | None:
    """What a command says of a checkpoint that has not been trained.

    Args:
        folder (`str` or `Path`): Local folder; anything else, such as a Hub id, counts as trained.

    Returns:
        `str`: one line; None for a trained checkpoint.

    Raises:
        ValueError: `initialisation.json` is there but is not what this package writes.

    Source:
        Ours: nobody shall take noise for a result, nor VGGT's reconstruction for noise.
    """
    path = Path(folder) / REPORT_NAME
    if not path.is_file():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if not report["untrained"]:
            return None
        if "reconstruction" not in report:
            return "untrained weights: answers are random, boxes and shapes too"
        return (
            f"starting checkpoint, untrained: answers and boxes are random; reconstruction: {report['reconstruction']}"
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: wanted a JSON object with `untrained`; got something else ({error!r})") from error

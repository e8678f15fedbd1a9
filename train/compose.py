"""A starting checkpoint from pretrained parts: VGGT's geometry, an image encoder, a language model; what none of them has is drawn fresh.

Tensors go from the sources into the checkpoint's files one at a time. Everything is checked by name and shape before the first one is read,
and the folder takes its name when all of it is there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save

from vidllm.modeling_vidllm.configuration_vidllm import VidLLMConfig
from vidllm.modeling_vidllm.modeling_vidllm import AUTO_MAP, VidLLMForConditionalGeneration
from vidllm.train.part_plans import HEAD, LANGUAGE, PartPlan, plan_geometry, plan_language_model, plan_vision
from vidllm.train.presets import VidLLMPreset
from vidllm.train.shard_writer import MAX_SHARD_BYTES, ShardWriter
from vidllm.train.source_configs import (
    language_config,
    language_tokenizer,
    one_line,
    preset_with_encoder,
    vision_config,
)
from vidllm.train.tokenizer import add_vidllm_tokens
from vidllm.train.weight_sources import WeightSource


EMBEDDING = f"{LANGUAGE}embed_tokens.weight"
# Values that are in memory at once, in float64, where a matrix of word vectors is measured.
CHUNK_VALUES = 2**22
# What a weight may be stored as.
_WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@torch.no_grad()
def grown(rows: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Word vectors with further rows: the mean of those that there are, a little apart from each other.

    Args:
        rows (`torch.Tensor` of shape `(words, width)`): Stay as they are.
        count (`int`): Rows wanted, at least as many.
        generator (`torch.Generator`): Draws.

    Returns:
        `torch.Tensor` of shape `(count, width)`, same dtype.

    Source:
        Ours: a row of the usual size would be the most likely word or the least, from a head that has never seen it.
    """
    mean = _chunked_mean(rows, lambda part: part)
    spread = (_chunked_mean(rows, lambda part: (part - mean).square()) * (len(rows) / (len(rows) - 1))).sqrt()
    drawn = torch.randn(count - len(rows), rows.shape[1], generator=generator)
    more = torch.empty(count, rows.shape[1], dtype=rows.dtype)
    more[: len(rows)] = rows
    more[len(rows) :] = mean.float() + 0.1 * spread.float() * drawn
    return more


def _chunked_mean(rows: torch.Tensor, of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Mean over rows `(words, width)` -> `(width,)`, float64: a copy of the largest matrix of all would double the memory."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for part in rows.split(max(1, CHUNK_VALUES // rows.shape[1])):
        total += of(part.double()).sum(0)
    return total / len(rows)


def fresh_tensors(model: VidLLMForConditionalGeneration, wanted: set[str], seed: int) -> dict[str, torch.Tensor]:
    """Fresh values of some parameters of a model on the meta device, drawn as transformers draws them.

    Args:
        model (`VidLLMForConditionalGeneration`): On the meta device; the modules with these parameters leave it.
        wanted (`set[str]`): Names of parameters.
        seed (`int`): Of torch's generator, whose state is left as it was.

    Returns:
        `dict[str, torch.Tensor]`: float32, on the CPU.

    Source:
        Ours.
    """
    for name, module in model.named_modules():
        own = {f"{name}.{key}".lstrip(".") for key, _ in module.named_parameters(recurse=False)}
        if own & wanted:
            module.to_empty(device="cpu", recurse=False)
        module._is_hf_initialized = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.initialize_weights()
    parameters = dict(model.named_parameters())
    return {name: parameters[name].detach() for name in sorted(wanted)}


@dataclass
class Composition:
    """Everything that is known before a tensor is read.

    Args:
        config (`VidLLMConfig`): Of the model.
        tokenizer (`PreTrainedTokenizerBase`): With the three tokens.
        family (`str`): Chat template family.
        parts (`list[PartPlan]`): What the sources give.
        fresh (`set[str]`): Names that none of them gives.
        shapes (`dict`): By our names, without a tied head.
        dtypes (`dict`): Of what is written.
        model (`VidLLMForConditionalGeneration`): On the meta device.
        preset (`VidLLMPreset`): Shapes, and how pictures are made for the encoder.
        grown (`dict`): By our names of word vectors, rows that the language model has; the others are drawn.

    Source:
        Ours.
    """

    config: VidLLMConfig
    tokenizer: PreTrainedTokenizerBase
    family: str
    parts: list[PartPlan]
    fresh: set[str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    model: VidLLMForConditionalGeneration
    preset: VidLLMPreset
    grown: dict[str, int]


def compose(
    preset: VidLLMPreset,
    geometry: str | None = None,
    vision: str | None = None,
    language_model: str | None = None,
    dtype: torch.dtype | None = None,
) -> Composition:
    """Open the sources and decide where every tensor goes.

    Args:
        preset (`VidLLMPreset`): Shapes of what the sources' configs do not say.
        geometry (`str`, *optional*): VGGT's weights.
        vision (`str`, *optional*): An image encoder, instead of VGGT's.
        language_model (`str`, *optional*): A decoder with its tokenizer.
        dtype (`torch.dtype`, *optional*): Of everything but the modules that stay in float32; by default that of the sources, and of the
            language model for what is fresh. It, or else the language model's, is also `config.dtype`, in which transformers loads all of
            the checkpoint where it is not told another.

    Returns:
        `Composition`

    Raises:
        ValueError: A source is absent or broken, a key is unknown or missing, or a shape differs.

    Source:
        Ours.
    """
    text = language_config(language_model) if language_model is not None else dict(preset.text_config)
    own_rows = text["vocab_size"]
    tokenizer, family = language_tokenizer(language_model, preset, text["model_type"])
    ids = add_vidllm_tokens(tokenizer)
    wanted_rows = max(ids.values()) + 1
    if language_model is not None or preset.keeps_vocabulary:
        text["vocab_size"] = max(own_rows, -(-wanted_rows // 8) * 8 if wanted_rows > own_rows else 0)
    else:
        text["vocab_size"] = -(-len(tokenizer) // 8) * 8
    text.update(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id
    )
    fields = {**preset.model_fields, **ids}
    usual, encoder_is_part = preset, False
    if vision is not None:
        encoder, encoder_is_part = vision_config(vision)
        preset = preset_with_encoder(preset, vision, encoder)
    try:
        config = VidLLMConfig(text_config=text, vision_config=dict(preset.vision_config), **fields)
        with torch.device("meta"):
            model = VidLLMForConditionalGeneration(config)
    except (StrictDataclassError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(
            f"config: wanted one of which a model can be made; got {type(error).__name__}: {one_line(error)}"
        ) from error
    tied = bool(config.text_config.tie_word_embeddings)
    state = {name: value for name, value in model.state_dict().items() if not (tied and name == HEAD)}
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    parts: list[PartPlan] = []
    if geometry is not None:
        own = VidLLMConfig(text_config=text, vision_config=dict(usual.vision_config), **fields)
        widths = own.vision_config.hidden_size, config.vision_config.hidden_size
        if widths[0] != widths[1]:
            raise ValueError(
                f"vision: {vision}: wanted an encoder of width {widths[0]}, which the geometry's blocks read; got one of width {widths[1]}"
            )
        parts.append(plan_geometry(WeightSource(geometry, "geometry"), own, without_encoder=vision is not None))
    if vision is not None:
        parts.append(plan_vision(WeightSource(vision, "vision"), config.vision_config, encoder_is_part))
    if language_model is not None:
        parts.append(plan_language_model(WeightSource(language_model, "language model"), shapes, tied))
    given: dict[str, tuple[PartPlan, str]] = {}
    for part in parts:
        found = part.shapes()
        for key, places in part.targets.items():
            for target, rows in places:
                _check_shape(part, key, target, rows, found[key], shapes, own_rows)
                if state[target].is_floating_point() and part.dtype(key) not in _WEIGHT_DTYPES:
                    raise ValueError(
                        f"{part.name}: {key}: wanted a tensor of {', '.join(map(_name_of, _WEIGHT_DTYPES))}; got {_name_of(part.dtype(key))}"
                    )
                given[target] = (part, key)
    language_dtype = next(
        (part.dtype(k) for part in parts if part.name == "language_model" for k in part.targets), None
    )
    dtypes = {}
    for name in shapes:
        usual_dtype = (
            given[name][0].dtype(given[name][1]) if name in given else dtype or language_dtype or torch.float32
        )
        dtypes[name] = torch.float32 if _stays_in_float32(name) else dtype or usual_dtype
    config.dtype = config.text_config.dtype = config.vision_config.dtype = dtype or language_dtype or torch.float32
    fresh = set(shapes) - set(given)
    grown_rows = {name: own_rows for name in (EMBEDDING, HEAD) if name in given and own_rows < shapes[name][0]}
    return Composition(config, tokenizer, family, parts, fresh, shapes, dtypes, model, preset, grown_rows)


def _stays_in_float32(name: str) -> bool:
    """Whether transformers loads a parameter in float32 whatever the dtype of the others."""
    return any(
        f"{module}." in f"{name}." for module in VidLLMForConditionalGeneration._keep_in_fp32_modules_strict or ()
    )


def _check_shape(
    part: PartPlan,
    key: str,
    target: str,
    rows: slice | None,
    got: tuple[int, ...],
    shapes: Mapping[str, tuple[int, ...]],
    own_rows: int,
) -> None:
    """A source tensor must fit; a matrix of word vectors has the `own_rows` of its own config, which may be fewer than the model's."""
    if target not in shapes:
        raise ValueError(
            f"{part.name}: {key}: wanted a tensor of the model; got one for {target}, which it does not have"
        )
    wanted = shapes[target]
    if rows is not None:
        got = (rows.stop - rows.start, *got[1:])
    if target in (HEAD, EMBEDDING):
        wanted = (own_rows, *wanted[1:])
    if got != wanted:
        raise ValueError(f"{part.name}: {key}: wanted shape {wanted}; got {got}")


def write_weights(
    made: Composition,
    folder: Path,
    seed: int,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Write all tensors, into files with hidden names; sets `config.scene_token_scale` to the size of the language model's word vectors.

    Args:
        made (`Composition`): What goes where.
        folder (`Path`): Existing folder.
        seed (`int`): Of what is drawn.
        max_shard_bytes (`int`): See `ShardWriter`.
        progress (callable, *optional*): Told the name of the part that is being written.

    Raises:
        ValueError: A file ends early.

    Source:
        Ours.
    """
    generator = torch.Generator().manual_seed(seed)
    with ShardWriter(folder, made.shapes, made.dtypes, max_shard_bytes, hidden=True) as writer:
        for part in made.parts:
            if progress is not None:
                progress(part.name)
            for key, tensor in part.tensors():
                for target, rows in part.targets.get(key, ()):
                    value = tensor if rows is None else tensor[rows]
                    if target == EMBEDDING:
                        size = _chunked_mean(value, torch.square).mean().sqrt()
                        made.config.scene_token_scale = float(f"{size:.4g}")
                    if target in made.grown:
                        value = grown(value, made.shapes[target][0], generator)
                    writer.write(target, value)
                    del value
                del tensor
        if progress is not None:
            progress("fresh parts")
        for name, value in fresh_tensors(made.model, made.fresh, seed).items():
            writer.write(name, value)


def write_code(made: Composition, folder: Path, max_new_tokens: int) -> None:
    """Code files and generation config, as `save_pretrained` writes them; fills in what `config.json` says of them, but does not write it.

    Args:
        made (`Composition`): After `write_weights`.
        folder (`Path`): Existing folder.
        max_new_tokens (`int`): Of the generation config.

    Source:
        Upstream: huggingface/transformers `PreTrainedModel.save_pretrained`. Ours: without weights.
    """
    made.config.auto_map = dict(AUTO_MAP)
    made.config.architectures = [VidLLMForConditionalGeneration.__name__]
    custom_object_save(made.model, folder, config=made.config)
    tokenizer = made.tokenizer
    GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        max_new_tokens=max_new_tokens,
    ).save_pretrained(folder)


def part_report(made: Composition) -> dict[str, Any]:
    """For `initialisation.json`: per source where it is, checksums, keys used and left out, dtypes as written; and what is fresh.

    Args:
        made (`Composition`): What went where.

    Returns:
        `dict`

    Source:
        Ours.
    """
    report: dict[str, Any] = {}
    for part in made.parts:
        targets = [target for places in part.targets.values() for target, _ in places]
        report[part.name] = {
            "source": part.source.place,
            "sha256": part.source.sha256(),
            "keys_used": sorted(set(part.source.shapes) - set(part.left_out)),
            "keys_left_out": part.left_out,
            "dtypes": sorted({_name_of(made.dtypes[name]) for name in targets}),
        }
    drawn = {name: (made.shapes[name][0] - rows) * made.shapes[name][1] for name, rows in made.grown.items()}
    report["fresh"] = {
        "parameters": sum(_numel(made.shapes[name]) for name in made.fresh) + sum(drawn.values()),
        "names": sorted(made.fresh),
        # first and last but one of the rows behind those of the language model
        "rows": {name: [rows, made.shapes[name][0]] for name, rows in made.grown.items()},
        "dtypes": sorted({_name_of(made.dtypes[name]) for name in made.fresh}),
    }
    return report


def _name_of(dtype: torch.dtype) -> str:
    """As configs write it."""
    return str(dtype).removeprefix("torch.")


def _numel(shape: tuple[int, ...]) -> int:
    """Elements of a shape."""
    return int(torch.Size(shape).numel())


def reconstruction_of(made: Composition) -> str:
    """What the reconstruction of a fresh checkpoint is, in words.

    Args:
        made (`Composition`): What goes where.

    Returns:
        `str`: whether it is VGGT's, and in which dtype: transformers loads all parts in one, which may be less than VGGT's.

    Source:
        Ours.
    """
    plans = {part.name: part for part in made.parts}
    if "geometry" not in plans:
        return "random"
    if "vision" in plans:
        return (
            "not VGGT's until it is distilled: VGGT's blocks read another encoder than the one they were trained with"
        )
    plan, loaded = plans["geometry"], made.config.dtype
    own_of = {name: plan.dtype(key) for key, places in plan.targets.items() for name, _ in places}
    if any(_rounds(own, made.dtypes[name]) for name, own in own_of.items()):
        return f"VGGT's within rounding to {_name_of(loaded)}, in relative units"
    if any(_rounds(own, loaded) for name, own in own_of.items() if not _stays_in_float32(name)):
        return (
            f"VGGT's, in relative units, if loaded with dtype=torch.float32; a usual load is in {_name_of(loaded)}, the language model's dtype, "
            "and VGGT's within rounding"
        )
    return "VGGT's, in relative units"


def _rounds(own: torch.dtype, other: torch.dtype) -> bool:
    """Whether values of a dtype change in another."""
    return torch.promote_types(own, other) != other


__all__ = [
    "Composition",
    "compose",
    "fresh_tensors",
    "grown",
    "part_report",
    "reconstruction_of",
    "write_code",
    "write_weights",
]

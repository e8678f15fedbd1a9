"""A starting checkpoint from pretrained parts: VGGT's geometry, an image encoder, a language model; what none of them has is drawn fresh.

Tensors go from the sources into the checkpoint's files one at a time. Everything is checked by name and shape before the first one is read,
and the folder takes its name when all of it is there.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save

from vidllm.modeling_vidllm.configuration_vidllm import VidLLMConfig
from vidllm.modeling_vidllm.modeling_vidllm import AUTO_MAP, VidLLMForConditionalGeneration
from vidllm.train.presets import VidLLMPreset
from vidllm.train.shard_writer import MAX_SHARD_BYTES, ShardWriter
from vidllm.train.tokenizer import add_vidllm_tokens, byte_level_tokenizer, prepare_tokenizer
from vidllm.train.vggt_weights import check_vggt_keys, vggt_key_map
from vidllm.train.weight_sources import WeightSource


ENCODER, LANGUAGE, HEAD = "model.encoder.", "model.language_model.", "lm_head.weight"
# Buffers that old files hold and that are computed today.
_COMPUTED_BUFFERS = re.compile(r".*(rotary_emb\.inv_freq|\.attn\.(masked_)?bias)")
# What stands before the names inside a decoder, by the class that was saved.
_DECODER_PREFIXES = ("model.", "")


@dataclass
class PartPlan:
    """What one source gives.

    Args:
        name (`str`): `geometry`, `vision` or `language_model`.
        source (`WeightSource`, *optional*): Where the tensors come from; None for a vision model that transformers loaded.
        targets (`dict`): Source key to pairs of our name and rows (None = all).
        left_out (`list[str]`): Source keys that have no place in the model, on purpose.

    Source:
        Ours.
    """

    name: str
    source: WeightSource | Mapping[str, torch.Tensor]
    targets: dict[str, list[tuple[str, slice | None]]]
    left_out: list[str] = field(default_factory=list)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes by source key."""
        if isinstance(self.source, WeightSource):
            return self.source.shapes
        return {key: tuple(tensor.shape) for key, tensor in self.source.items()}

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of a source key."""
        return self.source.dtypes[key] if isinstance(self.source, WeightSource) else self.source[key].dtype

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor `(...)` once, by its name in the source."""
        yield from self.source.tensors() if isinstance(self.source, WeightSource) else self.source.items()


def plan_geometry(source: WeightSource, config: VidLLMConfig, without_encoder: bool) -> PartPlan:
    """VGGT's tensors.

    Args:
        source (`WeightSource`): Of VGGT.
        config (`VidLLMConfig`): Of a model with VGGT's own encoder.
        without_encoder (`bool`): True: the encoder comes from elsewhere, VGGT's is left out.

    Returns:
        `PartPlan`

    Raises:
        ValueError: A key is unknown or missing.

    Source:
        Ours: `vidllm.train.vggt_weights`.
    """
    key_map = vggt_key_map(config)
    left_out = check_vggt_keys(source.shapes, key_map)
    targets: dict[str, list[tuple[str, slice | None]]] = {}
    for key, rule in key_map.items():
        places = [(f"model.{name}", rows) for name, rows in rule.targets]
        if source.shapes[key] != rule.shape:
            raise ValueError(f"geometry: {key}: wanted shape {rule.shape}; got {source.shapes[key]}")
        if without_encoder and all(name.startswith(ENCODER) for name, _ in places):
            left_out.append(key)
        else:
            targets[key] = places
    return PartPlan("geometry", source, targets, sorted(left_out))


def plan_language_model(source: WeightSource, names: Mapping[str, tuple[int, ...]], tied: bool) -> PartPlan:
    """A causal language model's tensors.

    Args:
        source (`WeightSource`): Of a decoder with or without its head.
        names (`Mapping[str, tuple[int, ...]]`): Shapes by our names, of the whole model.
        tied (`bool`): Whether the head is the embedding.

    Returns:
        `PartPlan`

    Raises:
        ValueError: A key has no place, one is missing, or the head is not where the config says.

    Source:
        Upstream: huggingface/transformers names (`model.layers...`, `lm_head.weight`).
    """
    wanted = {name for name in names if name.startswith(LANGUAGE)}
    prefix = next(p for p in _DECODER_PREFIXES if not p or any(key.startswith(p) for key in source.shapes))
    plan = PartPlan("language_model", source, {})
    for key in source.shapes:
        inside = key.removeprefix(prefix)
        target = HEAD if key == HEAD else LANGUAGE + inside
        if _COMPUTED_BUFFERS.fullmatch(key) or (key == HEAD and tied):
            plan.left_out.append(key)
        elif target in wanted or target == HEAD:
            plan.targets[key] = [(target, None)]
        else:
            raise ValueError(
                f"language model: {key}: wanted a tensor of the decoder; got one that it has no place for"
            )
    found = {name for places in plan.targets.values() for name, _ in places}
    missing = sorted((wanted | (set() if tied else {HEAD})) - found)
    if missing:
        key = missing[0] if missing[0] == HEAD else prefix + missing[0].removeprefix(LANGUAGE)
        raise ValueError(
            f"language model: {key}: wanted a tensor of shape {names[missing[0]]}; got no such key ({len(missing)} missing in all)"
        )
    plan.left_out.sort()
    return plan


def plan_vision(place: str, names: Mapping[str, tuple[int, ...]]) -> PartPlan:
    """An image encoder's tensors, through transformers, which knows the names of older files.

    Args:
        place (`str`): Folder or Hub id with a config.
        names (`Mapping[str, tuple[int, ...]]`): Shapes by our names.

    Returns:
        `PartPlan`

    Raises:
        ValueError: Tensors are missing, or have no place.

    Source:
        Ours.
    """
    model, info = AutoModel.from_pretrained(place, dtype="auto", output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        shape = tuple(model.state_dict()[missing[0]].shape)
        raise ValueError(
            f"vision: {missing[0]}: wanted a tensor of shape {shape}; got no such key ({len(missing)} in all)"
        )
    if unexpected := sorted(info["unexpected_keys"]):
        raise ValueError(
            f"vision: {unexpected[0]}: wanted a tensor of {type(model).__name__}; got one that it has no place for ({len(unexpected)} in all)"
        )
    state = model.state_dict()
    return PartPlan("vision", state, {key: [(f"{ENCODER}model.{key}", None)] for key in state})


def _growing(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a matrix of word vectors has fewer rows than wanted."""
    return len(shape) == len(wanted) == 2 and shape[1] == wanted[1] and shape[0] < wanted[0]


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
    full = rows.float()
    mean, spread = full.mean(0), full.std(0)
    drawn = torch.randn(count - len(rows), rows.shape[1], generator=generator)
    return torch.cat([rows, (mean + 0.1 * spread * drawn).to(rows.dtype)])


def language_config(place: str, preset: VidLLMPreset) -> dict[str, Any]:
    """Config of a language model's folder, the preset's for a bare file.

    Args:
        place (`str`): Folder, Hub id or file.
        preset (`VidLLMPreset`): What is used without a config.

    Returns:
        `dict`: as `VidLLMConfig(text_config=...)` takes it.

    Raises:
        ValueError: There is no config that transformers knows.

    Source:
        Ours.
    """
    if Path(place).expanduser().is_file():
        return dict(preset.text_config)
    return _config_of(place, "language model").to_dict()


def _config_of(place: str, what: str) -> Any:
    """Config of a folder or Hub id, or one clear error."""
    if not Path(place).expanduser().is_dir() and place.count("/") != 1:
        raise ValueError(
            f"{what}: wanted a Hub id (owner/name) or a folder with a config; got {place}, which is neither"
        )
    try:
        return AutoConfig.from_pretrained(
            str(Path(place).expanduser()) if Path(place).expanduser().is_dir() else place
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{what}: wanted a config of transformers in {place}; got none ({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    """Of a message."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def language_tokenizer(
    place: str | None, preset: VidLLMPreset, model_type: str
) -> tuple[PreTrainedTokenizerBase, str]:
    """The language model's own tokenizer, ready for Vid-LLM; the byte-level one without a language model.

    Args:
        place (`str`, *optional*): Folder or Hub id; a bare file has no tokenizer.
        preset (`VidLLMPreset`): Whose byte-level tokenizer it is otherwise.
        model_type (`str`): Of the language model's config.

    Returns:
        `tuple`: tokenizer, chat template family.

    Raises:
        ValueError: There is no tokenizer, or its turn marks are of no known family.

    Source:
        Ours.
    """
    if place is None:
        return byte_level_tokenizer(preset.chat_template_family, preset.merges), preset.chat_template_family
    folder = Path(place).expanduser()
    if folder.is_file():
        raise ValueError(f"language model: wanted a folder or Hub id with a tokenizer; got the file {place}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else place)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"language model: wanted a tokenizer in {place}; got none ({_first_line(error)})") from error
    return tokenizer, prepare_tokenizer(tokenizer, model_type)


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
            language model for what is fresh.

    Returns:
        `Composition`

    Raises:
        ValueError: A source is absent or broken, a key is unknown or missing, or a shape differs.

    Source:
        Ours.
    """
    changes: dict[str, Any] = {}
    text = language_config(language_model, preset) if language_model is not None else dict(preset.text_config)
    tokenizer, family = language_tokenizer(language_model, preset, text["model_type"])
    ids = add_vidllm_tokens(tokenizer)
    wanted_rows = max(ids.values()) + 1
    if language_model is not None or preset.keeps_vocabulary:
        text["vocab_size"] = max(
            text["vocab_size"], -(-wanted_rows // 8) * 8 if wanted_rows > text["vocab_size"] else 0
        )
    else:
        text["vocab_size"] = -(-len(tokenizer) // 8) * 8
    text.update(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id
    )
    if vision is not None:
        changes["vision_config"] = _config_of(vision, "vision").to_dict()
    fields = {**preset.model_fields, **ids}
    config = VidLLMConfig(
        text_config=text, vision_config=changes.get("vision_config", dict(preset.vision_config)), **fields
    )
    with torch.device("meta"):
        model = VidLLMForConditionalGeneration(config)
    tied = bool(config.text_config.tie_word_embeddings)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if not (tied and name == HEAD)}
    parts: list[PartPlan] = []
    if geometry is not None:
        own = config
        if vision is not None:
            own = VidLLMConfig(text_config=text, vision_config=dict(preset.vision_config), **fields)
        parts.append(plan_geometry(WeightSource(geometry, "geometry"), own, without_encoder=vision is not None))
    if vision is not None:
        parts.append(plan_vision(vision, shapes))
    if language_model is not None:
        parts.append(plan_language_model(WeightSource(language_model, "language model"), shapes, tied))
    given: dict[str, tuple[PartPlan, str]] = {}
    for part in parts:
        found = part.shapes()
        for key, places in part.targets.items():
            for target, rows in places:
                _check_shape(part, key, target, rows, found[key], shapes)
                given[target] = (part, key)
    language_dtype = next(
        (part.dtype(k) for part in parts if part.name == "language_model" for k in part.targets), None
    )
    kept = model._keep_in_fp32_modules_strict
    dtypes = {}
    for name in shapes:
        stays = any(f"{module}." in f"{name}." for module in kept)
        usual = given[name][0].dtype(given[name][1]) if name in given else dtype or language_dtype or torch.float32
        dtypes[name] = torch.float32 if stays else dtype or usual
    config.dtype = config.text_config.dtype = config.vision_config.dtype = dtype or language_dtype or torch.float32
    fresh = set(shapes) - set(given)
    return Composition(config, tokenizer, family, parts, fresh, shapes, dtypes, model)


def _check_shape(
    part: PartPlan,
    key: str,
    target: str,
    rows: slice | None,
    got: tuple[int, ...],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """A source tensor must fit; a matrix of word vectors may have fewer rows."""
    if target not in shapes:
        raise ValueError(
            f"{part.name}: {key}: wanted a tensor of the model; got one for {target}, which it does not have"
        )
    wanted = shapes[target]
    if rows is not None:
        got = (rows.stop - rows.start, *got[1:])
    is_words = target in (HEAD, f"{LANGUAGE}embed_tokens.weight")
    if got != wanted and not (is_words and _growing(got, wanted)):
        raise ValueError(f"{part.name}: {key}: wanted shape {wanted}; got {got}")


def write_weights(
    made: Composition,
    folder: Path,
    seed: int,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Write all tensors; sets `config.scene_token_scale` to the size of the language model's word vectors.

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
    words = f"{LANGUAGE}embed_tokens.weight"
    with ShardWriter(folder, made.shapes, made.dtypes, max_shard_bytes) as writer:
        for part in made.parts:
            if progress is not None:
                progress(part.name)
            for key, tensor in part.tensors():
                for target, rows in part.targets.get(key, ()):
                    value = tensor if rows is None else tensor[rows]
                    if target == words:
                        made.config.scene_token_scale = float(f"{value.float().square().mean().sqrt():.4g}")
                    if _growing(tuple(value.shape), made.shapes[target]):
                        value = grown(value, made.shapes[target][0], generator)
                    writer.write(target, value)
                    del value
                del tensor
        if progress is not None:
            progress("fresh parts")
        for name, value in fresh_tensors(made.model, made.fresh, seed).items():
            writer.write(name, value)


def write_configs(made: Composition, folder: Path, max_new_tokens: int) -> None:
    """Code files, config and generation config, as `save_pretrained` writes them.

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
    made.config.save_pretrained(folder)
    tokenizer = made.tokenizer
    GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        max_new_tokens=max_new_tokens,
    ).save_pretrained(folder)


def part_report(made: Composition) -> dict[str, Any]:
    """For `initialisation.json`: per source where it is, checksums, keys used and left out, dtypes; and what is fresh.

    Args:
        made (`Composition`): What went where.

    Returns:
        `dict`

    Source:
        Ours.
    """
    report: dict[str, Any] = {}
    for part in made.parts:
        is_files = isinstance(part.source, WeightSource)
        report[part.name] = {
            "source": part.source.place if is_files else None,
            "sha256": part.source.sha256() if is_files else None,
            "keys_used": sorted(part.targets),
            "keys_left_out": part.left_out,
            "dtypes": sorted({str(part.dtype(key)).removeprefix("torch.") for key in part.targets}),
        }
    report["fresh"] = {
        "parameters": sum(_numel(made.shapes[name]) for name in made.fresh),
        "names": sorted(made.fresh),
        "dtypes": sorted({str(made.dtypes[name]).removeprefix("torch.") for name in made.fresh}),
    }
    return report


def _numel(shape: tuple[int, ...]) -> int:
    """Elements of a shape."""
    return int(torch.Size(shape).numel())


__all__ = [
    "Composition",
    "PartPlan",
    "compose",
    "fresh_tensors",
    "grown",
    "part_report",
    "write_configs",
    "write_weights",
]

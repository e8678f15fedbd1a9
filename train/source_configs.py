"""What the folders of pretrained parts say beside their weights: configs, tokenizers, how their pictures are made. None of their code is run."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from vidllm.modeling_vidllm.encoder_vidllm import patch_size_hw
from vidllm.train.presets import VidLLMPreset
from vidllm.train.tokenizer import byte_level_tokenizer, prepare_tokenizer
from vidllm.train.weight_sources import folder_of_source


# Mean and standard deviation of an encoder's pixels by the type of its config, where its folder does not say.
_NORMALISATIONS: Mapping[str, tuple[Sequence[float], Sequence[float]]] = {
    "clip_vision_model": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "siglip_vision_model": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
    "vit": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
    "dinov2": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "dinov2_with_registers": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "dinov3_vit": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
}


def language_config(place: str) -> dict[str, Any]:
    """Config of a language model's folder.

    Args:
        place (`str`): Folder or Hub id.

    Returns:
        `dict`: as `VidLLMConfig(text_config=...)` takes it.

    Raises:
        ValueError: There is no config, or none of a decoder that transformers has.

    Source:
        Ours.
    """
    config = _config_of(place, "language model")
    fields = _fields(config)
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or not isinstance(fields.get("vocab_size"), int):
        raise ValueError(
            f"language model: {place}: wanted the config of a language model alone, with a vocab_size; got one of {config.model_type!r}"
        )
    return fields


def vision_config(place: str) -> tuple[dict[str, Any], bool]:
    """Config of an image encoder's folder.

    Args:
        place (`str`): Folder or Hub id.

    Returns:
        `tuple`: config as `VidLLMConfig(vision_config=...)` takes it; True if the folder holds a model of pictures and words, such as CLIP,
        of which the encoder is a part.

    Raises:
        ValueError: There is no config that transformers knows.

    Source:
        Ours.
    """
    config = _config_of(place, "vision")
    inner = getattr(config, "vision_config", None)
    if isinstance(inner, PreTrainedConfig):
        return _fields(inner), True
    return _fields(config), False


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Of a config; without where it was read, and without the mark that would send a later reader to the source's code."""
    fields = config.to_dict()
    for name in ("auto_map", "_name_or_path"):
        fields.pop(name, None)
    return fields


def _config_of(place: str, what: str) -> PreTrainedConfig:
    """Config of a folder or Hub id, or one clear error."""
    folder = folder_of_source(place, what)
    path = folder / "config.json"
    model_type = _json_object(path, what, "a config of transformers").get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{what}: {path}: wanted a model_type that transformers has, since the code of a source is not run; got {model_type!r}"
        )
    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, StrictDataclassError) as error:
        raise ValueError(
            f"{what}: {path}: wanted a config of {model_type}; got another ({one_line(error)})"
        ) from error


def _json_object(path: Path, what: str, wanted: str) -> dict[str, Any]:
    """The object in a JSON file, or one clear error."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{what}: wanted {wanted} in {path}; got none ({one_line(error)})") from error
    if not isinstance(document, dict):
        raise ValueError(f"{what}: wanted {wanted} in {path}; got {str(document)!r:.60}")
    return document


def one_line(error: Exception) -> str:
    """What an error says, without line breaks.

    Args:
        error (`Exception`): Of a library.

    Returns:
        `str`: the reason alone, where a strict config puts it into a last line of its own.

    Source:
        Ours.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1] if isinstance(error, StrictDataclassError) else lines[0]


def preset_with_encoder(preset: VidLLMPreset, place: str, config: Mapping[str, Any]) -> VidLLMPreset:
    """A preset whose pictures are those of an encoder of one's own.

    Args:
        preset (`VidLLMPreset`): Of the model.
        place (`str`): Folder or Hub id of the encoder.
        config (`Mapping[str, Any]`): Its config.

    Returns:
        `VidLLMPreset`: with the encoder's config, patch size, mean and standard deviation, and a short side that is the multiple of its patch
        nearest to the preset's.

    Raises:
        ValueError: Patches are not square, or neither the folder nor transformers says how pixels are normalised.

    Source:
        Upstream: huggingface/transformers `preprocessor_config.json` (`image_mean`, `image_std`, `do_normalize`), image processors' defaults.
        Ours: DINOv2's and DINOv3's are ImageNet's, as their authors publish them; size and crop stay the preset's.
    """
    # a config without a patch size is the encoder's to refuse
    height, width = patch_size_hw(AutoConfig.for_model(**config))
    if height != width or height < 1:
        raise ValueError(f"vision: {place}: wanted square patches; got {height} x {width} pixels")
    mean, std = _normalisation(folder_of_source(place, "vision"), str(config["model_type"]))
    return dataclasses.replace(
        preset,
        vision_config={**config, "patch_size": height},
        shortest_edge=max(1, round(preset.shortest_edge / height)) * height,
        image_mean=mean,
        image_std=std,
    )


def _normalisation(folder: Path, model_type: str) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of an encoder's pixels, which are in 0..1 before."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        said = _json_object(path, "vision", "the config of an image processor")
        said = said.get("image_processor", said)
        factor = said.get("rescale_factor", 1 / 255) if isinstance(said, dict) else None
        if not isinstance(factor, (int, float)) or not said.get("do_rescale", True) or abs(factor * 255 - 1) > 1e-3:
            raise ValueError(f"vision: {path}: wanted pixels that are divided by 255; got another rule")
        if said.get("do_normalize") is False:
            return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        if "image_mean" in said or "image_std" in said:
            mean, std = _three(said.get("image_mean")), _three(said.get("image_std"))
            if mean is None or std is None or min(std) <= 0:
                raise ValueError(
                    f"vision: {path}: wanted image_mean and image_std, three numbers each; got {said.get('image_mean')!r} and "
                    f"{said.get('image_std')!r}"
                )
            return mean, std
    if model_type not in _NORMALISATIONS:
        raise ValueError(
            f"vision: wanted image_mean and image_std in {folder / 'preprocessor_config.json'}; got none, and nothing is known of the "
            f"pixels of {model_type!r}"
        )
    mean, std = _NORMALISATIONS[model_type]
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def _three(values: Any) -> tuple[float, float, float] | None:
    """Three numbers; None if they are something else."""
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        return None
    if not all(isinstance(value, (int, float)) for value in values):
        return None
    return float(values[0]), float(values[1]), float(values[2])


def language_tokenizer(
    place: str | None, preset: VidLLMPreset, model_type: str
) -> tuple[PreTrainedTokenizerBase, str]:
    """The language model's own tokenizer, ready for Vid-LLM; the byte-level one without a language model.

    Args:
        place (`str`, *optional*): Folder or Hub id.
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
    folder = folder_of_source(place, "language model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = "it needs code of its own, which is not run" if "trust_remote_code" in str(error) else one_line(error)
        raise ValueError(f"language model: wanted a tokenizer in {folder}; got none ({reason})") from error
    return tokenizer, prepare_tokenizer(tokenizer, model_type)


__all__ = ["language_config", "language_tokenizer", "one_line", "preset_with_encoder", "vision_config"]

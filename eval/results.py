"""`results.json`: its form, checked against the schema beside this file; reading, writing, merging. No tensors."""

import json
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from vidllm.processing.video_reading_vidllm import VidLLMInputError


RESULTS_FILE = "results.json"
SCHEMA_FILE = Path(__file__).with_name("results.schema.json")
_TYPES = {
    "object": lambda value: isinstance(value, Mapping),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value),
    "null": lambda value: value is None,
}
_KEYWORDS = {
    "$defs", "$ref", "$schema", "additionalProperties", "description", "enum", "items", "minimum", "minProperties", "pattern",
    "properties", "propertyNames", "required", "title", "type",
}  # fmt: skip


@lru_cache(maxsize=1)
def results_schema() -> dict[str, Any]:
    """The JSON schema of `results.json`.

    Returns:
        `dict`

    Source:
        Ours.
    """
    return json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))


def check_results(document: Any, where: str = RESULTS_FILE) -> None:
    """Check a document against the schema.

    Args:
        document: What `results.json` says.
        where (`str`): File, for messages.

    Raises:
        VidLLMInputError: It does not fit; names the place in the document.

    Source:
        Upstream: JSON Schema 2020-12, the keywords that our schema uses. Ours: no further dependency for them; a number must be finite.
    """
    _check(document, results_schema(), where)
    provenance = document["provenance"]
    # What has no weights must be of a file, and only then is there nothing to say of frames.
    if "predictions_sha256" not in provenance and not (provenance["weights_sha256"] and provenance["frames"]):
        raise VidLLMInputError(
            f"{where}.provenance: wanted `weights_sha256` and `frames` of a model, or `predictions_sha256` of files; got neither"
        )


def _check(value: Any, schema: Mapping[str, Any], where: str) -> None:
    """One value against one schema; a keyword that is not known here must not pass in silence."""
    unknown = sorted(set(schema) - _KEYWORDS)
    if unknown:
        raise ValueError(f"{SCHEMA_FILE.name}: keyword {unknown[0]!r} is not known")
    if "$ref" in schema:
        _check(value, results_schema()["$defs"][schema["$ref"].removeprefix("#/$defs/")], where)
        return
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else types
    if types and not any(_TYPES[name](value) for name in types):
        raise VidLLMInputError(f"{where}: wanted {' or '.join(types)}; got {value!r:.80}")
    if "enum" in schema and value not in schema["enum"]:
        raise VidLLMInputError(f"{where}: wanted one of {', '.join(map(str, schema['enum']))}; got {value!r:.80}")
    if "pattern" in schema and not re.search(schema["pattern"], value):
        raise VidLLMInputError(f"{where}: wanted a text like {schema['pattern']}; got {value!r:.80}")
    if "minimum" in schema and value is not None and value < schema["minimum"]:
        raise VidLLMInputError(f"{where}: wanted at least {schema['minimum']}; got {value}")
    if isinstance(value, list) and "items" in schema:
        for number, item in enumerate(value):
            _check(item, schema["items"], f"{where}[{number}]")
    if isinstance(value, Mapping):
        _check_object(value, schema, where)


def _check_object(value: Mapping[str, Any], schema: Mapping[str, Any], where: str) -> None:
    """Keys of an object, and what stands under them."""
    missing = [name for name in schema.get("required", []) if name not in value]
    if missing:
        raise VidLLMInputError(f"{where}: wanted the key {missing[0]!r}; got {', '.join(map(str, value)) or 'none'}")
    if len(value) < schema.get("minProperties", 0):
        raise VidLLMInputError(f"{where}: wanted at least {schema['minProperties']} entry; got {len(value)}")
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name, item in value.items():
        if "propertyNames" in schema:
            _check(name, schema["propertyNames"], f"{where}, name")
        if name in known:
            _check(item, known[name], f"{where}.{name}")
        elif others is False:
            raise VidLLMInputError(f"{where}: wanted no key but {', '.join(known)}; got {name!r}")
        elif isinstance(others, Mapping):
            _check(item, others, f"{where}.{name}")


def read_results(path: str | Path) -> dict[str, Any]:
    """Read and check `results.json`.

    Args:
        path (`str` or `Path`): The file, or its folder.

    Returns:
        `dict`

    Raises:
        VidLLMInputError: It is absent, no JSON, or does not fit the schema.

    Source:
        Ours.
    """
    path = Path(path)
    path = path / RESULTS_FILE if path.is_dir() else path
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise VidLLMInputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise VidLLMInputError(f"{path}: not JSON ({error})") from None
    check_results(document, str(path))
    return document


def write_results(path: str | Path, document: Mapping[str, Any]) -> None:
    """Check and write `results.json`; a reader sees the old file or the new one, never a part.

    Args:
        path (`str` or `Path`): The file.
        document (`dict`): What it shall say.

    Raises:
        VidLLMInputError: The document does not fit the schema; nothing has been written then.

    Source:
        Ours.
    """
    check_results(document, str(path))
    part = Path(path).with_suffix(".part")
    part.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(path)


def table_rows(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A run as rows of a table: the model's number and the baselines' beside it.

    Args:
        run (`dict`): One entry of `runs`.

    Returns:
        `list[dict]`: `benchmark`, `protocol`, `metric`, `model`, and a number by kind of baseline where there is one.

    Source:
        Ours.
    """
    rows = []
    for benchmark, protocols in run["results"].items():
        for protocol, metrics in protocols.items():
            for metric, value in metrics.items():
                row = {"benchmark": benchmark, "protocol": protocol, "metric": metric, "model": value}
                for kind, found in run["baselines"].items():
                    other = found.get(benchmark, {}).get(protocol, {}).get(metric)
                    if other is not None:
                        row[kind] = other
                rows.append(row)
    return rows


__all__ = ["RESULTS_FILE", "check_results", "read_results", "results_schema", "table_rows", "write_results"]

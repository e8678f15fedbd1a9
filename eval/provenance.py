"""Where numbers are from: what predictions depend on, checked before they are mixed, and what a results document says of it. No tensors."""

import hashlib
import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vidllm.eval.results import RESULTS_FILE, read_results, write_results
from vidllm.eval.scoring import Scored, text_obstacle
from vidllm.eval.truth import read_rooms
from vidllm.eval.work import RECONSTRUCTION, EvaluationWork
from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.processing.video_reading_vidllm import VidLLMInputError


SETTINGS_FILE = "settings.json"
# What may change between runs that share predictions: a name, and how many prompts fit into memory.
FREE_SETTINGS = ("model", "batch_size")
PACKAGES = (
    "vidllm", "torch", "transformers", "numpy", "datasets", "safetensors", "av", "pillow", "pycocoevalcap", "scipy",
)  # fmt: skip


def weights_sha256(name: str, model: VidLLMForConditionalGeneration) -> dict[str, str]:
    """SHA-256 of a model's weights.

    Args:
        name (`str`): Checkpoint folder, or whatever else the model is called.
        model (`VidLLMForConditionalGeneration`): The loaded model.

    Returns:
        `dict[str, str]`: by file of a checkpoint folder, as `sha256sum` prints it; else `state_dict`: of all tensors with their names.

    Source:
        Ours: a number says which weights it belongs to.
    """
    files = sorted(Path(name).expanduser().glob("*.safetensors"))
    if files:
        return {path.name: _file_sha256(path) for path in files}
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {"state_dict": digest.hexdigest()}


def _file_sha256(path: Path) -> str:
    """SHA-256 of a file, however large."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def benchmark_settings(work: EvaluationWork, predictions_sha256: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What predictions of each benchmark depend on beside what all share.

    Args:
        work (`EvaluationWork`): What is asked.
        predictions_sha256 (`Mapping[str, str]`, *optional*): Of the files of another system's predictions, by benchmark.

    Returns:
        `dict` by benchmark.

    Source:
        Ours.
    """
    own = {name: {"split": part.split, "annotations_sha256": part.sha256} for name, part in work.benchmarks.items()}
    for name, value in (predictions_sha256 or {}).items():
        own[name]["predictions_sha256"] = value
    if work.reconstructed:
        digest = hashlib.sha256("\n".join(work.reconstructed).encode()).hexdigest()
        own[RECONSTRUCTION] = {"scenes_sha256": digest}
    return own


def check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder with predictions of other settings; else note the settings there.

    Args:
        out (`Path`): Folder of the run.
        settings (`dict`): `shared` by all benchmarks, and `benchmarks` with each one's own.

    Raises:
        VidLLMInputError: It holds predictions of other settings; names the first that differs.

    Source:
        Ours.
    """
    path = out / SETTINGS_FILE
    known = settings
    if path.is_file():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            pairs = [
                (name, known["shared"].get(name), value)
                for name, value in settings["shared"].items()
                if name not in FREE_SETTINGS
            ]
            pairs += [
                (f"{benchmark}: {name}", known["benchmarks"][benchmark].get(name), own.get(name))
                for benchmark, own in settings["benchmarks"].items()
                if benchmark in known["benchmarks"]
                for name in {**known["benchmarks"][benchmark], **own}
            ]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise VidLLMInputError(f"{path}: not the settings of an evaluation; choose another --out") from None
        for name, was, wanted in pairs:
            if was != json.loads(json.dumps(wanted)):
                raise VidLLMInputError(
                    f"{out}: holds predictions of other settings ({name} was {was}, now {wanted}); choose another --out"
                )
    merged = {**settings, "benchmarks": {**known["benchmarks"], **settings["benchmarks"]}}
    out.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def provenance(
    work: EvaluationWork,
    seconds: Sequence[float],
    settings: Mapping[str, Any],
    notes: Sequence[str],
    command: str | None,
    device: str,
    text_scores: str,
) -> dict[str, Any]:
    """Where the numbers of a run are from.

    Args:
        work (`EvaluationWork`): What was asked.
        seconds (`Sequence[float]`): Of each scene that was looked at.
        settings (`Mapping`): As of `check_settings`.
        notes (`Sequence[str]`): What was left out, and how baselines were made.
        command (`str`, *optional*): By default the process's own command line.
        device (`str`): Where the model ran.
        text_scores (`str`): `computed`, `not asked for`, or why some are missing.

    Returns:
        `dict`: `provenance` of the results document.

    Source:
        Ours.
    """
    counts = {name: {"rows": part.num_rows, "scored": len(part.samples)} for name, part in work.benchmarks.items()}
    if work.reconstructed:
        counts[RECONSTRUCTION] = {"scored": len(work.reconstructed)}
    rooms = read_rooms(work.data_root)
    predictions = {
        name: own["predictions_sha256"] for name, own in settings["benchmarks"].items() if "predictions_sha256" in own
    }
    return {
        **settings["shared"],
        **({"predictions_sha256": predictions} if predictions else {}),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "device": device,
        "splits": {name: part.split for name, part in work.benchmarks.items()},
        "annotations_sha256": {
            file: value for part in work.benchmarks.values() for file, value in part.sha256.items()
        },
        "rooms": None if rooms is None else {split: part["seed"] for split, part in rooms.items()},
        "counts": counts,
        "text_scores": text_scores,
        "notes": list(notes),
        "seconds_per_scene": float(np.mean(seconds)) if len(seconds) else None,
        "command": command or shlex.join(sys.argv),
    }


def _version(package: str) -> str:
    """Installed version of a package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def with_earlier_benchmarks(path: Path, document: dict[str, Any]) -> dict[str, Any]:
    """Keep what an earlier run with the same settings said about other benchmarks.

    Args:
        path (`Path`): Its results document; need not be there.
        document (`dict`): What is to be written.

    Returns:
        `dict`: both; where both speak of a benchmark, the new one counts.

    Raises:
        VidLLMInputError: The earlier document is malformed.

    Source:
        Ours.
    """
    if not path.is_file():
        return document
    earlier = read_results(path)
    ((name, run),) = document["runs"].items()
    before = earlier["runs"].get(name)
    if before is None:
        return document
    kinds = {**before["baselines"], **run["baselines"]}
    merged = {
        "results": {**before["results"], **run["results"]},
        "baselines": {kind: {**before["baselines"].get(kind, {}), **run["baselines"].get(kind, {})} for kind in kinds},
    }
    provenance = dict(document["provenance"])
    for part in (
        "splits",
        "annotations_sha256",
        "counts",
        *(["predictions_sha256"] if "predictions_sha256" in provenance else []),
    ):
        provenance[part] = {**earlier["provenance"][part], **provenance[part]}
    kept = set(before["results"]) - set(run["results"])
    provenance["notes"] = [
        *(note for note in earlier["provenance"]["notes"] if note.partition(":")[0] in kept),
        *provenance["notes"],
    ]
    return {"runs": {name: merged}, "provenance": provenance}


def text_scores_state(text: bool) -> str:
    """What provenance says of n-gram scores.

    Args:
        text (`bool`): Whether they were asked for.

    Returns:
        `str`: `computed`, `not asked for`, or why some are missing.

    Source:
        Ours.
    """
    return (text_obstacle() or "computed") if text else "not asked for"


def run_notes(work: EvaluationWork, scored: dict[str, Scored], more: Sequence[str]) -> list[str]:
    """What was left out, and how baselines were made.

    Args:
        work (`EvaluationWork`): What was asked.
        scored (`dict[str, Scored]`): What came of it.
        more (`Sequence[str]`): To be said at the end.

    Returns:
        `list[str]`

    Source:
        Ours.
    """
    notes = [*work.notes, *(note for part in work.benchmarks.values() for note in part.notes)]
    return [*notes, *(note for found in scored.values() for note in found.notes), *more]


def write_run(
    out: Path, name: str, scored: dict[str, Scored], given: dict[str, Scored] | None, said: dict[str, Any]
) -> dict[str, Any]:
    """Write the results document of a run.

    Args:
        out (`Path`): Folder of the run.
        name (`str`): Of the run.
        scored (`dict[str, Scored]`): Scores by benchmark.
        given (`dict[str, Scored]`, *optional*): The same with given geometry, put beside as a baseline.
        said (`dict`): Its provenance.

    Returns:
        `dict`: the document, with what an earlier run with the same settings said about other benchmarks.

    Raises:
        VidLLMInputError: It does not fit the schema, or the earlier document is malformed.

    Source:
        Ours.
    """
    baselines: dict[str, dict] = {}
    for benchmark, found in scored.items():
        for kind, scores in found.baselines.items():
            baselines.setdefault(kind, {})[benchmark] = scores
    if given is not None:
        baselines["given_geometry"] = {benchmark: found.results for benchmark, found in given.items()}
    results = {benchmark: found.results for benchmark, found in scored.items()}
    document = {"runs": {name: {"results": results, "baselines": baselines}}, "provenance": said}
    document = with_earlier_benchmarks(out / RESULTS_FILE, document)
    write_results(out / RESULTS_FILE, document)
    return document


__all__ = [
    "FREE_SETTINGS",
    "SETTINGS_FILE",
    "benchmark_settings",
    "check_settings",
    "provenance",
    "run_notes",
    "text_scores_state",
    "weights_sha256",
    "with_earlier_benchmarks",
    "write_run",
]

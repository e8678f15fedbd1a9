"""What a model card says, read from the files beside it: results with intervals, recipes with their cost, where the weights are from.

```
<model>/results/<name>/       results.json, and of its report: intervals.json, report.html, report.md
<model>/training.json         recipes of the runs that made the weights, in order, and what each cost
<model>/initialisation.json   where starting weights are from
<model>/demo.json             truth of the clip of the demonstration
```

A card is made of these files alone, so that it can be made again and compared.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vidllm.eval.places import without_places
from vidllm.eval.report import INTERVALS_NAME, results_sha256
from vidllm.eval.results import RESULTS_FILE, read_results
from vidllm.modeling_vidllm.configuration_vidllm import VidLLMConfig
from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.processing.video_reading_vidllm import VidLLMInputError


RESULTS_FOLDER, TRAINING_FILE, INITIALISATION_FILE = "results", "training.json", "initialisation.json"
CLIP_FILE, CLIP_TRUTH_FILE = "demo.mp4", "demo.json"
RECIPE_FILE, LOG_FILE = "recipe.json", "log.jsonl"
_LEVELS = ("easy", "standard", "hard")
# As a recipe names random weights; a folder or a Hub id looks otherwise.
_PRESET = re.compile(r"^vidllm-(tiny|nano|\d+b)$")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class MeasuredRun:
    """One results document.

    Args:
        document (`dict`): What `results.json` says, with one run.
        intervals (`dict`): What `intervals.json` says; empty where there is no report.

    Source:
        Ours.
    """

    document: Mapping[str, Any]
    intervals: Mapping[str, Any] = field(default_factory=dict)

    @property
    def level(self) -> str:
        """Name of the run: easy, standard or hard for rooms, else the data root's."""
        return next(iter(self.document["runs"]))

    @property
    def run(self) -> Mapping[str, Any]:
        """Results and baselines."""
        return self.document["runs"][self.level]

    @property
    def name(self) -> str:
        """Name of its folder and of its heading: the level, with `_given_geometry` where the model got the true geometry."""
        plain = re.sub(r"[^\w.-]", "_", self.level).lstrip(".") or "run"
        return plain + ("_given_geometry" if self.document["provenance"]["geometry"] == "given" else "")

    @property
    def on_rooms(self) -> bool:
        """Whether the scenes are procedural rooms."""
        return self.document["provenance"].get("rooms") is not None

    def interval(self, benchmark: str, protocol: str, metric: str) -> Sequence[float] | None:
        """`[low, high]` of a number, None where it has none."""
        return self.intervals.get("intervals", {}).get(benchmark, {}).get(protocol, {}).get(metric)


@dataclass(frozen=True)
class CardFacts:
    """All that a card is made of.

    Args:
        name (`str`): Of the model.
        parameters (`int`): Counted.
        frames (`int`, *optional*): That the checkpoint samples by itself.
        is_metric (`bool`): Whether lengths are metres.
        refines_poses (`bool`): Whether predicted poses are made exact against the pictures.
        refines_depth (`bool`): Whether depth bends with them.
        refines_focal (`bool`): Whether focal lengths are found with them.
        turns_room (`bool`): Whether the room's heading is read off the reconstruction's walls.
        stored_as (`tuple[str, ...]`): Dtypes in the weight files.
        runs (`tuple[MeasuredRun, ...]`): Results.
        training (`tuple[dict, ...]`): `recipe`, `random_start`, `versions`, `git`, `cost` of each run.
        initialisation (`dict`, *optional*): Of starting weights.
        clip (`dict`, *optional*): `seed`, `number`, `difficulty` of the room of the demonstration.

    Source:
        Ours.
    """

    name: str
    parameters: int
    frames: int | None = None
    is_metric: bool = False
    refines_poses: bool = False
    refines_depth: bool = False
    refines_focal: bool = False
    turns_room: bool = False
    stored_as: tuple[str, ...] = ()
    runs: tuple[MeasuredRun, ...] = ()
    training: tuple[Mapping[str, Any], ...] = ()
    initialisation: Mapping[str, Any] | None = None
    clip: Mapping[str, Any] | None = None

    @property
    def untrained(self) -> bool:
        """Whether the folder marks its weights as random."""
        return bool(self.initialisation and self.initialisation.get("untrained"))

    @property
    def sources(self) -> list[tuple[str, str]]:
        """(part, where its pretrained weights are from)."""
        parts = (self.initialisation or {}).get("parts", {})
        found = [(name, part.get("source")) for name, part in parts.items() if isinstance(part, Mapping)]
        return [(name, source) for name, source in found if source and source != "random"]

    @property
    def only_rooms(self) -> bool:
        """Whether nothing but random numbers and procedural rooms went into the weights, as far as the files say."""
        if self.sources or not self.training:
            return self.untrained and not self.sources
        recipes = [run["recipe"] for run in self.training]
        others = ("data_root", "data", "clips", "geometry_teacher", "language_teacher", "benchmarks")
        alone = all(recipe.get("rooms") and not any(recipe.get(name) for name in others) for recipe in recipes)
        return alone and bool(self.training[0].get("random_start"))


def read_json(path: Path, what: str) -> Any:
    """Read a file of JSON.

    Args:
        path (`Path`): The file.
        what (`str`): What is wanted, for the message.

    Returns:
        What it says.

    Raises:
        VidLLMInputError: It cannot be read or is no JSON.

    Source:
        Ours.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise VidLLMInputError(f"{path}: wanted {what}; cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise VidLLMInputError(f"{path}: wanted {what}; got something that is not JSON ({error})") from None


def read_run(folder: Path) -> MeasuredRun:
    """Read a run of `vidllm eval`, or the copy of one beside a card.

    Args:
        folder (`Path`): With `results.json`, and `intervals.json` where a report was written.

    Returns:
        `MeasuredRun`: paths shortened.

    Raises:
        VidLLMInputError: A file is malformed, there are several runs, or the report is of other results.

    Source:
        Ours.
    """
    document = read_results(folder)
    if len(document["runs"]) != 1:
        raise VidLLMInputError(f"{folder / RESULTS_FILE}: wanted one run; got {', '.join(document['runs'])}")
    path, intervals = folder / INTERVALS_NAME, {}
    if path.is_file():
        intervals = read_json(path, "intervals of a report")
        if not isinstance(intervals, dict) or intervals.get("results_sha256") != results_sha256(document):
            raise VidLLMInputError(
                f"{path}: wanted the intervals of {RESULTS_FILE} beside it; got those of other results; `vidllm report` writes them again"
            )
    return MeasuredRun(without_places(document), intervals)


def check_weights(model: Path, run: MeasuredRun, where: str | Path) -> None:
    """Refuse results of other weights.

    Args:
        model (`Path`): Checkpoint folder.
        run (`MeasuredRun`): Results.
        where (`str` or `Path`): Of the results, for the message.

    Raises:
        VidLLMInputError: The SHA-256 of the weight files are not those of the results.

    Source:
        Ours.
    """
    # Predictions of another system have no weights.
    measured, found = dict(run.document["provenance"].get("weights_sha256") or {}), {}
    for path in sorted(model.glob("*.safetensors")):
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        found[path.name] = digest.hexdigest()
    if found != measured:
        raise VidLLMInputError(
            f"{where}: wanted results of the weights in {model.resolve().name}/; got results of others (SHA-256 of "
            f"{', '.join(sorted(set(found) | set(measured)))} differ); run `vidllm eval` with this folder as --model"
        )


def read_training(recipes: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Recipes of training runs, with what each cost by the log beside it.

    Args:
        recipes (`Sequence[str | Path]`): `recipe.json` of each run or its folder, in the order in which the runs were made.

    Returns:
        `list[dict]`: what each file says, paths shortened; `random_start`: whether it started from random weights; `cost`: `steps`,
        `seconds_per_step` (mean), `hours`, None without a log.

    Raises:
        VidLLMInputError: A file is absent or no recipe, or a log is malformed.

    Source:
        Ours: seconds between the lines of the log, so pauses between resumed parts do not count.
    """
    found = []
    for given in recipes:
        path = Path(given).expanduser()
        path = path / RECIPE_FILE if path.is_dir() else path
        document = read_json(path, f"the {RECIPE_FILE} of a training run")
        if not isinstance(document, dict) or not isinstance(document.get("recipe"), dict):
            raise VidLLMInputError(f"{path}: wanted the {RECIPE_FILE} of a training run; got no `recipe` in it")
        start = bool(_PRESET.match(str(document["recipe"].get("model"))))
        found.append({**without_places(document), "random_start": start, "cost": _cost(path.with_name(LOG_FILE))})
    return found


def _cost(log: Path) -> dict[str, float] | None:
    """Steps and hours of a run, from its log."""
    if not log.is_file():
        return None
    seconds, before = 0.0, 0
    for number, line in enumerate(log.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
            step, each = int(entry["step"]), entry.get("seconds_per_step")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise VidLLMInputError(
                f"{log}, line {number}: wanted a line of a training log; got {line[:80]!r}"
            ) from None
        if each is not None:
            seconds, before = seconds + each * (step - before), step
    return {"steps": before, "seconds_per_step": seconds / before, "hours": seconds / 3600} if before else None


def stored_dtypes(model: Path) -> tuple[str, ...]:
    """Dtypes of the floating weights in the files, the commonest first.

    Args:
        model (`Path`): Checkpoint folder.

    Returns:
        `tuple[str, ...]`: such as `float16`.

    Source:
        Ours.
    """
    counts: dict[str, int] = {}
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                part = file.get_slice(name)
                word = _DTYPES.get(part.get_dtype())
                if word:
                    counts[word] = counts.get(word, 0) + math.prod(part.get_shape())
    return tuple(sorted(counts, key=lambda word: -counts[word]))


def read_runs(model: Path) -> tuple[MeasuredRun, ...]:
    """Results that lie beside a card.

    Args:
        model (`Path`): Checkpoint folder.

    Returns:
        `tuple[MeasuredRun, ...]`: see `in_order`.

    Raises:
        VidLLMInputError: A file is malformed, or of other weights.

    Source:
        Ours.
    """
    found = []
    for path in sorted((model / RESULTS_FOLDER).glob(f"*/{RESULTS_FILE}")):
        run = read_run(path.parent)
        check_weights(model, run, path)
        found.append(run)
    return in_order(found)


def in_order(runs: Sequence[MeasuredRun]) -> tuple[MeasuredRun, ...]:
    """Runs as a card lists them.

    Args:
        runs (`Sequence[MeasuredRun]`): In any order.

    Returns:
        `tuple[MeasuredRun, ...]`: easy, standard, hard, then others by name.

    Source:
        Ours.
    """
    places = {level: place for place, level in enumerate(_LEVELS)}
    return tuple(sorted(runs, key=lambda one: (places.get(one.level, len(places)), one.name)))


def read_facts(
    model: Path, runs: Sequence[MeasuredRun] | None = None, training: Sequence[Mapping[str, Any]] | None = None
) -> CardFacts:
    """Everything that a card of a folder says.

    Args:
        model (`Path`): Checkpoint folder.
        runs (`Sequence[MeasuredRun]`, *optional*): Instead of those beside the card.
        training (`Sequence[dict]`, *optional*): Instead of that beside the card.

    Returns:
        `CardFacts`

    Raises:
        VidLLMInputError: A file is absent or malformed, or results are of other weights.

    Source:
        Ours.
    """
    config = read_json(model / "config.json", "a checkpoint's config")

    def beside(name: str, what: str) -> Any:
        return read_json(model / name, what) if (model / name).is_file() else None

    if training is None:
        training = (beside(TRAINING_FILE, "recipes") or {"runs": []})["runs"]
    clip = beside(CLIP_TRUTH_FILE, "the truth of a clip")
    # Counted without reading a weight; tied ones once.
    with torch.device("meta"):
        empty = VidLLMForConditionalGeneration(VidLLMConfig.from_pretrained(model))
    return CardFacts(
        name=model.resolve().name,
        parameters=sum(parameter.numel() for parameter in empty.parameters()),
        frames=_frames(beside("processor_config.json", "a processor's config") or {}),
        is_metric=bool(config.get("is_metric")),
        refines_poses=bool(config.get("pose_refinement_sizes")),
        refines_depth=bool(config.get("pose_refinement_depth_grid")),
        refines_focal=bool(config.get("pose_refinement_focal_spread")),
        turns_room=bool(config.get("align_room_to_walls")),
        stored_as=stored_dtypes(model),
        runs=read_runs(model) if runs is None else in_order(runs),
        training=tuple(training),
        initialisation=without_places(beside(INITIALISATION_FILE, "where weights are from")),
        clip=None if clip is None else clip["room"],
    )


def _frames(settings: Mapping[str, Any]) -> int | None:
    """Frames that a processor samples, wherever its config says so."""
    for part in (settings, *(value for value in settings.values() if isinstance(value, Mapping))):
        if isinstance(part.get("num_frames"), int):
            return part["num_frames"]
    return None


__all__ = [
    "CLIP_FILE",
    "CLIP_TRUTH_FILE",
    "RECIPE_FILE",
    "RESULTS_FOLDER",
    "TRAINING_FILE",
    "CardFacts",
    "MeasuredRun",
    "check_weights",
    "in_order",
    "read_facts",
    "read_run",
    "read_runs",
    "read_training",
    "stored_dtypes",
]

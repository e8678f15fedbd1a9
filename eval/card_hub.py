"""Numbers in the Hub's own forms: `model-index` of a card's header, and files of `.eval_results/`. No tensors."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from vidllm.eval.card_facts import CardFacts, MeasuredRun
from vidllm.processing.video_reading_vidllm import VidLLMInputError


HUB_RESULTS_FOLDER = ".eval_results"
# The Hub's name of the nearest task, and ours.
TASKS = {
    "scanqa": ("visual-question-answering", "questions about a scene"),
    "sqa3d": ("visual-question-answering", "questions from a described standpoint"),
    "scanrefer": ("object-detection", "3D boxes of what a sentence describes"),
    "scan2cap": ("image-to-text", "descriptions of objects"),
    "reconstruction": ("depth-estimation", "cameras, depth, metric scale"),
}
_HUB_DATASET = re.compile(r"^([^/=]+)/([^/=]+)/([^/=]+)/([^=]+)=([\w.-]+/[\w.-]+):(\S+)$")


def eval_results(runs: Sequence[MeasuredRun]) -> list[EvalResult]:
    """All numbers of the model but those of single kinds, as a card's header holds them.

    Args:
        runs (`Sequence[MeasuredRun]`): Results.

    Returns:
        `list[EvalResult]`: fractions, degrees, metres, as in the results; the protocol stands in the metric's name and arguments.

    Source:
        Upstream: huggingface/hub-docs@064c75486afa079642c3a60c3f077835eed03a06 modelcard.md (model-index). Ours: names.
    """
    found = []
    for run in runs:
        provenance = run.document["provenance"]
        where = f"procedural rooms, level {run.level}" if run.on_rooms else run.level
        for benchmark, protocols in run.run["results"].items():
            task, task_name = TASKS[benchmark]
            found += [
                EvalResult(
                    task_type=task,
                    task_name=task_name,
                    dataset_type=benchmark,
                    dataset_name=f"{benchmark} ({where})",
                    dataset_config=run.name,
                    dataset_split=provenance["splits"].get(benchmark),
                    metric_type=metric,
                    metric_name=f"{metric} (protocol {protocol}, geometry {provenance['geometry']})",
                    metric_args={"protocol": protocol},
                    metric_value=value,
                )
                for protocol, metrics in protocols.items()
                for metric, value in metrics.items()
                if "/" not in metric
            ]
    return found


def card_data(facts: CardFacts, licence: str | None) -> ModelCardData:
    """The header of a card.

    Args:
        facts (`CardFacts`): What is known.
        licence (`str`, *optional*): As the Hub names it.

    Returns:
        `ModelCardData`

    Source:
        Upstream: huggingface_hub ModelCardData.
    """
    return ModelCardData(
        language="en",
        library_name="transformers",
        pipeline_tag="video-text-to-text",
        license=licence,
        tags=["vidllm", *(["untrained"] if facts.untrained else [])],
        model_name=facts.name,
        eval_results=eval_results(facts.runs),
    )


def hub_entries(runs: Sequence[MeasuredRun], datasets: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """What the files of `.eval_results/` say.

    Args:
        runs (`Sequence[MeasuredRun]`): Results.
        datasets (`Sequence[str]`): Which number stands on which leaderboard, `RUN/BENCHMARK/PROTOCOL/METRIC=OWNER/NAME:TASK`; a dataset of the Hub
            that is a benchmark there, and its task.

    Returns:
        `dict[str, list[dict]]`: entries by file; the first word of an entry's notes says which number it is.

    Raises:
        VidLLMInputError: A text is not of this form, a number was not measured, or a task is named twice.

    Source:
        Upstream: huggingface/hub-docs@064c75486afa079642c3a60c3f077835eed03a06 docs/hub/eval-results.md: an entry is one number on the leaderboard
        of a dataset that is registered as a Benchmark. Ours: who evaluates names that dataset; none is made up here.
    """
    by_name, taken = {run.name: run for run in runs}, set()
    found: dict[str, list[EvalResultEntry]] = {}
    for text in datasets:
        match = _HUB_DATASET.match(text.strip())
        if match is None:
            raise VidLLMInputError(
                f"--hub-dataset: wanted RUN/BENCHMARK/PROTOCOL/METRIC=OWNER/NAME:TASK, such as "
                f"easy/scanqa/official/exact_match=someone/rooms:scanqa; got {text!r}"
            )
        name, benchmark, protocol, metric, dataset, task = match.groups()
        run = by_name.get(name)
        value = run and run.run["results"].get(benchmark, {}).get(protocol, {}).get(metric)
        if run is None or value is None:
            raise VidLLMInputError(
                f"--hub-dataset: wanted a number of the results ({', '.join(by_name)}); {name}/{benchmark}/{protocol}/{metric} is none"
            )
        if (dataset, task) in taken:
            raise VidLLMInputError(
                f"--hub-dataset: wanted every task of a dataset once; {dataset}:{task} is there twice"
            )
        taken.add((dataset, task))
        provenance = run.document["provenance"]
        notes = (
            f"{name}/{benchmark}/{protocol}/{metric}; protocol {protocol}, geometry {provenance['geometry']}, "
            f"{provenance['frames']} frames per scene"
        )
        found.setdefault(f"{name}.yaml", []).append(EvalResultEntry(dataset, task, value, notes=notes))
    return {file: eval_result_entries_to_yaml(entries) for file, entries in found.items()}


def recorded_entries(model: Path) -> dict[str, list[dict[str, Any]]]:
    """What the files of `.eval_results/` say now.

    Args:
        model (`Path`): Checkpoint folder.

    Returns:
        `dict[str, list[dict]]`: entries by file.

    Raises:
        VidLLMInputError: A file is no YAML list of entries.

    Source:
        Ours.
    """
    found = {}
    for path in sorted((model / HUB_RESULTS_FOLDER).glob("*.yaml")):
        try:
            listed = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise VidLLMInputError(f"{path}: wanted YAML; {' '.join(str(error).split())}") from None
        if not isinstance(listed, list) or not all(
            isinstance(entry, dict) and isinstance(entry.get("dataset"), dict) for entry in listed
        ):
            raise VidLLMInputError(f"{path}: wanted a list of entries, each with its dataset; got {listed!r:.80}")
        found[path.name] = listed
    return found


def datasets_of(entries: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Which number stands on which leaderboard.

    Args:
        entries (`dict[str, list[dict]]`): From `recorded_entries`.

    Returns:
        `list[str]`: as `hub_entries` takes them.

    Source:
        Ours.
    """
    return [
        f"{str(entry.get('notes')).partition(';')[0]}={entry['dataset'].get('id')}:{entry['dataset'].get('task_id')}"
        for listed in entries.values()
        for entry in listed
    ]


__all__ = [
    "HUB_RESULTS_FOLDER",
    "TASKS",
    "card_data",
    "datasets_of",
    "eval_results",
    "hub_entries",
    "recorded_entries",
]

"""Model cards from measured results: written from files alone, and compared with them. No tensors."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.utils import yaml_dump
from jinja2 import Environment, StrictUndefined
from yaml import YAMLError

from vidllm.eval.card_context import card_context, number
from vidllm.eval.card_facts import (
    RECIPE_FILE,
    RESULTS_FOLDER,
    TRAINING_FILE,
    CardFacts,
    MeasuredRun,
    check_weights,
    read_facts,
    read_run,
    read_runs,
    read_training,
)
from vidllm.eval.card_hub import (
    HUB_RESULTS_FOLDER,
    card_data,
    datasets_of,
    eval_results,
    hub_entries,
    recorded_entries,
)
from vidllm.eval.report import HTML_NAME, INTERVALS_NAME, MARKDOWN_NAME
from vidllm.eval.results import RESULTS_FILE, table_rows
from vidllm.processing.video_reading_vidllm import VidLLMInputError


CARD_NAME, TEMPLATE_NAME = "README.md", "card.md.jinja"
_NUMBER = re.compile(r"(?<![\w.])\d(?:[\d,]*\d)?(?:\.\d+)?")
_INTERVAL = re.compile(r"^(-?[\d.]+) to (-?[\d.]+)$")
Place = tuple[str, ...]


@dataclass(frozen=True)
class WrittenCard:
    """What `write_card` made.

    Args:
        files (`tuple[Path, ...]`): What was written; the card is the last.
        numbers (`int`): Numbers of the results that stand in the card's tables.
        notices (`tuple[str, ...]`): What it lacks, and why.

    Source:
        Ours.
    """

    files: tuple[Path, ...]
    numbers: int
    notices: tuple[str, ...]


def write_card(
    model: str | Path,
    results: Sequence[str | Path] = (),
    recipes: Sequence[str | Path] = (),
    hub_datasets: Sequence[str] = (),
    licence: str | None = None,
) -> WrittenCard:
    """Write the card of a checkpoint folder, and beside it the files that its numbers are from.

    Args:
        model (`str` or `Path`): Checkpoint folder.
        results (`Sequence[str | Path]`): Folders of runs of `vidllm eval`, with their reports; they join those that lie in the folder already.
        recipes (`Sequence[str | Path]`): `recipe.json` of each training run or its folder, in order; by default what the folder records.
        hub_datasets (`Sequence[str]`): Numbers for `.eval_results/`, see `hub_entries`; by default those that stand there already.
        licence (`str`, *optional*): Of the weights, as the Hub names it; by default Apache-2.0 where only rooms and random numbers went into them.

    Returns:
        `WrittenCard`

    Raises:
        VidLLMInputError: Results are absent, malformed or of other weights, or a file cannot be read; nothing has been written then.

    Source:
        Ours.
    """
    model = Path(model).expanduser()
    if not (model / "config.json").is_file() or not list(model.glob("*.safetensors")):
        raise VidLLMInputError(f"model {model}: wanted a checkpoint folder with config.json and weights; got none")
    runs, texts, notices = _gathered(model, results)
    training = None
    if not recipes and not (model / TRAINING_FILE).is_file() and (model / RECIPE_FILE).is_file():
        recipes = (model,)
    if recipes:
        training = read_training(recipes)
        texts[TRAINING_FILE] = _json_text({"runs": training})
    elif not (model / TRAINING_FILE).is_file():
        notices.append("no recipe, so the card says nothing of the training (--recipe)")
    entries = hub_entries(runs, hub_datasets or datasets_of(recorded_entries(model)))
    if not entries:
        notices.append(
            f"no {HUB_RESULTS_FOLDER}: the Hub takes numbers on datasets that it lists as benchmarks; --hub-dataset names one"
        )
    for file, listed in entries.items():
        texts[f"{HUB_RESULTS_FOLDER}/{file}"] = yaml_dump(listed, sort_keys=False)
    facts = read_facts(model, runs, training)
    if licence is None and not facts.only_rooms:
        notices.append("no licence of the weights is stated (--license)")
    texts[CARD_NAME] = _rendered(facts, licence)
    for name, text in texts.items():
        if text is None:
            (model / name).unlink(missing_ok=True)
    written = [_write(model / name, text) for name, text in texts.items() if text is not None]
    return WrittenCard(tuple(written), sum(1 for _ in _expected_cells(runs)), tuple(notices))


def card_text(model: str | Path, licence: str | None = None) -> str:
    """The card of a folder as the files in it give it.

    Args:
        model (`str` or `Path`): Checkpoint folder.
        licence (`str`, *optional*): As for `write_card`.

    Returns:
        `str`: of `README.md`.

    Raises:
        VidLLMInputError: A file is absent or malformed, or results are of other weights.

    Source:
        Ours.
    """
    return _rendered(read_facts(Path(model).expanduser()), licence)


def _gathered(
    model: Path, results: Sequence[str | Path]
) -> tuple[list[MeasuredRun], dict[str, str | None], list[str]]:
    """Runs that were named and those that are there already; texts of the files beside the card, None where one must go; what is lacking."""
    runs: dict[str, MeasuredRun] = {}
    texts: dict[str, str | None] = {}
    notices = []
    present = [path.parent for path in sorted((model / RESULTS_FOLDER).glob(f"*/{RESULTS_FILE}"))]
    for position, folder in enumerate([*map(_run_folder, results), *present]):
        if position >= len(results) and folder.name in runs:
            continue
        run = read_run(folder)
        check_weights(model, run, folder / RESULTS_FILE)
        if run.name in runs:
            raise VidLLMInputError(f"--results: wanted every run once; {folder} is a second one named {run.name}")
        if folder in present and folder.name != run.name:
            raise VidLLMInputError(f"{folder}: wanted a folder named after its run, {run.name}")
        runs[run.name] = run
        place = f"{RESULTS_FOLDER}/{run.name}"
        texts[f"{place}/{RESULTS_FILE}"] = _json_text(run.document)
        if not run.intervals:
            notices.append(f"{run.name}: no report, so no intervals; `vidllm report {folder}` makes both")
        texts[f"{place}/{INTERVALS_NAME}"] = _json_text(run.intervals) if run.intervals else None
        # What a model says may be any text; beside a card it is ASCII, and means the same.
        for name, errors in ((HTML_NAME, "xmlcharrefreplace"), (MARKDOWN_NAME, "backslashreplace")):
            texts[f"{place}/{name}"] = _ascii(folder / name, errors) if run.intervals else None
    if not runs:
        raise VidLLMInputError(
            f"--results: wanted the folder of a run of `vidllm eval`; got none, and {model / RESULTS_FOLDER} holds none"
        )
    return list(runs.values()), texts, notices


def _run_folder(given: str | Path) -> Path:
    """The folder of a run, which may be named by its file."""
    path = Path(given).expanduser()
    return path.parent if path.name == RESULTS_FILE else path


def _ascii(path: Path, errors: str) -> str:
    """A report's text, with other characters as escapes."""
    try:
        return path.read_bytes().decode("utf-8").encode("ascii", errors).decode("ascii")
    except (OSError, ValueError) as error:
        raise VidLLMInputError(f"{path}: wanted a report; cannot be read ({error})") from None


def _rendered(facts: CardFacts, licence: str | None) -> str:
    """The card of what is known; a name without a value is an error, which `ModelCard.from_template` leaves blank in silence."""
    licence = licence or ("apache-2.0" if facts.only_rooms else None)
    template = files("vidllm.model_cards").joinpath(TEMPLATE_NAME).read_text(encoding="utf-8")
    made = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    # Sections that are left out leave their blank lines behind.
    body = re.sub(r"\n{3,}", "\n\n", made.from_string(template).render(**card_context(facts, licence))).strip()
    return str(ModelCard(f"---\n{card_data(facts, licence).to_yaml()}\n---\n\n{body}\n"))


def _json_text(value: Any) -> str:
    """As the files beside a card hold it."""
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def _write(path: Path, text: str) -> Path:
    """A reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8", errors="backslashreplace")
    part.replace(path)
    return path


# ---------------------------------------------------------------------- comparing


def check_card(model: str | Path) -> int:
    """Compare the numbers of a card with the files beside it: its header, its tables, `.eval_results/`, and all that its sentences say.

    Args:
        model (`str` or `Path`): Checkpoint folder with `README.md` and `results/`.

    Returns:
        `int`: how many numbers of results were compared; those of sentences are not counted.

    Raises:
        VidLLMInputError: The first number that differs: where, wanted, got; or results are absent, or of other weights than those in the folder.

    Source:
        Ours: the tables are read back without the code that writes them, so that a fault of that code shows too. Words may be changed, and numbers
        added to them; each that `vidllm card` writes (parameters, hours, rows, seconds, a recipe's fields) must be there as often as it writes it.
    """
    model = Path(model).expanduser()
    path, runs = model / CARD_NAME, read_runs(model)
    if not runs:
        raise VidLLMInputError(f"{model}: wanted results beside the card, {RESULTS_FOLDER}/<name>/; got none")
    try:
        text = path.read_bytes().decode("utf-8")
        card = ModelCard(text, ignore_metadata_errors=False)
        header = _in_header(card.data.eval_results or [])
    except (OSError, ValueError, TypeError, KeyError, YAMLError) as error:
        raise VidLLMInputError(f"{path}: wanted a card; {' '.join(str(error).split())}") from None
    _compare(f"{path}, model-index", _in_header(eval_results(runs)), header)
    cells: dict[Place, str] = {}
    for place, cell in _cells_in(path, text):
        if cells.setdefault(place, cell) != cell:
            raise VidLLMInputError(f"{path}, {', '.join(place)}: wanted one number; got {cells[place]} and {cell}")
    expected = dict(_expected_cells(runs))
    _compare(str(path), expected, cells)
    recorded = recorded_entries(model)
    wanted, found = _in_entries(hub_entries(runs, datasets_of(recorded))), _in_entries(recorded)
    _compare(str(model / HUB_RESULTS_FOLDER), wanted, found)
    _check_sentences(path, card_text(model, card.data.license), text)
    return len(header) + len(expected) + len(found)


def _check_sentences(path: Path, wanted: str, found: str) -> None:
    """Every number of the card as it would be written now stands in the card as it is."""
    bodies = [ModelCard(text, ignore_metadata_errors=False).text for text in (wanted, found)]
    left = Counter(_NUMBER.findall(bodies[1]))
    for line in bodies[0].splitlines():
        for number_text in _NUMBER.findall(line):
            if not left[number_text]:
                raise VidLLMInputError(
                    f"{path}: wanted the number {number_text} once more, as in {' '.join(line.split())!r:.200}, which the files beside it give; "
                    "`vidllm card` writes it again"
                )
            left[number_text] -= 1


def _compare(where: str, wanted: Mapping[Place, Any], found: Mapping[Place, Any]) -> None:
    """The first number that differs, is lacking or made up."""
    for place in {**wanted, **found}:
        if wanted.get(place) != found.get(place):
            raise VidLLMInputError(
                f"{where}, {', '.join(map(str, place))}: wanted {wanted.get(place, 'no number')}, as in {RESULTS_FOLDER}/; "
                f"got {found.get(place, 'no number')}; `vidllm card` writes it again"
            )


def _in_header(listed: Sequence[Any]) -> dict[Place, Any]:
    """The numbers of `model-index`."""
    return {
        (one.dataset_config, one.dataset_type, one.metric_args["protocol"], one.metric_type): one.metric_value
        for one in listed
    }


def _in_entries(entries: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[Place, Any]:
    """The numbers of `.eval_results/`, with what their notes say of them."""
    return {
        (
            file,
            str(entry["dataset"].get("id")),
            str(entry["dataset"].get("task_id")),
            str(entry.get("notes")),
        ): entry.get("value")
        for file, listed in entries.items()
        for entry in listed
    }


def _expected_cells(runs: Sequence[MeasuredRun]) -> Iterator[tuple[Place, str]]:
    """Every number of the results, by run, benchmark, protocol, metric and column."""
    for run in runs:
        for row in table_rows(run.run):
            place = (run.name, row["benchmark"], row["protocol"], row["metric"])
            for column, value in row.items():
                if column not in ("benchmark", "protocol", "metric"):
                    yield (*place, column), number(value)
            interval = run.interval(row["benchmark"], row["protocol"], row["metric"])
            if interval is not None:
                yield (*place, "low"), number(interval[0])
                yield (*place, "high"), number(interval[1])


def _cells_in(path: Path, text: str) -> Iterator[tuple[Place, str]]:
    """Every number of a card's tables below a heading of the third level, in the same way."""
    name: str | None = None
    columns: list[str] | None = None
    for line_number, line in enumerate(text.splitlines(), 1):
        if line.startswith("#"):
            name, columns = (line.removeprefix("### ") if line.startswith("### ") else None), None
            continue
        if not line.startswith("|"):
            columns = None
        if name is None or not line.startswith("| "):
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if columns is None:
            columns = cells
            continue
        if len(cells) != len(columns):
            raise VidLLMInputError(f"{path}, line {line_number}: wanted {len(columns)} cells; got {len(cells)}")
        row = dict(zip(columns, cells, strict=True))
        place = (name, row.pop("benchmark", ""), row.pop("protocol", ""), row.pop("metric", ""))
        bounds = _INTERVAL.match(row.pop("interval", ""))
        if bounds:
            yield (*place, "low"), bounds[1]
            yield (*place, "high"), bounds[2]
        yield from (((*place, column), cell) for column, cell in row.items() if cell)


__all__ = ["CARD_NAME", "WrittenCard", "card_text", "check_card", "write_card"]

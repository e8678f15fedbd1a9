"""The command `vidllm eval`: benchmarks in, a table with protocols and baselines out."""

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from vidllm.cli_console import progress, say, write_json


@contextmanager
def watching() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr, where that is a terminal; gives the function that moves it: (what, done, of all)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda *_: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def move(what: str, done: int, of_all: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=of_all)
            bar.update(tasks[what], completed=done, total=of_all)

        yield move


def print_table(document: dict[str, Any]) -> None:
    """The runs of a results document on stdout."""
    from rich.console import Console
    from rich.table import Table

    from vidllm.eval.results import table_rows

    # A pipe has no width; nothing is cut there.
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, emoji=False, width=200)
    geometry = document["provenance"]["geometry"]
    for name, run in document["runs"].items():
        kinds = list(run["baselines"])
        table = Table(title=f"{name}, geometry {geometry}", title_justify="left")
        for column in ("benchmark", "protocol", "metric"):
            table.add_column(column)
        for column in ("model", *kinds):
            table.add_column(column, justify="right")
        last = None
        for row in table_rows(run):
            if last not in (None, row["benchmark"]):
                table.add_section()
            numbers = ["" if kind not in row else f"{row[kind]:.4f}" for kind in ("model", *kinds)]
            table.add_row(row["benchmark"], row["protocol"], row["metric"], *numbers)
            last = row["benchmark"]
        console.print(table)


def evaluate(
    benchmarks: Annotated[
        list[str], typer.Argument(metavar="BENCHMARK...", help="scanqa, sqa3d, scanrefer, scan2cap, reconstruction.")
    ],
    data_root: Annotated[Path, typer.Option("--data-root", metavar="DIR", help="Scenes and annotations.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for predictions and results.json.")],
    model: Annotated[
        str | None, typer.Option("--model", metavar="PATH_OR_ID", help="Checkpoint folder or Hub id.")
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(
            "--predictions",
            metavar="FILE",
            help="Instead of a model: answers, boxes, captions of any system, as .jsonl, .json, or a folder of them by benchmark.",
        ),
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="Default: SQA3D test, others val.")] = None,
    geometry: Annotated[
        str | None,
        typer.Option(
            "--geometry",
            metavar="predicted|given",
            help="given: true poses, intrinsics and depth. Default: predicted; with --predictions not stated.",
        ),
    ] = None,
    with_given_geometry: Annotated[
        bool, typer.Option("--with-given-geometry", help="Run again with given geometry, as a baseline.")
    ] = False,
    frames: Annotated[
        int | None, typer.Option("--frames", min=1, help="Frames per scene; default: the checkpoint's.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts answered together.")] = 32,
    limit_scenes: Annotated[
        int | None, typer.Option("--limit-scenes", min=1, metavar="N", help="Only the first N scenes.")
    ] = None,
    blind_root: Annotated[
        Path | None,
        typer.Option(
            "--blind-root", metavar="DIR", help="Fit the baselines on the train split there; default: the data root's."
        ),
    ] = None,
    train_rooms: Annotated[
        int,
        typer.Option(
            "--train-rooms", min=1, help="Made in memory to fit baselines on, where rooms lack a train split."
        ),
    ] = 400,
    prompts: Annotated[
        str, typer.Option("--prompts", help="Wording: vidllm, plain, video3dllm or llava3d.")
    ] = "vidllm",
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ...; default: CUDA if there is.")
    ] = None,
    proposals: Annotated[
        str | None,
        typer.Option(
            "--proposals",
            metavar="PATH|true",
            help="Boxes to choose from, and to caption: .json (Video-3D-LLM), .pt (Chat-Scene), folder of masks (LEO), or the true ones.",
        ),
    ] = None,
    no_text: Annotated[bool, typer.Option("--no-text", help="Leave out BLEU, METEOR, ROUGE-L and CIDEr.")] = False,
    num_processes: Annotated[
        int | None,
        typer.Option("--num-processes", min=1, metavar="N", help="Share the scenes among N; on GPUs one each."),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")
    ] = False,
) -> None:
    """Score a model, or predictions of any other system, on benchmarks, baselines beside it.

    Run again after an interruption, it goes on where it stopped, with as many processes as it is told then. The folder holds predictions and
    results.json. A file of predictions has a JSON object per line: {"id": ..., "answer": "..."}, {"id": "scene|object|ann", "box": [cx, cy,
    cz, dx, dy, dz]}, {"id": "scene|object|name", "caption": "..."}.
    """
    command = shlex.join(["vidllm", *sys.argv[1:]])
    common = {"split": split, "limit_scenes": limit_scenes, "blind_root": blind_root, "num_train_rooms": train_rooms}
    if predictions is not None:
        asked = {"--model": model, "--frames": frames, "--device": device, "--proposals": proposals}
        asked |= {"--num-processes": num_processes, "--with-given-geometry": with_given_geometry or None}
        wrong = [name for name, value in asked.items() if value is not None]
        if wrong:
            raise ValueError(f"--predictions: wanted without {wrong[0]}, because no model is loaded")
        with progress("starting"):
            from vidllm.eval.score_outside import score_predictions
        with watching() as move:
            options = {**common, "geometry": geometry, "text": not no_text, "command": command, "progress": move}
            document = score_predictions(benchmarks, predictions, data_root, out, **options)
        _tell(document, out, json)
        return
    from vidllm.loading import check_model, load_model, load_processor

    name = check_model(model)
    with progress("starting"):
        from vidllm.eval.results import read_results
        from vidllm.eval.run import run_evaluation
        from vidllm.eval.work import check_benchmarks, checked_data_root
        from vidllm.train.initialise import untrained_notice

    check_benchmarks(benchmarks)
    checked_data_root(data_root)
    notice = untrained_notice(name)
    if notice is not None:
        say(f"notice: {notice}", style="yellow")
    options = {
        **common,
        "geometry": geometry or "predicted",
        "with_given_geometry": with_given_geometry,
        "num_frames": frames,
        "batch_size": batch_size,
        "prompts": prompts,
        "proposals": proposals,
    }
    if num_processes is not None and num_processes > 1:
        # Checked here, so that bad input is one line and not the end of a launcher's report.
        with progress("reading annotations"):
            _check(benchmarks, checked_data_root(data_root), options)
        named = {**options, "model": name, "data_root": data_root, "out": out, "device": device}
        _launch(num_processes, benchmarks, {**named, "no_text": no_text, "command": command})
        _tell(read_results(out), out, json)
        return
    with progress("loading the model"):
        processor = load_processor(name)
        loaded = load_model(name, device)
    with watching() as move:
        document = run_evaluation(
            benchmarks,
            (loaded, processor),
            data_root,
            out,
            model_name=name,
            command=command,
            progress=move,
            text=not no_text,
            **options,
        )
    _tell(document, out, json)


def _check(benchmarks: list[str], data_root: str, options: dict[str, Any]) -> None:
    """Refuse what every process would refuse, before any is started."""
    from vidllm.eval.run import GEOMETRIES
    from vidllm.eval.work import check_benchmarks, plan
    from vidllm.processing.benchmarks.proposals import load_proposals

    if options["geometry"] not in GEOMETRIES:
        raise ValueError(f"geometry: wanted {' or '.join(GEOMETRIES)}; got {options['geometry']!r}")
    names = check_benchmarks(benchmarks)
    work = plan(names, data_root, None, options["split"], options["prompts"], options["limit_scenes"])
    if options["proposals"] is not None:
        load_proposals(options["proposals"], data_root, [scene.scene_id for scene in work.scenes])


def _launch(num_processes: int, benchmarks: list[str], options: dict[str, Any]) -> None:
    """Evaluate on several processes; returns when results are written."""
    import importlib.util

    from vidllm.cli_train import launch_command, run_launcher

    if importlib.util.find_spec("accelerate") is None:
        raise ValueError("--num-processes: accelerate is not installed (extra `train`)")
    words = {"num_frames": "frames", "num_train_rooms": "train-rooms"}
    arguments = [*benchmarks, "--processes", str(num_processes)]
    for key, value in options.items():
        option = f"--{words.get(key, key).replace('_', '-')}"
        if isinstance(value, bool):
            arguments += [option] * value
        elif value is not None:
            arguments += [option, str(value)]
    code = run_launcher([*launch_command("vidllm.eval.run", num_processes, None, cpu=False), *arguments])
    if code:
        raise typer.Exit(2)


def _tell(document: dict[str, Any], out: Path, json: bool) -> None:
    """A finished run on stdout: notes, then a table or the document."""
    for note in document["provenance"]["notes"]:
        say(note)
    if json:
        write_json(document)
        return
    print_table(document)
    say(f"wrote {out / 'results.json'}")


def report(
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run of `vidllm eval`.")],
    data_root: Annotated[
        Path | None,
        typer.Option("--data-root", metavar="DIR", help="Where its scenes lie now; default: where they lay."),
    ] = None,
    examples: Annotated[
        int, typer.Option("--examples", min=0, help="Of each benchmark, half of them right if there are so many.")
    ] = 8,
) -> None:
    """A run as a page that loads nothing (report.html) and as Markdown (report.md).

    Scores with intervals over scenes, baselines beside them, answers and boxes that were right and wrong.
    """
    with progress("writing the report"):
        from vidllm.eval.report import write_report

        written = write_report(out, data_root, examples)
    for path in written:
        say(f"wrote {path}")

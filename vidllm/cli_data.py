"""Commands that make and look after data: `vidllm rooms`, `vidllm data check`, `vidllm data frames`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from vidllm.cli_console import VidLLMCommands, say, write, write_json


data = typer.Typer(
    cls=VidLLMCommands,
    help="Look through a data root; extract frames of many scenes.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
DataRoot = Annotated[
    Path, typer.Option("--data-root", metavar="DIR", help="scans/, posed_images/, videos/, annotations/.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Workers = Annotated[int, typer.Option("--workers", min=1, help="Processes.")]


@contextmanager
def counting(label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr; gives the function that moves it: (done, of all)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, of_all: bar.update(task, completed=done, total=of_all)


def rooms(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Data root to write.")],
    scenes: Annotated[int, typer.Option("--scenes", min=1, help="Rooms to make.")],
    seed: Annotated[int, typer.Option("--seed", min=0, help="Same versions and seed: same files.")] = 0,
    difficulty: Annotated[str, typer.Option("--difficulty", help="easy, standard or hard.")] = "standard",
    split: Annotated[str, typer.Option("--split", help="train or val.")] = "train",
    height: Annotated[int, typer.Option("--height", min=8, help="Of the pictures, pixels.")] = 96,
    width: Annotated[int, typer.Option("--width", min=8, help="Of the pictures, pixels.")] = 128,
    layout: Annotated[
        str, typer.Option("--layout", help="Frame layouts, separated by commas, or all.")
    ] = "posed_images",
    antialias: Annotated[bool, typer.Option("--antialias", help="Smooth edges; slower.")] = False,
    workers: Workers = 1,
    device: Annotated[str, typer.Option("--device", help="Where to render.")] = "cpu",
    json: AsJson = False,
) -> None:
    """Make furnished rooms, filmed, in the very files of ScanNet, ScanQA, SQA3D and ScanRefer."""
    from vidllm.processing.rooms.write import rooms_command

    with counting("rooms") as move:
        report = rooms_command(
            out.expanduser(), scenes, seed, difficulty, split, height, width, layout, antialias, workers, device, move
        )
    if json:
        write_json(report)
        return
    for name, value in report.items():
        if isinstance(value, str | int | float):
            write(f"{name:12} {value}")
    write(f"wrote {scenes} rooms ({difficulty}, {split}, seed {seed}) to {out}")


@data.command()
def check(data_root: DataRoot, json: AsJson = False) -> None:
    """Say what is there and what is missing, per benchmark and split."""
    from vidllm.processing.scenes.check import check_data_root

    report = check_data_root(data_root.expanduser())
    if json:
        write_json(report.to_dict())
        return
    for line in report.lines():
        write(line)


@data.command()
def frames(
    data_root: DataRoot,
    scene: Annotated[list[str] | None, typer.Argument(metavar="SCENE...", help="Default: all that are found.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Default: the data root itself.")] = None,
    num_frames: Annotated[int, typer.Option("--frames", min=1, help="Frames per scene.")] = 32,
    method: Annotated[str, typer.Option("--method", help="uniform or max_coverage.")] = "uniform",
    workers: Workers = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace scenes from other settings.")] = False,
    json: AsJson = False,
) -> None:
    """Extract sampled frames, depth and poses; a run that was killed goes on where it stopped."""
    from vidllm.processing.scenes.frames import extract_frames

    with counting("scenes") as move:
        report = extract_frames(
            data_root.expanduser(),
            scene or None,
            None if out is None else out.expanduser(),
            num_frames,
            method,
            num_workers=workers,
            overwrite=overwrite,
            progress=lambda done, of_all, *_: move(done, of_all),
        )
    document: dict[str, Any] = report.to_dict()
    for name, line in report.failed.items():
        say(f"error: {name}: {line}", style="red")
    if json:
        write_json(document)
    else:
        write(f"{len(report.done)} scenes written, {len(report.skipped)} there already, {len(report.failed)} failed")
        for name, lines in report.problems.items():
            for line in lines:
                say(f"{name}: {line}")
    if report.failed:
        raise typer.Exit(2)

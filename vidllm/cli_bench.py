"""The command `vidllm bench`: seconds and memory over a ladder of frames."""

from typing import Annotated, Any

import typer

from vidllm.cli_console import progress, say, write_json


_COLUMNS = (
    ("frames", "frames", "d"),
    ("reconstruct_s", "reconstruct s", ".3f"),
    ("encode_s", "encode s", ".3f"),
    ("first_token_s", "first token s", ".3f"),
    ("next_first_token_s", "next first s", ".3f"),
    ("tokens_per_s", "tokens/s", ".1f"),
    ("answer_s", "answer s", ".3f"),
    ("questions_per_minute_kept", "q/min kept", ".1f"),
    ("questions_per_minute_encoding", "q/min anew", ".1f"),
    ("ratio", "ratio", ".1f"),
    ("peak_memory_mib", "peak MiB", ".0f"),
)


def fit_line(fit: list[float]) -> str:
    """A polynomial in the number of frames as text."""
    powers = ("", " per frame", " per frame squared")
    return " + ".join(f"{value:.4g}{power}" for value, power in zip(fit, powers, strict=False))


def print_bench(document: dict[str, Any]) -> None:
    """The rungs of a bench on stdout."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, emoji=False, width=200)
    environment, settings = document["environment"], document["settings"]
    height, width = settings["size_hw"]
    title = f"{environment['device']}, {environment['dtype']}, {environment['attention']}, {height}x{width}, {settings['new_tokens']} new tokens"
    table = Table(title=title, title_justify="left")
    shown = [column for column in _COLUMNS if column[0] in document["rungs"][0]]
    for _, name, _ in shown:
        table.add_column(name, justify="right")
    for rung in document["rungs"]:
        table.add_row(*("" if rung[key] is None else format(rung[key], form) for key, _, form in shown))
    console.print(table)
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
    say(f"{environment['parameters']:,} parameters; {versions}")
    for name, fit in document["fits"].items():
        say(f"{name}: {fit_line(fit)}")


def bench(
    model: Annotated[
        str | None, typer.Option("--model", metavar="PATH_OR_ID", help="Checkpoint folder or Hub id.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", metavar="NAME", help="Random weights of a preset instead.")
    ] = None,
    frames: Annotated[str, typer.Option("--frames", metavar="N,N,...", help="Ladder of frames.")] = "8,16,32",
    size: Annotated[
        str,
        typer.Option("--size", metavar="NAME|HxW", help="paper (518x686), vggt (392x518), small (224x224), or HxW."),
    ] = "small",
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=2, help="Length of each answer.")] = 20,
    questions: Annotated[int, typer.Option("--questions", min=1, help="Asked about the scene that is kept.")] = 66,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="The median of so many runs counts.")] = 3,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Runs before that do not count.")] = 1,
    only_geometry: Annotated[
        bool,
        typer.Option(
            "--only-geometry", help="Stop after the reconstruction; a preset then has next to no language model."
        ),
    ] = False,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; default: the checkpoint's.")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ...; default: CUDA if there is.")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")
    ] = False,
) -> None:
    """Seconds, tokens per second, questions per minute and memory over a ladder of frames.

    Pixels are noise and answers have a fixed length: both depend on shapes alone.
    """
    if (model is None) == (preset is None):
        raise ValueError("bench: wanted either --model or --preset")
    counts = tuple(int(part) if part.strip().isdigit() else 0 for part in frames.split(","))
    if min(counts) < 1:
        raise ValueError(f"--frames: wanted numbers from 1, separated by commas; got {frames!r}")
    with progress("starting"):
        import torch

        from vidllm.eval.speed import BenchSettings, size_of
        from vidllm.eval.speed import bench as measured
        from vidllm.loading import choose_device, load

        settings = BenchSettings(
            frames=counts,
            size_hw=size_of(size),
            new_tokens=new_tokens,
            questions=questions,
            repeats=repeats,
            warmup=warmup,
            with_answers=not only_geometry,
        )
        place = choose_device(device)
        if preset is not None:
            from vidllm.train.initialise import build_untrained

            loaded, processor = build_untrained(preset, dtype=dtype, only_geometry=only_geometry)
            loaded = loaded.to(place)
        else:
            loaded, processor = load(model, device)
            if dtype is not None:
                if dtype not in ("float32", "bfloat16", "float16"):
                    raise ValueError(f"--dtype: wanted float32, bfloat16 or float16; got {dtype!r}")
                loaded = loaded.to(getattr(torch, dtype))
    with progress("measuring"):
        document = measured(loaded, processor, settings)
    document["model"] = model if preset is None else f"{preset}, random weights"
    if json:
        write_json(document)
        return
    print_bench(document)

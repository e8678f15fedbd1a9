"""The commands `vidllm card` and `vidllm push`: from measured results to a card, from a folder to the Hub."""

from pathlib import Path
from typing import Annotated

import typer

from vidllm.cli_console import progress, say, write, write_json


Folder = Annotated[Path, typer.Option("--model", metavar="PATH", help="Checkpoint folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]


def card(
    model: Folder,
    results: Annotated[
        list[Path] | None,
        typer.Option(
            "--results",
            metavar="DIR",
            help="Folder of a run of `vidllm eval` on these weights, best after `vidllm report` on it; several times for several runs. Those that "
            "lie in results/ of the checkpoint already stay.",
        ),
    ] = None,
    recipe: Annotated[
        list[Path] | None,
        typer.Option(
            "--recipe",
            metavar="FILE_OR_DIR",
            help="recipe.json of a training run, or its folder; several times in the order of the runs.",
        ),
    ] = None,
    hub_dataset: Annotated[
        list[str] | None,
        typer.Option(
            "--hub-dataset",
            metavar="NUMBER=DATASET",
            help="A number for .eval_results/ and the Hub's benchmark dataset that it is on: RUN/BENCHMARK/PROTOCOL/METRIC=OWNER/NAME:TASK.",
        ),
    ] = None,
    license_: Annotated[
        str | None,
        typer.Option(
            "--license",
            metavar="ID",
            help="Of the weights; default: apache-2.0 where only rooms and random numbers went into them.",
        ),
    ] = None,
    json: AsJson = False,
) -> None:
    """Write the model card from measured results.

    Results with their reports and recipes are copied beside it (results/, training.json), so that its numbers can be compared with them.
    """
    with progress("writing the card"):
        from vidllm.eval.card import write_card
        from vidllm.loading import check_model

        done = write_card(check_model(model), results or (), recipe or (), hub_dataset or (), license_)
    for notice in done.notices:
        say(f"notice: {notice}", style="yellow")
    if json:
        write_json(
            {"files": [str(path) for path in done.files], "numbers": done.numbers, "notices": list(done.notices)}
        )
        return
    for path in done.files:
        write(f"wrote {path}")
    write(f"{done.numbers} numbers of the results stand in the card")


def push(
    model: Folder,
    to: Annotated[str, typer.Option("--to", metavar="OWNER/NAME", help="Repository on the Hub.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be pushed; touch no network.")] = False,
    private: Annotated[bool, typer.Option("--private", help="A new repository is seen by its owner only.")] = False,
    json: AsJson = False,
) -> None:
    """Upload a checkpoint folder to the Hub.

    It is checked before: weights complete, code there, no pickles, no file too large, a card whose numbers are those of its results.
    """
    from vidllm import push as pushing

    pushing.check_repository(to)
    with progress("checking the folder"):
        plan = pushing.plan_push(model)
    for notice in plan.notices:
        say(f"notice: {notice}", style="yellow")
    for name, why in plan.left_out:
        say(f"left out: {name} ({why})")
    pushed = None
    if not json:
        width = max(len(name) for name, _ in plan.files)
        for name, size in plan.files:
            write(f"{name:{width}}  {size:>15,}")
        write(f"{f'{len(plan.files)} files':{width}}  {plan.total_bytes:>15,} bytes")
    if not dry_run:
        pushed = pushing.push(plan, to, private)
    if json:
        write_json(
            {
                "repository": to,
                "private": private,
                "dry_run": dry_run,
                "files": [{"path": name, "bytes": size} for name, size in plan.files],
                "total_bytes": plan.total_bytes,
                "left_out": [{"path": name, "why": why} for name, why in plan.left_out],
                "notices": list(plan.notices),
                **(pushed or {}),
            }
        )
        return
    write(
        "nothing was pushed (--dry-run)" if pushed is None else f"pushed to {pushed['url']}, commit {pushed['commit']}"
    )

"""Commands that train: `vidllm train joint` = `accelerate launch -m vidllm.train.joint`, `distill` likewise, and `precompute`."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vidllm.cli_console import VidLLMCommands, say


if TYPE_CHECKING:
    from vidllm.train.distill_recipes import DistillRecipe
    from vidllm.train.dry_run import DryRun
    from vidllm.train.recipes import JointRecipe

OutOfRun = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="Folder of the run: new, empty, or to resume. Not of a dry run."),
]
DryRunFlag = Annotated[
    bool, typer.Option("--dry-run", help="Only say what the run needs: parameters, memory, tokens, FLOPs.")
]
Devices = Annotated[int, typer.Option("--devices", min=1, help="Of the dry run.")]
Sharding = Annotated[str, typer.Option("--sharding", help="Of the dry run: none, zero2 or full.")]
Size = Annotated[
    str | None,
    typer.Option("--size", metavar="HxW", help="Of the dry run: frames; default: the recipe's, or a 4:3 video's."),
]

train = typer.Typer(
    cls=VidLLMCommands,
    help="Train by a recipe, on one or several processes.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def launch_command(module: str, num_processes: int | None, config_file: Path | None, cpu: bool) -> list[str]:
    """The words that start a training module on every process.

    Args:
        module (`str`): What `python -m` takes.
        num_processes (`int`, *optional*): Of this machine; by default what the config file says, else one per GPU, else one.
        config_file (`Path`, *optional*): Of `accelerate config`, for several machines, FSDP or DeepSpeed.
        cpu (`bool`): Whether GPUs are left alone.

    Returns:
        `list[str]`: to be followed by the module's own arguments.

    Source:
        Ours: `accelerate launch --cpu --num_processes 2` would silently run one process, so several are always asked for as several
        devices; the module itself is told to leave GPUs alone.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    if config_file is not None:
        command += ["--config_file", str(config_file)]
        command += [] if num_processes is None else ["--num_processes", str(num_processes)]
        return [*command, "-m", module]
    if num_processes is None:
        import torch

        num_processes = 1 if cpu else max(1, torch.cuda.device_count())
    several = ["--multi_gpu"] if num_processes > 1 else []
    rest = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    # With several processes the launcher's own message would bury that of the module.
    quiet = ["--quiet"] if num_processes == 1 else []
    return [*command, *several, "--num_processes", str(num_processes), *rest, *quiet, "-m", module]


def run_launcher(command: Sequence[str]) -> int:
    """Run a launcher to its end; a request to stop this process goes on to it.

    Args:
        command (`Sequence[str]`): As of `subprocess`.

    Returns:
        `int`: exit code; negative: the signal that ended it.

    Source:
        Ours: `kill` would otherwise end the command alone, and the processes that train would go on unseen.
    """
    launcher = subprocess.Popen(command)
    previous = signal.signal(signal.SIGTERM, lambda number, _: launcher.send_signal(number))
    try:
        while True:
            # Woken now and then: a signal that reaches another thread does not end a wait.
            with contextlib.suppress(subprocess.TimeoutExpired):
                return launcher.wait(timeout=0.5)
    finally:
        signal.signal(signal.SIGTERM, previous)


def print_dry_run(chosen: "JointRecipe | DistillRecipe", devices: int, sharding: str, size: str | None) -> None:
    """What a recipe of either stage needs, on stdout; neither data nor weights need be there."""
    from vidllm.cli_console import write
    from vidllm.eval.speed import size_of
    from vidllm.loading import no_progress_bars
    from vidllm.train.distill_recipes import DistillRecipe
    from vidllm.train.dry_run import dry_run, run_shape
    from vidllm.train.dry_run_distill import dry_run_distill

    if chosen.model is None:
        raise ValueError(f"{chosen.name}: wanted a model, if only its shape: --set model=vidllm-7b")
    with no_progress_bars():
        shape = run_shape(chosen.model, chosen.rooms)
        size_hw = shape.size_hw if size is None else size_of(size)
        if chosen.num_frames is None:
            chosen = replace(chosen, num_frames=shape.num_frames)
        if isinstance(chosen, DistillRecipe):
            told = dry_run_distill(chosen, shape.config, size_hw, devices, sharding)
        else:
            told = dry_run(chosen, shape.config, size_hw, devices, sharding)
    write("\n".join(dry_run_lines(chosen, told, size_hw, devices, sharding)))


def dry_run_lines(
    chosen: "JointRecipe | DistillRecipe", told: "DryRun", size_hw: tuple[int, int], devices: int, sharding: str
) -> list[str]:
    """A dry run as text."""
    gib, tera = 2**30, 10**12
    lines = [f"{chosen.name}: {devices} devices, sharding {sharding}, frames of {size_hw[0]}x{size_hw[1]}"]
    if told.prompts_per_video:
        lines.append(
            f"assumed: {told.prompts_per_video} prompts per video, {told.prompt_tokens} tokens each with their reply, {told.learned_tokens} of them learned"
        )
    if getattr(chosen, "lora", None) is not None:
        lines.append("adapters: parts that are trained whole are held twice, as they were and as they are trained")
    for name in ("geometry_teacher", "language_teacher"):
        if getattr(chosen, name, "") is None:
            lines.append(f"{name}: not named, so not counted")
    lines.append("")
    for part in dict.fromkeys([*told.parameters, *told.parts]):
        cost, held = told.parts.get(part), told.parameters.get(part)
        counts = (
            f"{'':>14}             {'':>14}        "
            if held is None
            else f"{held:>14,} parameters  {told.trained[part]:>14,} trained"
        )
        more = ""
        if cost is not None:
            more = f"  {cost.activation_bytes / gib:9.3f} GiB"
            more += f"  {cost.forward_flops / tera:10.3f} TFLOP forward" if cost.forward_flops else ""
        lines.append(f"{part:16} {counts}{more}".rstrip())
    lines += ["", "memory per device, GiB (without what allocators waste):"]
    memory = {
        "weights": told.weight_bytes,
        "teachers": told.teacher_bytes,
        "gradients": told.gradient_bytes,
        "buckets": told.bucket_bytes,
        "optimizer": told.optimizer_bytes,
        "activations": told.activation_bytes,
        "together": told.bytes_per_device,
    }
    notes = {
        "buckets": "  (DDP sends gradients from a second copy of them)",
        "teachers": "  (frozen, as float32)",
    }
    lines += [
        f"  {what:12} {count / gib:9.2f}{notes.get(what, '')}"
        for what, count in memory.items()
        if count or what not in notes
    ]
    tokens = (
        f"{told.language_tokens_per_step:,} tokens of the language model, " if told.language_tokens_per_step else ""
    )
    lines += [
        "",
        f"{told.steps:,} steps; in each {told.videos_per_step:,} videos, {told.frames_per_step:,} frames, "
        f"{tokens}{told.flops_per_step / tera:,.1f} TFLOP forward and backward",
    ]
    return lines


def folder_of_run(out: Path | None) -> Path:
    """The folder of a run; `ValueError` if there is none."""
    if out is None:
        raise ValueError("wanted --out DIR, the folder of the run; only --dry-run does without")
    return out.expanduser()


@train.command()
def joint(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="debug, nano_perception, nano, nano_lora, nano_stage2, scannet, single_gpu_lora or paper_stage2.",
        ),
    ],
    out: OutOfRun = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the recipe; repeatable."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", metavar="FILE", exists=True, help="A JSONL file of own videos, instead of the recipe's data."
        ),
    ] = None,
    data_root: Annotated[
        Path | None,
        typer.Option(
            "--data-root", metavar="DIR", exists=True, help="Scenes and annotations of the recipe's benchmarks."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")] = False,
    num_processes: Annotated[
        int | None, typer.Option("--num-processes", min=1, help="Default: one per GPU, or one.")
    ] = None,
    config_file: Annotated[
        Path | None, typer.Option("--config-file", metavar="FILE", help="Of `accelerate config`.", exists=True)
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Leave GPUs alone.")] = False,
    dry_run: DryRunFlag = False,
    devices: Devices = 8,
    sharding: Sharding = "none",
    size: Size = None,
) -> None:
    """Train reconstruction, answers, captions and boxes together (stage 2).

    The folder holds checkpoints, log.jsonl and, at the end, a model that `vidllm ask --model DIR` takes.
    """
    from vidllm.train.recipes import changed_recipe, chosen_recipe
    from vidllm.train.run_folder import checkpoint_to_resume

    paths = {
        name: None if path is None else str(path.expanduser()) for name, path in (("data", data), ("root", data_root))
    }
    if dry_run:
        print_dry_run(changed_recipe(recipe, settings or [], paths["data"], paths["root"]), devices, sharding, size)
        return
    folder = folder_of_run(out)
    # Checked here, so that a typo is one line and not the end of a launcher's report.
    chosen_recipe(recipe, settings or [], paths["data"], paths["root"])
    checkpoint_to_resume(folder, resume)
    arguments = [recipe, "--out", str(folder)]
    for setting in settings or []:
        arguments += ["--set", setting]
    for name, path in (("--data", paths["data"]), ("--data-root", paths["root"])):
        arguments += [] if path is None else [name, path]
    arguments += ["--resume"] * resume + ["--cpu"] * cpu
    command = launch_command("vidllm.train.joint", num_processes, config_file, cpu)
    code = run_launcher([*command, *arguments])
    if code:
        raise typer.Exit(2)
    say(f"wrote {folder}")


@train.command()
def distill(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="debug_stage1, nano_stage1 or paper_stage1.")],
    out: OutOfRun = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the recipe; repeatable."),
    ] = None,
    clips: Annotated[
        Path | None,
        typer.Option("--clips", metavar="DIR", exists=True, help="Videos, folders of pictures, or a data root."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")] = False,
    num_processes: Annotated[
        int | None, typer.Option("--num-processes", min=1, help="Default: one per GPU, or one.")
    ] = None,
    config_file: Annotated[
        Path | None, typer.Option("--config-file", metavar="FILE", help="Of `accelerate config`.", exists=True)
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Leave GPUs alone.")] = False,
    dry_run: DryRunFlag = False,
    devices: Devices = 8,
    sharding: Sharding = "none",
    size: Size = None,
) -> None:
    """Train encoder and adapter on two frozen teachers (stage 1).

    Any videos serve. Stage 2 starts from the folder: --set model=DIR.
    """
    from vidllm.train.distill_recipes import changed_distill_recipe, chosen_distill_recipe
    from vidllm.train.precompute import check_clips_have_features
    from vidllm.train.run_folder import checkpoint_to_resume

    place = None if clips is None else str(clips.expanduser())
    if dry_run:
        print_dry_run(changed_distill_recipe(recipe, settings or [], place), devices, sharding, size)
        return
    folder = folder_of_run(out)
    # Checked here, so that a typo is one line and not the end of a launcher's report.
    check_clips_have_features(chosen_distill_recipe(recipe, settings or [], place))
    checkpoint_to_resume(folder, resume)
    arguments = [recipe, "--out", str(folder)]
    for setting in settings or []:
        arguments += ["--set", setting]
    arguments += [] if place is None else ["--clips", place]
    arguments += ["--resume"] * resume + ["--cpu"] * cpu
    command = launch_command("vidllm.train.distillation", num_processes, config_file, cpu)
    code = run_launcher([*command, *arguments])
    if code:
        raise typer.Exit(2)
    say(f"wrote {folder}")


@train.command()
def curves(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folder of a run, or LABEL=FOLDER.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="PNG file.")],
    term: Annotated[
        list[str] | None, typer.Option("--term", metavar="NAME", help="Loss term; repeatable; default: all.")
    ] = None,
    start: Annotated[
        list[str] | None,
        typer.Option("--start", metavar="LABEL=NUMBER", help="What a run had cost before its first step; repeatable."),
    ] = None,
    per_step: Annotated[
        list[str] | None,
        typer.Option("--per-step", metavar="LABEL=NUMBER", help="What a step of a run costs; repeatable; default: 1."),
    ] = None,
    across: Annotated[str, typer.Option("--across", help="Name of the horizontal axis.")] = "steps",
    log: Annotated[bool, typer.Option("--log", help="Logarithmic vertical axes.")] = False,
) -> None:
    """Draw the held-out losses of runs that were started with --set held_out.every=N."""
    from vidllm.train.curves import draw_curves, runs_of_words

    terms = draw_curves(runs_of_words(runs, start or [], per_step or []), out.expanduser(), term or [], across, log)
    say(f"wrote {out} ({', '.join(terms)})")


@train.command()
def precompute(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="Vision model or Vid-LLM checkpoint.")],
    clips: Annotated[
        Path, typer.Option("--clips", metavar="DIR", exists=True, help="Videos, folders of pictures, or a data root.")
    ],
    like: Annotated[
        str, typer.Option("--like", metavar="MODEL", help="Checkpoint of the student: says the size of the frames.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder, or one to go on with.")],
    stream: Annotated[
        str, typer.Option("--stream", help="Of a Vid-LLM teacher: encoder, geometry or language.")
    ] = "encoder",
    frames_kept: Annotated[
        int, typer.Option("--frames-kept", min=0, help="Frames of a clip, as of the recipe; 0: all.")
    ] = 64,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ...; default: CUDA if there is.")
    ] = None,
) -> None:
    """Write a teacher's features of all clips once; stage 1 then takes the folder as a teacher.

    A run that was killed goes on where it stopped. Clips that are held out need features too: once more, with their folder and the same --out.
    """
    from vidllm.cli_eval import watching
    from vidllm.loading import choose_device, load_processor, no_progress_bars
    from vidllm.train.clip_data import ClipFolder
    from vidllm.train.precompute import precompute as written_by
    from vidllm.train.teachers import VisionTeacher

    place = choose_device(device)
    found = ClipFolder(clips, frames_kept)
    processor = load_processor(like)
    with no_progress_bars():
        model = VisionTeacher(teacher, stream).to(place)
    with watching() as move:
        count = written_by(model, found, processor, out, progress=lambda done, total: move("clips", done, total))
    say(f"wrote features of {count} clips to {out}; {len(found) - count} were there")

"""The folder of a training run: what it depends on, its log, and the finished checkpoint.

```
<out>/recipe.json        the resolved recipe, versions, commit, processes; before step 0, and again of every resume
<out>/log.jsonl          one line per logged step
<out>/held_out.jsonl     one line per look at scenes that are not learned from, where the recipe says so
<out>/checkpoint-N/      weights, processor, code, state of optimizer and random numbers: to resume
<out>/                   at the end, weights, processor and code: a complete Hub folder
<out>/adapter/           of a LoRA run, the adapter alone; not where the run gave the model metres, which no adapter can say
<out>/not-finite-N-P.json  of a run that stopped at step N: which samples had a loss that was not finite, by process
```
"""

import json
import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.processing.processing_vidllm import VidLLMProcessor
from vidllm.train.held_out import HELD_OUT_NAME
from vidllm.train.initialise import save_checkpoint
from vidllm.train.recipes import plain


RECIPE_NAME, LOG_NAME, ADAPTER_NAME = "recipe.json", "log.jsonl", "adapter"
STATE_NAME = "trainer_state.json"
# What a run may have written before its first checkpoint; `runs` is TensorBoard's.
_BEFORE_A_CHECKPOINT = {RECIPE_NAME, LOG_NAME, HELD_OUT_NAME, "rooms", "runs"}
_NOT_FINITE = re.compile(r"^not-finite-\d+-\d+\.json$")
_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")
# What else a step depends on, under the names that the Trainer, FSDP and DeepSpeed save it; without it transformers would start it afresh in silence.
_STATES = {
    "optimizer": ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*"),
    "schedule": ("scheduler.pt", "global_step*"),
    "random numbers": ("rng_state*.pth",),
}
_PACKAGES = ("vidllm", "torch", "transformers", "accelerate", "datasets", "peft", "numpy", "safetensors")
# Fields that a resumed run may have differently without becoming another run.
_FREE_FIELDS = (
    "workers",
    "log_every",
    "save_every",
    "keep_checkpoints",
    "report_to",
    "rooms_cache",
    "data_root",
    "data",
    "clips",
    "held_out",
)


def versions() -> dict[str, str]:
    """What a run was made with.

    Returns:
        `dict[str, str]`: versions by package, of Python, and the device.

    Source:
        Ours.
    """
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return found


def git_commit(folder: Path | None = None) -> dict[str, Any] | None:
    """Commit of the source tree that runs.

    Args:
        folder (`Path`, *optional*): Inside the tree; by default that of this file.

    Returns:
        `dict`: `commit` and `changed` (whether files differ from it); None where this is no checkout.

    Source:
        Ours.
    """
    folder = folder or Path(__file__).resolve().parent

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    # A package that is installed below somebody's checkout is not part of it.
    if commit is None or not ask("ls-files", Path(__file__).name):
        return None
    return {"commit": commit, "changed": bool(ask("status", "--porcelain", "--untracked-files=no"))}


def checkpoint_to_resume(out_dir: Path, resume: bool | str) -> str | None:
    """The checkpoint that a run goes on from; a run that starts anew wants a folder without another one.

    Args:
        out_dir (`Path`): Of the run.
        resume (`bool` or `str`): Whether to go on from the last checkpoint, or from which.

    Returns:
        `str`, or None: start anew; with `resume` because the run was killed before its first checkpoint.

    Raises:
        ValueError: There is nothing to go on from, something of it is gone, or something would be overwritten.

    Source:
        Ours: a run that was killed while it saved leaves a checkpoint whose last file is absent, or empty; the one before it counts.
    """
    if isinstance(resume, str):
        if not _is_whole(Path(resume)):
            raise ValueError(f"--resume: wanted a folder checkpoint-N of a run; got {resume}")
        _check_states(Path(resume))
        return resume
    last = _last_whole(out_dir)
    if resume and last is not None:
        _check_states(last)
        return str(last)
    if resume and _is_unbegun(out_dir):
        return None
    if resume:
        raise ValueError(f"--resume: wanted a run with a checkpoint; {out_dir} has none")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        hint = ""
        if last is not None:
            hint = "; --resume goes on from its last checkpoint"
        elif _is_unbegun(out_dir):
            hint = "; it has no checkpoint yet: --resume starts it anew"
        raise ValueError(
            f"output folder: wanted a new or empty folder; got {out_dir}, which holds something already{hint}"
        )
    return None


def _checkpoints(out_dir: Path) -> dict[int, Path]:
    """Folders `checkpoint-N` by N."""
    found = out_dir.glob("checkpoint-*")
    return {int(match[1]): path for path in found if (match := _CHECKPOINT.match(path.name))}


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint has its last file."""
    try:
        state = json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and "global_step" in state


def _check_states(checkpoint: Path) -> None:
    """Refuse a checkpoint that somebody took something out of."""
    for what, names in _STATES.items():
        if not any(True for name in names for _ in checkpoint.glob(name)):
            raise ValueError(
                f"--resume: wanted {names[0]} in {checkpoint}, or its {what} would start afresh; got no such file"
            )


def _last_whole(out_dir: Path) -> Path | None:
    """The last checkpoint that has its last file."""
    numbered = _checkpoints(out_dir)
    return next((numbered[step] for step in sorted(numbered, reverse=True) if _is_whole(numbered[step])), None)


def _is_unbegun(out_dir: Path) -> bool:
    """Whether a folder holds only what a run leaves that was killed before its first checkpoint was whole."""
    return out_dir.is_dir() and all(
        path.name in _BEFORE_A_CHECKPOINT
        or path.suffix == ".part"
        or _NOT_FINITE.match(path.name)
        or _CHECKPOINT.match(path.name)
        for path in out_dir.iterdir()
    )


def check_processes(checkpoint: str | None, processes: int, batch_size: int, accumulation: int) -> None:
    """Refuse to go on with a number of processes that would silently change which scenes a step sees.

    Args:
        checkpoint (`str`, *optional*): To go on from; beside it lies the record of its run.
        processes (`int`): That take part now.
        batch_size (`int`): Scenes per process and forward now.
        accumulation (`int`): Forwards per step now.

    Raises:
        ValueError: Another number than the run had, and another number of scenes per step.

    Source:
        Ours: visits of scenes are numbered over the run, so that as many scenes per step are the same scenes, whoever reads them.
    """
    path = None if checkpoint is None else Path(checkpoint).parent / RECIPE_NAME
    if path is None or not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    had = [before, *before.get("resumed", [])][-1].get("processes", processes)
    scenes = had * before["recipe"]["batch_size"] * before["recipe"]["accumulation"]
    now = processes * batch_size * accumulation
    if had != processes and scenes != now:
        raise ValueError(
            f"--resume: wanted {had} processes, as the run had, or {scenes} scenes per step by batch_size and accumulation, or it would learn "
            f"from other scenes; got {processes} and {now} scenes per step"
        )


def write_recipe(recipe: Any, out_dir: Path, resumed_from: str | None, facts: dict[str, Any]) -> list[str]:
    """Write what the run depends on.

    Args:
        recipe (`JointRecipe`, `DistillRecipe` or `Mapping`): Resolved.
        out_dir (`Path`): Of the run.
        resumed_from (`str`, *optional*): Checkpoint that it goes on from.
        facts (`dict`): What else is worth knowing, such as `processes` and skipped rows; `data.fingerprint` tells whether rows are the same.

    Returns:
        `list[str]`: how it differs from the run that it goes on from.

    Source:
        Ours: `recipe` is the newest; `versions`, `git` and the facts are of the start, and of each resume in its entry of `resumed`.
    """
    path = out_dir / RECIPE_NAME
    resolved, changed = plain(recipe), []
    document = {"recipe": resolved, "versions": versions(), "git": git_commit(), **facts}
    if resumed_from is not None and path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        old = before["recipe"]
        changed = [
            f"{name}: {old.get(name)!r} -> {value!r}"
            for name, value in resolved.items()
            if old.get(name) != value and name not in _FREE_FIELDS
        ]
        had, has = [before, *before.get("resumed", [])][-1].get("data", {}), facts.get("data", {})
        if had.get("fingerprint", has.get("fingerprint")) != has.get("fingerprint"):
            changed.append(f"data: other rows, or in another order: {had.get('rows')} -> {has.get('rows')}")
        entry = {"from": Path(resumed_from).name, "changed": changed, **document}
        del entry["recipe"]
        document = {**before, "recipe": resolved, "resumed": [*before.get("resumed", []), entry]}
    out_dir.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)
    return changed


def clear_unbegun(out_dir: Path) -> None:
    """Clear away what a run left that was killed before its first checkpoint was whole, for one that starts anew.

    Args:
        out_dir (`Path`): Of the run; without a whole checkpoint.

    Source:
        Ours: rooms stay, they are the same again.
    """
    for left in (out_dir / LOG_NAME, out_dir / HELD_OUT_NAME):
        left.unlink(missing_ok=True)
    for checkpoint in _checkpoints(out_dir).values():
        if not _is_whole(checkpoint):
            shutil.rmtree(checkpoint)


def publish(model: VidLLMForConditionalGeneration, processor: VidLLMProcessor, out_dir: Path) -> None:
    """Put a complete Hub folder into the folder of the run; `config.json`, without which the Auto classes and the commands refuse it, comes last.

    Args:
        model (`VidLLMForConditionalGeneration`): Trained.
        processor (`VidLLMProcessor`): Its processor.
        out_dir (`Path`): Of the run.

    Raises:
        ValueError: Model and processor disagree.

    Source:
        Ours: `vidllm ask --model <out>` works when the run is over.
    """
    made = out_dir / ".finished"
    shutil.rmtree(made, ignore_errors=True)
    save_checkpoint(model, processor, made)
    (out_dir / "config.json").unlink(missing_ok=True)
    for old in out_dir.glob("*.safetensors*"):
        old.unlink()
    for path in sorted(made.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, out_dir / path.name)
    made.rmdir()


__all__ = [
    "check_processes",
    "checkpoint_to_resume",
    "clear_unbegun",
    "git_commit",
    "publish",
    "versions",
    "write_recipe",
]

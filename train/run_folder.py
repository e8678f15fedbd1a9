"""The folder of a training run: what it depends on, its log, and the finished checkpoint.

```
<out>/recipe.json        the resolved recipe, versions, commit; before step 0
<out>/log.jsonl          one line per logged step
<out>/held_out.jsonl     one line per look at scenes that are not learned from, where the recipe says so
<out>/checkpoint-N/      weights, processor, code, state of optimizer and random numbers: to resume
<out>/                   at the end, weights, processor and code: a complete Hub folder
<out>/adapter/           of a LoRA run, the adapter alone
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
from vidllm.train.initialise import save_checkpoint
from vidllm.train.recipes import plain


RECIPE_NAME, LOG_NAME, ADAPTER_NAME = "recipe.json", "log.jsonl", "adapter"
_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")
_PACKAGES = ("vidllm", "torch", "transformers", "accelerate", "datasets", "peft", "numpy", "safetensors")
# Fields that a resumed run may have differently without becoming another run.
_FREE_FIELDS = (
    "workers",
    "log_every",
    "save_every",
    "keep_checkpoints",
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
        `str`, or None: start anew.

    Raises:
        ValueError: There is nothing to go on from, or something that would be overwritten.

    Source:
        Ours.
    """
    if isinstance(resume, str):
        if not (Path(resume) / "trainer_state.json").is_file():
            raise ValueError(f"--resume: wanted a folder checkpoint-N of a run; got {resume}")
        return resume
    numbered = {
        int(match[1]): path for path in out_dir.glob("checkpoint-*") if (match := _CHECKPOINT.match(path.name))
    }
    # A run that was killed while it saved leaves one without its last file.
    last = [numbered[step] for step in sorted(numbered) if (numbered[step] / "trainer_state.json").is_file()][-1:]
    if resume:
        if not last:
            raise ValueError(f"--resume: wanted a run with a checkpoint; {out_dir} has none")
        return str(last[0])
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        hint = "; --resume goes on from its last checkpoint" if last else ""
        raise ValueError(
            f"output folder: wanted a new or empty folder; got {out_dir}, which holds something already{hint}"
        )
    return None


def write_recipe(recipe: Any, out_dir: Path, resumed_from: str | None, facts: dict[str, Any]) -> list[str]:
    """Write what the run depends on.

    Args:
        recipe (`JointRecipe` or `DistillRecipe`): Resolved.
        out_dir (`Path`): Of the run.
        resumed_from (`str`, *optional*): Checkpoint that it goes on from.
        facts (`dict`): What else is worth knowing, such as skipped rows.

    Returns:
        `list[str]`: how it differs from the run that it goes on from.

    Source:
        Ours.
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
        document["resumed"] = [*before.get("resumed", []), {"from": Path(resumed_from).name, "changed": changed}]
    out_dir.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)
    return changed


def publish(model: VidLLMForConditionalGeneration, processor: VidLLMProcessor, out_dir: Path) -> None:
    """Put a complete Hub folder into the folder of the run; `config.json`, without which nothing loads, comes last.

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


__all__ = ["checkpoint_to_resume", "git_commit", "publish", "versions", "write_recipe"]

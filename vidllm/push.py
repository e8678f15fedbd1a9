"""A checkpoint folder to the Hub: what would go there, whether it loads as anybody would load it, and the upload."""

import contextlib
import json
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidllm.loading import check_model
from vidllm.processing.video_reading_vidllm import VidLLMInputError


if TYPE_CHECKING:
    from huggingface_hub import HfApi

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# What a repository of a Vid-LLM consists of; everything else in the folder stays where it is.
_PUSHED = (
    "README.md",
    "LICENSE*",
    "config.json",
    "generation_config.json",
    "*.safetensors",
    INDEX,
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "initialisation.json",
    "training.json",
    "demo.mp4",
    "demo.json",
    "*.png",
    "*.jpg",
    "results/*/results.json",
    "results/*/intervals.json",
    "results/*/report.html",
    "results/*/report.md",
    ".eval_results/*.yaml",
)
_NEEDED = (
    "README.md",
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
# States of a training run: pickles too, but such as every run leaves behind, so they are passed over.
_TRAINER_STATE = (
    "optimizer*.pt",
    "optimizer*.bin",
    "scheduler*.pt",
    "scaler*.pt",
    "rng_state*.pth",
    "training_args.bin",
    "trainer_state.json",
    "global_step*",
    "latest",
)
# Larger ones cannot be downloaded by plain HTTP (huggingface_hub's MAX_HTTP_DOWNLOAD_SIZE).
MOST_BYTES = 50 * 10**9
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib", ".dill")


@dataclass(frozen=True)
class PushPlan:
    """What would be pushed.

    Args:
        folder (`Path`): The checkpoint.
        files (`tuple[tuple[str, int], ...]`): Path in the repository and bytes of each file.
        left_out (`tuple[tuple[str, str], ...]`): What stays, and why.
        notices (`tuple[str, ...]`): What is worth knowing before it is public.

    Source:
        Ours.
    """

    folder: Path
    files: tuple[tuple[str, int], ...]
    left_out: tuple[tuple[str, str], ...]
    notices: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        """Of all files together."""
        return sum(size for _, size in self.files)


def plan_push(model: str | Path) -> PushPlan:
    """Find out what of a folder would be pushed, and check that it loads as anybody would load it.

    Args:
        model (`str` or `Path`): Checkpoint folder.

    Returns:
        `PushPlan`

    Raises:
        VidLLMInputError: A file is missing, is a pickle, is too large, or does not fit: weights, processor, code, or a card whose numbers differ
            from its results.

    Source:
        Ours: weights are compared by name and shape, which takes no memory at any size.
    """
    folder = Path(check_model(model))
    if not folder.is_dir():
        raise VidLLMInputError(f"--model: wanted a local checkpoint folder; got {model}")
    pushed, left_out = _sorted_out(folder)
    missing = [name for name in _NEEDED if name not in pushed]
    if missing:
        hint = "; `vidllm card` writes a card" if "README.md" in missing else ""
        raise VidLLMInputError(f"model {folder}: wanted a complete checkpoint; {', '.join(missing)} missing{hint}")
    notices = _check_code(folder, left_out)
    pushed += [path.name for path in _shipped_code()]
    files_and_sizes = tuple((name, (folder / name).stat().st_size) for name in sorted(pushed))
    for name, size in files_and_sizes:
        if size > MOST_BYTES:
            raise VidLLMInputError(
                f"model {folder}: wanted files of at most {MOST_BYTES:,} bytes; {name} has {size:,}; "
                "`save_pretrained(..., max_shard_size=...)` splits weights"
            )
    _check_weight_files(folder, pushed)
    _check_loads(folder)
    notices += _check_card(folder)
    return PushPlan(folder, files_and_sizes, tuple(left_out), tuple(notices))


def _sorted_out(folder: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Paths that would be pushed, code aside; what stays, and why."""
    pushed, left_out = [], []
    code = {path.name for path in _shipped_code()}
    for path in sorted(folder.iterdir()):
        if path.name in code:
            continue
        if path.name.startswith(".") and path.name != ".eval_results":
            left_out.append((path.name, "hidden"))
        elif fnmatchcase(path.name, "checkpoint-*"):
            left_out.append((path.name, "a checkpoint of a training run"))
        elif any(fnmatchcase(path.name, pattern) for pattern in _TRAINER_STATE):
            left_out.append((path.name, "state of a training run"))
        elif path.is_dir() and not any(pattern.startswith(f"{path.name}/") for pattern in _PUSHED):
            left_out.append((f"{path.name}/", "not part of a model's repository"))
        else:
            for file in [path] if path.is_file() else sorted(path.rglob("*")):
                if file.is_file():
                    _sort_file(folder, file, pushed, left_out)
    return pushed, left_out


def _sort_file(folder: Path, file: Path, pushed: list[str], left_out: list[tuple[str, str]]) -> None:
    """One file: pushed, left out, or a reason to stop."""
    name = file.relative_to(folder).as_posix()
    if file.suffix.lower() in _PICKLES:
        raise VidLLMInputError(
            f"model {folder}: wanted weights in safetensors alone; got {name}, which may run code when it is opened; remove it"
        )
    # A pattern's star must not reach into folders.
    depth = name.count("/")
    if any(pattern.count("/") == depth and fnmatchcase(name, pattern) for pattern in _PUSHED):
        pushed.append(name)
    elif file.suffix == ".py":
        left_out.append((name, "code that is not of this package"))
    else:
        left_out.append((name, "not part of a model's repository"))


def _shipped_code() -> list[Path]:
    """The code files of this version that belong into every checkpoint."""
    folders = (files("vidllm.modeling_vidllm"), files("vidllm.processing"))
    return [Path(str(item)) for folder in folders for item in folder.iterdir() if item.name.endswith("_vidllm.py")]


def _check_code(folder: Path, left_out: list[tuple[str, str]]) -> list[str]:
    """Every code file must be there; notices of those that are of another version."""
    code = _shipped_code()
    missing = sorted(path.name for path in code if not (folder / path.name).is_file())
    if missing:
        raise VidLLMInputError(
            f"model {folder}: wanted the code of the model in the folder; {', '.join(missing)} missing"
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        auto_map = dict(config["auto_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise VidLLMInputError(
            f"model {folder}: config.json: wanted an auto_map to the code; got none ({error!r})"
        ) from None
    for auto_class, place in auto_map.items():
        module = str(place).partition(".")[0]
        if not (folder / f"{module}.py").is_file():
            raise VidLLMInputError(
                f"model {folder}: config.json: {auto_class}: wanted a file of the folder; got {place}"
            )
    from vidllm import __version__

    differing = sorted(path.name for path in code if (folder / path.name).read_bytes() != path.read_bytes())
    if not differing:
        return []
    return [f"code: {', '.join(differing)} differ from those of vidllm {__version__}; they are pushed as they are"]


def _check_weight_files(folder: Path, pushed: list[str]) -> None:
    """One file, or an index and exactly the files that it names."""
    weights = sorted(name for name in pushed if name.endswith(".safetensors"))
    if INDEX not in pushed:
        if weights != [WEIGHTS]:
            raise VidLLMInputError(
                f"model {folder}: wanted {WEIGHTS}, or {INDEX} and its files; got {', '.join(weights)}"
            )
        return
    try:
        named = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VidLLMInputError(f"model {folder}: {INDEX}: wanted a weight_map; got none ({error!r})") from None
    if named != weights:
        absent, extra = sorted(set(named) - set(weights)), sorted(set(weights) - set(named))
        what = f"{', '.join(absent)} missing" if absent else f"{', '.join(extra)} not named in it"
        raise VidLLMInputError(f"model {folder}: {INDEX}: wanted exactly the files that it names; {what}")


def _check_loads(folder: Path) -> None:
    """Weights by name and shape, and the processor by loading it."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError, safe_open

    from vidllm import VidLLMForConditionalGeneration
    from vidllm.loading import load_processor, no_progress_bars

    load_processor(folder)
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt"):
                pass
    except (SafetensorError, OSError) as error:
        raise VidLLMInputError(
            f"model {folder}: {path.name}: cannot be read ({error}); was it copied whole?"
        ) from None
    try:
        with no_progress_bars():
            # Names and shapes go through all that loading does to them, and no weight takes memory.
            _, info = VidLLMForConditionalGeneration.from_pretrained(
                folder, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
            )
    except (ValueError, OSError, RuntimeError, StrictDataclassError) as error:
        raise VidLLMInputError(f"model {folder}: cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    for key, what in (("missing_keys", "weights are missing"), ("unexpected_keys", "weights are not the model's")):
        names = sorted(info[key])
        if names:
            raise VidLLMInputError(f"model {folder}: {len(names)} {what}, such as {names[0]}")
    for name, got, wanted in info["mismatched_keys"]:
        raise VidLLMInputError(f"model {folder}: {name}: wanted shape {tuple(wanted)}; got {tuple(got)}")


def _check_card(folder: Path) -> list[str]:
    """A card with results must agree with them."""
    from vidllm.eval.card import check_card
    from vidllm.eval.card_facts import RESULTS_FOLDER
    from vidllm.eval.results import RESULTS_FILE

    if any((folder / RESULTS_FOLDER).glob(f"*/{RESULTS_FILE}")):
        check_card(folder)
        return []
    return ["no measured results beside the card, so nothing in it was checked (`vidllm card` writes both)"]


def push(plan: PushPlan, to: str, private: bool = False, api: "HfApi | None" = None) -> dict[str, Any]:
    """Make the repository if there is none, and put the files there in one go.

    Args:
        plan (`PushPlan`): From `plan_push`.
        to (`str`): `owner/name`.
        private (`bool`): Whether a new repository is seen by its owner only.
        api (`HfApi`, *optional*): By default the Hub's, with the token of this user.

    Returns:
        `dict`: `url` of the repository, `commit`: its last one.

    Raises:
        VidLLMInputError: No token, or the Hub refuses; says what it said and what to do.

    Source:
        Upstream: huggingface_hub HfApi.create_repo, upload_folder. Ours: exactly the files of the plan.
    """
    from huggingface_hub import HfApi, get_token

    # HTTPError is that of whichever client huggingface_hub has, which differs between its versions.
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    from vidllm.loading import no_progress_bars

    api = api or HfApi()
    if not (api.token or get_token()):
        raise VidLLMInputError(
            f"push to {to}: wanted a token of the Hub with write access; got none: `hf auth login` or HF_TOKEN"
        )
    try:
        # Bars are for people; in a file they would be one long line.
        with contextlib.nullcontext() if sys.stderr.isatty() else no_progress_bars():
            repository = api.create_repo(to, private=True if private else None, repo_type="model", exist_ok=True)
            done = api.upload_folder(
                repo_id=repository.repo_id,
                folder_path=plan.folder,
                allow_patterns=[escape(name) for name, _ in plan.files],
                commit_message="Push with vidllm",
            )
    except HfHubHTTPError as error:
        raise VidLLMInputError(f"push to {to}: {_refusal(error)}") from error
    except (HTTPError, OSError) as error:
        raise VidLLMInputError(f"push to {to}: the Hub cannot be reached ({' '.join(str(error).split())})") from error
    return {"url": str(repository), "commit": done.oid}


def _refusal(error: Any) -> str:
    """What the Hub said, in one line, and what to do."""
    status = getattr(error.response, "status_code", None)
    advice = {
        401: "wanted a valid token: `hf auth login` or HF_TOKEN",
        403: "wanted a token with write access to this owner's repositories",
        404: "wanted a repository that exists and that the token may write to",
    }.get(status)
    said = error.server_message or str(error)
    return f"the Hub answers {status}" + (f"; {advice}" if advice else "") + f" ({' '.join(str(said).split())[:300]})"


def check_repository(to: str) -> str:
    """Say what is wrong with a name before anything is read.

    Args:
        to (`str`): `owner/name`.

    Returns:
        `str`: the same.

    Raises:
        VidLLMInputError: It is no such name.

    Source:
        Upstream: huggingface_hub validate_repo_id. Ours: with the owner, so that nothing goes to the wrong place.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(to)
    except HFValidationError as error:
        raise VidLLMInputError(f"--to: wanted owner/name; got {to!r} ({' '.join(str(error).split())})") from None
    if "/" not in to:
        raise VidLLMInputError(f"--to: wanted owner/name; got {to!r}")
    return to


__all__ = ["PushPlan", "check_repository", "plan_push", "push"]

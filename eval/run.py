"""`run_evaluation`: the model's predictions on benchmarks, scored beside baselines, written to `results.json` with its provenance.

A run that was killed goes on where it stopped. No tensors.
"""

import hashlib
import json
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vidllm.eval.predict import MAX_NEW_TOKENS, PredictionFiles, PredictionSettings, Predictor
from vidllm.eval.reconstruction import CONSTANT_STEP_M
from vidllm.eval.results import RESULTS_FILE, read_results, write_results
from vidllm.eval.scoring import Scored, score_run
from vidllm.eval.train_facts import TrainFacts, mean_log_depth_of, train_facts
from vidllm.eval.truth import read_rooms, rooms_of_split
from vidllm.eval.work import RECONSTRUCTION, EvaluationWork, check_benchmarks, checked_data_root, plan
from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.processing.benchmarks.prompts import DEFAULT_STYLE
from vidllm.processing.processing_vidllm import VidLLMProcessor
from vidllm.processing.video_reading_vidllm import VidLLMInputError


GEOMETRIES = ("predicted", "given")
SETTINGS_FILE = "settings.json"
# What may change between runs that share predictions: a name, and how many prompts fit into memory.
FREE_SETTINGS = ("model", "batch_size")
PACKAGES = ("vidllm", "torch", "transformers", "numpy", "datasets", "safetensors", "av", "pillow")
Progress = Callable[[str, int, int], None]


def run_evaluation(
    benchmarks: Sequence[str],
    model: str | Path | tuple[VidLLMForConditionalGeneration, VidLLMProcessor],
    data_root: str | Path,
    out: str | Path,
    split: str | None = None,
    geometry: str = "predicted",
    with_given_geometry: bool = False,
    num_frames: int | None = None,
    batch_size: int = 32,
    limit_scenes: int | None = None,
    blind_root: str | Path | None = None,
    num_train_rooms: int = 400,
    prompts: str = DEFAULT_STYLE,
    device: str | None = None,
    model_name: str | None = None,
    command: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate a model on the benchmarks of a data root.

    Predictions go to `<out>/predictions/<benchmark>.jsonl` as they are made, keyed by the ids that the benchmark's authors use; run again
    with the same settings, only what is missing is made. Numbers of benchmarks that an earlier run with the same settings wrote to
    `<out>/results.json` stay there.

    Args:
        benchmarks (`Sequence[str]`): Of `scanqa`, `sqa3d`, `scanrefer`, `scan2cap`, `reconstruction`.
        model (`str` or `Path`, or a tuple): Checkpoint folder or Hub id; or a loaded model in evaluation mode and its processor.
        data_root (`str` or `Path`): Scenes and annotations.
        out (`str` or `Path`): Folder for predictions and results.
        split (`str`, *optional*): Instead of the split that each benchmark's authors evaluate (SQA3D: test, others: val).
        geometry (`str`): `predicted`, or `given`: the model gets true poses, intrinsics, and depth where there is any.
        with_given_geometry (`bool`): Whether to run a second time with given geometry and put that beside as a baseline.
        num_frames (`int`, *optional*): Frames sampled evenly of each scene; the checkpoint's own number if not given.
        batch_size (`int`): Prompts answered together.
        limit_scenes (`int`, *optional*): Only the first so many scenes.
        blind_root (`str` or `Path`, *optional*): Data root whose train split the baselines are fitted on, instead of `data_root`.
        num_train_rooms (`int`): Rooms made in memory to fit them on, where a data root of rooms has no train split.
        prompts (`str`): Name of the prompts, one of `STYLES`.
        device (`str`, *optional*): Where a model that is loaded here runs; by default CUDA if there is any.
        model_name (`str`, *optional*): How provenance calls the model; by default its path.
        command (`str`, *optional*): How provenance says that this was run; by default the process's own command line.
        progress (`Callable`, *optional*): Called with what is being done, how much of it is done, and of how much.

    Returns:
        `dict`: what `<out>/results.json` says: `{"runs": {name: {"results": {benchmark: {protocol: {metric: value}}}, "baselines": {kind:
        ...}}}, "provenance": {...}}`. The name is the difficulty for rooms, else the data root's own.

    Raises:
        VidLLMInputError: Wrong arguments, files that are absent or malformed, or `out` holds predictions of other settings.

    Source:
        Ours.
    """
    names = check_benchmarks(benchmarks)
    root, out = checked_data_root(data_root), Path(out).expanduser()
    if geometry not in GEOMETRIES:
        raise VidLLMInputError(f"geometry: wanted {' or '.join(GEOMETRIES)}; got {geometry!r}")
    for what, number in (("num_frames", num_frames), ("batch_size", batch_size), ("limit_scenes", limit_scenes)):
        if number is not None and number < 1:
            raise VidLLMInputError(f"{what}: wanted at least 1; got {number}")
    if with_given_geometry and geometry == "given":
        raise VidLLMInputError("with_given_geometry: wanted with geometry predicted; geometry is given already")
    loaded, processor = model if isinstance(model, tuple) else load(model, device)
    name = model_name or ("a model in memory" if isinstance(model, tuple) else str(model))
    frames = num_frames or processor.video_processor.num_frames
    if not frames:
        raise VidLLMInputError("num_frames: wanted a number; the checkpoint samples by frames per second and has none")
    report = progress or (lambda *_: None)
    report("reading annotations", 0, 1)
    work = plan(names, root, frames, split, prompts, limit_scenes)
    settings = _settings(work, loaded, name, frames, geometry, batch_size, prompts, limit_scenes)
    _check_settings(out, settings)
    facts = train_facts(
        root,
        None if blind_root is None else checked_data_root(blind_root),
        num_train_rooms,
        out / "train_facts.json",
        lambda done, of_all: report("making train rooms for the baselines", done, of_all),
    )
    constant_depth, depth_source = _constant_depth(work, facts)

    def predicted_with(kind: str, folder: Path) -> tuple[dict[str, Scored], PredictionFiles]:
        files = PredictionFiles(folder, names)
        asked = PredictionSettings(frames, batch_size, kind, constant_depth)
        predictor = Predictor(loaded, processor, root, asked)
        for done, scene in enumerate(work.scenes):
            report(f"scenes, geometry {kind}", done, len(work.scenes))
            predictor.run(scene, files)
        report(f"scenes, geometry {kind}", len(work.scenes), len(work.scenes))
        return score_run(work, {name: file.records for name, file in files.of.items()}, facts), files

    scored, files = predicted_with(geometry, out / "predictions")
    baselines: dict[str, dict] = {}
    for benchmark, found in scored.items():
        for kind, scores in found.baselines.items():
            baselines.setdefault(kind, {})[benchmark] = scores
    if with_given_geometry:
        given, _ = predicted_with("given", out / "predictions" / "given_geometry")
        baselines["given_geometry"] = {benchmark: found.results for benchmark, found in given.items()}
    notes = [*work.notes, *(note for part in work.benchmarks.values() for note in part.notes)]
    notes += [note for found in scored.values() for note in found.notes]
    notes += [depth_source] if work.reconstructed else []
    document = {
        "runs": {
            run_name(root, split): {
                "results": {benchmark: found.results for benchmark, found in scored.items()},
                "baselines": baselines,
            }
        },
        "provenance": _provenance(work, files, loaded, settings, notes, command, device),
    }
    document = _with_earlier_benchmarks(out / RESULTS_FILE, document)
    write_results(out / RESULTS_FILE, document)
    return document


def load(model: str | Path, device: str | None = None) -> tuple[VidLLMForConditionalGeneration, VidLLMProcessor]:
    """Load a checkpoint for evaluation.

    Args:
        model (`str` or `Path`): Folder or Hub id.
        device (`str`, *optional*): By default the first CUDA device if there is one, else the CPU.

    Returns:
        `tuple`: model in evaluation mode, processor.

    Source:
        Ours: our own classes, so that no code of the checkpoint is run.
    """
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    processor = VidLLMProcessor.from_pretrained(str(model))
    return VidLLMForConditionalGeneration.from_pretrained(str(model)).to(place).eval(), processor


def run_name(data_root: str, split: str | None = None) -> str:
    """Name of a run: the difficulty of rooms, else the data root's own name.

    Args:
        data_root (`str`): Absolute path of the data root.
        split (`str`, *optional*): Evaluated split.

    Returns:
        `str`

    Source:
        Ours.
    """
    rooms = rooms_of_split(data_root, split or "val")
    return Path(data_root).name if rooms is None else str(rooms["difficulty"])


def weights_sha256(name: str, model: VidLLMForConditionalGeneration) -> dict[str, str]:
    """SHA-256 of a model's weights.

    Args:
        name (`str`): Checkpoint folder, or whatever else the model is called.
        model (`VidLLMForConditionalGeneration`): The loaded model.

    Returns:
        `dict[str, str]`: by file of a checkpoint folder, as `sha256sum` prints it; else `state_dict`: of all tensors with their names.

    Source:
        Ours: a number says which weights it belongs to.
    """
    files = sorted(Path(name).expanduser().glob("*.safetensors"))
    if files:
        return {path.name: _file_sha256(path) for path in files}
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {"state_dict": digest.hexdigest()}


def _file_sha256(path: Path) -> str:
    """SHA-256 of a file, however large."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _settings(
    work: EvaluationWork,
    model: VidLLMForConditionalGeneration,
    name: str,
    frames: int,
    geometry: str,
    batch_size: int,
    prompts: str,
    limit_scenes: int | None,
) -> dict[str, Any]:
    """Everything that predictions depend on: what all benchmarks share, and each benchmark's own files."""
    shared = {
        "model": name,
        "weights_sha256": weights_sha256(name, model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "data_root": work.data_root,
        "geometry": geometry,
        "frames": frames,
        "batch_size": batch_size,
        "prompts": prompts,
        "limit_scenes": limit_scenes,
        "max_new_tokens": MAX_NEW_TOKENS,
    }
    own = {name: {"split": part.split, "annotations_sha256": part.sha256} for name, part in work.benchmarks.items()}
    if work.reconstructed:
        digest = hashlib.sha256("\n".join(work.reconstructed).encode()).hexdigest()
        own[RECONSTRUCTION] = {"scenes_sha256": digest}
    return {"shared": shared, "benchmarks": own}


def _check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder with predictions of other settings; else note the settings there."""
    path = out / SETTINGS_FILE
    known = settings
    if path.is_file():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            pairs = [
                (name, known["shared"].get(name), value)
                for name, value in settings["shared"].items()
                if name not in FREE_SETTINGS
            ]
            pairs += [
                (f"{benchmark}: {name}", known["benchmarks"][benchmark].get(name), value)
                for benchmark, own in settings["benchmarks"].items()
                if benchmark in known["benchmarks"]
                for name, value in own.items()
            ]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise VidLLMInputError(f"{path}: not the settings of an evaluation; choose another --out") from None
        for name, was, wanted in pairs:
            if was != json.loads(json.dumps(wanted)):
                raise VidLLMInputError(
                    f"{out}: holds predictions of other settings ({name} was {was}, now {wanted}); choose another --out"
                )
    merged = {**settings, "benchmarks": {**known["benchmarks"], **settings["benchmarks"]}}
    out.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def _constant_depth(work: EvaluationWork, facts: TrainFacts | None) -> tuple[float | None, str]:
    """Distance that the constant baseline says, and how it was found."""
    if not work.reconstructed:
        return None, ""
    what = f"{RECONSTRUCTION}: constant moves {CONSTANT_STEP_M} m to the right per frame, upright and level, and sees everything at"
    if facts is not None and facts.mean_log_depth is not None:
        depth_m = float(np.exp(facts.mean_log_depth))
        return depth_m, f"{what} {depth_m:.3f} m ({facts.source})"
    mean = mean_log_depth_of(work.data_root, list(work.reconstructed))
    if mean is None:
        return None, f"{RECONSTRUCTION}: no depth in the scenes, so that depth and scale are not scored"
    return float(np.exp(mean)), f"{what} {np.exp(mean):.3f} m (of the evaluated scenes themselves)"


def _provenance(
    work: EvaluationWork,
    files: PredictionFiles,
    model: VidLLMForConditionalGeneration,
    settings: dict[str, Any],
    notes: Sequence[str],
    command: str | None,
    device: str | None,
) -> dict[str, Any]:
    """Where the numbers are from."""
    seconds = [record["seconds"] for record in files.timing.records.values()]
    counts = {name: {"rows": part.num_rows, "scored": len(part.samples)} for name, part in work.benchmarks.items()}
    if work.reconstructed:
        counts[RECONSTRUCTION] = {"scored": len(work.reconstructed)}
    rooms = read_rooms(work.data_root)
    return {
        **settings["shared"],
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "device": device or str(model.device),
        "splits": {name: part.split for name, part in work.benchmarks.items()},
        "annotations_sha256": {
            file: value for part in work.benchmarks.values() for file, value in part.sha256.items()
        },
        "rooms": None if rooms is None else {split: part["seed"] for split, part in rooms.items()},
        "counts": counts,
        "notes": list(notes),
        "seconds_per_scene": float(np.mean(seconds)) if seconds else None,
        "command": command or shlex.join(sys.argv),
    }


def _version(package: str) -> str:
    """Installed version of a package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _with_earlier_benchmarks(path: Path, document: dict[str, Any]) -> dict[str, Any]:
    """Keep what an earlier run with the same settings said about other benchmarks."""
    if not path.is_file():
        return document
    earlier = read_results(path)
    ((name, run),) = document["runs"].items()
    before = earlier["runs"].get(name)
    if before is None:
        return document
    kinds = {**before["baselines"], **run["baselines"]}
    merged = {
        "results": {**before["results"], **run["results"]},
        "baselines": {kind: {**before["baselines"].get(kind, {}), **run["baselines"].get(kind, {})} for kind in kinds},
    }
    provenance = dict(document["provenance"])
    for part in ("splits", "annotations_sha256", "counts"):
        provenance[part] = {**earlier["provenance"][part], **provenance[part]}
    kept = set(before["results"]) - set(run["results"])
    provenance["notes"] = [
        *(note for note in earlier["provenance"]["notes"] if note.partition(":")[0] in kept),
        *provenance["notes"],
    ]
    return {"runs": {name: merged}, "provenance": provenance}


__all__ = ["load", "run_evaluation", "run_name", "weights_sha256"]

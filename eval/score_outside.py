"""`score_predictions`: another system's predictions scored as our own are, without a model. No tensors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vidllm.eval.outside import read_outside
from vidllm.eval.predictions import PredictionFile
from vidllm.eval.processes import Processes, alone_in
from vidllm.eval.provenance import (
    benchmark_settings,
    check_settings,
    provenance,
    run_notes,
    text_scores_state,
    write_run,
)
from vidllm.eval.run import GEOMETRIES, Progress, baseline_facts, run_name
from vidllm.eval.scoring import ScoringSettings, score_run
from vidllm.eval.work import RECONSTRUCTION, check_benchmarks, checked_data_root, plan
from vidllm.processing.benchmarks.prompts import DEFAULT_STYLE
from vidllm.processing.video_reading_vidllm import VidLLMInputError


# What is known of the geometry that a system had, unless its user says more.
NOT_STATED = "not stated"


def score_predictions(
    benchmarks: Sequence[str],
    predictions: str | Path,
    data_root: str | Path,
    out: str | Path,
    split: str | None = None,
    geometry: str | None = None,
    limit_scenes: int | None = None,
    blind_root: str | Path | None = None,
    num_train_rooms: int = 400,
    model_name: str | None = None,
    command: str | None = None,
    progress: Progress | None = None,
    text: bool = True,
) -> dict[str, Any]:
    """Score predictions of any other system; no model is loaded and no scene is looked at.

    They are checked, brought into the form of our own at `<out>/predictions/<benchmark>.jsonl`, and scored as these are, beside the same
    baselines.

    Args:
        benchmarks (`Sequence[str]`): Of `scanqa`, `sqa3d`, `scanrefer`, `scan2cap`.
        predictions (`str` or `Path`): File or folder, in the form that `vidllm.eval.outside` says.
        data_root (`str` or `Path`): Annotations, and the scans that true boxes are read from.
        out (`str` or `Path`): Folder for predictions and results.
        split (`str`, *optional*): Instead of the split that each benchmark's authors evaluate (SQA3D: test, others: val).
        geometry (`str`, *optional*): What the system had of geometry: `predicted` or `given`; by default `not stated`.
        limit_scenes (`int`, *optional*): Only the first so many scenes.
        blind_root (`str` or `Path`, *optional*): As of `run_evaluation`.
        num_train_rooms (`int`): As of `run_evaluation`.
        model_name (`str`, *optional*): What the system is called; by default by the name of the file.
        command (`str`, *optional*): As of `run_evaluation`.
        progress (`Callable`, *optional*): As of `run_evaluation`.
        text (`bool`): Whether n-gram scores are computed.

    Returns:
        `dict`: as of `run_evaluation`.

    Raises:
        VidLLMInputError: Wrong arguments, predictions that cannot be scored (then nothing is written), or `out` holds others.

    Source:
        Ours.
    """
    names = check_benchmarks(benchmarks)
    root, out = checked_data_root(data_root), Path(out).expanduser()
    if RECONSTRUCTION in names:
        raise VidLLMInputError(
            f"predictions: wanted benchmarks of {', '.join(names[:-1]) or 'texts or boxes'}; {RECONSTRUCTION} needs a model"
        )
    if geometry not in (None, *GEOMETRIES):
        raise VidLLMInputError(f"geometry: wanted {' or '.join(GEOMETRIES)}; got {geometry!r}")
    if limit_scenes is not None and limit_scenes < 1:
        raise VidLLMInputError(f"limit_scenes: wanted at least 1; got {limit_scenes}")
    report = progress or (lambda *_: None)
    report("reading annotations", 0, 1)
    work = plan(names, root, None, split, limit_scenes=limit_scenes)
    found = read_outside(predictions, work.benchmarks)
    settings = {
        "shared": {
            "model": model_name or Path(predictions).name,
            "weights_sha256": {},
            "dtype": None,
            "data_root": root,
            "geometry": geometry or NOT_STATED,
            "frames": None,
            "batch_size": None,
            "prompts": DEFAULT_STYLE,
            "limit_scenes": limit_scenes,
            "max_new_tokens": None,
            "proposals": None,
        },
        "benchmarks": benchmark_settings(work, found.sha256),
    }
    with alone_in(out, Processes()):
        check_settings(out, settings)
        facts = baseline_facts(root, blind_root, num_train_rooms, out, report)
        records = {}
        for name in names:
            file = PredictionFile(out / "predictions" / f"{name}.jsonl")
            file.add(found.records[name])
            records[name] = file.records
        report("scoring", 0, 1)
        scored = score_run(work, records, ScoringSettings(root, facts, text))
        report("scoring", 1, 1)
        notes = run_notes(work, scored, found.notes)
        said = provenance(work, [], settings, notes, command, "none", text_scores_state(text))
        return write_run(out, run_name(root, split), scored, None, said)


__all__ = ["NOT_STATED", "score_predictions"]

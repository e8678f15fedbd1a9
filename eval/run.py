"""`run_evaluation`: the model's predictions on benchmarks, scored beside baselines, written to `results.json` with its provenance.

A run that was killed goes on where it stopped. Several processes share the scenes (`Processes`):
`accelerate launch --multi_gpu --num_processes N -m vidllm.eval.run BENCHMARK... --model DIR --data-root DIR --out DIR`. No tensors.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig
from transformers.utils.logging import disable_progress_bar

from vidllm.eval.predict import MAX_NEW_TOKENS, PredictionSettings, Predictor
from vidllm.eval.predictions import TIMING, PredictionFiles
from vidllm.eval.processes import Processes, alone_in, start_processes, steady_threads
from vidllm.eval.provenance import (
    SETTINGS_FILE,
    benchmark_settings,
    check_settings,
    provenance,
    run_notes,
    text_scores_state,
    weights_sha256,
    write_run,
)
from vidllm.eval.reconstruction import CONSTANT_STEP_M
from vidllm.eval.scoring import ScoringSettings, score_run
from vidllm.eval.train_facts import TrainFacts, mean_log_depth_of, train_facts
from vidllm.eval.truth import rooms_of_split
from vidllm.eval.work import RECONSTRUCTION, EvaluationWork, check_benchmarks, checked_data_root, plan
from vidllm.modeling_vidllm.configuration_vidllm import VidLLMConfig
from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.processing.benchmarks.prompts import DEFAULT_STYLE
from vidllm.processing.benchmarks.proposals import SceneProposals, load_proposals
from vidllm.processing.processing_vidllm import VidLLMProcessor
from vidllm.processing.video_reading_vidllm import VidLLMInputError


GEOMETRIES = ("predicted", "given")
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
    text: bool = True,
    proposals: str | Path | None = None,
    processes: Processes | None = None,
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
        text (`bool`): Whether n-gram scores (BLEU, METEOR, ROUGE-L, CIDEr) are computed; what needs Java is left out, and said to be, where there is none.
        proposals (`str` or `Path`, *optional*): Boxes that somebody else found, see `load_proposals`: descriptions are also answered by choosing among
            them (protocol `proposals`), and captions are asked for at their centres instead of the true ones.
        processes (`Processes`, *optional*): Which of several processes this is, see `start_processes`; by default the only one. Each does every
            n-th scene and writes files of its own; the main one puts them together, scores and writes results.

    Returns:
        `dict`: what `<out>/results.json` says: `{"runs": {name: {"results": {benchmark: {protocol: {metric: value}}}, "baselines": {kind:
        ...}}}, "provenance": {...}}`. The name is the difficulty for rooms, else the data root's own. Of several processes those that are not
        the main one return an empty one.

    Raises:
        VidLLMInputError: Wrong arguments, files that are absent or malformed, `out` holds predictions of other settings, or another evaluation is
            at work there.

    Source:
        Ours.
    """
    names, group = check_benchmarks(benchmarks), processes or Processes()
    root, out = checked_data_root(data_root), Path(out).expanduser()
    if geometry not in GEOMETRIES:
        raise VidLLMInputError(f"geometry: wanted {' or '.join(GEOMETRIES)}; got {geometry!r}")
    for what, number in (("num_frames", num_frames), ("batch_size", batch_size), ("limit_scenes", limit_scenes)):
        if number is not None and number < 1:
            raise VidLLMInputError(f"{what}: wanted at least 1; got {number}")
    if with_given_geometry and geometry == "given":
        raise VidLLMInputError("with_given_geometry: wanted with geometry predicted; geometry is given already")
    device = group.device(device)
    loaded, processor = model if isinstance(model, tuple) else load(model, device)
    name = model_name or ("a model in memory" if isinstance(model, tuple) else str(model))
    frames = num_frames or processor.video_processor.num_frames
    if not frames:
        raise VidLLMInputError("num_frames: wanted a number; the checkpoint samples by frames per second and has none")
    report = progress if progress is not None and group.is_main else (lambda *_: None)
    report("reading annotations", 0, 1)
    work = plan(names, root, frames, split, prompts, limit_scenes)
    boxes = _proposals(proposals, work, loaded)
    settings = {
        "shared": {
            "model": name,
            "weights_sha256": weights_sha256(name, loaded) if group.is_main else {},
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "data_root": root,
            "geometry": geometry,
            "pose_refinement_sizes": list(loaded.config.pose_refinement_sizes),
            "pose_refinement_depth_grid": list(loaded.config.pose_refinement_depth_grid),
            "pose_refinement_focal_spread": loaded.config.pose_refinement_focal_spread,
            "pose_refinement_depth_per_focal": loaded.config.pose_refinement_depth_per_focal,
            "align_room_to_walls": loaded.config.align_room_to_walls,
            "frames": frames,
            "batch_size": batch_size,
            "prompts": prompts,
            "limit_scenes": limit_scenes,
            "max_new_tokens": MAX_NEW_TOKENS,
            "proposals": None if boxes is None else boxes.settings,
        },
        "benchmarks": benchmark_settings(work),
    }
    kinds = {geometry: out / "predictions"}
    if with_given_geometry:
        kinds["given"] = out / "predictions" / "given_geometry"
    with alone_in(out, group):
        facts, constant_depth, depth_source = None, None, ""
        if group.is_main:
            check_settings(out, settings)
            facts = baseline_facts(root, blind_root, num_train_rooms, out, report)
            constant_depth, depth_source = _constant_depth(work, facts)
        constant_depth = group.from_main(constant_depth)
        files = {}
        for kind, folder in kinds.items():
            files[kind] = PredictionFiles(folder, names, group.rank if group.count > 1 else None)
            asked = PredictionSettings(frames, batch_size, kind, constant_depth, boxes)
            predictor, mine = Predictor(loaded, processor, root, asked), group.share(work.scenes)
            with steady_threads(loaded):
                for done, scene in enumerate(mine):
                    report(f"scenes, geometry {kind}", done, len(mine))
                    predictor.run(scene, files[kind])
            report(f"scenes, geometry {kind}", len(mine), len(mine))
        group.wait()
        if not group.is_main:
            return {}
        report("scoring", 0, 1)
        scoring, scored = ScoringSettings(root, facts, text, boxes), {}
        for kind in kinds:
            files[kind].gather(_order(work))
            scored[kind] = score_run(work, {name: file.records for name, file in files[kind].of.items()}, scoring)
        report("scoring", 1, 1)
        given = scored["given"] if with_given_geometry else None
        seconds = [record["seconds"] for record in files[geometry].timing.records.values()]
        where = device or str(loaded.device)
        notes = [depth_source] if work.reconstructed else []
        said = provenance(
            work, seconds, settings, run_notes(work, scored[geometry], notes), command, where, text_scores_state(text)
        )
        return write_run(out, run_name(root, split), scored[geometry], given, said)


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
    # A processor's parts look their config up; without this transformers would ask whether to run the checkpoint's code.
    AutoConfig.register(VidLLMConfig.model_type, VidLLMConfig, exist_ok=True)
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


def baseline_facts(
    root: str, blind_root: str | Path | None, num_train_rooms: int, out: Path, report: Progress
) -> TrainFacts | None:
    """What baselines are fitted on.

    Args:
        root (`str`): Absolute path of the evaluated data root.
        blind_root (`str` or `Path`, *optional*): As of `run_evaluation`.
        num_train_rooms (`int`): As of `run_evaluation`.
        out (`Path`): Folder of the run, where what was made is kept.
        report (`Callable`): As `progress` of `run_evaluation`.

    Returns:
        `TrainFacts`, or None: there is nothing to fit on.

    Raises:
        VidLLMInputError: See `train_facts`.

    Source:
        Ours.
    """
    return train_facts(
        root,
        None if blind_root is None else checked_data_root(blind_root),
        num_train_rooms,
        out / "train_facts.json",
        lambda done, of_all: report("making train rooms for the baselines", done, of_all),
    )


def _proposals(
    source: str | Path | None, work: EvaluationWork, model: VidLLMForConditionalGeneration
) -> SceneProposals | None:
    """Boxes to choose from, of the scenes whose questions want them."""
    wanted = [name for name in ("scanrefer", "scan2cap") if name in work.benchmarks]
    if source is None:
        return None
    if not wanted:
        raise VidLLMInputError("proposals: wanted with scanrefer or scan2cap; neither is evaluated")
    if "scanrefer" in wanted and model.config.box_output == "text":
        raise VidLLMInputError("proposals: wanted a model with a grounding decoder; this one writes boxes as text")
    scenes = [scene.scene_id for scene in work.scenes if any(name in scene.samples for name in wanted)]
    return load_proposals(source, work.data_root, scenes)


def _order(work: EvaluationWork) -> dict[str, list[str]]:
    """Ids in the order in which the files of a finished run have them: that of the benchmarks' own files."""
    order = {name: [sample.official_id for sample in part.samples] for name, part in work.benchmarks.items()}
    if work.reconstructed:
        order[RECONSTRUCTION] = list(work.reconstructed)
    return {**order, TIMING: [scene.scene_id for scene in work.scenes]}


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


def main(arguments: Sequence[str] | None = None) -> int:
    """What a launcher starts on every process.

    Args:
        arguments (`Sequence[str]`, *optional*): By default those of the process.

    Returns:
        `int`: exit code; 2 on bad input, with one line on stderr.

    Source:
        Ours.
    """
    parser = argparse.ArgumentParser(
        prog="python -m vidllm.eval.run", description="Score a checkpoint on benchmarks, on one or several processes."
    )
    parser.add_argument("benchmarks", nargs="+", metavar="BENCHMARK")
    for name in ("model", "data-root", "out"):
        parser.add_argument(f"--{name}", required=True, metavar="PATH")
    for name in ("split", "blind-root", "device", "proposals", "model-name", "command"):
        parser.add_argument(f"--{name}")
    for name in ("frames", "limit-scenes", "processes"):
        parser.add_argument(f"--{name}", type=int, metavar="N")
    parser.add_argument("--geometry", default="predicted", help="predicted or given")
    parser.add_argument("--with-given-geometry", action="store_true")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--train-rooms", type=int, default=400)
    parser.add_argument("--prompts", default=DEFAULT_STYLE)
    parser.add_argument("--no-text", action="store_true", help="no n-gram scores")
    given = parser.parse_args(arguments)
    disable_progress_bar()
    try:
        group = start_processes(given.processes)
        run_evaluation(
            given.benchmarks,
            given.model,
            given.data_root,
            given.out,
            split=given.split,
            geometry=given.geometry,
            with_given_geometry=given.with_given_geometry,
            num_frames=given.frames,
            batch_size=given.batch_size,
            limit_scenes=given.limit_scenes,
            blind_root=given.blind_root,
            num_train_rooms=given.train_rooms,
            prompts=given.prompts,
            device=given.device,
            model_name=given.model_name,
            command=given.command,
            text=not given.no_text,
            proposals=given.proposals,
            processes=group,
        )
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    return 0


__all__ = [
    "GEOMETRIES",
    "SETTINGS_FILE",
    "baseline_facts",
    "load",
    "main",
    "run_evaluation",
    "run_name",
    "weights_sha256",
]


if __name__ == "__main__":
    sys.exit(main())

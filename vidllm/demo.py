"""Everything once, on a model and a clip that the demonstration makes itself; no network."""

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vidllm.commands import ask, caption, encode, ground, load, read_video
from vidllm.exporting import export, labelled_boxes, plain_scene, summarise, write_json_file
from vidllm.loading import no_progress_bars
from vidllm.printing import answer_lines, caption_lines, grounding_lines, summary_lines


PRESET = "vidllm-nano"
NOTICE = "untrained weights: every answer, box and shape below is random; only the machinery is real"
CLIP_SECONDS = 2.5
MAX_NEW_TOKENS = 24
QUESTIONS = (
    "What kind of room is this?",
    "How many tables are there?",
    "What colour is the sofa?",
    "What is next to the cabinet?",
    "Is there a bed in the room?",
    "What is the largest piece of furniture?",
    "I stand at the table and face the sofa. What is behind me?",
)
DESCRIPTIONS = ("the red sofa", "the blue cabinet at the wall")


def make_model(folder: Path) -> None:
    """Write the untrained checkpoint of the demonstration, in place of one that an earlier run left.

    Args:
        folder (`Path`): Where it goes.

    Raises:
        ValueError: The folder holds something else.

    Source:
        Ours: an older one may not fit the code any more.
    """
    from vidllm.train.initialise import initialise, is_untrained

    if is_untrained(folder):
        shutil.rmtree(folder)
    with no_progress_bars():
        initialise(PRESET, folder, seed=0)


def run_demo(out_dir: str | Path, show: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Make a model and a clip, then ask, ground, caption, reconstruct, and write all of it.

    Args:
        out_dir (`str` or `Path`): Gets `model/`, `room.mp4`, `answers.json`, `boxes.json` and `reconstruction/`.
        show (callable): Is given each line of text as soon as it is known.

    Returns:
        `dict`: what `answers.json` holds.

    Raises:
        ImportError: A library of the extra `export` is missing.
        ValueError: The folder cannot be written.

    Source:
        Ours.
    """
    import torch

    from vidllm.processing.export import check_export
    from vidllm.processing.synthetic_clip import write_synthetic_clip

    start = time.perf_counter()
    torch.manual_seed(0)
    out_dir = check_export(out_dir)
    show(NOTICE)
    clip, folder = out_dir / "room.mp4", out_dir / "model"
    make_model(folder)
    write_synthetic_clip(clip, seconds=CLIP_SECONDS)
    show(f"model {folder}, clip {clip}")
    model, processor = load(folder)
    inputs = read_video(processor, str(clip))
    scene = encode(model, inputs)
    unit = scene.reconstruction.unit

    def show_all(title: str, lines: list[str]) -> None:
        for line in ("", title, *lines):
            show(line)

    # Greedy decoding of untrained weights repeats one letter; drawn letters show at least that different answers come out.
    model.generation_config.do_sample = True
    answers = ask(model, processor, scene, QUESTIONS, MAX_NEW_TOKENS)
    show_all("vidllm ask", [line for answer in answers for line in answer_lines(answer, unit)])
    groundings = [ground(model, processor, scene, description) for description in DESCRIPTIONS]
    show_all("vidllm ground", [line for found in groundings for line in grounding_lines(found, unit)])
    places = [found.boxes[0].box[:3] for found in groundings if found.boxes][:1] or [(0.0, 2.0, 0.0)]
    captions = [caption(model, processor, scene, place, max_new_tokens=MAX_NEW_TOKENS) for place in places]
    show_all("vidllm caption", [line for item in captions for line in caption_lines(item, unit)])
    boxes = labelled_boxes(groundings)
    paths = export(out_dir / "reconstruction", processor, inputs, scene.reconstruction, boxes)
    plain = plain_scene(processor, inputs, scene.reconstruction, boxes)
    summary = summarise(plain, inputs, float(scene.reconstruction.scale[0]))
    show_all("vidllm reconstruct", [*summary_lines(summary), f"files        {out_dir / 'reconstruction'}"])
    header = {"untrained": True, "notice": NOTICE, "model": str(folder), "video": str(clip), "geometry": "predicted"}
    grounded = {**header, "frame": "room", "unit": unit, "groundings": [asdict(found) for found in groundings]}
    document = {
        **grounded,
        "answers": [asdict(answer) for answer in answers],
        "captions": [asdict(item) for item in captions],
        "reconstruction": {**summary, "files": {name: str(path) for name, path in paths.items()}},
        "seconds": round(time.perf_counter() - start, 1),
    }
    for name, content in (("boxes.json", grounded), ("answers.json", document)):
        write_json_file(out_dir / name, content)
    show_all(f"{document['seconds']} s; all of it: {out_dir / 'answers.json'}", [])
    return document


__all__ = ["make_model", "run_demo"]

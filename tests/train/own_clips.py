"""Clips of nothing in particular with questions about them, as people's own JSONL file."""

import json

import numpy as np
from PIL import Image


def write_clips(folder, clips=3, frames=3, with_box=True, questions=(("How many chairs?", "two"),), size_hw=(28, 42)):
    """Pictures of noise, no cameras, no depth; with a box the last lines ask where something is, and what is at a place. Returns the file."""
    rng = np.random.default_rng(0)
    lines = []
    for clip in range(clips):
        (folder / f"clip{clip}").mkdir(parents=True)
        for number in range(frames):
            picture = rng.integers(0, 255, (*size_hw, 3), dtype=np.uint8)
            Image.fromarray(picture).save(folder / f"clip{clip}" / f"{number}.png")
        for question, answer in questions:
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": f"{answer} {clip}"}]
            lines.append({"video": f"clip{clip}", "messages": turns})
    if with_box:
        turns = [
            {"role": "user", "content": "Where is the lamp?"},
            {"role": "assistant", "content": [{"type": "box"}]},
        ]
        lines.append(
            {
                "video": "clip0", "task": "ground", "box_frame": "room", "room_from_world": [[1, 0, 0], [0, 0, 1], [0, -1, 0]],
                "messages": turns, "boxes": [[0, 1, 0, 1, 1, 1]],
            }
        )  # fmt: skip
        turns = [
            {"role": "user", "content": [{"type": "text", "text": "What is at "}, {"type": "point"}, {"type": "text", "text": "?"}]},
            {"role": "assistant", "content": "A wall."},
        ]  # fmt: skip
        lines.append({"video": "clip1", "messages": turns, "points": [[0.1, 0.2, 1.0]], "point_frame": "world"})
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path

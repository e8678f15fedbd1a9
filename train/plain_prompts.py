"""The plainest prompts about a room: its things by kind and color, as they are seen in the sampled frames.

The benchmarks' questions seldom ask for what a thing looks like: 7 % of the ScanQA questions of 40 rooms ask for a color.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vidllm.processing.benchmarks.prompts import DEFAULT_STYLE, box_turn, reply_turn, user_turn
from vidllm.processing.samples import Sample


# A thing counts as seen from so many pixels on, over all sampled frames.
LEAST_PIXELS = 100
BARE_STYLE = "plain"


def plain_samples(
    scene_id: str,
    names: Sequence[tuple[str, str | None]],
    seen_pixels: Sequence[int],
    boxes: Mapping[int, np.ndarray],
    rng: np.random.Generator,
    data_root: str = "",
) -> list[Sample]:
    """All plain prompts about a room: the color of a kind, the kind of a color, and where a thing of both is.

    A kind, a color, or a pair of them is asked about only where one thing that is seen has it, and no other thing of the room has.

    Args:
        scene_id (`str`): Of the room.
        names (`Sequence` of `(str, str | None)`): Kind and color of each thing, by its number; None = no color with a name.
        seen_pixels (`Sequence[int]`): Pixels of each thing in the sampled frames.
        boxes (`Mapping[int, np.ndarray]`): Box `(6,)` of things by their number, annotation frame, metres; things without one are not looked for.
        rng (`np.random.Generator`): Draws the wording: half of the questions are bare, half ask for a short answer as the benchmarks' do.
        data_root (`str`): As the other samples of the room have it; samples of different roots are of different videos.

    Returns:
        `list[Sample]`: ids that begin with `plain_color`, `plain_kind` (task `qa`) or `plain_place` (task `ground`).

    Source:
        Ours.
    """
    kinds = Counter(kind for kind, _ in names)
    colors = Counter(color for _, color in names)
    pairs = Counter(names)
    found: list[Sample] = []
    for number, (kind, color) in enumerate(names):
        if color is None or seen_pixels[number] < LEAST_PIXELS:
            continue

        def ask(name: str, task: str, question: str, turns: list[dict], number: int = number, **answer: Any) -> None:
            found.append(
                Sample(
                    sample_id=f"{name}/{scene_id}/{number}",
                    scene_id=scene_id,
                    data_root=data_root,
                    benchmark="rooms",
                    split="train",
                    task=task,
                    messages=turns,
                    question=question,
                    **answer,
                )
            )

        asked = []
        if kinds[kind] == 1:
            asked.append(("plain_color", f"What color is the {kind}?", color))
        if colors[color] == 1:
            asked.append(("plain_kind", f"Which object is {color}?", kind))
        for name, question, answer in asked:
            style = BARE_STYLE if rng.random() < 0.5 else DEFAULT_STYLE
            ask(
                name,
                "qa",
                question,
                [user_turn(style, "qa", question=question), reply_turn(answer)],
                answers=(answer,),
            )
        if pairs[kind, color] == 1 and number in boxes:
            description = f"the {color} {kind}."
            turns = [user_turn(DEFAULT_STYLE, "ground", description=description), box_turn()]
            box = boxes[number][None]
            ask(
                "plain_place", "ground", description, turns, object_ids=(number,), boxes_annotation=box, box_block=(0,)
            )
    return found


__all__ = ["LEAST_PIXELS", "plain_samples"]

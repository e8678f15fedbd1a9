"""The plainest prompts about a room: its things by kind and color, as they are seen in the sampled frames.

The benchmarks' questions seldom ask for what a thing looks like, and a small language model that is trained from nothing needs thousands of such
questions before it looks at the scene at all; what it has learned from them serves the others.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

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
) -> list[tuple[str, Sample]]:
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
        `list` of `(kind, Sample)`: kinds `plain_color`, `plain_kind` (task `qa`) and `plain_place` (task `ground`).

    Source:
        Ours.
    """
    kinds = Counter(kind for kind, _ in names)
    colors = Counter(color for _, color in names)
    pairs = Counter(names)
    found = []
    for number, (kind, color) in enumerate(names):
        if color is None or seen_pixels[number] < LEAST_PIXELS:
            continue
        common = {"scene_id": scene_id, "benchmark": "rooms", "split": "train", "data_root": data_root}
        asked = []
        if kinds[kind] == 1:
            asked.append(("plain_color", f"What color is the {kind}?", color))
        if colors[color] == 1:
            asked.append(("plain_kind", f"Which object is {color}?", kind))
        for name, question, answer in asked:
            turns = [
                user_turn(BARE_STYLE if rng.random() < 0.5 else DEFAULT_STYLE, "qa", question=question),
                reply_turn(answer),
            ]
            found.append(
                (
                    name,
                    Sample(
                        sample_id=f"{name}/{scene_id}/{number}",
                        task="qa",
                        messages=turns,
                        question=question,
                        answers=(answer,),
                        **common,
                    ),
                )
            )
        if pairs[kind, color] == 1 and number in boxes:
            description = f"the {color} {kind}."
            turns = [user_turn(DEFAULT_STYLE, "ground", description=description), box_turn()]
            found.append(
                (
                    "plain_place",
                    Sample(
                        sample_id=f"plain_place/{scene_id}/{number}",
                        task="ground",
                        messages=turns,
                        question=description,
                        object_ids=(number,),
                        boxes_annotation=boxes[number][None],
                        box_block=(0,),
                        **common,
                    ),
                )
            )
    return found


__all__ = ["LEAST_PIXELS", "plain_samples"]

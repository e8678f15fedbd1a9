"""The plainest prompts about a room: its things by kind, color and pattern, as they are seen in the sampled frames.

The benchmarks' questions seldom ask for what a thing looks like: 7 % of the ScanQA questions of 40 rooms ask for a color. And of a question
with two answers a language model that cannot look anything up yet learns next to nothing: it takes tens of thousands of them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vidllm.processing.benchmarks.prompts import DEFAULT_STYLE, box_turn, reply_turn, user_turn
from vidllm.processing.rooms.furniture import FLOOR_CATEGORIES, SMALL_CATEGORIES
from vidllm.processing.rooms.materials import COLOURS
from vidllm.processing.rooms.scene_graph import article
from vidllm.processing.samples import Sample


# A thing counts as seen from so many pixels on, over all sampled frames.
LEAST_PIXELS = 100
BARE_STYLE = "plain"
PLAIN_KINDS = ("plain_color", "plain_kind", "plain_pattern", "plain_place", "plain_there", "plain_there_color")


def plain_samples(
    scene_id: str,
    things: Sequence[tuple[str, str | None, str | None]],
    seen_pixels: Sequence[int],
    boxes: Mapping[int, np.ndarray],
    rng: np.random.Generator,
    data_root: str = "",
) -> list[Sample]:
    """All plain prompts about a room: the color of a kind, the kind of a color, the pattern of a thing, where it is, whether there is one.

    What a kind, a color, or a pair of them is like is asked only where one thing that is seen has it, and no other thing of the room has. Whether
    there is one is asked of what is seen, and as often of what is nowhere in the room.

    Args:
        scene_id (`str`): Of the room.
        things (`Sequence` of `(str, str | None, str | None)`): Kind, color and pattern of each thing, by its number; None = none with a name.
        seen_pixels (`Sequence[int]`): Pixels of each thing in the sampled frames.
        boxes (`Mapping[int, np.ndarray]`): Box `(6,)` of things by their number, annotation frame, metres; things without one are not looked for.
        rng (`np.random.Generator`): Draws the wording (half of the questions are bare, half ask for a short answer as the benchmarks' do), and
            what is asked for in vain.
        data_root (`str`): As the other samples of the room have it; samples of different roots are of different videos.

    Returns:
        `list[Sample]`: ids begin with one of `PLAIN_KINDS`; task `ground` for places, `qa` for all else.

    Source:
        Ours.
    """
    kinds = Counter(kind for kind, *_ in things)
    colors = Counter(color for _, color, _ in things)
    pairs = Counter((kind, color) for kind, color, _ in things)
    found: list[Sample] = []

    def add(name: str, number: int, task: str, question: str, turns: list[dict], **answer: Any) -> None:
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

    def ask(name: str, number: int, question: str, answer: str) -> None:
        style = BARE_STYLE if rng.random() < 0.5 else DEFAULT_STYLE
        turns = [user_turn(style, "qa", question=question), reply_turn(answer)]
        add(name, number, "qa", question, turns, answers=(answer,))

    seen = [number for number in range(len(things)) if seen_pixels[number] >= LEAST_PIXELS]
    for number in seen:
        kind, color, pattern = things[number]
        if color is None:
            continue
        if kinds[kind] == 1:
            ask("plain_color", number, f"What color is the {kind}?", color)
        if colors[color] == 1:
            ask("plain_kind", number, f"Which object is {color}?", kind)
        if pairs[kind, color] > 1:
            continue
        if pattern is not None:
            name = kind if kinds[kind] == 1 else f"{color} {kind}"
            ask("plain_pattern", number, f"What pattern does the {name} have?", pattern)
        if number in boxes:
            description = f"the {color} {kind}."
            turns = [user_turn(DEFAULT_STYLE, "ground", description=description), box_turn()]
            box = boxes[number][None]
            place = {"object_ids": (number,), "boxes_annotation": box, "box_block": (0,)}
            add("plain_place", number, "ground", description, turns, **place)
    first = {things[number][0]: number for number in reversed(seen)}
    for kind, number in first.items():
        group = next((names for names in (FLOOR_CATEGORIES, SMALL_CATEGORIES) if kind in names), ())
        absent = [name for name in group if not kinds[name]]
        if absent:
            ask("plain_there", number, f"Is there {article(kind)}?", "yes")
            other = absent[int(rng.integers(len(absent)))]
            ask("plain_there", number + len(things), f"Is there {article(other)}?", "no")
        missing = [color for color in COLOURS if not pairs[kind, color]]
        if things[number][1] is not None and not pairs[kind, None]:
            ask("plain_there_color", number, f"Is there {article(f'{things[number][1]} {kind}')}?", "yes")
            other = missing[int(rng.integers(len(missing)))]
            ask("plain_there_color", number + len(things), f"Is there {article(f'{other} {kind}')}?", "no")
    return found


def drawn_evenly(left: dict[str, list[Any]], rng: np.random.Generator) -> Any:
    """Take one thing out of lists by kind: a kind evenly among those that are left, then one of that kind.

    Args:
        left (`dict[str, list]`): Not empty, nor any of its lists; what is drawn is removed, and a kind of which nothing is left.
        rng (`np.random.Generator`): Draws.

    Returns:
        What was drawn.

    Source:
        Ours.
    """
    kinds = sorted(left)
    kind = kinds[int(rng.integers(len(kinds)))]
    drawn = left[kind].pop(int(rng.integers(len(left[kind]))))
    if not left[kind]:
        del left[kind]
    return drawn


def chosen_plain(found: Sequence[Sample], count: int, rng: np.random.Generator) -> list[Sample]:
    """Some plain prompts, evenly by kind (`drawn_evenly`).

    Args:
        found (`Sequence[Sample]`): Of `plain_samples`.
        count (`int`): Most that are chosen.
        rng (`np.random.Generator`): Draws them.

    Returns:
        `list[Sample]`: in the order of `found`.

    Source:
        Ours.
    """
    left: dict[str, list[int]] = {}
    for number, sample in enumerate(found):
        left.setdefault(sample.sample_id.split("/")[0], []).append(number)
    chosen: list[int] = []
    while left and len(chosen) < count:
        chosen.append(drawn_evenly(left, rng))
    return [found[number] for number in sorted(chosen)]


__all__ = ["LEAST_PIXELS", "PLAIN_KINDS", "chosen_plain", "drawn_evenly", "plain_samples"]

"""Plain prompts: what is asked has one right answer in the room, and is about what is seen."""

from collections import Counter

import numpy as np

from vidllm.processing.rooms.furniture import FLOOR_CATEGORIES, SMALL_CATEGORIES
from vidllm.processing.rooms.materials import COLOURS
from vidllm.train.plain_prompts import LEAST_PIXELS, PLAIN_KINDS, chosen_plain, plain_samples


THINGS = [
    ("chair", "red", "striped"),
    ("chair", "blue", None),
    ("lamp", "blue", "dotted"),
    ("desk", None, None),
    ("bed", "green", "plain"),
    ("bowl", "white", None),
]
SEEN = [500, 500, LEAST_PIXELS, 500, LEAST_PIXELS - 1, 500]
BOXES = {number: np.arange(6.0) + number for number in (0, 1, 2, 4)}


def asked(seed=0, **change):
    given = {"things": THINGS, "seen_pixels": SEEN, "boxes": BOXES, **change}
    found = plain_samples("room", rng=np.random.default_rng(seed), data_root="there", **given)
    return [(sample.sample_id.split("/")[0], sample) for sample in found]


def test_only_what_one_thing_of_the_room_has_is_asked_about():
    found = {(kind, sample.question): sample for kind, sample in asked() if "there" not in kind}
    assert set(found) == {
        # two chairs, two blue things; the desk has no named color, the bed is not seen, the bowl has no box
        ("plain_kind", "Which object is red?"),
        ("plain_pattern", "What pattern does the red chair have?"),
        ("plain_place", "the red chair."),
        ("plain_place", "the blue chair."),
        ("plain_color", "What color is the lamp?"),
        ("plain_pattern", "What pattern does the lamp have?"),
        ("plain_place", "the blue lamp."),
        ("plain_color", "What color is the bowl?"),
        ("plain_kind", "Which object is white?"),
    }
    assert found["plain_kind", "Which object is red?"].answers == ("chair",)
    assert found["plain_color", "What color is the lamp?"].answers == ("blue",)
    assert found["plain_pattern", "What pattern does the red chair have?"].answers == ("striped",)
    place = found["plain_place", "the blue chair."]
    assert (place.task, place.box_frame, place.object_ids) == ("ground", "annotation", (1,))
    np.testing.assert_array_equal(place.boxes_annotation, BOXES[1][None])
    # samples of one room are of one video only if they say so
    assert {(sample.scene_id, sample.data_root) for sample in found.values()} == {("room", "there")}


def test_what_there_is_and_what_there_is_not_are_asked_about_as_often():
    in_vain = {"plain_there": set(), "plain_there_color": set()}
    for seed in range(60):
        found = asked(seed)
        assert len({sample.sample_id for _, sample in found}) == len(found)
        for name, others in in_vain.items():
            answers = {sample.question: sample.answers[0] for kind, sample in found if kind == name}
            yes = {question for question, answer in answers.items() if answer == "yes"}
            others |= {question for question, answer in answers.items() if answer == "no"}
            if name == "plain_there":
                # the bed is there, but who could know
                assert yes == {"Is there a chair?", "Is there a lamp?", "Is there a desk?", "Is there a bowl?"}
            else:
                assert yes == {"Is there a red chair?", "Is there a blue lamp?", "Is there a white bowl?"}
            # two kinds that are asked for in vain can be the same
            asked_for = [sample for kind, sample in found if kind == name]
            assert len(asked_for) == 2 * len(yes)
            assert sum(sample.answers[0] == "no" for sample in asked_for) == len(yes)
    kinds = {"chair", "lamp", "desk", "bed", "bowl"}
    wanted = [name for name in (*FLOOR_CATEGORIES, *SMALL_CATEGORIES) if name not in kinds]
    named = {question.removesuffix("?").split(" ", 3)[3] for question in in_vain["plain_there"]}
    assert named <= set(wanted)
    assert len(named) > len(wanted) - 4
    colored = {question.removesuffix("?").split(" ", 3)[3] for question in in_vain["plain_there_color"]}
    assert colored <= {f"{c} {k}" for c in COLOURS for k in ("chair", "lamp", "bowl")} - {
        "red chair", "blue chair", "blue lamp", "white bowl",
    }  # fmt: skip
    assert len(colored) > 20


def test_kinds_of_prompts_are_chosen_evenly():
    found = [sample for _, sample in asked()]
    rng, counts = np.random.default_rng(0), Counter()
    for _ in range(600):
        chosen = chosen_plain(found, 3, rng)
        assert len({sample.sample_id for sample in chosen}) == 3
        counts.update(sample.sample_id.split("/")[0] for sample in chosen)
    assert set(counts) == set(PLAIN_KINDS)
    assert min(counts.values()) > 0.7 * max(counts.values())
    everything = chosen_plain(found, 99, rng)
    assert everything == found


def test_half_of_the_questions_are_bare():
    endings = Counter()
    for seed in range(60):
        for kind, sample in asked(seed):
            if kind != "plain_place":
                text = sample.messages[0]["content"][-1]["text"]
                assert text.startswith(sample.question)
                endings[text.removeprefix(sample.question)] += 1
    assert set(endings) == {"", "\nReply with a word or a short phrase."}
    assert 0.4 < endings[""] / sum(endings.values()) < 0.6


def test_a_room_without_seen_things_has_none():
    assert asked(seen_pixels=[0] * len(THINGS)) == []
    assert asked(things=[], seen_pixels=[], boxes={}) == []

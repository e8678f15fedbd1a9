"""Plain prompts: what is asked has one right answer in the room, and is about what is seen."""

from collections import Counter

import numpy as np

from vidllm.train.plain_prompts import LEAST_PIXELS, plain_samples


NAMES = [("chair", "red"), ("chair", "blue"), ("lamp", "blue"), ("desk", None), ("bed", "green"), ("bowl", "white")]
SEEN = [500, 500, LEAST_PIXELS, 500, LEAST_PIXELS - 1, 500]
BOXES = {number: np.arange(6.0) + number for number in (0, 1, 2, 4)}


def asked(seed=0, **change):
    given = {"names": NAMES, "seen_pixels": SEEN, "boxes": BOXES, **change}
    found = plain_samples("room", rng=np.random.default_rng(seed), data_root="there", **given)
    return [(sample.sample_id.split("/")[0], sample) for sample in found]


def test_only_what_one_thing_of_the_room_has_is_asked_about():
    found = {(kind, sample.question): sample for kind, sample in asked()}
    assert set(found) == {
        # two chairs, two blue things; the desk has no named color, the bed is not seen, the bowl has no box
        ("plain_kind", "Which object is red?"),
        ("plain_place", "the red chair."),
        ("plain_place", "the blue chair."),
        ("plain_color", "What color is the lamp?"),
        ("plain_place", "the blue lamp."),
        ("plain_color", "What color is the bowl?"),
        ("plain_kind", "Which object is white?"),
    }
    assert found["plain_kind", "Which object is red?"].answers == ("chair",)
    assert found["plain_color", "What color is the lamp?"].answers == ("blue",)
    place = found["plain_place", "the blue chair."]
    assert (place.task, place.box_frame, place.object_ids) == ("ground", "annotation", (1,))
    np.testing.assert_array_equal(place.boxes_annotation, BOXES[1][None])
    # samples of one room are of one video only if they say so
    assert {(sample.scene_id, sample.data_root) for sample in found.values()} == {("room", "there")}
    assert len({sample.sample_id for sample in found.values()}) == len(found)


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
    assert asked(seen_pixels=[0] * len(NAMES)) == []
    assert asked(names=[], seen_pixels=[], boxes={}) == []

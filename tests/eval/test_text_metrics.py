"""Scores of answers, boxes and captions against frozen references and cases worked out by hand."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from vidllm.eval.metrics.answers import clean_answer, means_by_kind, refined_match
from vidllm.eval.metrics.scan2cap.scores import named_object, scan2cap_scores
from vidllm.eval.metrics.scanqa.scores import scanqa_scores
from vidllm.eval.metrics.scanrefer.scores import scanrefer_counts, scanrefer_iou, scanrefer_scores
from vidllm.eval.metrics.sqa3d.scores import sqa3d_scores
from vidllm.processing.scenes.labels import SCANREFER_CLASSES, LabelMap, unique_multiple


GOLDENS = Path(__file__).parents[1] / "goldens"


def golden(name):
    return json.loads((GOLDENS / "text" / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("folder", ["text", "geometry"])
def test_goldens_are_those_of_the_manifest(folder):
    manifest = json.loads((GOLDENS / folder / "MANIFEST.json").read_text())
    assert {path.name for path in (GOLDENS / folder).iterdir()} >= set(manifest)
    for name, entry in manifest.items():
        assert hashlib.sha256((GOLDENS / folder / name).read_bytes()).hexdigest() == entry["sha256"], name


def scanqa_pairs(flatten=False):  # flat: the case of the carriage return, whose truth was made that way
    data = golden("scanqa.json")
    answers = {row["question_id"]: row["answer_top10"][0] for row in data["predictions"]}
    changed = data["carriage_return_case"]["predictions"] if flatten else {}
    said = [changed.get(row["question_id"], answers[row["question_id"]]) for row in data["rows"]]
    if flatten:
        said = [text.replace("\r", " ").replace("\n", " ") for text in said]
    return data, said, [row["answers"] for row in data["rows"]]


def test_scanqa_exact_match_is_the_reference_s():
    data, said, accepted = scanqa_pairs()
    wanted = data["profiles"]["official"]["scores"]["EM"] / 100
    assert scanqa_scores(said, accepted) == pytest.approx({"exact_match": wanted}, abs=1e-11)


@pytest.mark.parametrize("protocol", ["leo", "llava3d", "video3dllm", "chat_scene"])
def test_scanqa_matches_of_the_answers_as_stored_are_the_reference_s(protocol):
    data, said, accepted = scanqa_pairs()
    wanted = data["profiles"][protocol]["scores"]
    scores = scanqa_scores(said, accepted, protocol=protocol)
    assert scores["exact_match"] == pytest.approx(wanted["EM"] / 100, abs=1e-11)
    if "EM-R" in wanted:
        assert scores["exact_match_refined"] == pytest.approx(wanted["EM-R"] / 100, abs=1e-11)


def test_scanqa_exact_match_after_line_breaks_are_replaced():
    data, said, accepted = scanqa_pairs(flatten=True)
    wanted = data["carriage_return_case"]["expected_after_replacing_line_breaks_by_space"]["EM"] / 100
    assert scanqa_scores(said, accepted)["exact_match"] == pytest.approx(wanted, abs=1e-11)


def test_scanqa_by_kind_worked_out_by_hand():
    scores = scanqa_scores(
        ["red", "two", "Two", "on the desk", "yes"],
        [["red"], ["two", "2"], ["two", "2"], ["desk"], ["yes"]],
        ["colour", "count", "count", "on", "existence"],
    )
    assert scores == {
        "exact_match": 3 / 5,
        "exact_match_macro": pytest.approx((1 + 0.5 + 0 + 1) / 4),
        "colour/exact_match": 1.0,
        "count/exact_match": 0.5,
        "existence/exact_match": 1.0,
        "on/exact_match": 0.0,
    }


def test_sqa3d_under_leo_s_protocol_is_the_reference_s():
    data = golden("sqa3d.json")
    right = {row["question_id"]: row["answers"][0]["answer"] for row in data["annotations"]["annotations"]}
    for said, row in zip(data["predictions"], data["rows"], strict=True):
        cleaned = clean_answer(said["text"])
        assert cleaned == row["cleaned"]
        marks = refined_match(cleaned, [clean_answer(right[said["question_id"]])])
        assert marks == (bool(row["em"]), bool(row["em_refined"])), said
    scores = sqa3d_scores(
        [row["text"] for row in data["predictions"]],
        [right[row["question_id"]] for row in data["predictions"]],
        [row["type"] for row in data["rows"]],
        "leo",
    )
    wanted = data["profiles"]["leo"]["scores"]
    for kind in wanted:
        name = "" if kind == "all" else f"{kind}/"
        assert wanted[kind]["n"] == sum(kind in ("all", row["type"]) for row in data["rows"])
        assert scores[f"{name}exact_match"] == pytest.approx(wanted[kind]["EM"] / 100, abs=1e-8)
        assert scores[f"{name}exact_match_refined"] == pytest.approx(wanted[kind]["EM-R"] / 100, abs=1e-8)


def test_refined_match_of_several_references_is_the_reference_s():
    data, said, accepted = scanqa_pairs()
    marks = [
        refined_match(clean_answer(" ".join(text.splitlines())), [clean_answer(other) for other in others])
        for text, others in zip(said, accepted, strict=True)
    ]
    wanted = data["profiles"]["leo"]["scores"]
    assert np.mean(marks, axis=0) == pytest.approx([wanted["EM"] / 100, wanted["EM-R"] / 100], abs=1e-11)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  The  TV.", "TV"),
        ("23 chairs, 2 tables", "twenty-three chairs, two tables"),
        ("none", "zero"),
        ("11 oclock", "eleven o'clock"),
        ("an apple on a mat2", "apple on mat"),
        ("rigth behine", "right behind"),
        ("a", "a"),
        ("backwards!", "backward"),
    ],
)
def test_cleaning_by_hand(text, cleaned):
    assert clean_answer(text) == cleaned


def test_refined_match_stops_at_the_first_reference_that_contains():
    assert refined_match("brown", ["dark brown", "brown"]) == (False, True)
    assert refined_match("", ["anything"]) == (False, True)
    assert refined_match("black board", ["blackboard"]) == (False, True)
    assert refined_match("left", ["right"]) == (False, False)


def test_sqa3d_official_is_letter_by_letter():
    assert sqa3d_scores(["left", "Left", "the left"], ["left"] * 3) == {"exact_match": pytest.approx(1 / 3)}


def test_wrong_columns_and_protocols_are_refused():
    with pytest.raises(ValueError, match="one length"):
        scanqa_scores(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="at least 1"):
        sqa3d_scores([], [])
    with pytest.raises(ValueError, match="wanted one of official, leo, llava3d, video3dllm, chat_scene; got 'cider'"):
        sqa3d_scores(["a"], ["a"], protocol="cider")


def test_macro_mean_counts_kinds_alike():
    scores = means_by_kind({"m": [True] * 9 + [False]}, ["often"] * 9 + ["rare"])
    assert scores["m"] == 0.9
    assert scores["m_macro"] == 0.5


# ---- boxes


def scanrefer_rows():
    data = golden("scanrefer.json")

    def key(row):
        return row["scene_id"], row["object_id"], row["ann_id"]

    boxes = {key(row): np.array(row["bbox"]) for row in data["predictions"]}
    return data, key, boxes


def test_scanrefer_overlap_is_the_reference_s():
    data, key, boxes = scanrefer_rows()
    true = {key(row): np.array(row["bbox"]) for row in data["rows"]}
    for row in data["per_prediction"]:
        assert scanrefer_iou(boxes[key(row)], true[key(row)]) == pytest.approx(row["iou"], abs=1e-9), row["case"]


@pytest.mark.parametrize("block", ["scores_missing_count_as_miss", "scores_over_submitted_rows_only"])
def test_scanrefer_scores_are_the_reference_s(block):
    data, key, boxes = scanrefer_rows()
    kinds = _unique_multiple(data)
    rows = [
        number
        for number, row in enumerate(data["rows"])
        if block == "scores_missing_count_as_miss" or key(row) in boxes
    ]
    scores = scanrefer_scores(
        [boxes.get(key(data["rows"][number])) for number in rows],
        [np.array(data["rows"][number]["bbox"]) for number in rows],
        [kinds[number] for number in rows],
    )
    wanted = data[block]["scores"]
    for kind, name in (("overall", ""), ("unique", "unique/"), ("multiple", "multiple/")):
        for threshold in ("0.25", "0.5"):
            expected = wanted[kind]["overall"][f"acc@{threshold}iou"]
            assert scores[f"{name}acc_{threshold}"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("block", ["scores_missing_count_as_miss", "scores_over_submitted_rows_only"])
def test_every_part_of_scanrefer_is_the_reference_s(block):
    data, key, boxes = scanrefer_rows()
    kinds, classes = _unique_multiple(data), data["raw_name_to_class18"]
    numbers = [n for n, row in enumerate(data["rows"]) if block == "scores_missing_count_as_miss" or key(row) in boxes]
    rows, kinds = [data["rows"][number] for number in numbers], [kinds[number] for number in numbers]
    others = [classes.get(row["object_name"].replace("_", " "), 17) == 17 for row in rows]
    scores = scanrefer_scores(
        [boxes.get(key(row)) for row in rows], [np.array(row["bbox"]) for row in rows], kinds, in_others=others
    )
    counts = scanrefer_counts(kinds, others)
    found = 0
    for kind, parts in data[block]["scores"].items():
        for part, measures in parts.items():
            names = [name for name in (kind, part) if name != "overall"]
            assert counts["/".join(names) or "all"] == data[block]["counts"][kind][part]
            for measure, value in measures.items():
                name = "/".join([*names, measure.replace("@", "_").removesuffix("iou")])
                assert scores[name] == pytest.approx(value, abs=1e-9), name
                found += 1
    assert found == 18 == len(scores)
    said = {tuple(map(str, key(row))): row for row in data["per_prediction"]}
    for row, mark in zip(rows, others, strict=True):
        known = said.get(tuple(map(str, key(row))))
        assert known is None or known["others"] == mark


def test_unique_and_multiple_are_told_apart_as_the_reference_does():
    data, key, _ = scanrefer_rows()
    classes = {name: SCANREFER_CLASSES[number] for name, number in data["raw_name_to_class18"].items()}
    found = unique_multiple(data["rows"], LabelMap({}, classes, "scanrefer.json"))
    known = {tuple(map(str, key(row))): row["unique_multiple"] for row in data["per_prediction"]}
    rows = {tuple(map(str, key(row))): kind for row, kind in zip(data["rows"], found, strict=True)}
    assert len(known) == 135
    assert all((rows[name] == "multiple") == bool(mark) for name, mark in known.items())


def _unique_multiple(data):
    """By the classes that the reference used."""
    classes = data["raw_name_to_class18"]
    objects = {}
    for row in data["rows"]:
        name = row["object_name"].replace("_", " ")
        objects.setdefault((row["scene_id"], row["object_id"]), classes.get(name, 17))
    counts = {}
    for (scene, _), kind in objects.items():
        counts[scene, kind] = counts.get((scene, kind), 0) + 1
    found = [
        "unique" if counts[row["scene_id"], objects[row["scene_id"], row["object_id"]]] == 1 else "multiple"
        for row in data["rows"]
    ]
    said = {tuple(map(str, (r["scene_id"], r["object_id"], r["ann_id"]))): r for r in data["per_prediction"]}
    for row, kind in zip(data["rows"], found, strict=True):
        known = said.get((row["scene_id"], row["object_id"], row["ann_id"]))
        assert known is None or known["unique_multiple"] == (kind == "multiple")
    return found


def test_an_overlap_of_exactly_one_half_is_a_miss():
    # One box is half of the other: 1 / 2, and the denominator is a little larger.
    half, whole = np.array([0, 0, 0, 1.0, 1, 1]), np.array([0.5, 0, 0, 2.0, 1, 1])
    assert scanrefer_iou(half, whole) == pytest.approx(0.5, abs=1e-8)
    assert scanrefer_scores([half], [whole]) == {"acc_0.25": 1.0, "acc_0.5": 0.0}
    slightly_more = np.array([0.0005, 0, 0, 1.001, 1, 1])
    assert scanrefer_scores([slightly_more], [whole])["acc_0.5"] == 1.0


def test_a_box_of_no_description_is_a_miss_and_an_empty_kind_is_zero():
    box = np.array([1.0, 2, 3, 0.5, 0.6, 0.7])
    scores = scanrefer_scores([box, None, []], [box] * 3, ["unique"] * 3)
    assert scores["acc_0.5"] == pytest.approx(1 / 3)
    assert scores["multiple/acc_0.25"] == 0.0
    with pytest.raises(ValueError, match="wanted unique or multiple; got 'other'"):
        scanrefer_scores([box], [box], ["other"])


# ---- captions


@pytest.mark.parametrize(
    ("caption", "category", "colours"),
    [
        ("this is a red chair. it is next to the blue couch.", "chair", ("red",)),
        ("The chair is RED.", "chair", ("red",)),
        ("the chair next to the red couch", "chair", ()),
        ("it is the tallest of the chairs.", "chair", ()),
        ("a white trash can that is in the corner of the room.", "trash can", ("white",)),
        ("chairs, red and blue, stand around the green table", "chair", ("red", "blue")),
        ("an armchair", None, ()),
        ("red", None, ()),
        ("", None, ()),
    ],
)
def test_what_a_caption_names(caption, category, colours):
    assert named_object(caption) == (category, colours)


def test_captions_must_name_category_and_colour():
    objects = [("chair", "red"), ("chair", "red"), ("chair", "red"), ("door", None), ("door", None)]
    said = ["a red chair", "a chair", "a red couch", "the door is white", "a window"]
    assert scan2cap_scores(said, objects) == {"category_and_colour": 2 / 5}
    with pytest.raises(ValueError, match="wanted a category and a colour of the rooms; got 'spaceship'"):
        scan2cap_scores(["a"], [("spaceship", None)])

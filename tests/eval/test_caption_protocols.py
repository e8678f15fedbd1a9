"""LL3DA's protocol, the toolbox's assignment and cleaned answers against frozen references; what captions and answers are refused."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from vidllm.eval.metrics.answers import clean_answer, protocol_of
from vidllm.eval.metrics.scan2cap.captions import CaptionedObject, best_proposals, caption_scores
from vidllm.eval.metrics.scan2cap.toolbox import (
    BOX_ORDER,
    SceneCaptions,
    assignment_score,
    matched_overlap,
    toolbox_scores,
)
from vidllm.eval.metrics.scanqa.scores import scanqa_scores
from vidllm.eval.metrics.sqa3d.scores import sqa3d_scores
from vidllm.eval.metrics.text_scorers import java_obstacle, one_line, text_scores
from vidllm.processing.benchmarks.question_types import scanqa_type


GOLDENS = Path(__file__).parents[1] / "goldens" / "text"
needs_java = pytest.mark.skipif(java_obstacle() is not None, reason=f"text scores: {java_obstacle()}")


def golden(name):
    return json.loads((GOLDENS / name).read_text(encoding="utf-8"))


EDGES = golden("edges.json")


def box(centre, size):
    """Corners in the toolbox's order."""
    return np.array(BOX_ORDER) / 2 * np.array(size) + np.array(centre)


# ---------------------------------------------------------------------- frozen references


@needs_java
def test_the_scorers_are_those_of_the_probe():
    """The paraphrase table shows in these four pairs alone."""
    pairs = [
        (["sos a brown chair . eos", "sos a chair by the table . eos"], "sos the chair is brown eos"),
        (["sos two monitors eos"], "sos two screens eos"),
        (["sos there is a large sofa against the wall eos"], "sos there is a big couch next to the wall eos"),
        (
            ["sos it is a trash can . it is below the desk . eos"],
            "sos this is a garbage bin . it sits under the table . eos",
        ),
    ]
    scores = text_scores([said for _, said in pairs], [known for known, _ in pairs], tokenize=False)
    assert scores.corpus["meteor"] == pytest.approx(
        golden("scanqa.json")["meteor_paraphrase_table"]["probe_score"], abs=1e-9
    )


@needs_java
def test_ll3da_answers_are_the_reference_s():
    data = golden("scanqa.json")
    said = {row["question_id"]: row["answer_top10"][0] for row in data["predictions"]}
    scores = scanqa_scores(
        [said[row["question_id"]] for row in data["rows"]],
        [row["answers"] for row in data["rows"]],
        protocol="ll3da",
        text=True,
    )
    assert scores == pytest.approx(EDGES["ll3da_scanqa"]["scores"], abs=1e-9)


@needs_java
@pytest.mark.parametrize("threshold", [0.25, 0.5])
def test_ll3da_captions_are_the_reference_s(threshold):
    data = golden("scan2cap.json")
    found = {(row["scene_id"], row["object_id"]): row for row in data["per_object"]}
    rows = {}
    for row in data["rows"]:
        rows.setdefault((row["scene_id"], row["object_id"], row["object_name"]), []).append(row)
    objects = []
    for key, described in rows.items():
        said = found.get(key[:2], {"caption": None, "iou": 0.0})
        tokens = tuple(tuple(row["token"]) for row in described)
        texts = tuple(row["description"] for row in described)
        objects.append(CaptionedObject("|".join(key), texts, tokens, said["caption"], iou=said["iou"]))
    wanted = EDGES["ll3da_scan2cap"]["scores"][f"m@{threshold:g}"]
    assert caption_scores(objects, "ll3da", threshold) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("scene", EDGES["toolbox_assignment"]["scenes"])
def test_the_toolbox_s_assignment_is_the_reference_s(scene):
    proposals, objects = np.array(scene["proposals"]), np.array(scene["objects"])
    np.testing.assert_allclose(assignment_score(proposals, objects), scene["assignment_score"], atol=1e-12)
    overlaps = matched_overlap(proposals[scene["chosen"]], objects)
    # equal to the last bit: thresholds are compared with it
    assert [float(overlap) for overlap in overlaps] == scene["iou"]


def test_an_overlap_of_one_half_of_small_boxes_is_below_the_toolbox_s_threshold():
    small, double = box((0, 0, 0), (0.1, 0.1, 0.1)), box((0.05, 0, 0), (0.2, 0.1, 0.1))
    assert 0.4999 < matched_overlap(small[None], double[None])[0] < 0.5
    large, twice = box((0, 0, 0), (1, 1, 1)), box((0.5, 0, 0), (2, 1, 1))
    assert matched_overlap(large[None], twice[None])[0] == 0.5


def test_the_toolbox_s_score_is_not_generalised_iou():
    """Equal boxes: generalised IoU is 1; so is (1 + 1) / 1 - 1. Two halves of a hull: 0 and 0. Half overlap: 1/3 - 0, and 2/1.5 - 1."""
    unit = box((0, 0, 0), (1, 1, 1))
    others = np.stack([unit, box((1, 0, 0), (1, 1, 1)), box((0.5, 0, 0), (1, 1, 1)), box((0.1, 0.1, 0.1), (0.5,) * 3)])
    scores = assignment_score(unit[None], others)[0]
    assert scores == pytest.approx([1.0, 0.0, 1 / 3, 0.125])
    # the last box lies inside: its generalised IoU is .125 too, but boxes that overlap in a corner differ
    corner = assignment_score(unit[None], box((0.5, 0.5, 0.5), (1, 1, 1))[None])[0, 0]
    assert corner == pytest.approx(2 / 1.5**3 - 1)
    generalised = 0.125 / 1.875 - (1.5**3 - 1.875) / 1.5**3
    assert abs(corner - generalised) > 0.02


@pytest.mark.parametrize(("text", "cleaned"), EDGES["clean_answer"]["cases"])
def test_cleaned_answers_are_the_reference_s(text, cleaned):
    assert clean_answer(text) == cleaned


# ---------------------------------------------------------------------- LL3DA by hand


def described(key, caption, iou, tokens=("a", "red", "chair")):
    return CaptionedObject(key, (" ".join(tokens),), (tuple(tokens),), caption, iou=iou)


@needs_java
def test_ll3da_captions_by_hand():
    near, far = described("s|1|chair", "a  red chair", 0.6), described("s|2|chair", "a red chair", 0.5)
    unknown = described("s|3|unknown", "rubbish", 0.9)
    scores = caption_scores([near, far, unknown], "ll3da", 0.5)
    assert set(scores) == {"bleu_4", "cider", "rouge_l", "meteor", "objects", "objects_with_caption"}
    # an overlap of one half is not more than one half; an object without a name is left out
    assert (scores["objects"], scores["objects_with_caption"]) == (2.0, 1.0)
    by_hand = text_scores(["sos a red chair eos", "sos eos"], [["sos a red chair eos"]] * 2, tokenize=False)
    for name in ("bleu_4", "cider", "rouge_l", "meteor"):
        assert scores[name] == pytest.approx(by_hand.corpus[name], abs=1e-12)
    # ROUGE-L of "sos eos" with five words: precision 1, recall 2/5, beta 1.2
    floor = (1 + 1.44) * 1 * 0.4 / (0.4 + 1.44 * 1)
    assert scores["rouge_l"] == pytest.approx((1 + floor) / 2)
    assert caption_scores([near, far], "leo", 0.5)["objects_with_caption"] == 2.0
    with pytest.raises(ValueError, match="wanted at least one object"):
        caption_scores([unknown], "ll3da")


@needs_java
def test_ll3da_keeps_references_of_thirty_tokens_and_case():
    long = tuple(f"w{number}" for number in range(40))
    item = described("s|1|chair", " ".join(long[:30]), 0.9, long)
    assert caption_scores([item], "ll3da")["rouge_l"] == pytest.approx(1.0)
    assert caption_scores([item], "leo")["rouge_l"] < 0.95
    capital = described("s|1|chair", "A RED CHAIR", 0.9)
    # only `sos` and `eos` are left of five words
    assert caption_scores([capital], "ll3da")["rouge_l"] == pytest.approx(0.4)


@needs_java
def test_ll3da_answers_by_hand():
    """Blanks collapse, other white space stays: ROUGE takes "red\\tchair" for one word, BLEU for two."""
    scores = scanqa_scores(["  the   red chair ", "two"], [["the red chair"], ["two"]], protocol="ll3da", text=True)
    assert scores["rouge_l"] == pytest.approx(1.0)
    scores = scanqa_scores(["red\tchair"], [["red chair"]], protocol="ll3da", text=True)
    assert scores["rouge_l"] == 0.0
    assert text_scores(["red\tchair"], [["red chair"]], tokenize=False).corpus["bleu_2"] == pytest.approx(1.0)
    # best of two references, taken apart for precision and recall: 1/2 and 1/1 of "red"
    scores = scanqa_scores(["red sofa"], [["red", "blue sofa bed"]], protocol="ll3da", text=True)
    precision, recall = 1 / 2, 1.0
    assert scores["rouge_l"] == pytest.approx(2.44 * precision * recall / (recall + 1.44 * precision))


@needs_java
@pytest.mark.parametrize("line_break", ["\r", "\n", "\r\n", "\u2028", "\x85"])
def test_a_line_break_of_any_kind_is_one_blank(line_break):
    """ROUGE without a tokenizer would count a second blank as a word."""
    for protocol in ("video3dllm", "ll3da", "leo"):
        scores = scanqa_scores(
            [f"red{line_break}chair", "two"], [["red chair"], ["two"]], protocol=protocol, text=True
        )
        assert scores["rouge_l"] == pytest.approx(1.0), protocol
        assert scores["meteor"] == pytest.approx(1.0, abs=1e-6), protocol


def test_the_proposal_of_greatest_overlap_speaks():
    objects = np.array([[0, 0, 0, 1, 1, 1], [5, 0, 0, 1, 1, 1], [9, 0, 0, 1, 1, 1.0]])
    proposals = np.array(
        [[0.2, 0, 0, 1, 1, 1], [0.1, 0, 0, 1, 1, 1], [-0.1, 0, 0, 1, 1, 1], [5.5, 0, 0, 1, 1, 1], [20, 0, 0, 1, 1, 1]]
    )
    chosen, overlap = best_proposals(proposals, objects, 0.5)
    # of two equal ones the first; one third is not enough; what touches nothing speaks for nothing
    assert chosen.tolist() == [1, -1, -1]
    assert overlap == pytest.approx([0.9 / 1.1, 0, 0])
    assert best_proposals(proposals, objects, 0.25)[0].tolist() == [1, 3, -1]
    assert best_proposals(np.zeros((0, 6)), objects)[0].tolist() == [-1, -1, -1]
    corners = np.stack([box(row[:3], row[3:]) for row in proposals])
    assert best_proposals(corners, objects)[0].tolist() == [1, -1, -1]


# ---------------------------------------------------------------------- toolbox


@needs_java
def test_the_toolbox_by_hand():
    """Two objects, three proposals: both found, one with the right words; then none near enough."""
    unit = (1, 1, 1)
    scene = SceneCaptions(
        (("sos a red chair eos",), ("sos a blue desk eos", "sos the desk eos")),
        np.stack([box((0, 0, 0), unit), box((4, 0, 0), unit)]),
        ("sos far away eos", "sos the desk eos", "sos a red chair eos"),
        np.stack([box((20, 0, 0), unit), box((4, 0, 0), unit), box((0.25, 0, 0), unit)]),
    )
    scores = toolbox_scores({"s": scene})
    assert scores["rouge_l_recall@0.5"] == pytest.approx(1.0)
    assert scores["rouge_l_precision@0.5"] == pytest.approx(2 / 3)
    assert scores["rouge_l_f1@0.5"] == pytest.approx(0.8)
    strict = toolbox_scores({"s": scene}, (0.75,))
    assert strict["rouge_l_recall@0.75"] == pytest.approx(0.5)
    nothing = toolbox_scores({"s": scene}, (1.1,))
    assert nothing["cider_precision@1.1"] == nothing["cider_recall@1.1"] == 0.0
    assert math.isnan(nothing["cider_f1@1.1"])


@needs_java
def test_an_object_without_a_proposal_gets_the_first_one_s_caption():
    unit = (1, 1, 1)
    scene = SceneCaptions(
        (("sos a red chair eos",), ("sos a red chair eos",)),
        np.stack([box((0, 0, 0), unit), box((0.2, 0, 0), unit)]),
        ("sos a red chair eos",),
        box((0, 0, 0), unit)[None],
    )
    scores = toolbox_scores({"s": scene})
    # its box overlaps the second object by .8 / 1.2, so that both count, and precision exceeds 1
    assert scores["rouge_l_recall@0.5"] == pytest.approx(1.0)
    assert scores["rouge_l_precision@0.5"] == pytest.approx(2.0)


def test_boxes_that_do_not_fit_are_refused():
    unit = box((0, 0, 0), (1, 1, 1))[None]
    for wrong in (np.zeros((1, 6)), np.concatenate([unit, unit]), np.full((1, 8, 3), np.nan)):
        with pytest.raises(ValueError, match=r"s, proposals: wanted finite corners of shape \(1, 8, 3\)"):
            toolbox_scores({"s": SceneCaptions((("a",),), unit, ("a",), wrong)})


def test_objects_that_cannot_be_scored_are_refused():
    with pytest.raises(ValueError, match=r"wanted each object once; got s\|1\|chair twice"):
        caption_scores([described("s|1|chair", "a", 0.9)] * 2)
    with pytest.raises(ValueError, match=r"s\|1\|chair: wanted a finite overlap; got nan"):
        caption_scores([described("s|1|chair", "a", float("nan"))])
    with pytest.raises(ValueError, match=r"captions, row 0: wanted a text; got 7"):
        caption_scores([described("s|1|chair", 7, 0.9)])


# ---------------------------------------------------------------------- answers


@pytest.mark.parametrize("wrong", [None, 3, [], ["a", None], {"a": 1}])
def test_predictions_that_are_no_texts_are_refused(wrong):
    with pytest.raises(ValueError, match=r"scanqa, predictions, row 1: wanted a text, or texts in order"):
        scanqa_scores(["a", wrong], [["a"], ["a"]])


@pytest.mark.parametrize("wrong", [[], "a red chair", ["a", None]])
def test_accepted_answers_are_lists_of_texts(wrong):
    """Inside a single text every part of it would be found."""
    with pytest.raises(ValueError, match=r"scanqa, references, row 0: wanted a list of at least one accepted text"):
        scanqa_scores(["red"], [wrong])


def test_sqa3d_refuses_what_is_no_text():
    with pytest.raises(ValueError, match=r"sqa3d, predictions, row 1: wanted a text; got None"):
        sqa3d_scores(["a", None], ["a", "a"])
    with pytest.raises(ValueError, match=r"sqa3d, references, row 0: wanted a text; got \['a'\]"):
        sqa3d_scores(["a"], [["a"]])


def test_ten_answers_count_under_the_official_protocol_alone():
    said, known = [["red", "blue"], ["one", "two"]], [["blue"], ["three"]]
    assert scanqa_scores(said, known) == {"exact_match": 0.0, "exact_match_at_10": 0.5}
    assert set(scanqa_scores(said, known, protocol="leo")) == {"exact_match", "exact_match_refined"}
    assert scanqa_scores([["x"] * 10 + ["blue"]], [["blue"]])["exact_match_at_10"] == 0.0


def test_exact_match_is_unicode_and_blank_by_the_letter():
    assert scanqa_scores(["caf\u00e9", "", " a"], [["cafe\u0301"], [""], ["a"]])["exact_match"] == pytest.approx(1 / 3)
    assert sqa3d_scores(["\u0130"], ["i"], protocol="leo")["exact_match"] == 1.0


def test_an_empty_answer_matches_nothing_in_chat_scene():
    for protocol, refined in (("leo", 1.0), ("llava3d", 1.0), ("chat_scene", 0.0)):
        scores = sqa3d_scores(["..."], ["left"], protocol=protocol)
        assert scores == {"exact_match": 0.0, "exact_match_refined": refined}
    assert sqa3d_scores(["The door."], ["door"], protocol="chat_scene")["exact_match"] == 1.0


def test_the_same_question_twice_counts_twice():
    once, twice = scanqa_scores(["a", "b"], [["a"], ["c"]]), scanqa_scores(["a", "a", "b"], [["a"], ["a"], ["c"]])
    assert (once["exact_match"], twice["exact_match"]) == (0.5, pytest.approx(2 / 3))


@needs_java
def test_half_a_pair_of_surrogates_breaks_nothing():
    assert one_line("a\ud83d b") == "a\ufffd b"
    scores = scanqa_scores(["\ud83d", "last"], [["x"], ["last"]], text=True)
    assert scores["exact_match"] == 0.5
    assert text_scores(["\ud83d", "last"], [["x"], ["last"]], tokenize=False).each["meteor"][1] > 0.9


@needs_java
def test_cider_of_a_single_text_is_zero():
    """The document frequencies of one text tell nothing: log(1) = 0."""
    assert text_scores(["a red chair"], [["a red chair"]], tokenize=False).corpus["cider"] == 0.0


def test_questions_have_the_official_classes():
    asked = {
        "Where is it?": "Place", "How many are there?": "Number", "What color is it?": "Color", "What is the color?": "Color",
        "What shape is it?": "Object nature", "What is it?": "Object", "what is it?": "Other", "": "Other",
    }  # fmt: skip
    assert {question: scanqa_type(question) for question in asked} == asked


def test_modules_score_by_the_protocol_they_are_loaded_with():
    assert protocol_of("default", None, "official") == "official"
    assert protocol_of("leo", None, "official") == "leo"
    assert protocol_of("leo", "llava3d", "official") == "llava3d"

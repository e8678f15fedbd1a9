"""N-gram scores under every named protocol against frozen references, to the last digit; texts that break others."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vidllm.eval.metrics import text_scorers
from vidllm.eval.metrics.scan2cap.captions import CaptionedObject, caption_scores, caption_tokens
from vidllm.eval.metrics.scan2cap.toolbox import SceneCaptions, toolbox_scores
from vidllm.eval.metrics.scanqa.scores import member_match, scanqa_scores
from vidllm.eval.metrics.sqa3d.scores import question_type, sqa3d_scores
from vidllm.eval.metrics.text_scorers import java_obstacle, one_line, ptb_tokenized, text_scores


GOLDENS = Path(__file__).parents[1] / "goldens" / "text"
needs_java = pytest.mark.skipif(java_obstacle() is not None, reason=f"text scores: {java_obstacle()}")
NAMES = {
    "EM": "exact_match", "EM@10": "exact_match_at_10", "EM-R": "exact_match_refined", "BLEU-1": "bleu_1", "BLEU-2": "bleu_2",
    "BLEU-3": "bleu_3", "BLEU-4": "bleu_4", "METEOR": "meteor", "ROUGE-L": "rouge_l", "CIDEr": "cider", "objects": "objects",
    "objects_with_caption": "objects_with_caption",
}  # fmt: skip


def golden(name):
    return json.loads((GOLDENS / name).read_text(encoding="utf-8"))


# ---------------------------------------------------------------------- ScanQA, SQA3D


def scanqa_inputs(changed=None, flatten=False):
    data = golden("scanqa.json")
    ranked = {row["question_id"]: row["answer_top10"] for row in data["predictions"]}
    for name, text in (changed or {}).items():
        ranked[name] = [text, *ranked[name][1:]]
    said = [ranked[row["question_id"]] for row in data["rows"]]
    if flatten:
        said = [[text.replace("\r", " ").replace("\n", " ") for text in texts] for texts in said]
    return data, said, [row["answers"] for row in data["rows"]]


@needs_java
@pytest.mark.parametrize("protocol", ["official", "leo", "llava3d", "video3dllm", "chat_scene"])
def test_scanqa_equals_the_reference(protocol):
    """Answers as they are stored, line breaks included: what becomes of those is the protocol's own affair."""
    data, said, accepted = scanqa_inputs()
    assert sum("\n" in texts[0] for texts in said) == 2
    profile = data["profiles"][protocol]
    scores = scanqa_scores(said, accepted, protocol=protocol, text=True)
    for name, wanted in profile["scores"].items():
        assert 100 * scores[NAMES[name]] == pytest.approx(wanted, abs=1e-9), name


@needs_java
def test_a_carriage_return_moves_no_later_answer():
    data = golden("scanqa.json")
    case = data["carriage_return_case"]
    _, said, accepted = scanqa_inputs(case["predictions"], flatten=True)
    _, raw, _ = scanqa_inputs(case["predictions"])
    scores = scanqa_scores(said, accepted, text=True)
    for name, wanted in case["expected_after_replacing_line_breaks_by_space"].items():
        assert 100 * scores[NAMES[name]] == pytest.approx(wanted, abs=1e-9), name
    # as they come, breaks included: the n-gram scores are the same
    assert scanqa_scores(raw, accepted, text=True)["cider"] == pytest.approx(scores["cider"], abs=1e-12)


@pytest.mark.parametrize(
    ("protocol", "line_feed", "carriage_return"),
    [("official", 0, 1), ("leo", 1, 1), ("video3dllm", 1, 1), ("llava3d", 0, 0), ("chat_scene", 0, 0)],
)
def test_what_becomes_of_line_breaks_before_answers_are_compared(protocol, line_feed, carriage_return):
    """`llava3d` and `chat_scene` clean the text as it comes, which glues the words together."""
    for text, wanted in (("red\nchair", line_feed), ("red\rchair", carriage_return), ("red chair", 1)):
        assert scanqa_scores([text], [["red chair"]], protocol=protocol)["exact_match"] == wanted, text
    ranked = scanqa_scores([["x", "red\rchair"], ["y", "red\nchair"]], [["red chair"]] * 2)
    assert ranked["exact_match_at_10"] == 0.5


@needs_java
def test_ll3da_collapses_blanks_and_has_no_exact_match():
    answers, accepted = ["a  red\nchair", "two"], [["a red chair"], ["two chairs", "two"]]
    scores = scanqa_scores(answers, accepted, protocol="ll3da", text=True)
    assert set(scores) == {"bleu_4", "meteor", "rouge_l", "cider"}
    assert scores["rouge_l"] == pytest.approx(1.0)
    # no tokenizer: a capital is another word
    assert scanqa_scores(["Red"], [["red"]], protocol="ll3da", text=True)["rouge_l"] == 0


@pytest.mark.parametrize("protocol", ["leo", "llava3d", "video3dllm"])
def test_sqa3d_equals_the_reference_by_kind_of_question(protocol):
    data = golden("sqa3d.json")
    questions = {row["question_id"]: row["question"] for row in data["questions"]["questions"]}
    right = {row["question_id"]: row["answers"][0]["answer"] for row in data["annotations"]["annotations"]}
    ids = [row["question_id"] for row in data["predictions"]]
    kinds = [question_type(questions[number]) for number in ids]
    assert kinds == [row["type"] for row in data["rows"]]
    said = [row["text"] for row in data["predictions"]]
    scores = sqa3d_scores(said, [right[number] for number in ids], kinds, protocol)
    for kind, wanted in data["profiles"][protocol]["scores"].items():
        for name in set(wanted) & set(NAMES):
            key = NAMES[name] if kind == "all" else f"{kind}/{NAMES[name]}"
            assert 100 * scores[key] == pytest.approx(wanted[name], abs=1e-6), (kind, name)


def test_questions_are_told_apart_by_their_first_letters():
    asked = ["What is it?", "Whatever?", " isn't it?", "How far?", "Can I?", "Which one?", "Are there?", ""]
    assert [question_type(q) for q in asked] == ["what", "what", "is", "how", "can", "which", "others", "others"]


def test_any_equal_reference_counts_before_a_lenient_one():
    assert member_match("brown", ["dark brown", "brown"]) == (True, True)
    assert member_match("brown", ["dark brown"]) == (False, True)
    assert member_match("", ["x"]) == (False, True)
    assert scanqa_scores([""], [["x"]], protocol="chat_scene") == {"exact_match": 0.0, "exact_match_refined": 0.0}


# ---------------------------------------------------------------------- Scan2Cap


def scan2cap_objects():
    data = golden("scan2cap.json")
    rows, said = {}, {(row["scene_id"], row["object_id"]): row for row in data["per_object"]}
    for row in data["rows"]:
        rows.setdefault((row["scene_id"], row["object_id"], row["object_name"]), []).append(row)
    objects = []
    for key, described in rows.items():
        found = said.get(key[:2])
        more = (
            {}
            if found is None
            else {
                "caption": found["caption"],
                "caption_tokens": tuple(found["caption_tokens"].split()),
                "iou": found["iou"],
            }
        )
        objects.append(
            CaptionedObject(
                "|".join(key),
                tuple(row["description"] for row in described),
                tuple(tuple(row["token"]) for row in described),
                **more,
            )
        )
    return data, rows, objects


@needs_java
@pytest.mark.parametrize(
    ("protocol", "threshold"), [("scan2cap", 0.25), ("scan2cap", 0.5), ("leo", 0.5), ("video3dllm", 0.5)]
)
def test_scan2cap_equals_the_reference(protocol, threshold):
    data, _, objects = scan2cap_objects()
    wanted = data["profiles"][protocol]["scores"][f"m@{threshold:g}"]
    scores = caption_scores(objects, protocol, threshold)
    for name, value in wanted.items():
        assert scores[NAMES[name]] == pytest.approx(value, abs=1e-9), name


@needs_java
def test_the_toolbox_equals_the_reference():
    data, rows, _ = scan2cap_objects()
    scenes = {}
    for name, proposals in data["scene_proposals"].items():
        objects = [described for key, described in rows.items() if key[0] == name]
        scenes[name] = SceneCaptions(
            references=tuple(tuple(f"sos {' '.join(row['token'])} eos" for row in described) for described in objects),
            object_corners=np.array([described[0]["bbox"] for described in objects]),
            captions=tuple(proposal["caption"] for proposal in proposals),
            proposal_corners=np.array([proposal["box"] for proposal in proposals]),
        )
    scores = toolbox_scores(scenes)
    for level, measures in data["profiles"]["benchmark_toolbox"]["scores"].items():
        for measure, wanted in measures.items():
            end = f"{measure.removesuffix('-score')}@{level[4:]}"
            for order in range(4):
                assert scores[f"bleu_{order + 1}_{end}"] == pytest.approx(wanted["bleu"][order], abs=1e-9)
            for ours, theirs in (("cider", "cider"), ("rouge_l", "rouge"), ("meteor", "meteor")):
                assert scores[f"{ours}_{end}"] == pytest.approx(wanted[theirs], abs=1e-9)


def test_captions_without_tokens_are_cut_like_descriptions():
    assert caption_tokens("This is a wooden chair. It's next to the T-shirt!") == (
        "this", "is", "a", "wooden", "chair", ".", "it's", "next", "to", "the", "t-shirt", "!",
    )  # fmt: skip


def test_wrong_objects_are_refused():
    good = CaptionedObject("s|1|chair", ("a chair",), (("a", "chair"),), "a chair", iou=0.9)
    with pytest.raises(ValueError, match="wanted at least one object"):
        caption_scores([])
    with pytest.raises(ValueError, match=r"s\|2\|table has none, or not both"):
        caption_scores([good, CaptionedObject("s|2|table", (), ())])
    with pytest.raises(ValueError, match="wanted one of scan2cap, leo, video3dllm, ll3da; got 'coco'"):
        caption_scores([good], "coco")
    with pytest.raises(ValueError, match="wanted at least one scene"):
        toolbox_scores({})
    with pytest.raises(ValueError, match="scene: wanted objects and at least one proposal"):
        toolbox_scores({"scene": SceneCaptions((("a",),), np.zeros((1, 8, 3)), (), np.zeros((0, 8, 3)))})


# ---------------------------------------------------------------------- scorers


@needs_java
def test_perfect_texts_score_best_and_shuffled_ones_low():
    texts = [f"the {colour} {thing} is {place} the window" for colour in ("red", "blue", "green") for thing in ("chair", "table") for place in ("near", "below")]  # fmt: skip
    best = text_scores(texts, [[text] for text in texts], tokenize=True).corpus
    assert best["rouge_l"] == pytest.approx(1.0)
    assert best["bleu_4"] == pytest.approx(1.0)
    assert best["meteor"] == pytest.approx(1.0)
    assert best["cider"] == pytest.approx(10.0, rel=0.01)
    other = text_scores(texts[5:] + texts[:5], [[text] for text in texts], tokenize=True).corpus
    assert all(other[name] < best[name] for name in best)
    assert other["cider"] < 3


@needs_java
def test_strange_texts_move_nothing():
    strange = [
        "",
        "   ",
        "a\rb",
        "a\u2028b\u2029c\x85d",
        "\U0001f600 chair",
        "x" * 10_000,
        "||| a ||| b",
        "\n\n",
        "last one",
    ]
    assert ptb_tokenized(strange)[-1] == "last one"
    assert len(ptb_tokenized(strange)) == len(strange)
    assert ptb_tokenized(["", ""]) == ["", ""]
    assert ptb_tokenized([]) == []
    references = [["something else"]] * (len(strange) - 1) + [["last one"]]
    for tokenize in (False, True):
        scores = text_scores(strange, references, tokenize)
        assert scores.each["rouge_l"][-1] == pytest.approx(1.0)
        assert scores.each["meteor"][-1] > 0.9
        assert all(np.isfinite(values).all() for values in scores.each.values())
    assert one_line("a\r\nb\nc") == "a b c"


def test_without_java_scores_are_missing_and_not_zero(monkeypatch):
    monkeypatch.setattr(text_scorers.shutil, "which", lambda name: None)
    assert java_obstacle() == "no `java` on the path (Debian: default-jre-headless)"
    plain = text_scores(["a chair"], [["a chair"]], tokenize=False)
    assert plain.missing == ("meteor",)
    assert set(plain.corpus) == {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"}
    tokenized = text_scores(["a chair"], [["a chair"]], tokenize=True)
    assert tokenized.corpus == {}
    assert set(tokenized.missing) == set(text_scorers.NAMES)
    assert scanqa_scores(["a chair"], [["a chair"]], text=True) == {"exact_match": 1.0}


def test_a_paraphrase_table_that_is_a_pointer_is_told(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "paraphrase-en.gz").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    monkeypatch.setattr(text_scorers, "_jar_folder", lambda part: tmp_path)
    monkeypatch.setattr(text_scorers.shutil, "which", lambda name: "/usr/bin/java")
    assert "has 42 bytes instead of 61813011" in java_obstacle()
    (tmp_path / "data" / "paraphrase-en.gz").unlink()
    assert "is not there" in java_obstacle()


def test_wrong_columns_are_refused():
    with pytest.raises(ValueError, match="wanted at least one text, each with references; got 2 texts and 1 lists"):
        text_scores(["a", "b"], [["a"]], tokenize=False)
    with pytest.raises(ValueError, match="each with references"):
        text_scores(["a"], [[]], tokenize=False)


@needs_java
def test_the_java_program_is_started_once_and_ends_with_the_process():
    code = (
        "from vidllm.eval.metrics import text_scorers as t; import os\n"
        "for n in range(3): t.text_scores(['a chair', 'b'], [['a chair'], ['c']], tokenize=False)\n"
        "print(t._meteor.cache_info().misses, t._meteor().meteor_p.pid)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    starts, pid = done.stdout.split()
    assert starts == "1"
    assert not Path(f"/proc/{pid}").exists()
    assert "Exception" not in done.stderr

"""Malformed annotation files: one clear error that names file, row and field; or, on request, a counted skip."""

import json

import benchmark_files as official
import datasets
import pytest

from vidllm.processing.benchmarks import benchmark_report, load_benchmark
from vidllm.processing.benchmarks.prompts import prompt_style, user_turn
from vidllm.processing.benchmarks.question_types import scanqa_type, sqa3d_type
from vidllm.processing.samples import Sample


pytestmark = pytest.mark.filterwarnings("ignore:.*(rows without boxes|skipped)")
QA, QUESTIONS, ANNOTATIONS, REFER = (
    "ScanQA_v1.0_val.json",
    "v1_balanced_questions_test_scannetv2.json",
    "v1_balanced_sqa_annotations_test_scannetv2.json",
    "ScanRefer_filtered_val.json",
)


@pytest.fixture
def root(tmp_path):
    datasets.disable_progress_bars()
    yield official.write_root(tmp_path / "root")
    datasets.enable_progress_bars()


def edit(root, name, change):
    path = root / "annotations" / name
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def drop(content, row, key):
    del content[row][key]


def put(content, row, key, value):
    content[row][key] = value


BENCHMARK = {
    QA: ("scanqa", "val"),
    QUESTIONS: ("sqa3d", "test"),
    ANNOTATIONS: ("sqa3d", "test"),
    REFER: ("scanrefer", "val"),
}


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (QA, lambda c: {"rows": c}, ["wanted a list of rows"]),
        (QA, lambda c: put(c, 1, "answers", "two"), ["row 1", "'answers'", "list of texts", "'two'"]),
        (QA, lambda c: drop(c, 2, "question"), ["row 2", "'question'", "nothing"]),
        (QA, lambda c: drop(c, 0, "answers"), ["row 0", "'answers'"]),
        (QA, lambda c: put(c, 0, "answers", [" "]), ["row 0", "'answers'", "blank"]),
        (QA, lambda c: put(c, 3, "scene_id", "../scene"), ["row 3", "'scene_id'", "without folders"]),
        (QA, lambda c: put(c, 2, "question_id", "val-scene0900-1"), ["row 2", "'question_id'", "row 1 has it too"]),
        (QA, lambda c: put(c, 1, "object_ids", [2, 99]), ["row 1", "object 99", "aggregation.json"]),
        (QA, lambda c: put(c, 1, "object_ids", ["2"]), ["row 1", "'object_ids'", "whole numbers"]),
        (QA, lambda c: c.insert(1, "text"), ["row 1", "wanted an object"]),
        (QUESTIONS, lambda c: c["questions"], ["'questions'"]),
        (QUESTIONS, lambda c: put(c["questions"], 0, "question_id", "220602000001"), ["row 0", "'question_id'", "whole number"]),
        (QUESTIONS, lambda c: put(c["questions"], 0, "question_id", 5), ["row 0", "'question_id'", ANNOTATIONS]),
        (QUESTIONS, lambda c: c["questions"].__delitem__(-1), ["row 0", "'question_id'", QUESTIONS]),
        (QUESTIONS, lambda c: put(c["questions"], 1, "scene_id", official.SCENES[0]), [ANNOTATIONS, "row 0", "'scene_id'"]),
        (ANNOTATIONS, lambda c: c["annotations"][1]["rotation"].__delitem__("_w"), ["row 1", "rotation._w", "finite number"]),
        (ANNOTATIONS, lambda c: put(c["annotations"][0], "position", "x", float("nan")), ["row 0", "position.x", "finite"]),
        (ANNOTATIONS, lambda c: put(c["annotations"], 0, "rotation", {"_x": 2, "_y": 0, "_z": 0, "_w": 0}), ["rotation", "unit quaternion"]),
        (ANNOTATIONS, lambda c: c["annotations"][0]["answers"].append({"answer": "b"}), ["row 0", "'answers'", "exactly one", "2"]),
        (ANNOTATIONS, lambda c: c["annotations"].append(c["annotations"][0]), ["row 2", "'question_id'", "row 0 has it too"]),
        (REFER, lambda c: put(c, 0, "object_id", "chair"), ["row 0", "'object_id'", "whole number"]),
        (REFER, lambda c: put(c, 2, "ann_id", "0"), ["row 2", "'ann_id'", "row 0 has it too"]),
        (REFER, lambda c: put(c, 4, "object_id", "44"), ["row 4", "object 44", "aggregation.json"]),
        (REFER, lambda c: put(c, 4, "description", ""), ["row 4", "'description'", "a text"]),
    ],
)  # fmt: skip
def test_one_clear_error(root, tmp_path, name, change, says):
    edit(root, name, change)
    with pytest.raises(ValueError, match=r"annotations/") as caught:
        load_benchmark(*_args(name, root), cache_dir=tmp_path / "cache")
    message = str(caught.value)
    assert "\n" not in message
    assert any(part in message for part in BENCHMARK)
    assert all(part in message for part in says), message


def _args(name, root):
    benchmark, split = BENCHMARK[name]
    return benchmark, root, split


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'[{"scene_id": "a"},\n {"scene_id": ]', "line 2, column 15: not JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS"),
        (b"[\xff]", "not UTF-8"),
        (b"", "not JSON"),
    ],
)
def test_files_that_are_no_json(root, content, says):
    (root / "annotations" / QA).write_bytes(content)
    with pytest.raises(ValueError, match=says) as caught:
        load_benchmark("scanqa", root, "val")
    assert QA in str(caught.value)


def test_a_missing_file_is_also_a_file_not_found_error(root):
    (root / "annotations" / QA).unlink()
    with pytest.raises(FileNotFoundError, match=QA) as caught:
        load_benchmark("scanqa", root, "val")
    assert isinstance(caught.value, ValueError)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_benchmark("scanqa", root / "nowhere", "val")


def test_line_ends_and_byte_order_marks_do_not_matter(root, tmp_path):
    wanted = list(load_benchmark("scanqa", root, "val", cache_dir=tmp_path / "cache"))
    path = root / "annotations" / QA
    lines = json.dumps(json.loads(path.read_text()), indent=1).split("\n")
    mixed = "".join(line + ("\n", "\r\n", "\r")[number % 3] for number, line in enumerate(lines))
    path.write_bytes(b"\xef\xbb\xbf" + mixed.encode())
    assert list(load_benchmark("scanqa", root, "val", cache_dir=tmp_path / "cache")) == wanted


def test_a_malformed_scan_is_named_also_from_another_process(root, tmp_path):
    path = root / "scans" / official.SCENES[0] / f"{official.SCENES[0]}_vh_clean_2.ply"
    path.write_bytes(path.read_bytes()[:-100])
    for options in ({}, {"num_proc": 2}):
        with pytest.raises(ValueError, match=r"_vh_clean_2\.ply: the file is cut"):
            load_benchmark("scanqa", root, "val", cache_dir=tmp_path / "cache", **options)


def test_not_strict_skips_and_counts(root, tmp_path):
    def change(content):
        drop(content, 0, "question")
        put(content, 1, "object_ids", [99])

    edit(root, QA, change)
    with pytest.warns(UserWarning, match="1 skipped: question: wanted a text"):
        rows, report = load_benchmark(
            "scanqa", root, "val", strict=False, cache_dir=tmp_path / "cache", with_report=True
        )
    assert [row["official_id"] for row in rows] == ["val-scene0901-0", "val-scene0950-0"]
    assert (report.num_official_rows, report.num_rows, report.num_skipped) == (4, 2, 2)
    assert any("object id not in the scan" in line and "row 1" in line for line in report.skipped)
    edit(root, ANNOTATIONS, lambda content: content["annotations"][0]["rotation"].update(_x=3))
    assert benchmark_report("sqa3d", root, "test").num_skipped == 1
    edit(root, QUESTIONS, lambda content: content["questions"].__delitem__(-1))
    report = benchmark_report("sqa3d", root, "test")
    assert (report.num_rows, report.num_skipped) == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("scan_qa", "val"), "did you mean scanqa"),
        (("scanqa", "test"), "test_w_obj, test_wo_obj"),
        (("scan2cap", "test"), "train, val"),
    ],
)
def test_unknown_names(root, arguments, says):
    with pytest.raises(ValueError, match=says):
        load_benchmark(arguments[0], root, arguments[1])


def test_unknown_variants_and_prompts(root):
    with pytest.raises(ValueError, match="per_answer"):
        load_benchmark("scanqa", root, "val", variant="per_answers")
    with pytest.raises(ValueError, match="did you mean video3dllm"):
        load_benchmark("scanqa", root, "val", prompts="video3d-llm")
    with pytest.raises(ValueError, match="llava3d has none for the task ground"):
        load_benchmark("scanrefer", root, "val", prompts="llava3d")


def test_question_types():
    assert [sqa3d_type(q) for q in (" What is it?", "Isn't it red?", "However?", "cannot I?", "Whichever?", "Where?")] == [
        "what", "is", "how", "can", "which", "others"]  # fmt: skip
    wanted = {
        "Where is the bed?": "Place",
        "Tell me how many there are": "Other",
        "How many beds are there?": "Number",
        "What is the color of it?": "Color",
        "What type of bed is it?": "Object nature",
        "What is on it? Where is it?": "Place",
        "In the corner, What is it?": "Object",
    }
    assert {question: scanqa_type(question) for question in wanted} == wanted


def test_words_are_never_read_as_a_template():
    turn = user_turn("vidllm", "sqa", situation="I see {question}.", question="Is {point} a {x}?")
    assert turn["content"][1]["text"] == "I see {question}.\nIs {point} a {x}?\nReply with a word or a short phrase."
    assert len(turn["content"]) == 2
    assert prompt_style("plain").templates["qa"] == "{question}"


BASE = {
    "sample_id": "a", "scene_id": "s", "task": "ground",
    "messages": [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "x"}]},
                 {"role": "assistant", "content": [{"type": "box"}]}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"task": "guess"}, "task: wanted one of"),
        ({"boxes_annotation": [[1, 2, 3]]}, "boxes_annotation"),
        ({"boxes_annotation": [[0, 0, 0, 1, -1, 1]]}, "sizes from 0"),
        ({"boxes_annotation": [[0, 0, 0, 1, float("nan"), 1]]}, "finite"),
        ({"boxes_annotation": [[0, 0, 0, 1, 1, 1]], "box_block": [1]}, "box_block"),
        ({"points": [[0, 0, 0]]}, "points: wanted 0"),
        ({"box_frame": "room"}, "box_frame"),
        ({"answers": "yes"}, "answers: wanted a list of texts"),
        ({"annotation_from_world": [[2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]]}, "rigid"),
        ({"messages": BASE["messages"][:1] * 2}, "roles in turn"),
        ({"messages": BASE["messages"][1:]}, "exactly one video block"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "video"}]}]}, "video first"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}, {"type": "box"}]}]}, "a type among text, video, point"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "says something"),
    ],
)  # fmt: skip
def test_samples_are_checked_when_they_are_made(change, says):
    Sample(**BASE)
    with pytest.raises(ValueError, match=says):
        Sample(**{**BASE, **change})
    with pytest.raises(AttributeError):
        Sample(**BASE).task = "qa"

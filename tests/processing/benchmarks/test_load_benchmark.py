"""The builders over small files in the official formats: rows, boxes, order, sharing, caches, reports."""

import json
import os
from itertools import chain
from pathlib import Path

import benchmark_files as official
import datasets
import numpy as np
import pytest
import torch
from datasets.distributed import split_dataset_by_node

from vidllm.processing.benchmarks import benchmark_report, load_benchmark
from vidllm.processing.benchmarks.builder import FEATURES, row_ranges
from vidllm.processing.samples import Sample


REAL = Path(__file__).resolve().parents[4] / "shared" / "realdata" / "sqa3d_test"


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return official.write_root(tmp_path_factory.mktemp("data") / "root")


@pytest.fixture
def load(root, tmp_path):
    def call(name, split, **options):
        options.setdefault("cache_dir", tmp_path / "cache")
        return load_benchmark(name, options.pop("data_root", root), split, **options)

    return call


pytestmark = pytest.mark.filterwarnings("ignore:.*rows without boxes")


def texts(turn):
    return [block["text"] for block in turn["content"] if block["type"] == "text"]


def test_scanqa(load):
    rows = list(load("scanqa", "val"))
    assert [row["official_id"] for row in rows] == [row["question_id"] for row in official.scanqa_rows()]
    assert [row["question_type"] for row in rows] == ["Object", "Number", "Color", "Place"]
    sample = Sample.from_row(rows[0])
    assert (sample.task, sample.answers, sample.object_ids) == ("qa", ("bed", "a wide bed"), (0,))
    assert sample.official == official.scanqa_rows()[0]
    np.testing.assert_allclose(sample.boxes_annotation, [official.expected_box(0)], atol=1e-6)
    np.testing.assert_allclose(
        Sample.from_row(rows[1]).boxes_annotation, [official.expected_box(2), official.expected_box(3)], atol=1e-6
    )
    assert rows[3]["boxes_annotation"] is None  # the scan is absent, not empty
    assert [turn["role"] for turn in sample.messages] == ["user", "assistant"]
    assert sample.messages[0]["content"][0] == {"type": "video"}
    assert texts(sample.messages[1]) == ["bed"]
    # a tab in the question is a space in the prompt and stays in the question
    assert rows[2]["question"] == "What color is the\tlow table?"
    assert texts(rows[2]["messages"][0])[0].startswith("What color is the low table?")


def test_scanqa_one_row_per_answer_and_hidden_answers(load):
    rows = list(load("scanqa", "val", variant="per_answer"))
    assert [row["sample_id"].rpartition("/")[2] for row in rows[:3]] == [
        "val-scene0900-0#0", "val-scene0900-0#1", "val-scene0900-1#0"]  # fmt: skip
    assert [texts(row["messages"][1])[0] for row in rows] == ["bed", "a wide bed", "2", "brown", "in the corner"]
    hidden = [Sample.from_row(row) for row in load("scanqa", "test_wo_obj")]
    assert len(hidden) == 4
    assert not any(sample.has_reply or sample.answers or sample.object_ids for sample in hidden)


def test_sqa3d_joins_by_id_and_reads_by_key_name(load):
    first, second = (Sample.from_row(row) for row in load("sqa3d", "test"))
    assert (first.official_id, first.answers, first.situation) == (
        "220602000001",
        ("wall",),
        "I am sitting on the bed.",
    )
    assert first.rotation_xyzw.tolist() == [0, 0, -1, 0]
    assert second.rotation_xyzw.tolist() == [0, 0, 0.6, 0.8]  # `_w` stands first in the file
    assert second.position_m.tolist() == [-0.9, 1.25, 0]
    assert (first.question_type, second.question_type) == ("what", "is")
    assert first.official["annotation"]["answers"][0]["answer_confidence"] == "yes"
    rows = list(load("sqa3d", "train", variant="all_situations"))
    assert [row["situation"] for row in rows] == [
        "I am sitting on the bed.", "The bed is under me.", "I rest on a bed.", "I face the table."]  # fmt: skip
    assert len({row["sample_id"] for row in rows}) == 4
    assert all(row["situation"] in texts(row["messages"][0])[0] for row in rows)


def test_scanrefer_and_scan2cap(load):
    grounding = [Sample.from_row(row) for row in load("scanrefer", "val")]
    assert [sample.question for sample in grounding] == [row["description"] for row in official.scanrefer_rows()]
    assert [sample.question_type for sample in grounding] == [
        "unique",
        "multiple",
        "unique",
        "multiple",
        "unique",
        "unique",
    ]
    assert grounding[0].official_id == f"{official.SCENES[0]}|1|0"
    assert grounding[3].official["eval_type"] == "multiple"
    assert grounding[0].messages[-1] == {"role": "assistant", "content": [{"type": "box"}]}
    np.testing.assert_allclose(grounding[1].boxes_annotation, [official.expected_box(2)], atol=1e-6)

    captions = [Sample.from_row(row) for row in load("scan2cap", "val")]
    assert [sample.official_id for sample in captions[:2]] == [
        f"{official.SCENES[0]}|1|coffee_table", f"{official.SCENES[0]}|2|office_chair"]  # fmt: skip
    assert len(captions) == 5
    assert captions[0].references == ("this is a low table. it is right of the bed.", "a small square table.")
    assert [row["token"][0] for row in captions[0].official["rows"]] == ["this", "a"]
    np.testing.assert_allclose(captions[0].points, [official.expected_box(1)[:3]], atol=1e-6)
    assert captions[4].points is None
    assert captions[4].num_point_blocks == 1
    single = list(load("scan2cap", "val", variant="per_description"))
    assert [row["references"] for row in single] == [[row["description"]] for row in official.scanrefer_rows()]


def test_without_a_label_table_types_are_unknown_and_said_so(tmp_path):
    root = official.write_root(tmp_path / "root", labels=False)
    rows, report = load_benchmark("scanrefer", root, "val", cache_dir=tmp_path / "cache", with_report=True)
    assert set(rows["question_type"]) == {None}
    assert any("scannetv2-labels.combined.tsv" in note for note in report.notes)


def test_other_prompts(load):
    row = load("scanrefer", "val", prompts="video3dllm")[0]
    assert texts(row["messages"][0]) == [
        "Identify the object according to the following description.\nThis is a low table. it is right of the bed."]  # fmt: skip
    caption = load("scan2cap", "val", prompts="llava3d")[0]["messages"][0]["content"]
    assert [block["type"] for block in caption] == ["video", "text", "point", "text"]


def test_rows_and_samples_are_the_same_thing(load):
    for name, split in (("scanqa", "val"), ("sqa3d", "test"), ("scanrefer", "val"), ("scan2cap", "val")):
        for row in load(name, split):
            assert set(row) == set(FEATURES)
            again = Sample.from_row(row).to_row()
            assert {key: again[key] for key in row if row[key] is not None} == {
                k: v for k, v in row.items() if v is not None
            }


def test_row_ranges_cover_everything_once():
    for count in (0, 1, 5, 64, 65, 1000):
        covered = [n for text in row_ranges(count) for n in range(*map(int, text.split(":")))]
        assert covered == list(range(count))


def test_processes_streams_workers_and_nodes_give_each_row_once(load, tmp_path):
    wanted = list(load("scanrefer", "val"))
    assert list(load("scanrefer", "val", num_proc=2, cache_dir=tmp_path / "other")) == wanted
    stream = load("scanrefer", "val", streaming=True)
    assert stream.num_shards == 6
    assert list(stream) == wanted
    ids = [row["sample_id"] for row in wanted]
    for world in (2, 3, 4):
        parts = [[row["sample_id"] for row in split_dataset_by_node(stream, rank, world)] for rank in range(world)]
        assert sorted(chain(*parts)) == sorted(ids), world
        parts = [split_dataset_by_node(load("scanrefer", "val"), rank, world)["sample_id"] for rank in range(world)]
        assert sorted(chain(*parts)) == sorted(ids), world
    for workers in (1, 2):
        loader = torch.utils.data.DataLoader(stream, batch_size=2, num_workers=workers, collate_fn=list)
        assert sorted(row["sample_id"] for batch in loader for row in batch) == sorted(ids)


def test_edited_files_are_read_again(tmp_path):
    root, cache = official.write_root(tmp_path / "root"), tmp_path / "cache"
    load = lambda: load_benchmark("scanqa", root, "val", cache_dir=cache)  # noqa: E731
    before = load()
    assert load().cache_files == before.cache_files  # unchanged: not made again
    path = root / "annotations" / "ScanQA_v1.0_val.json"
    stat = path.stat()
    path.write_text(path.read_text().replace("a wide bed", "a tidy bed"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time: the content counts
    assert load()[0]["answers"] == ["bed", "a tidy bed"]
    # a changed alignment moves the boxes
    info = root / "scans" / official.SCENES[0] / f"{official.SCENES[0]}.txt"
    info.write_text(info.read_text().replace("-2.0", "-3.0"))
    moved = np.array(load()[0]["boxes_annotation"][0]) - before[0]["boxes_annotation"][0]
    np.testing.assert_allclose(moved, [0, -1, 0, 0, 0, 0], atol=1e-6)
    # a scan that arrives later gives boxes
    official.write_scan(root, official.ABSENT)
    path.write_text(path.read_text().replace("[17]", "[3]"))
    assert load()[3]["boxes_annotation"] is not None


def test_report(root, load):
    with pytest.warns(UserWarning, match="1 rows without boxes; the scans of 1 scenes are absent"):
        _, report = load("scanrefer", "val", with_report=True)
    assert (report.num_official_rows, report.num_rows, report.num_scenes) == (6, 6, 3)
    assert (report.num_scenes_without_scan, report.num_rows_without_boxes, report.num_skipped) == (1, 1, 0)
    assert report.question_types == {"unique": 4, "multiple": 2}
    assert report.published_rows == 9508
    assert benchmark_report("scanrefer", root, "val") == report
    assert len(report.sha256) == 2
    assert benchmark_report("scan2cap", root, "val").num_rows == 5


@pytest.mark.parametrize("below", ["scanqa", "ScanQA/data"])
def test_files_in_unpacked_archives_are_found(root, tmp_path, below):
    folder = tmp_path / "annotations" / below
    folder.mkdir(parents=True)
    text = (root / "annotations" / "ScanQA_v1.0_val.json").read_text()
    (folder / "ScanQA_v1.0_val.json").write_text(text)
    assert benchmark_report("scanqa", tmp_path, "val").num_rows == 4
    (tmp_path / "annotations" / "copy").mkdir()
    (tmp_path / "annotations" / "copy" / "ScanQA_v1.0_val.json").write_text(text)
    with pytest.raises(ValueError, match="wanted one such file"):
        benchmark_report("scanqa", tmp_path, "val")


@pytest.mark.skipif(not REAL.is_dir(), reason="the real SQA3D test files are not here")
def test_real_sqa3d_test_files(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "annotations").symlink_to(REAL)
    rows, report = load_benchmark("sqa3d", tmp_path / "root", "test", cache_dir=tmp_path / "cache", with_report=True)
    assert len(rows) == 3519
    assert (report.num_rows, report.num_scenes, report.num_skipped) == (3519, 67, 0)
    assert report.question_types == {"what": 1147, "is": 652, "how": 465, "can": 338, "which": 351, "others": 566}
    counts = [len(value) for value in rows["alternative_situations"]]
    assert [counts.count(n) for n in (0, 1, 2)] == [20, 25, 3474]
    questions = json.loads((REAL / "v1_balanced_questions_test_scannetv2.json").read_text())["questions"]
    given = json.loads((REAL / "v1_balanced_sqa_annotations_test_scannetv2.json").read_text())["annotations"]
    by_id = {row["question_id"]: row for row in given}
    assert [row["official_id"] for row in rows] == [str(question["question_id"]) for question in questions]
    for row, question in list(zip(rows, questions))[::50]:
        rotation = by_id[question["question_id"]]["rotation"]
        assert row["rotation_xyzw"] == [rotation[key] for key in ("_x", "_y", "_z", "_w")]
        assert row["answers"] == [by_id[question["question_id"]]["answers"][0]["answer"]]
    report = benchmark_report("sqa3d", tmp_path / "root", "test", variant="all_situations")
    assert report.num_rows == 3519 + 25 + 2 * 3474

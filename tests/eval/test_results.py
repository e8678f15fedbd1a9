"""The form of `results.json`, the table of it, and the files that predictions are kept in."""

import copy
import json
from pathlib import Path

import pytest

from vidllm.eval.predictions import PredictionFile
from vidllm.eval.results import check_results, read_results, results_schema, table_rows, write_results
from vidllm.processing.video_reading_vidllm import VidLLMInputError


DOCUMENT = {
    "runs": {
        "easy": {
            "results": {
                "scanqa": {"official": {"exact_match": 0.5, "what is on/exact_match": 1}},
                "scanrefer": {"official": {"acc_0.25": 0.4, "unique/acc_0.25": 0.6}},
            },
            "baselines": {"blind": {"scanqa": {"official": {"exact_match": 0.3}}}, "given_geometry": {}},
        }
    },
    "provenance": {
        "model": "m",
        "weights_sha256": {"model.safetensors": "0" * 64},
        "versions": {"torch": "2"},
        "geometry": "predicted",
        "frames": 8,
        "data_root": "rooms",
        "splits": {"scanqa": "val"},
        "annotations_sha256": {},
        "counts": {"scanqa": {"rows": 2, "scored": 2}},
        "notes": [],
        "seconds_per_scene": None,
        "command": "vidllm eval",
        "anything": "more",
    },
}


def changed(path, value):
    """The document with one place changed; None removes it."""
    document = copy.deepcopy(DOCUMENT)
    place = document
    for name in path[:-1]:
        place = place[name]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return document


SCANQA = ("runs", "easy", "results", "scanqa")


def test_a_good_document_passes():
    check_results(DOCUMENT)
    # Of another system there are files instead of weights, and no frames.
    outside = changed(("provenance", "weights_sha256"), {})
    outside["provenance"].update(frames=None, geometry="not stated", predictions_sha256={"scanqa": "1" * 64})
    check_results(outside)


@pytest.mark.parametrize(
    "name", ["meteor", "cider", "iou_0.25/cider", "bleu_4_f1@0.5", "rouge_l_recall@0", "how many/exact_match"]
)
def test_names_of_metrics(name):
    check_results(changed((*SCANQA, "leo"), {name: 0.1}))
    with pytest.raises(VidLLMInputError, match="wanted a text like"):
        check_results(changed((*SCANQA, "leo"), {f"{name}_x": 0.1}))


def test_shipped_results_fit():
    shipped = sorted(Path(__file__).parents[2].glob("model_cards/*/results/*/results.json"))
    assert shipped
    for path in shipped:
        read_results(path)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("runs",), None, "wanted the key 'runs'"),
        (("runs",), {}, "runs: wanted at least 1 entry; got 0"),
        (("more",), 1, "wanted no key but runs, provenance; got 'more'"),
        (("runs", "easy", "baselines"), None, "runs.easy: wanted the key 'baselines'"),
        (("runs", "easy", "baselines", "oracle"), {}, "baselines, name: wanted one of blind, .*got 'oracle'"),
        (("runs", "easy", "results", "scanqq"), {}, "results, name: wanted one of scanqa"),
        ((*SCANQA, "mine"), {"exact_match": 1}, "scanqa, name: wanted one of official"),
        ((*SCANQA, "official", "accuracy"), 1, "official, name: wanted a text like"),
        ((*SCANQA, "official", "exact_match"), "1", "official.exact_match: wanted number; got '1'"),
        ((*SCANQA, "official", "exact_match"), float("nan"), "wanted number; got nan"),
        ((*SCANQA, "official", "exact_match"), True, "wanted number; got True"),
        (("provenance", "weights_sha256", "model.safetensors"), "abc", "wanted a text like"),
        (("provenance", "geometry"), "true", "provenance.geometry: wanted one of predicted, given"),
        (
            ("provenance", "weights_sha256"),
            {},
            "wanted `weights_sha256` and `frames` of a model, or `predictions_sha256`",
        ),
        (("provenance", "frames"), 0, "wanted at least 1; got 0"),
        (("provenance", "frames"), 2.5, "wanted integer or null; got 2.5"),
        (("provenance", "counts", "scanqa", "rows"), -1, "wanted at least 0; got -1"),
        (("provenance", "notes"), ["a", 1], r"notes\[1\]: wanted string; got 1"),
    ],
)
def test_a_wrong_document_is_refused(path, value, message, tmp_path):
    document = changed(path, value)
    with pytest.raises(VidLLMInputError, match=message):
        check_results(document)
    with pytest.raises(VidLLMInputError, match=message):
        write_results(tmp_path / "results.json", document)
    assert not list(tmp_path.iterdir())


def test_what_is_written_is_read_back(tmp_path):
    write_results(tmp_path / "results.json", DOCUMENT)
    assert read_results(tmp_path) == DOCUMENT
    assert read_results(tmp_path / "results.json") == DOCUMENT
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(VidLLMInputError, match="not JSON"):
        read_results(tmp_path)
    with pytest.raises(VidLLMInputError, match="cannot be read"):
        read_results(tmp_path / "absent.json")


def test_the_schema_names_no_keyword_that_is_not_checked(monkeypatch):
    check_results(DOCUMENT)
    schema = copy.deepcopy(results_schema())
    schema["maxProperties"] = 1
    monkeypatch.setattr("vidllm.eval.results.results_schema", lambda: schema)
    with pytest.raises(ValueError, match="keyword 'maxProperties' is not known"):
        check_results(DOCUMENT)


def test_rows_of_the_table():
    rows = table_rows(DOCUMENT["runs"]["easy"])
    assert rows[0] == {
        "benchmark": "scanqa",
        "protocol": "official",
        "metric": "exact_match",
        "model": 0.5,
        "blind": 0.3,
    }
    assert [row["metric"] for row in rows] == ["exact_match", "what is on/exact_match", "acc_0.25", "unique/acc_0.25"]


def test_records_survive_a_half_written_line(tmp_path):
    path = tmp_path / "deep" / "scanqa.jsonl"
    file = PredictionFile(path)
    # Letters that some readers take for line ends, and half of a pair of surrogates, which UTF-8 cannot hold.
    file.add([{"id": "a", "answer": "r\u00f6d\u2028\x85"}, {"id": "b", "answer": "\udce4"}])
    whole = path.read_bytes()
    with open(path, "ab") as stream:
        stream.write(b'{"id": "c", "ans')
    again = PredictionFile(path)
    assert path.read_bytes() == whole
    assert again.records == file.records
    assert again.records["a"]["answer"] == "r\u00f6d\u2028\x85"
    assert again.missing(["b", "d", "a", "c"]) == ["d", "c"]
    again.add([{"id": "b", "answer": "other"}, {"id": "c", "answer": ""}])
    assert [json.loads(line)["id"] for line in path.read_bytes().split(b"\n")[:-1]] == ["a", "b", "c"]
    assert again.records["b"]["answer"] == "\udce4"


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "scanqa.jsonl"
    path.write_bytes(b'{"id": "a"}\n{"id": \n{"id": "b"}\n')
    with pytest.raises(VidLLMInputError, match="line 2: wanted a record with an id"):
        PredictionFile(path)
    path.write_bytes(b'{"id": "a"}\n{"id": "a"}\n')
    with pytest.raises(VidLLMInputError, match="line 2: wanted every id once; a is there twice"):
        PredictionFile(path)

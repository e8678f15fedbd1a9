"""`vidllm eval`: the table, the JSON document, and one line for each kind of bad input."""

import json
import sys

import pytest
from typer.testing import CliRunner

from vidllm.cli import app
from vidllm.eval.results import check_results


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "60"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="session")
def arguments(model_dir, rooms_root):
    return ["--model", model_dir, "--data-root", rooms_root, "--frames", 3, "--train-rooms", 2, "--no-text"]


def test_table_and_document(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["anywhere/vidllm", "eval", "scanqa", "my rooms"])
    asked = ["eval", "scanqa", "reconstruction", *arguments, "--out", tmp_path, "--limit-scenes", 1]
    result = run(*asked)
    assert result.exit_code == 0, result.stderr
    document = json.loads((tmp_path / "results.json").read_text())
    check_results(document)
    assert "easy, geometry predicted" in result.stdout
    rows = [line for line in result.stdout.splitlines() if "exact_match" in line or "abs_rel" in line]
    results, baselines = (document["runs"]["easy"][part] for part in ("results", "baselines"))
    first = next(line for line in rows if " exact_match " in line)
    for found in (results, baselines["blind"], baselines["majority"]):
        assert f"{found['scanqa']['official']['exact_match']:.4f}" in first
    assert sum("abs_rel" in line for line in rows) == 4
    assert "untrained weights" in result.stderr
    assert "only the first 1 of 3 scenes" in result.stderr
    assert document["provenance"]["command"] == "vidllm eval scanqa 'my rooms'"
    # Nothing is left to do the second time.
    again = run(*asked, "--json")
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["runs"] == document["runs"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["scanqq"], "benchmark: wanted one of scanqa, sqa3d, scanrefer, scan2cap, reconstruction; got 'scanqq'"),
        (["scanqa", "--split", "train"], "ScanQA_v1.0_train.json: no such file"),
        (["scanqa", "--geometry", "none"], "geometry: wanted predicted or given; got 'none'"),
        (["scanqa", "--data-root", "nowhere"], "no such folder; wanted a data root"),
        (["scanqa", "--model", "nowhere"], "no such folder, and not a Hub id"),
        (["scanqa", "--frames", "0"], "Invalid value for '--frames'"),
        ([], "Missing argument 'BENCHMARK...'"),
        (["scanqa", "--proposals", "true"], "proposals: wanted with scanrefer or scan2cap; neither is evaluated"),
        (
            ["scanqa", "--predictions", "said.jsonl"],
            "--predictions: wanted without --model, because no model is loaded",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, tmp_path, wrong, message):
    result = run("eval", *arguments, "--out", tmp_path / "out", *wrong)
    assert result.exit_code == 2
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if not line.startswith("notice: ")]
    assert len(errors) == 1, errors
    assert errors[0].startswith("error: ")
    assert message in errors[0]


def test_predictions_of_another_system(rooms_root, tmp_path):
    rows = json.loads((rooms_root / "annotations" / "ScanQA_v1.0_val.json").read_text())
    said = tmp_path / "said.jsonl"
    said.write_text(
        "".join(json.dumps({"id": row["question_id"], "answer": row["answers"][0]}) + "\n" for row in rows)
    )
    asked = ["eval", "scanqa", "--predictions", said, "--data-root", rooms_root, "--out", tmp_path / "out"]
    result = run(*asked, "--train-rooms", 2, "--no-text")
    assert result.exit_code == 0, result.stderr
    assert "easy, geometry not stated" in result.stdout
    row = next(line for line in result.stdout.splitlines() if " exact_match " in line and "official" in line)
    assert "1.0000" in row
    check_results(json.loads((tmp_path / "out" / "results.json").read_text()))
    said.write_text(said.read_text().rpartition("{")[0])
    result = run(*asked, "--train-rooms", 2, "--no-text")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert "wanted a prediction of each of" in result.stderr
    result = run(*asked, "--frames", 3)
    assert "wanted without --frames" in result.stderr

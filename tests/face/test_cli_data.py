"""`vidllm rooms` and `vidllm data`: a data root is made, looked through, and its frames extracted."""

import json

import pytest
from typer.testing import CliRunner

from vidllm.cli import app


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rooms") / "root"
    result = CliRunner().invoke(
        app, ["rooms", "--out", str(folder), "--scenes", "2", "--seed", "1", "--difficulty", "easy", "--json"]
    )
    assert result.exit_code == 0, result.output
    json.loads(result.stdout)
    return folder


def test_rooms_are_found_by_the_data_check(root):
    result = CliRunner().invoke(app, ["data", "check", "--data-root", str(root), "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["num_scenes"] == report["num_scans"] == 2
    text = CliRunner().invoke(app, ["data", "check", "--data-root", str(root)])
    assert "scenes with frames: 2" in text.stdout


def test_frames_are_extracted_once(root, tmp_path):
    command = ["data", "frames", "--data-root", str(root), "--out", str(tmp_path), "--frames", "3", "--json"]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    done = json.loads(first.stdout)["done"]
    assert len(done) == 2
    assert len(list((tmp_path / "posed_images" / done[0]).glob("*.jpg"))) == 3
    again = json.loads(CliRunner().invoke(app, command).stdout)
    assert (again["done"], sorted(again["skipped"])) == ([], sorted(done))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rooms", "--out", "OUT", "--scenes", "1", "--difficulty", "hardest"], "hardest"),
        (["rooms", "--out", "OUT", "--scenes", "1", "--split", "dev"], "dev"),
        (["data", "check", "--data-root", "OUT/none"], "none"),
        (["data", "frames", "--data-root", "OUT/none"], "none"),
        (["data", "frames", "--data-root", "OUT", "--method", "best"], "best"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, words, tmp_path):
    result = CliRunner().invoke(app, [argument.replace("OUT", str(tmp_path)) for argument in arguments])
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert "Traceback" not in result.output

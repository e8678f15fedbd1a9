"""Held-out losses of runs in one picture."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vidllm.cli import app
from vidllm.train.curves import CurveRun, draw_curves, held_out_curve, runs_of_words


LINES = [{"step": step, "token": 3 - step / 20, "depth": 1 / (step + 1), "seconds": 0.5} for step in (0, 10, 30)]


def run_folder(tmp_path, name, lines=LINES):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    (folder / "held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def lines_drawn(monkeypatch, *arguments, **more):
    """What is on the panels, by term and label."""
    kept = []
    monkeypatch.setattr("vidllm.train.curves.save_figure", lambda figure, path: kept.append(figure))
    terms = draw_curves(*arguments, **more)
    (figure,) = kept
    drawn = {
        axes.get_title(): {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
        for axes in figure.axes
    }
    assert list(drawn) == terms
    return drawn, figure


def test_each_run_is_drawn_where_it_was_measured(tmp_path, monkeypatch):
    a = run_folder(tmp_path, "a")
    b = run_folder(
        tmp_path,
        "b",
        [{"step": 0, "token": 4.0, "depth": 2.0, "other": 1}, {"step": 30, "token": 1, "depth": 0.5, "other": 1}],
    )
    runs = [CurveRun("first", a), CurveRun("second", b, start=100, per_step=2)]
    drawn, figure = lines_drawn(monkeypatch, runs, tmp_path / "x.png", across="work")
    assert drawn == {
        "token": {"first": ([0, 10, 30], [3.0, 2.5, 1.5]), "second": ([100, 160], [4.0, 1])},
        "depth": {"first": ([0, 10, 30], [1.0, 1 / 11, 1 / 31]), "second": ([100, 160], [2.0, 0.5])},
    }
    assert all(axes.get_xlabel() == "work" for axes in figure.axes)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["first", "second"]
    assert {axes.get_yscale() for axes in figure.axes} == {"linear"}
    drawn, figure = lines_drawn(monkeypatch, runs, tmp_path / "x.png", ["depth"], log=True)
    assert list(drawn) == ["depth"]
    assert figure.axes[0].get_yscale() == "log"
    zero = run_folder(tmp_path, "zero", [{"step": 0, "depth": 0.0}])
    _, figure = lines_drawn(monkeypatch, [CurveRun("zero", zero)], tmp_path / "x.png", log=True)
    assert figure.axes[0].get_yscale() == "linear"


def test_the_command_writes_a_picture(tmp_path):
    run_folder(tmp_path, "a")
    out = tmp_path / "pictures" / "curves.png"
    out.parent.mkdir()
    words = [
        "train",
        "curves",
        str(tmp_path / "a"),
        f"again={tmp_path / 'a'}",
        "--out",
        str(out),
        "--start",
        "again=5",
    ]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    pixels = np.asarray(Image.open(out).convert("RGB"))
    assert pixels.shape[0] > 200
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_what_cannot_be_drawn(tmp_path):
    a = run_folder(tmp_path, "a")
    with pytest.raises(ValueError, match="wanted at least one run"):
        draw_curves([], tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"wanted terms that all runs have \(token, depth\); got tokens"):
        draw_curves([CurveRun("a", a)], tmp_path / "x.png", ["tokens"])
    with pytest.raises(ValueError, match="no such file; a run writes it where its recipe has held_out"):
        held_out_curve(tmp_path)
    for text, message in (
        ("", "wanted at least one line"),
        ('{"step": 1, "token": 2}\n[1]\n', "line 2: wanted one JSON object of numbers"),
        ('{"step": 1, "token": "x"}\n', "line 1: wanted one JSON object of numbers"),
        ('{"token": 1}\n', "line 1: wanted a step; got token"),
        ("{\n", "line 1: wanted one JSON object"),
    ):
        (a / "held_out.jsonl").write_text(text)
        with pytest.raises(ValueError, match=message):
            held_out_curve(a)
    assert not (tmp_path / "x.png").exists()


def test_runs_as_a_command_line_names_them(tmp_path):
    assert runs_of_words(["x/one", "b=y"], ["b=2.5"], ["one=3"]) == [
        CurveRun("one", tmp_path.__class__("x/one"), 0.0, 3.0),
        CurveRun("b", tmp_path.__class__("y"), 2.5, 1.0),
    ]
    for words, starts, message in (
        (["a=x", "a=y"], [], "wanted each label once; got 'a' twice"),
        (["a=x"], ["a=much"], "--start: wanted LABEL=NUMBER; got 'a=much'"),
        (["a=x"], ["b=1"], "wanted a label of a; got 'b'"),
        (["a=x"], ["a=-1"], "a: wanted a start of at least 0"),
        (["a=x"], ["a=nan"], "a: wanted a start of at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            runs_of_words(words, starts)

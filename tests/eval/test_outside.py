"""Predictions of other systems: every form that is read, and everything that can be wrong with them."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from vidllm.eval import run
from vidllm.eval.caption_scoring import score_caption_texts
from vidllm.eval.metrics.text_scorers import text_scores
from vidllm.eval.oriented import oriented_corners
from vidllm.eval.outside import read_outside
from vidllm.eval.report import write_report
from vidllm.eval.results import check_results
from vidllm.eval.score_outside import score_predictions
from vidllm.eval.train_facts import facts_of_rooms
from vidllm.eval.truth import named_objects
from vidllm.eval.work import plan
from vidllm.processing.video_reading_vidllm import VidLLMInputError


BENCHMARKS = ("scanqa", "sqa3d", "scanrefer", "scan2cap")


@pytest.fixture(scope="module")
def work(rooms_root):
    return plan(BENCHMARKS, str(rooms_root), None)


@pytest.fixture(scope="module")
def perfect(work, rooms_root):
    """What is right, as rows."""
    named = named_objects(str(rooms_root), "val")
    rows = {}
    for name in ("scanqa", "sqa3d"):
        rows[name] = [{"id": s.official_id, "answer": s.answers[0]} for s in work.benchmarks[name].samples]
    samples = work.benchmarks["scanrefer"].samples
    rows["scanrefer"] = [{"id": s.official_id, "box": s.boxes_annotation[0].tolist()} for s in samples]
    rows["scan2cap"] = []
    for sample in work.benchmarks["scan2cap"].samples:
        category, colour = named[sample.scene_id, sample.object_ids[0]]
        rows["scan2cap"].append({"id": sample.official_id, "caption": " ".join(filter(None, [colour, category]))})
    return rows


@pytest.fixture
def score(rooms_root, tmp_path, monkeypatch):
    facts = facts_of_rooms("easy", 5, 2)
    monkeypatch.setattr(run, "train_facts", lambda *_: facts)

    def score(benchmarks, predictions, root=rooms_root, **options):
        options = {"text": False, "command": "test", **options}
        return score_predictions(benchmarks, predictions, root, tmp_path / "out", **options)

    return score


def written(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def folder_of(path, rows):
    path.mkdir()
    for name, mine in rows.items():
        written(path / f"{name}.jsonl", mine)
    return path


def test_perfect_predictions_score_the_maximum(score, perfect, tmp_path, rooms_root, monkeypatch):
    monkeypatch.setattr(run, "load", lambda *_: pytest.fail("a model was loaded"))
    document = score(BENCHMARKS, folder_of(tmp_path / "said", perfect))
    check_results(document)
    results, baselines = document["runs"]["easy"]["results"], document["runs"]["easy"]["baselines"]
    assert results["scanqa"]["official"]["exact_match"] == results["sqa3d"]["leo"]["exact_match_refined"] == 1
    assert results["scanrefer"]["official"]["acc_0.5"] == results["scanrefer"]["oriented"]["acc_0.5"] == 1
    assert results["scan2cap"]["rooms"] == {"category_and_colour": 1}
    assert set(baselines) == {"blind", "majority", "constant"}
    assert 0 < baselines["blind"]["scanqa"]["official"]["exact_match"] < 1
    provenance = document["provenance"]
    assert (provenance["model"], provenance["weights_sha256"], provenance["frames"]) == ("said", {}, None)
    assert provenance["geometry"] == "not stated"
    assert set(provenance["predictions_sha256"]) == set(BENCHMARKS)
    assert provenance["seconds_per_scene"] is None
    # Our own form is read, too, and says the same.
    again = score_predictions(BENCHMARKS, tmp_path / "out" / "predictions", rooms_root, tmp_path / "again", text=False)
    assert again["runs"] == document["runs"]
    for name in BENCHMARKS:
        files = [tmp_path / folder / "predictions" / f"{name}.jsonl" for folder in ("out", "again")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_neither_frames_nor_cameras_are_needed(score, perfect, tmp_path, rooms_root):
    root = tmp_path / "root"
    shutil.copytree(rooms_root, root, ignore=shutil.ignore_patterns("posed_images", "videos"))
    document = score(BENCHMARKS, folder_of(tmp_path / "said", perfect), root=root)
    assert document["provenance"]["counts"]["scanrefer"]["scored"] == len(perfect["scanrefer"])
    # Their report does without pictures, and says of whom it is.
    write_report(tmp_path / "out", most_examples=4)
    for name in ("report.html", "report.md"):
        text = (tmp_path / "out" / name).read_text()
        assert "said on easy" in text
        assert "Predictions of another system, said, geometry not stated, 3 scenes" in text
        assert "Vid-LLM on" not in text
        assert "None" not in text.split("Provenance")[0]
        assert "2 of 2 boxes without pictures" in text
        assert "IoU" in text
        assert "<img" not in text


def test_captions_of_other_data_than_rooms_have_intervals_and_examples(score, work, tmp_path, rooms_root):
    """Compared with what people say, where nothing is right or wrong: nearest and farthest are shown."""
    root = tmp_path / "root"
    shutil.copytree(rooms_root, root)
    (root / "rooms.json").unlink()
    samples = work.benchmarks["scan2cap"].samples
    rows = [{"id": s.official_id, "caption": s.references[0] if n % 2 else "zebra"} for n, s in enumerate(samples)]
    document = score(["scan2cap"], written(tmp_path / "said.jsonl", rows), root=root, text=True)
    (result,) = document["runs"].values()
    assert "rooms" not in result["results"]["scan2cap"]
    write_report(tmp_path / "out", most_examples=4)
    intervals = json.loads((tmp_path / "out" / "intervals.json").read_text())["intervals"]["scan2cap"]
    low, high = intervals["scan2cap"]["cider"]
    assert low < result["results"]["scan2cap"]["scan2cap"]["cider"] < high
    assert {"rouge_l_f1@0.5", "bleu_4_f1@0.5"} <= set(intervals["benchmark_toolbox"])
    lines = [line for line in (tmp_path / "out" / "report.md").read_text().splitlines() if line.startswith("| cider")]
    assert len(lines) == 4
    assert ["zebra" in line for line in lines] == [False, False, True, True]


def test_a_long_description_is_not_cut_for_the_toolbox(work):
    """Scan2Cap's own scorer compares with thirty tokens of it, the toolbox with all."""
    part = work.benchmarks["scan2cap"]
    words = " ".join(f"word{number}" for number in range(40))
    samples = [replace(sample, references=(words,), official={}) for sample in part.samples]
    long = replace(part, samples=samples)
    for said, cut, whole in ((words, False, True), (" ".join(words.split()[:30]), True, False)):
        scores = score_caption_texts(long, [{"caption": said}] * len(samples))
        assert (scores["scan2cap"]["rouge_l"] > 1 - 1e-9) == cut
        assert (scores["benchmark_toolbox"]["rouge_l_f1@0.5"] > 1 - 1e-9) == whole


@pytest.mark.parametrize("form", ["list", "by id", "lines in another order", "windows", "one file for all"])
def test_forms_of_a_file(work, perfect, tmp_path, form):
    rows, asked = perfect["scanqa"], {"scanqa": work.benchmarks["scanqa"]}
    if form == "list":
        path = tmp_path / "said.json"
        path.write_text(json.dumps(rows))
    elif form == "by id":
        path = tmp_path / "said.json"
        path.write_text(json.dumps({row["id"]: {"answer": row["answer"]} for row in rows}))
    elif form == "lines in another order":
        path = written(tmp_path / "said.jsonl", rows[::-1])
    elif form == "windows":
        path = tmp_path / "said.jsonl"
        path.write_bytes(b"\xef\xbb\xbf" + "".join(json.dumps(row) + "\r\n\r\n" for row in rows).encode())
    else:
        path = tmp_path / "said.jsonl"
        written(path, [{**row, "benchmark": name} for name, mine in perfect.items() for row in mine])
        asked = work.benchmarks
    found = read_outside(path, asked)
    assert [(r["id"], r["answer"]) for r in found.records["scanqa"]] == [(r["id"], r["answer"]) for r in rows]
    assert [record["scene"] for record in found.records["scanqa"]] == [
        sample.scene_id for sample in work.benchmarks["scanqa"].samples
    ]
    assert len(found.sha256) == len(asked)


def test_keys_of_the_authors(work, perfect, tmp_path):
    asked = {"scanqa": work.benchmarks["scanqa"]}
    rows = [
        {"scene_id": "any", "question_id": row["id"], "answer_top10": ["wrong", row["answer"]], "bbox": []}
        for row in perfect["scanqa"]
    ]
    found = read_outside(written(tmp_path / "qa.jsonl", rows), asked)
    assert found.records["scanqa"][0]["answers"] == ["wrong", perfect["scanqa"][0]["answer"]]
    rows = []
    for row in perfect["scanrefer"]:
        scene, thing, annotation = row["id"].split("|")
        corners = oriented_corners(np.array([*row["box"], 0, 0, 0])).tolist()
        rows.append({"scene_id": scene, "object_id": thing, "ann_id": int(annotation), "pred_bbox": corners})
    found = read_outside(written(tmp_path / "ref.jsonl", rows), {"scanrefer": work.benchmarks["scanrefer"]})
    for record, row in zip(found.records["scanrefer"], perfect["scanrefer"], strict=True):
        np.testing.assert_allclose(record["box_annotation"], row["box"], atol=1e-9)
    # Numbers as ids, as SQA3D's files have them.
    rows = [{"question_id": int(row["id"]), "answer": row["answer"]} for row in perfect["sqa3d"]]
    assert len(
        read_outside(written(tmp_path / "sqa.jsonl", rows), {"sqa3d": work.benchmarks["sqa3d"]}).records["sqa3d"]
    )


def test_answers_in_order_have_a_score_of_their_own(score, perfect, tmp_path):
    rows = [{"id": row["id"], "answers": ["wrong", row["answer"]]} for row in perfect["scanqa"]]
    official = score(["scanqa"], written(tmp_path / "said.jsonl", rows))["runs"]["easy"]["results"]["scanqa"][
        "official"
    ]
    assert (official["exact_match"], official["exact_match_at_10"]) == (0, 1)


def test_a_turned_box_and_no_box(score, perfect, tmp_path):
    rows = [{"id": row["id"], "box": [*row["box"], np.pi / 2, 0, 0]} for row in perfect["scanrefer"]]
    cubes = [row["box"][3] == pytest.approx(row["box"][4], rel=0.3) for row in perfect["scanrefer"]]
    assert not all(cubes)
    results = score(["scanrefer"], written(tmp_path / "said.jsonl", rows))["runs"]["easy"]["results"]["scanrefer"]
    # The box around a quarter turn is upright again, with its edges swapped, and is the very body that was turned.
    assert results["official"] == pytest.approx(results["oriented"])
    assert results["official"]["acc_0.5"] < 1
    nothing = [{"id": row["id"], "box": None} for row in perfect["scanrefer"]]
    with pytest.raises(VidLLMInputError, match="holds predictions of other settings"):
        score(["scanrefer"], written(tmp_path / "said.jsonl", nothing))
    shutil.rmtree(tmp_path / "out")
    results = score(["scanrefer"], tmp_path / "said.jsonl")["runs"]["easy"]["results"]["scanrefer"]
    assert results["official"]["acc_0.25"] == results["oriented"]["acc_0.25"] == 0


def test_captions_of_proposals(score, work, perfect, tmp_path):
    rows = []
    for number, (row, sample) in enumerate(zip(perfect["scan2cap"], work.benchmarks["scan2cap"].samples, strict=True)):
        near = sample.boxes_annotation[0].copy()
        # IoU 1, 0.6 / 1.4 = 0.43, none.
        near[0] += (0, 0.4 * near[3], 99)[number % 3]
        rows.append({"id": row["id"], "caption": sample.references[0], "box": near.tolist()})
    document = score(["scan2cap"], written(tmp_path / "said.jsonl", rows), text=True)
    results = document["runs"]["easy"]["results"]["scan2cap"]
    assert set(results) == {"rooms", "scan2cap", "leo", "video3dllm", "ll3da"}
    for protocol in ("scan2cap", "leo"):
        assert 0 < results[protocol]["cider"] < results[protocol]["iou_0.25/cider"]
    assert any("captions are of proposals" in note for note in document["provenance"]["notes"])
    del rows[1]["box"]
    with pytest.raises(VidLLMInputError, match=r"line 2: wanted `box`, because other rows have one"):
        score(["scan2cap"], written(tmp_path / "said.jsonl", rows))


STRANGE = [
    "",
    " ",
    "\r",
    "a\r\nb",
    "\u2028",
    "x\u2028y\u2029z\x85w\x0b",
    "\U0001f600",
    "red " * 2500,
    "|||",
    "\x00",
    "-lrb-",
]


def test_strange_texts_move_no_other_row(score, perfect, tmp_path):
    """Rows that are right stay right in every score, whatever stands between them."""
    rows = [dict(row) for row in perfect["scanqa"]]
    places = list(range(0, 2 * len(STRANGE), 2))
    assert len(rows) > places[-1] + 1
    for place, text in zip(places, STRANGE, strict=True):
        rows[place]["answer"] = text
    document = score(["scanqa"], written(tmp_path / "said.jsonl", rows), text=True)
    scores = document["runs"]["easy"]["results"]["scanqa"]
    right = (len(rows) - len(STRANGE)) / len(rows)
    assert scores["official"]["exact_match"] == pytest.approx(right)
    kept = [
        json.loads(line)["answer"]
        for line in (tmp_path / "out/predictions/scanqa.jsonl").read_bytes().split(b"\n")[:-1]
    ]
    assert kept == [row["answer"] for row in rows]
    # A shift by one line would leave next to nothing of it.
    for protocol in ("official", "llava3d", "video3dllm"):
        assert scores[protocol]["rouge_l"] == pytest.approx(right, abs=0.03)
        assert scores[protocol]["cider"] > 0
    if document["provenance"]["text_scores"] == "computed":
        texts = text_scores(
            [row["answer"] for row in rows], [[row["answer"]] for row in perfect["scanqa"]], tokenize=True
        )
        of_right = [n for n in range(len(rows)) if n not in places]
        assert texts.each["meteor"][of_right].min() > 0.4
        assert texts.each["meteor"][places].max() < 0.1
        assert 0 < scores["official"]["meteor"] < 1


def first_row(rows, **changes):
    return [{**rows[0], **changes}, *rows[1:]]


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("scanqa", lambda rows: rows[:-2], r"wanted a prediction of each of \d+ rows of scanqa; 2 have none, such as val-"),
        ("scanqa", lambda rows: [*rows, rows[3]], r"line \d+: wanted one prediction of .*line 4 is one, too"),
        ("scanqa", lambda rows: [*rows, {"id": "val-none", "answer": ""}], "wanted an id of scanqa's val split; got 'val-none'"),
        ("scanqa", lambda rows: first_row(rows, answer=3), "line 1: wanted a text as `answer`; got 3"),
        ("scanqa", lambda rows: first_row(rows, answer=None), "line 1: wanted a text as `answer`; got None"),
        ("scanqa", lambda rows: [{"id": rows[0]["id"]}, *rows[1:]], r"line 1: wanted `answer`; got \['id'\]"),
        ("scanqa", lambda rows: [{"id": rows[0]["id"], "answers": []}, *rows[1:]], "wanted a list of texts as `answers`"),
        ("scanqa", lambda rows: [{"id": rows[0]["id"], "answers": ["a", 1]}, *rows[1:]], "wanted a text as `answers`; got 1"),
        ("scanqa", lambda rows: first_row(rows, id=True), "wanted a text or a whole number as `id`"),
        ("scanqa", lambda rows: [{"answer": "a"}, *rows], "line 1: wanted `id`"),
        ("scanqa", lambda rows: [["a"], *rows], "line 1: wanted an object"),
        ("scanqa", lambda rows: [], "wanted a prediction of each of"),
        ("scanrefer", lambda rows: first_row(rows, box=[0, 0, 0, 1, 1]), "line 1: wanted 6, 9 or 8 x 3 finite numbers"),
        ("scanrefer", lambda rows: first_row(rows, box=[0, 0, 0, 1, 1, float("nan")]), "line 1: wanted 6, 9 or 8 x 3 finite"),
        ("scanrefer", lambda rows: first_row(rows, box=[0, 0, 0, 1, 1, float("inf")]), "line 1: wanted 6, 9 or 8 x 3 finite"),
        ("scanrefer", lambda rows: first_row(rows, box=[0, 0, 0, 1, 1, -1]), "line 1: wanted edge lengths from 0"),
        ("scanrefer", lambda rows: first_row(rows, box=["0", 0, 0, 1, 1, 1]), "line 1: wanted 6, 9 or 8 x 3 finite numbers"),
        ("scanrefer", lambda rows: first_row(rows, box=[True, 0, 0, 1, 1, 1]), "line 1: wanted 6, 9 or 8 x 3 finite numbers"),
        ("scanrefer", lambda rows: first_row(rows, box=[[0], [0, 1]]), "line 1: wanted 6, 9 or 8 x 3 finite numbers"),
        ("scanrefer", lambda rows: first_row(rows, box="[0,0,0,1,1,1]"), "line 1: wanted 6, 9 or 8 x 3 finite numbers"),
        ("scanrefer", lambda rows: first_row(rows, box=[10**400, 0, 0, 1, 1, 1]), "line 1: wanted 6, 9 or 8 x 3 finite"),
        ("scan2cap", lambda rows: first_row(rows, caption=["a"]), "line 1: wanted a text as `caption`"),
    ],
)  # fmt: skip
def test_broken_predictions_are_one_error_and_nothing_is_written(score, perfect, tmp_path, name, spoil, message):
    with pytest.raises(VidLLMInputError, match=message):
        score([name], written(tmp_path / "said.jsonl", spoil(perfect[name])))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"id": "a", "answer": "\xff"}\n', "line 1: wanted JSON in UTF-8"),
        (b'\n{"id": "a", "answer": \n', "line 2: wanted JSON in UTF-8"),
        (b'{"id": "a", "answer": "b", "answer": "c"}\n', "line 1: wanted every key once; 'answer' is there twice"),
        (b"[" * 100_000 + b"\n", "line 1: wanted JSON in UTF-8"),
        (
            b'{"id": "%s", "answer": "\\ud83d"}\n',
            "line 1: wanted characters as `answer`, not half of a surrogate pair",
        ),
    ],
)
def test_broken_files_are_one_error(score, perfect, tmp_path, content, message):
    (tmp_path / "said.jsonl").write_bytes(content.replace(b"%s", perfect["scanqa"][0]["id"].encode()) + "".join(
        json.dumps(row) + "\n" for row in perfect["scanqa"][1:]
    ).encode())  # fmt: skip
    with pytest.raises(VidLLMInputError, match=message):
        score(["scanqa"], tmp_path / "said.jsonl")


def test_files_that_are_no_predictions(score, perfect, tmp_path, work):
    with pytest.raises(VidLLMInputError, match="cannot be read"):
        score(["scanqa"], tmp_path / "none.jsonl")
    (tmp_path / "said.txt").write_text("")
    with pytest.raises(VidLLMInputError, match=r"got \.txt"):
        score(["scanqa"], tmp_path / "said.txt")
    folder = folder_of(tmp_path / "said", {"scanqa": perfect["scanqa"]})
    with pytest.raises(VidLLMInputError, match=r"wanted one of sqa3d.jsonl and sqa3d.json; got none"):
        score(["scanqa", "sqa3d"], folder)
    (folder / "scanqa.json").write_text("[]")
    with pytest.raises(VidLLMInputError, match=r"got scanqa.jsonl and scanqa.json"):
        score(["scanqa"], folder)
    with pytest.raises(VidLLMInputError, match="wanted `benchmark`, because several are asked for"):
        score(["scanqa", "sqa3d"], folder / "scanqa.jsonl")
    with pytest.raises(VidLLMInputError, match="reconstruction needs a model"):
        score(["scanqa", "reconstruction"], folder)
    (tmp_path / "said.json").write_text('"text"')
    with pytest.raises(VidLLMInputError, match="wanted a list of predictions, or an object"):
        score(["scanqa"], tmp_path / "said.json")


def test_rows_that_are_not_asked_are_counted(score, perfect, tmp_path):
    document = score(["scanqa"], written(tmp_path / "said.jsonl", perfect["scanqa"]), limit_scenes=1)
    scored = document["provenance"]["counts"]["scanqa"]["scored"]
    assert 0 < scored < len(perfect["scanqa"])
    assert f"scanqa: {len(perfect['scanqa']) - scored} predictions were not read" in " ".join(
        document["provenance"]["notes"]
    )

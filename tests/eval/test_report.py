"""Reports: what they say is what was scored, nothing is loaded or run by the page, boxes stand where they are."""

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vidllm.cli import app
from vidllm.eval import predict, run, train_facts
from vidllm.eval.predictions import PredictionFile
from vidllm.eval.report import write_report
from vidllm.eval.report_pictures import best_frame, box_corners, box_lines_px, data_uri, frame_picture, map_picture
from vidllm.eval.results import read_results, table_rows
from vidllm.eval.run import run_evaluation
from vidllm.eval.work import EVAL_BENCHMARKS
from vidllm.processing.benchmarks.frames import SceneFrames
from vidllm.processing.video_reading_vidllm import VidLLMInputError


DANGEROUS = "<script>alert(1)</script> | \r\n`x` ![p](//e) &lt; a\\|b"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, loaded, rooms_root):
    """A run with one answer that is right and one that is dangerous."""
    out = tmp_path_factory.mktemp("report") / "run"
    patch = pytest.MonkeyPatch()
    patch.setattr(predict, "MAX_NEW_TOKENS", {"qa": 4, "sqa": 4, "caption": 6, "ground": 8})
    patch.setattr(run, "MAX_NEW_TOKENS", predict.MAX_NEW_TOKENS)
    facts = train_facts.facts_of_rooms("easy", 5, 2)
    patch.setattr(run, "train_facts", lambda *_: facts)
    again = {"num_frames": 3, "model_name": "tiny", "command": "vidllm eval <all>"}
    run_evaluation(EVAL_BENCHMARKS, loaded, rooms_root, out, **again)
    path = out / "predictions" / "scanqa.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["answer"], lines[1]["answer"] = DANGEROUS, "\u2028\U0001f600"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_evaluation(EVAL_BENCHMARKS, loaded, rooms_root, out, **again)
    patch.undo()
    write_report(out, most_examples=1000)
    return out


class Tags(HTMLParser):
    """Tags and their attributes, and the texts between them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_every_score_stands_in_both_files_with_its_baselines(finished):
    (result,) = read_results(finished)["runs"].values()
    page, markdown = ((finished / name).read_text() for name in ("report.html", "report.md"))
    texts = "\n".join(Tags(page).texts)
    for row in table_rows(result):
        assert f"{row['model']:.3f}" in texts
        cells = f"| {row['benchmark']} | {row['protocol']} | {row['metric']} | {row['model']:.3f}"
        (line,) = [line for line in markdown.splitlines() if line.startswith(cells + " ")]
        for kind in result["baselines"]:
            if kind in row:
                assert f"{row[kind]:.3f}" in line
    assert re.search(r"\| scanqa \| official \| exact_match \| \d\.\d{3} \[\d\.\d{3} to \d\.\d{3}\] \|", markdown)


def test_what_has_an_interval(finished):
    """Everything that is a mean over rows, of every protocol and kind; BLEU is none, and the report says so."""
    (result,) = read_results(finished)["runs"].values()
    markdown = (finished / "report.md").read_text()
    intervals = json.loads((finished / "intervals.json").read_text())["intervals"]
    bare = set()
    for row in table_rows(result):
        found = intervals[row["benchmark"]].get(row["protocol"], {}).get(row["metric"])
        if found is None:
            bare.add(row["metric"].split("/")[-1])
        else:
            assert found[0] <= row["model"] + 1e-9, row
            assert row["model"] <= found[1] + 1e-9, row
    assert bare <= {"bleu_1", "bleu_2", "bleu_3", "bleu_4"}
    assert bare
    assert "BLEU has no interval" in markdown
    assert "BLEU has no interval" in (finished / "report.html").read_text()
    assert re.search(
        r"\| scanqa \| official \| [^|/]+/exact_match \| \d\.\d{3} \[\d\.\d{3} to \d\.\d{3}\] \|", markdown
    )


def test_the_page_is_well_formed_loads_nothing_and_runs_nothing(finished):
    page = (finished / "report.html").read_text()
    parsed = Tags(page)
    assert parsed.open == []
    names = {tag for tag, _ in parsed.tags}
    assert not names & {"script", "link", "iframe", "object", "form"}
    for tag, attributes in parsed.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        if "src" in attributes:
            assert attributes["src"].startswith("data:image/png;base64,")
        assert "href" not in attributes
    assert "url(" not in page
    # what a model says is text
    assert any("<script>alert(1)</script>" in text for text in parsed.texts)
    assert any("\U0001f600" in text for text in parsed.texts)


def test_markdown_cells_stay_within_their_rows(finished):
    lines = (finished / "report.md").read_text().splitlines()
    (line,) = [line for line in lines if "alert(1)" in line]
    assert r"| \<script>alert(1)\</script> \| \`x\` \!\[p](//e) \&lt; a\\\|b |" in line
    assert len(re.findall(r"(?<!\\)\|", line)) == 6


def test_boxes_are_shown_on_frames_and_maps(finished):
    pictures = [
        attributes["src"] for tag, attributes in Tags((finished / "report.html").read_text()).tags if tag == "img"
    ]
    assert len(pictures) > 4


def test_the_reconstruction_has_curves_and_pictures(finished):
    page, markdown = ((finished / name).read_text() for name in ("report.html", "report.md"))
    parsed = Tags(page)
    lines = [attributes["points"] for tag, attributes in parsed.tags if tag == "polyline"]
    # poses and depth, the model and the constant reconstruction
    assert len(lines) == 4
    heights = [[float(point.split(",")[1]) for point in line.split()] for line in lines]
    for line in heights:
        assert len(line) in (20, 30)
        assert line == sorted(line, reverse=True)
        assert all(10 <= height <= 170 for height in line)
    shown = [attributes["alt"] for tag, attributes in parsed.tags if tag == "img" and attributes["alt"]]
    kinds = ["true depth", "predicted depth, same colours", "way of the camera from above"]
    assert [name.split(", 0.")[0].split(", 1.")[0].split(", 2.")[0] for name in shown] == kinds * 2
    assert {"best poses", "worst poses"} <= set(parsed.texts)
    records = PredictionFile(finished / "predictions" / "reconstruction.jsonl").records
    # at 30 degrees, the mean of the scenes
    (line,) = re.findall(r"^\| 30 \| (\S+) \| (\S+) \|$", markdown, re.MULTILINE)
    for found, name in zip(line, ("model", "constant"), strict=True):
        assert float(found) == pytest.approx(
            np.mean([r["curves"][name]["pairs"][-1] for r in records.values()]), abs=5e-4
        )


def test_results_written_before_there_were_curves_can_be_reported(finished, tmp_path):
    old = shutil.copytree(finished, tmp_path / "old")
    path = old / "predictions" / "reconstruction.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    document = json.loads((old / "results.json").read_text())
    (result,) = document["runs"].values()
    lists = [result["results"], *result["baselines"].values()]
    metrics = [found["reconstruction"]["metric"] for found in lists if "reconstruction" in found]
    metrics += [record[part]["metric"] for record in records for part in ("scores", "constant")]
    assert len(metrics) > 4
    for found in metrics:
        for name in ("fscore_5cm", "accuracy_m", "completeness_m"):
            del found[name]
    for record in records:
        del record["curves"], record["view"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    (old / "results.json").write_text(json.dumps(document))
    write_report(old, most_examples=2)
    page = (old / "report.html").read_text()
    assert "<svg" not in page
    assert "best poses" not in page
    assert "| reconstruction | metric | abs_rel |" in (old / "report.md").read_text()


def test_a_folder_without_a_run_and_other_annotations_are_refused(finished, tmp_path, rooms_root):
    with pytest.raises(VidLLMInputError, match="cannot be read"):
        write_report(tmp_path)
    settings = finished / "settings.json"
    kept = settings.read_text()
    changed = json.loads(kept)
    changed["benchmarks"]["scanqa"]["annotations_sha256"] = {"x": "0"}
    settings.write_text(json.dumps(changed))
    try:
        with pytest.raises(
            VidLLMInputError, match=r"the annotations of scanqa in .* are not those that were evaluated"
        ):
            write_report(finished)
        settings.write_text("{}")
        with pytest.raises(VidLLMInputError, match="wanted the settings of an evaluation"):
            write_report(finished)
    finally:
        settings.write_text(kept)


def test_the_command(finished):
    done = CliRunner().invoke(app, ["report", str(finished), "--examples", "2"])
    assert done.exit_code == 0, done.output
    assert (finished / "report.html").stat().st_size < 2_000_000


def test_predictions_that_are_missing_are_told(finished):
    records = PredictionFile(finished / "predictions" / "scanqa.jsonl").records
    assert len(records) > 2


# ---------------------------------------------------------------------- pictures


def frames_of_two(height=60, width=90):
    """Two cameras 1 m apart that look along +y of the annotation frame, z up."""
    cam_from_annotation = np.eye(4)
    cam_from_annotation[:3, :3] = [[1, 0, 0], [0, 0, -1], [0, 1, 0]]
    second = np.eye(4)
    second[0, 3] = -1.0
    intrinsics = np.array([[60.0, 0, width / 2], [0, 60.0, height / 2], [0, 0, 1]])
    return SceneFrames(
        scene_id="s", source="test", indices=[0, 1], frame_ids=[0, 1], rgb=[np.zeros((height, width, 3), np.uint8)] * 2,
        depth_m=None, intrinsics_px=np.stack([intrinsics] * 2), cam_from_world=np.stack([np.eye(4), second]),
        annotation_from_world=np.linalg.inv(cam_from_annotation), timestamps_s=None,
    )  # fmt: skip


def test_corners_and_edges_of_a_box():
    corners = box_corners([1, 2, 3, 2, 4, 6])
    assert corners.min(axis=0).tolist() == [0, 0, 0]
    assert corners.max(axis=0).tolist() == [2, 4, 6]
    assert len(np.unique(corners, axis=0)) == 8
    lines = box_lines_px([0, 0, 4, 2, 2, 2], np.eye(4), np.array([[60.0, 0, 45], [0, 60, 30], [0, 0, 1]]))
    assert len(lines) == 12
    ends = np.concatenate(lines)
    # the near face, 3 m away, is seen 20 px to each side of the middle
    assert ends.min(axis=0) == pytest.approx([25, 10])
    assert ends.max(axis=0) == pytest.approx([65, 50])


def test_edges_that_pass_the_camera_are_cut_and_those_behind_it_left_out():
    intrinsics = np.array([[60.0, 0, 45], [0, 60, 30], [0, 0, 1]])
    around = box_lines_px([0, 0, 0, 2, 2, 2], np.eye(4), intrinsics)
    assert len(around) == 8
    assert np.isfinite(np.concatenate(around)).all()
    assert box_lines_px([0, 0, -4, 2, 2, 2], np.eye(4), intrinsics) == []


def test_the_frame_with_the_box_in_its_middle_is_chosen():
    frames = frames_of_two()
    # camera 0 stands at x = 0, camera 1 at x = 1, both look along y
    assert best_frame([0.1, 4, 0, 1, 1, 1], frames) == 0
    assert best_frame([1.1, 4, 0, 1, 1, 1], frames) == 1
    assert best_frame([0, -4, 0, 1, 1, 1], frames) is None


def test_pictures_show_both_boxes():
    frames = frames_of_two()
    true, found = [0.0, 4, 0, 1, 1, 1], [0.8, 4, 0, 1, 1, 1]
    for picture in (frame_picture(frames, 0, true, found), map_picture(frames, true, found)):
        colours = {colour for _, colour in picture.getcolors(1 << 20)}
        assert {(20, 160, 60), (210, 60, 30)} <= colours
    green = np.argwhere((np.asarray(frame_picture(frames, 0, true, None, 90)) == (20, 160, 60)).all(-1))
    # 1 m at 3.5 m and 60 px: 8.6 px to each side of the middle
    assert green[:, 1].min() == pytest.approx(45 - 8.6, abs=2)
    assert green[:, 1].max() == pytest.approx(45 + 8.6, abs=2)
    assert map_picture(frames, true, None).size == (240, 240)
    assert data_uri(Image.new("RGB", (3, 2))).startswith("data:image/png;base64,")

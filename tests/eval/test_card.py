"""Model cards: written from a run of the evaluation, its recipe and its log; nothing in them that no file says."""

import html
import json
import re
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from typer.testing import CliRunner

from vidllm.cli import app
from vidllm.eval import predict, run, train_facts
from vidllm.eval.card import check_card, write_card
from vidllm.eval.card_context import behind_baselines
from vidllm.eval.card_facts import MeasuredRun, read_training
from vidllm.eval.card_hub import TASKS
from vidllm.eval.places import without_places
from vidllm.eval.report import write_report
from vidllm.eval.results import read_results, table_rows
from vidllm.eval.run import run_evaluation
from vidllm.eval.work import EVAL_BENCHMARKS
from vidllm.processing.video_reading_vidllm import VidLLMInputError
from vidllm.train.distill_recipes import DISTILL_RECIPES
from vidllm.train.initialise import initialise
from vidllm.train.recipes import RECIPES, debug, nano_lora, plain


@pytest.fixture(scope="module")
def measured(tmp_path_factory, model_dir, rooms_root):
    """A run of all benchmarks with its report, on the weights of a checkpoint folder."""
    out = tmp_path_factory.mktemp("card") / "run"
    patch = pytest.MonkeyPatch()
    patch.setattr(predict, "MAX_NEW_TOKENS", {"qa": 3, "sqa": 3, "caption": 3, "ground": 4})
    patch.setattr(run, "MAX_NEW_TOKENS", predict.MAX_NEW_TOKENS)
    facts = train_facts.facts_of_rooms("easy", 5, 2)
    patch.setattr(run, "train_facts", lambda *_: facts)
    run_evaluation(EVAL_BENCHMARKS, str(model_dir), rooms_root, out, num_frames=3, command="vidllm eval <all>")
    patch.undo()
    write_report(out, most_examples=2)
    return out


@pytest.fixture
def trained(tmp_path, model_dir):
    """The same checkpoint in a folder of its own, as one that was trained."""
    folder = shutil.copytree(model_dir, tmp_path / "tiny")
    (folder / "initialisation.json").unlink()
    return folder


def write_run(folder, recipe, seconds=(2.0, 3.0)):
    """A folder of a training run with a recipe and a log."""
    folder.mkdir()
    document = {
        "recipe": plain(recipe),
        "versions": {"vidllm": "0.1", "torch": "2.13.0", "transformers": "5.23.0", "device": "cpu"},
        "git": {"commit": "0123456789abcdef", "changed": True},
        "processes": 2,
    }
    (folder / "recipe.json").write_text(json.dumps(document))
    lines = [
        {"step": 1, "loss": 2.0, "seconds_per_step": seconds[0]},
        {"step": 11, "loss": 1.0, "seconds_per_step": seconds[1]},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def body(folder):
    return ModelCard.load(folder / "README.md").text


def test_every_number_stands_there_with_its_interval_and_baselines(measured, trained):
    written = write_card(trained, [measured])
    document = read_results(measured)
    (result,) = document["runs"].values()
    text = body(trained)
    for row in table_rows(result):
        cells = f"| {row['benchmark']} | {row['protocol']} | {row['metric']} | {row['model']:.3f} |"
        (line,) = [line for line in text.splitlines() if line.startswith(cells)]
        for kind in result["baselines"]:
            if kind in row:
                assert f"| {row[kind]:.3f} |" in line
    assert re.search(r"\| scanqa \| official \| exact_match \| \d\.\d{3} \| \d\.\d{3} to \d\.\d{3} \|", text)
    assert written.numbers > sum(1 for _ in table_rows(result))
    assert check_card(trained) > written.numbers
    kept = json.loads((trained / "results" / "easy" / "results.json").read_text())
    assert kept["runs"] == document["runs"]
    assert kept["provenance"]["data_root"] == "rooms"
    assert "(results/easy/report.html)" in text
    page = (trained / "results" / "easy" / "report.html").read_text()
    assert html.unescape(page) == html.unescape((measured / "report.html").read_text())
    for path in trained.rglob("*.*"):
        if path.suffix in (".md", ".html", ".json"):
            assert str(measured.parent) not in path.read_text()
    sections = [line for line in text.splitlines() if line.startswith("## ")]
    for name in (
        "Intended use",
        "Out of scope",
        "Data and licences",
        "Training recipe and cost",
        "Results",
        "Limits",
        "Not verified",
        "Citation",
    ):
        assert f"## {name}" in sections
    assert "trust_remote_code=True" in text
    assert "vidllm ground room.mp4" in text


def test_the_header_is_what_the_hub_reads(measured, trained):
    write_card(trained, [measured])
    data = ModelCard.load(trained / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.model_name) == ("transformers", "video-text-to-text", "tiny")
    (result,) = read_results(measured)["runs"].values()
    found = {
        (one.dataset_type, one.metric_args["protocol"], one.metric_type): one.metric_value for one in data.eval_results
    }
    assert found == {
        (row["benchmark"], row["protocol"], row["metric"]): row["model"]
        for row in table_rows(result)
        if "/" not in row["metric"]
    }
    assert set(TASKS) == set(EVAL_BENCHMARKS)
    assert {one.dataset_name for one in data.eval_results if one.dataset_type == "scanqa"} == {
        "scanqa (procedural rooms, level easy)"
    }


def test_a_report_needs_the_predictions_that_were_scored(measured, tmp_path):
    found = json.loads((measured / "intervals.json").read_text())
    (result,) = read_results(measured)["runs"].values()
    low, high = found["intervals"]["reconstruction"]["metric"]["abs_rel"]
    assert low <= result["results"]["reconstruction"]["metric"]["abs_rel"] <= high
    copy = shutil.copytree(measured, tmp_path / "copy")
    path = copy / "predictions" / "reconstruction.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["scores"]["metric"]["abs_rel"] += 1
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(
        VidLLMInputError, match="wanted the predictions that were scored; reconstruction, metric, abs_rel"
    ):
        write_report(copy)


def test_a_run_without_a_report_gives_a_card_without_intervals(measured, trained, tmp_path):
    write_card(trained, [measured])
    assert "| interval |" in body(trained)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(measured / "results.json", bare)
    written = write_card(trained, [bare / "results.json"])
    assert any("easy: no report, so no intervals; `vidllm report" in notice for notice in written.notices)
    assert "| interval |" not in body(trained)
    assert "Some results have no intervals and no report." in body(trained)
    assert [path.name for path in (trained / "results" / "easy").iterdir()] == ["results.json"]
    assert check_card(trained) > 0


def test_a_run_that_was_evaluated_into_the_checkpoint_is_taken_from_there(measured, trained):
    shutil.copytree(measured, trained / "results" / "easy")
    write_card(trained)
    assert check_card(trained) > 0
    kept = json.loads((trained / "results" / "easy" / "results.json").read_text())
    assert kept["provenance"]["data_root"] == "rooms"
    (trained / "results" / "easy").rename(trained / "results" / "other")
    with pytest.raises(VidLLMInputError, match="wanted a folder named after its run, easy"):
        write_card(trained)


def test_recipe_and_cost_come_from_the_files_of_the_runs(measured, trained, tmp_path):
    first = write_run(tmp_path / "first", debug())
    second = write_run(tmp_path / "second", debug(), seconds=(1.0, 1.0))
    write_card(trained, [measured], recipes=[first, second / "recipe.json"])
    text = body(trained)
    # 1 step of 2 s and 10 of 3 s; 11 of 1 s
    for row in (
        "steps in the log | 11 | 11",
        "seconds per step | 2.91 | 1.00",
        "hours | 0.01 | 0.00",
        "processes | 2 | 2",
    ):
        assert f"| {row} |" in text
    assert "| started from | `vidllm-tiny` | `vidllm-tiny` |" in text
    assert "0123456789ab, changed" in text
    assert "Run 2 was trained by a source tree that differed from its commit." in text
    assert "no licence of theirs holds" in text
    assert ModelCard.load(trained / "README.md").data.license == "apache-2.0"
    kept = json.loads((trained / "training.json").read_text())["runs"]
    assert [run["cost"]["steps"] for run in kept] == [11, 11]
    assert check_card(trained) > 0
    # and again from what is in the folder
    before = (trained / "README.md").read_bytes()
    write_card(trained)
    assert (trained / "README.md").read_bytes() == before


def test_what_was_trained_on_other_data_claims_no_licence(measured, trained, tmp_path):
    from dataclasses import replace

    recipe = replace(nano_lora(), model="/somewhere/start", data="/somewhere/my.jsonl")
    (trained / "recipe.json").write_text((write_run(tmp_path / "run", recipe) / "recipe.json").read_text())
    assert "no licence of the weights is stated (--license)" in write_card(trained, [measured]).notices
    text = body(trained)
    assert ModelCard.load(trained / "README.md").data.license is None
    assert "Training started from `start`; the licences of what that was made of hold." in text
    assert "own videos, `my.jsonl`. Their licence is not known to this card." in text
    assert "A licence of the weights is not stated" in text
    assert "/somewhere" not in text
    assert not any("--license" in notice for notice in write_card(trained, [measured], licence="cc-by-nc-4.0").notices)
    assert "Licence of the weights: cc-by-nc-4.0." in body(trained)
    assert check_card(trained) > 0


def test_untrained_weights_are_called_so(measured, model_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "tiny")
    write_card(folder, [measured])
    text = body(folder)
    assert "parameters (untrained; stored in float32)" in text
    assert "Weights are random: answers, boxes and reconstructions mean nothing." in text
    assert "untrained" in ModelCard.load(folder / "README.md").data.tags


def test_a_card_says_that_poses_are_refined(measured, trained):
    """Not to be mistaken for what the network alone can do."""
    write_card(trained, [measured])
    assert "made exact against the pictures" not in body(trained)
    config = json.loads((trained / "config.json").read_text())
    (trained / "config.json").write_text(json.dumps({**config, "pose_refinement_sizes": [12]}))
    write_card(trained, [measured])
    assert "The poses that the network predicts are then made exact against the pictures" in body(trained)
    assert "walls" not in body(trained)
    more = {"pose_refinement_sizes": [12], "pose_refinement_depth_grid": [2, 3], "align_room_to_walls": True}
    (trained / "config.json").write_text(json.dumps({**config, **more}))
    write_card(trained, [measured])
    assert "The poses and the depth that the network predicts are then made exact against the pictures" in body(
        trained
    )
    assert "is read off the walls of its reconstruction" in body(trained)
    assert "focal length" not in body(trained)
    (trained / "config.json").write_text(json.dumps({**config, **more, "pose_refinement_focal_spread": 0.1}))
    write_card(trained, [measured])
    assert "The poses, the depth and the focal length that the network predicts are then made exact" in body(trained)
    assert "`pose_refinement_focal_spread: 0` leaves the focal length" in body(trained)


def test_numbers_for_the_hubs_leaderboards(measured, trained):
    place = "easy/scanqa/official/exact_match"
    write_card(trained, [measured], hub_datasets=[f"{place}=someone/rooms:scanqa_easy"])
    listed = yaml.safe_load((trained / ".eval_results" / "easy.yaml").read_text())
    (entry,) = parse_eval_result_entries(listed)
    (result,) = read_results(measured)["runs"].values()
    assert (entry.dataset_id, entry.task_id) == ("someone/rooms", "scanqa_easy")
    assert entry.value == result["results"]["scanqa"]["official"]["exact_match"]
    assert "protocol official, geometry predicted, 3 frames" in entry.notes
    numbers = check_card(trained)
    write_card(trained)
    assert check_card(trained) == numbers
    (trained / ".eval_results" / "easy.yaml").write_text(yaml.safe_dump([{**listed[0], "value": 0.99}]))
    with pytest.raises(VidLLMInputError, match=r"easy\.yaml, someone/rooms, scanqa_easy, .*: wanted .*; got 0\.99"):
        check_card(trained)
    with pytest.raises(VidLLMInputError, match="wanted RUN/BENCHMARK/PROTOCOL/METRIC=OWNER/NAME:TASK"):
        write_card(trained, [measured], hub_datasets=["scanqa=someone/rooms"])
    with pytest.raises(VidLLMInputError, match="easy/scanqa/leo/spice is none"):
        write_card(trained, [measured], hub_datasets=["easy/scanqa/leo/spice=someone/rooms:x"])


def test_every_number_of_the_sentences_is_compared(measured, trained, tmp_path):
    """Parameters, hours, seconds, rows and recipes; words may be changed, and numbers added."""
    write_card(trained, [measured], recipes=[write_run(tmp_path / "first", debug(), seconds=(200.0, 300.0))])
    path = trained / "README.md"
    text, numbers = path.read_text(), check_card(trained)
    document = read_results(measured)["provenance"]
    rows, seconds = document["counts"]["scanqa"]["rows"], document["seconds_per_scene"]
    parameters = re.search(r"([\d,]+) parameters \(", text)[1]
    for sentence in (
        f"{parameters} parameters (",
        f"{seconds:.2f} s per scene",
        f"scanqa: {rows} rows",
        "0.9 hours of training in all",
        "| steps in the log | 11 |",
        "| seconds per step | 290.91 |",
    ):
        assert text.count(sentence) == 1, sentence
        # the last digit becomes another
        at = text.index(sentence) + max(n for n, sign in enumerate(sentence) if sign.isdigit())
        path.write_text(text[:at] + str((int(text[at]) + 5) % 10) + text[at + 1 :])
        with pytest.raises(VidLLMInputError, match=r"wanted the number .* once more"):
            check_card(trained)
    path.write_text(text.replace("Research and teaching", "Teaching, since 2026, and research"))
    assert check_card(trained) == numbers
    path.write_text(text.replace(" hours of training in all", ""))
    assert check_card(trained) == numbers


def test_what_cannot_be_a_card_is_refused_and_changes_nothing(measured, trained, tmp_path):
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    other = tmp_path / "other"
    initialise("vidllm-tiny", other, seed=8)
    with pytest.raises(VidLLMInputError, match="wanted results of the weights in other/; got results of others"):
        write_card(other, [measured])
    with pytest.raises(VidLLMInputError, match="--results: wanted the folder of a run"):
        write_card(trained)
    with pytest.raises(VidLLMInputError, match="a second one named easy"):
        write_card(trained, [measured, measured])
    with pytest.raises(VidLLMInputError, match=r"wanted the recipe\.json of a training run"):
        write_card(trained, [measured], recipes=[tmp_path / "nowhere"])
    with pytest.raises(VidLLMInputError, match="wanted a checkpoint folder"):
        write_card(tmp_path, [measured])
    with pytest.raises(VidLLMInputError, match="cannot be read"):
        write_card(trained, [tmp_path])
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before


def test_the_command(measured, trained, tmp_path):
    runner = CliRunner()
    done = runner.invoke(app, ["card", "--model", str(trained), "--results", str(measured), "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["files"][-1] == str(trained / "README.md")
    assert document["numbers"] > 10
    assert any(".eval_results" in notice for notice in document["notices"])
    again = runner.invoke(app, ["card", "--model", str(trained), "--license", "mit"])
    assert again.exit_code == 0, again.output
    assert f"{document['numbers']} numbers of the results stand in the card" in again.stdout
    assert ModelCard.load(trained / "README.md").data.license == "mit"
    refused = runner.invoke(app, ["card", "--model", str(tmp_path / "none")])
    assert refused.exit_code == 2
    assert refused.stderr.count("\n") == 1


def test_numbers_that_are_no_better_than_a_baseline_are_named():
    document = {
        "runs": {
            "easy": {
                "results": {
                    "scanqa": {"official": {"exact_match": 0.3, "x/exact_match": 0.1}},
                    "reconstruction": {"metric": {"abs_rel": 0.2, "delta_1": 0.8, "scale_error": 0.1}},
                },
                "baselines": {
                    "blind": {"scanqa": {"official": {"exact_match": 0.2, "x/exact_match": 0.4}}},
                    "majority": {"scanqa": {"official": {"exact_match": 0.3}}},
                    "constant": {"reconstruction": {"metric": {"abs_rel": 0.1, "delta_1": 0.5, "scale_error": 0.2}}},
                    "given_geometry": {"reconstruction": {"metric": {"delta_1": 0.9}}},
                },
            }
        },
        "provenance": {},
    }
    assert behind_baselines(MeasuredRun(document)) == {
        "scanqa official": ["exact_match"],
        "reconstruction metric": ["abs_rel"],
    }


def test_paths_keep_their_last_part():
    given = {
        "a": "/data/me/rooms/", "b": ["vidllm eval --out /x/y/z.json 'q' a/b owner/name https://x.org/a/b", 3.5, None],
        "c": "~/runs/one", "d": "D:\\me\\two", "e": "m/s, 1/2",
    }  # fmt: skip
    assert without_places(given) == {
        "a": "rooms/", "b": ["vidllm eval --out z.json 'q' a/b owner/name https://x.org/a/b", 3.5, None],
        "c": "one", "d": "two", "e": "m/s, 1/2",
    }  # fmt: skip


@pytest.mark.parametrize("name", [*RECIPES, *DISTILL_RECIPES])
def test_a_recipe_has_no_places_and_comes_out_as_it_is(name):
    """Expressions of parameter names hold backslashes; a card that loses them tells of another training."""
    chosen = plain({**RECIPES, **DISTILL_RECIPES}[name]())
    assert without_places(chosen) == json.loads(json.dumps(chosen))
    assert without_places("\\\\server\\share\\three") == "three"


def test_a_log_that_is_none_is_named(tmp_path):
    folder = write_run(tmp_path / "run", debug())
    (folder / "log.jsonl").write_text('{"step": 1}\n')
    assert read_training([folder])[0]["cost"] is None
    (folder / "log.jsonl").write_text('{"step": 1, "seconds_per_step": 1.0}\nnonsense\n')
    with pytest.raises(VidLLMInputError, match="line 2: wanted a line of a training log"):
        read_training([folder])
    (folder / "log.jsonl").unlink()
    assert read_training([folder])[0]["cost"] is None

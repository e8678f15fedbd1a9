"""Cards of the checkpoints in the tree: every number is that of the results beside it."""

import json
import re
import shutil

import pytest
from contracts.card_results import results_of
from contracts.source_tree import ROOT
from huggingface_hub import ModelCard

from vidllm.eval.card import card_text, check_card, write_card
from vidllm.eval.report import results_sha256
from vidllm.processing.video_reading_vidllm import VidLLMInputError
from vidllm.train.initialise import initialise, is_untrained


FOLDERS = sorted(path.parent for path in (ROOT / "model_cards").glob("*/config.json"))


@pytest.fixture(scope="module")
def carded(tmp_path_factory):
    """A tiny checkpoint with a card of two runs, one with a report."""
    folder = tmp_path_factory.mktemp("cards") / "tiny"
    initialise("vidllm-tiny", folder)
    results = []
    for name, value in (("standard", 0.4375), ("easy", 0.5625)):
        results.append(folder.parent / name)
        results[-1].mkdir()
        document = results_of(folder, name, value)
        (results[-1] / "results.json").write_text(json.dumps(document))
    intervals = {"scanqa": {"official": {"exact_match": [0.5, 0.625]}}}
    kept = {"results_sha256": results_sha256(document), "level": 0.95, "draws": 2000, "intervals": intervals}
    (results[-1] / "intervals.json").write_text(json.dumps(kept))
    (results[-1] / "report.html").write_text("<p>\u00e9</p>", encoding="utf-8")
    (results[-1] / "report.md").write_text("\u00e9", encoding="utf-8")
    write_card(folder, results)
    return folder


def test_cards_in_the_tree_say_what_was_measured_and_are_as_they_were_generated():
    for folder in FOLDERS:
        if is_untrained(folder):
            continue
        assert check_card(folder) > 0
        assert any(folder.glob("results/*/report.html")), (
            f"{folder.name}: no report: `vidllm report`, then `vidllm card`"
        )
        card = ModelCard.load(folder / "README.md")
        again = ModelCard(card_text(folder, card.data.license))
        assert card.data.to_dict() == again.data.to_dict(), (
            f"{folder.name}: `vidllm card --model` writes the card again"
        )
        assert card.text == again.text, f"{folder.name}: `vidllm card --model` writes the card again"


def test_the_check_accepts_a_card_as_it_was_written(carded):
    # four numbers with four baselines, two runs; three of each model's again in the header; one interval
    assert check_card(carded) == 2 * (4 + 4) + 2 * 3 + 2
    assert card_text(carded) == (carded / "README.md").read_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "| exact_match | 0.562 |",
            "| exact_match | 0.662 |",
            "easy, scanqa, official, exact_match, model: wanted 0.562",
        ),
        ("| 0.333 |", "| 0.433 |", "colour/exact_match, model: wanted 0.333"),
        ("| 0.250 |", "| 0.150 |", "blind: wanted 0.250"),
        (
            "value: 0.5625",
            "value: 0.5626",
            r"model-index, easy, scanqa, official, exact_match: wanted 0\.5625, .*; got 0\.5626",
        ),
        ("0.500 to 0.625", "0.500 to 0.725", r"exact_match, high: wanted 0\.625, as in results/; got 0\.725"),
        (
            "| reconstruction | metric | abs_rel |",
            "| reconstruction | median | abs_rel |",
            "metric, abs_rel, model: wanted 0.142",
        ),
    ],
    ids=["table", "kind", "baseline", "header", "interval", "protocol"],
)
def test_a_doctored_card_is_found(carded, tmp_path, old, new, message):
    folder = shutil.copytree(carded, tmp_path / "tiny")
    text = (folder / "README.md").read_text()
    assert old in text
    (folder / "README.md").write_text(text.replace(old, new, 1))
    with pytest.raises(VidLLMInputError, match=message):
        check_card(folder)


def test_a_line_that_is_missing_or_made_up_is_found(carded, tmp_path):
    text = (carded / "README.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| reconstruction | metric | delta_1"))
    for number, changed in enumerate(
        (text.replace(line + "\n", "", 1), text.replace(line, f"{line}\n{line.replace('delta_1', 'auc_30')}", 1))
    ):
        folder = shutil.copytree(carded, tmp_path / str(number))
        (folder / "README.md").write_text(changed)
        with pytest.raises(VidLLMInputError, match=r"wanted .*; got"):
            check_card(folder)


def test_results_that_changed_or_are_of_other_weights_are_found(carded, tmp_path):
    folder = shutil.copytree(carded, tmp_path / "results")
    path = folder / "results" / "standard" / "results.json"
    path.write_text(path.read_text().replace("0.875", "0.975"))
    with pytest.raises(VidLLMInputError, match=r"standard, .*, delta_1: wanted 0\.975, as in results/; got 0\.875"):
        check_card(folder)
    path = folder / "results" / "easy" / "results.json"
    path.write_text(path.read_text().replace("0.875", "0.975"))
    with pytest.raises(VidLLMInputError, match="got those of other results"):
        check_card(folder)
    folder = shutil.copytree(carded, tmp_path / "weights")
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(VidLLMInputError, match="got results of others"):
        check_card(folder)
    (folder / "README.md").write_text("---\n- : [\n---\n")
    shutil.copy(carded / "model.safetensors", folder)
    with pytest.raises(VidLLMInputError, match=r"README\.md: wanted a card"):
        check_card(folder)
    shutil.rmtree(folder / "results")
    with pytest.raises(VidLLMInputError, match="wanted results beside the card"):
        check_card(folder)


def test_a_card_and_what_lies_beside_it_stand_on_their_own(carded):
    text = (carded / "README.md").read_text()
    assert not re.search(r"\bnan\b|None|\{\{|Undefined", text)
    for path in (carded / "README.md", *(carded / "results").rglob("*.*")):
        assert path.read_bytes().isascii()
        assert "somewhere" not in path.read_text()

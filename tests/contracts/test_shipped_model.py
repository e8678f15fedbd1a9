"""The checkpoint in the tree: its code is that of the tree, its weights are what a clone can carry."""

import json

import pytest
from contracts.source_tree import ROOT, is_saved_code, relative, shipped_files, source_files


FOLDER = ROOT / "model_cards" / "vidllm-nano"
REFRESH = "run `python -m vidllm.train.ship --code-only model_cards/vidllm-nano`"


@pytest.mark.skipif(not FOLDER.is_dir(), reason="no trained weights ship yet")
def test_the_folder_is_part_of_the_repository():
    names = {path.name for path in source_files() if path.parent == FOLDER}
    needed = {"config.json", "model.safetensors", "tokenizer.json", "processor_config.json", "demo.mp4", "demo.json"}
    assert needed <= names, f"{relative(FOLDER)} lacks {sorted(needed - names)} (or .gitignore hides them)"
    present = {path.name for path in FOLDER.iterdir() if path.is_file()}
    assert present == names, f".gitignore hides {sorted(present - names)}"


@pytest.mark.skipif(not FOLDER.is_dir(), reason="no trained weights ship yet")
def test_its_code_is_the_code_of_the_tree():
    sources = {path.name: path for path in shipped_files()}
    copies = {path.name: path for path in source_files() if path.parent == FOLDER and path.suffix == ".py"}
    assert set(copies) == set(sources), f"{sorted(set(copies) ^ set(sources))}: {REFRESH}"
    stale = [name for name, path in copies.items() if path.read_bytes() != sources[name].read_bytes()]
    assert not stale, f"{relative(FOLDER)}: {stale} differ from their sources: {REFRESH}"
    assert all(map(is_saved_code, copies.values()))


@pytest.mark.skipif(not FOLDER.is_dir(), reason="no trained weights ship yet")
def test_its_template_and_config_are_those_of_the_tree():
    from vidllm.modeling_vidllm.configuration_vidllm import VidLLMConfig

    template = ROOT / "processing" / "chat_template.jinja"
    assert (FOLDER / "chat_template.jinja").read_bytes() == template.read_bytes(), REFRESH
    text = (FOLDER / "config.json").read_text(encoding="utf-8")
    config = json.loads(text)
    assert (config["dtype"], config["is_metric"]) == ("float32", True)
    assert text == VidLLMConfig.from_pretrained(FOLDER).to_json_string(), REFRESH


def test_code_inside_checkpoints_is_told_from_code():
    assert is_saved_code(FOLDER / "modeling_vidllm.py")
    assert not is_saved_code(FOLDER / "README.md")
    assert not is_saved_code(ROOT / "model_cards" / "__init__.py")
    assert not is_saved_code(ROOT / "processing" / "rooms" / "layout.py")

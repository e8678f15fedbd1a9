"""Sources that are not what they should be: one clear line each, nothing read outside of them, nothing of theirs run."""

import json
import shutil

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError
from safetensors.torch import load_file, save_file

from vidllm.train import weight_sources
from vidllm.train.initialise import initialise_from_sources
from vidllm.train.weight_sources import WeightSource

from .source_parts import nothing_left, save_decoder, vggt_of


@pytest.fixture
def shards(tmp_path):
    """A folder of two shards with an index; what the index says."""
    folder = tmp_path / "source"
    folder.mkdir()
    listed = {}
    for number in (1, 2):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file({f"t{number}": torch.ones(3)}, folder / name)
        listed[f"t{number}"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    return folder, listed


def test_an_index_is_followed(shards):
    assert sorted(WeightSource(shards[0], "geometry").shapes) == ["t1", "t2"]


@pytest.mark.parametrize(
    "text",
    ['{"weight_map": ', "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": 3}', "7", ""],
)
def test_a_broken_index(shards, text):
    folder, _ = shards
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"geometry: .*index.json: wanted a JSON object with `weight_map`.*; got"
    ) as error:
        WeightSource(folder, "geometry")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("only", [False, True])
@pytest.mark.parametrize(
    "name", ["../out.safetensors", "ABSOLUTE", "deep/out.safetensors", "out.pt", "..", "out", 3, None]
)
def test_an_index_names_files_of_its_folder_alone(shards, name, only):
    """Also where it names a single file."""
    folder, listed = shards
    for path in (folder.parent / "out.safetensors", folder / "deep" / "out.safetensors"):
        path.parent.mkdir(exist_ok=True)
        shutil.copy(folder / listed["t1"], path)
    torch.save({"t1": torch.ones(3)}, folder / "out.pt")
    listed["t1"] = str(folder.parent / "out.safetensors") if name == "ABSOLUTE" else name
    if only:
        del listed["t2"]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(ValueError, match=r"index.json: wanted the name of a .safetensors file beside it for t1; got"):
        WeightSource(folder, "geometry")


def test_an_index_of_one_file_is_checked_against_it(shards):
    folder, listed = shards
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"t9": listed["t1"]}}))
    with pytest.raises(
        ValueError, match=r"wanted t9 in .*00001-of-00002.safetensors, as the index says; it is not there"
    ):
        WeightSource(folder, "geometry")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint16, torch.int64, torch.int8, torch.float8_e4m3fn])
def test_weights_are_floating_numbers(tmp_path, geometry_model, dtype):
    tensors = vggt_of(geometry_model)
    tensors["aggregator.camera_token"] = torch.zeros(tensors["aggregator.camera_token"].shape).to(dtype)
    save_file(tensors, tmp_path / "vggt.safetensors")
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(
        ValueError, match=f"geometry: aggregator.camera_token: wanted a tensor of float64, .*; got {name}"
    ):
        initialise_from_sources("vidllm-tiny", tmp_path / "out", geometry=str(tmp_path / "vggt.safetensors"))
    nothing_left(tmp_path / "out")


def test_a_dtype_that_torch_lacks(tmp_path):
    """Four bits a value: it stands in the format, and torch cannot read it."""
    header = json.dumps({"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    header += b" " * (-len(header) % 8)
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    with pytest.raises(ValueError, match=r"geometry: a in .*a.safetensors: wanted one of F64, .*; got F4"):
        WeightSource(tmp_path / "a.safetensors", "geometry")


# ---------------------------------------------------------------------- language models


def said_of(folder, monkeypatch):
    """The one line that is said of a language model in `folder`."""

    def asked(*_):
        raise AssertionError("somebody was asked whether to run code")

    monkeypatch.setattr("builtins.input", asked)
    out = folder.parent / "out"
    with pytest.raises(ValueError, match=r"language model|config") as error:
        initialise_from_sources("vidllm-tiny", out, language_model=str(folder))
    nothing_left(out)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"model_type": "qwen2_5_vl"}, "wanted the config of a language model alone, with a vocab_size; got one of 'qwen2_5_vl'"),
        ({"model_type": "gemma3"}, "wanted the config of a language model alone, with a vocab_size; got one of 'gemma3'"),
        ({"model_type": "t5"}, "wanted the config of a language model alone, with a vocab_size; got one of 't5'"),
        ({"model_type": "weird", "auto_map": {"AutoConfig": "code.X"}}, "since the code of a source is not run; got 'weird'"),
        ({"vocab_size": 5}, "since the code of a source is not run; got None"),
        ([], "wanted a config of transformers in"),
    ],
)  # fmt: skip
def test_configs_of_something_else(tmp_path, monkeypatch, document, message):
    save_decoder(tmp_path / "decoder", "qwen3", tied=True)
    (tmp_path / "decoder" / "config.json").write_text(json.dumps(document))
    (tmp_path / "decoder" / "code.py").write_text("open('executed', 'w')\nclass X: pass\n")
    monkeypatch.chdir(tmp_path)
    assert message in said_of(tmp_path / "decoder", monkeypatch)
    assert not (tmp_path / "executed").exists()


def test_a_known_model_with_code_of_its_own_is_read_without_it(tmp_path, monkeypatch):
    save_decoder(tmp_path / "decoder", "qwen3", tied=True)
    path = tmp_path / "decoder" / "config.json"
    document = {**json.loads(path.read_text()), "auto_map": {"AutoConfig": "code.X", "AutoModelForCausalLM": "code.X"}}
    path.write_text(json.dumps(document))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked whether to run code"))
    initialise_from_sources("vidllm-tiny", tmp_path / "out", language_model=str(tmp_path / "decoder"))
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert "auto_map" not in text
    assert str(tmp_path) not in json.dumps(text)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["{", "[]"])
def test_broken_tokenizers(tmp_path, monkeypatch, name, text):
    save_decoder(tmp_path / "decoder", "qwen3", tied=True)
    (tmp_path / "decoder" / name).write_text(text)
    assert "wanted a tokenizer in" in said_of(tmp_path / "decoder", monkeypatch)


def test_nobody_is_advised_to_run_code(tmp_path, monkeypatch):
    """torch's own message is: read it with weights_only=False."""
    save_decoder(tmp_path / "decoder", "qwen3", tied=True)
    tensors = load_file(tmp_path / "decoder" / "model.safetensors")
    (tmp_path / "decoder" / "model.safetensors").unlink()
    torch.save({**tensors, "more": Exception}, tmp_path / "decoder" / "pytorch_model.bin")
    said = said_of(tmp_path / "decoder", monkeypatch)
    assert "weights_only" not in said
    assert "code in a file is not run" in said


# ---------------------------------------------------------------------- the Hub


class UnreachableError(HTTPError):
    """What the HTTP client raises where there is no network; no OSError."""


def test_cached_weights_serve_without_network(tmp_path, monkeypatch):
    class Api:
        def list_repo_files(self, repo_id):
            raise UnreachableError("Name or service not known")

    cached = tmp_path / "models--owner--name"
    snapshot = cached / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    save_file({"a": torch.ones(3)}, snapshot / "model.safetensors")
    monkeypatch.setattr(weight_sources, "HfApi", Api)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    source = WeightSource("owner/name", "geometry")
    assert source.shapes == {"a": (3,)}
    assert source.files == [snapshot / "model.safetensors"]
    with pytest.raises(
        ValueError, match=r"geometry: owner/other .* cannot be fetched from the Hub: Name or service not known"
    ):
        WeightSource("owner/other", "geometry")

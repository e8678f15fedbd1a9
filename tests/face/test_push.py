"""Pushing to the Hub: what goes there and what stays, what is refused before, and what the Hub's answers become.

The Hub is a stub of its HTTP API on this machine.
"""

import json
import pickle
import shutil
import socket

import huggingface_hub.constants
import pytest
from contracts.card_results import results_of
from face import hub_stub
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from vidllm import push as pushing
from vidllm.cli import app
from vidllm.eval.card import write_card
from vidllm.push import plan_push, push
from vidllm.train.initialise import initialise


REPOSITORY = "someone/tiny-room"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """An untrained tiny checkpoint."""
    folder = tmp_path_factory.mktemp("push") / "tiny"
    initialise("vidllm-tiny", folder, seed=3)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "tiny")


@pytest.fixture
def hub(monkeypatch):
    """The stub, in place of the Hub, for everything that huggingface_hub does; uploads by LFS, which it can answer."""
    with hub_stub.stub_hub() as server:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", hub_stub.TOKEN)
        yield server


def run(*arguments):
    return CliRunner().invoke(app, ["push", *map(str, arguments)])


def refused(folder, message):
    """One line and exit code 2, nothing on stdout."""
    done = run("--model", folder, "--to", REPOSITORY, "--dry-run")
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


# ---------------------------------------------------------------------- upload


def test_the_commit_holds_exactly_the_files_of_the_folder(folder, hub):
    done = run("--model", folder, "--to", REPOSITORY, "--private", "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    (created,) = hub.created
    assert (created["organization"], created["name"], created["visibility"]) == ("someone", "tiny-room", "private")
    found = hub.files()
    assert found == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert [file["path"] for file in document["files"]] == sorted(found)
    assert document["total_bytes"] == sum(map(len, found.values()))
    assert document["url"] == f"{hub.endpoint}/{REPOSITORY}"
    assert len(document["commit"]) == 40
    # the weights went as a blob of their own, once
    assert list(hub.blobs.values()) == [(folder / "model.safetensors").read_bytes()]
    assert all(commit["path"] == f"/api/models/{REPOSITORY}/commit/main" for commit in hub.commits)


def test_what_a_run_leaves_behind_stays_and_is_named(folder, hub):
    (folder / "checkpoint-100").mkdir()
    (folder / "checkpoint-100" / "optimizer.pt").write_bytes(pickle.dumps(1))
    (folder / ".cache").mkdir()
    (folder / ".cache" / "token").write_text("secret")
    for name in (
        "optimizer.pt",
        "training_args.bin",
        "rng_state_0.pth",
        "trainer_state.json",
        "log.jsonl",
        "recipe.json",
        ".env",
    ):
        (folder / name).write_bytes(b"x")
    (folder / "rooms").mkdir()
    (folder / "rooms" / "block.pt").write_bytes(b"x")
    (folder / "other_vidllm.py").write_text("raise SystemExit\n")
    (folder / "results").mkdir()
    (folder / "results" / "notes.txt").write_text("x")
    (folder / ".eval_results").mkdir()
    (folder / ".eval_results" / "easy.yaml").write_text("[]\n")
    done = run("--model", folder, "--to", REPOSITORY)
    assert done.exit_code == 0, done.output
    left = {
        "checkpoint-100", ".cache", "optimizer.pt", "training_args.bin", "rng_state_0.pth", "trainer_state.json", "log.jsonl",
        "recipe.json", ".env", "rooms/", "other_vidllm.py", "results/notes.txt",
    }  # fmt: skip
    for name in left:
        assert f"left out: {name} (" in done.stderr
    found = hub.files()
    assert ".eval_results/easy.yaml" in found
    assert not {name for name in found if name.rstrip("/") in {one.rstrip("/") for one in left} or "/" in name} - {
        ".eval_results/easy.yaml"
    }
    assert "modeling_vidllm.py" in found
    assert "secret" not in "".join(content.decode("latin-1") for content in found.values())


def test_a_dry_run_lists_everything_and_reaches_for_nothing(folder, hub, monkeypatch):
    def nowhere(*_):
        raise AssertionError("a dry run reached for the network")

    monkeypatch.setattr(socket.socket, "connect", nowhere)
    monkeypatch.delenv("HF_TOKEN")
    done = run("--model", folder, "--to", REPOSITORY, "--dry-run")
    assert done.exit_code == 0, done.output
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    for name, size in sizes.items():
        assert any(line.split() == [name, f"{size:,}"] for line in done.stdout.splitlines())
    assert f"{len(sizes)} files" in done.stdout
    assert f"{sum(sizes.values()):,} bytes" in done.stdout
    assert done.stdout.endswith("nothing was pushed (--dry-run)\n")
    assert "no measured results" in done.stderr
    assert hub.requests == []


def test_names_with_brackets_are_no_patterns(folder, hub):
    (folder / "LICENSE[1]").write_text("x")
    (folder / "LICENSE1").write_text("y")
    plan = plan_push(folder)
    assert {"LICENSE[1]", "LICENSE1"} <= {name for name, _ in plan.files}
    push(plan, REPOSITORY, api=HfApi(endpoint=hub.endpoint))
    assert hub.files()["LICENSE[1]"] == b"x"
    assert "visibility" not in hub.created[0]


def test_a_sharded_checkpoint_goes_whole(folder, hub):
    from vidllm import VidLLMForConditionalGeneration

    VidLLMForConditionalGeneration.from_pretrained(folder).save_pretrained(folder, max_shard_size="600KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert (folder / "model.safetensors.index.json").is_file()
    plan = plan_push(folder)
    push(plan, REPOSITORY)
    shards = {path.name for path in folder.glob("*.safetensors")}
    assert len(shards) > 1
    assert shards <= set(hub.files())
    sorted(folder.glob("*.safetensors"))[0].unlink()
    refused(folder, "missing")


# ---------------------------------------------------------------------- what the Hub answers


@pytest.mark.parametrize(
    ("place", "status", "advice"),
    [
        ("/api/repos/create", 401, "wanted a valid token"),
        ("/api/repos/create", 403, "wanted a token with write access"),
        ("/preupload/", 404, "wanted a repository that exists"),
        ("/commit/", 403, "wanted a token with write access"),
    ],
)
def test_a_refusal_is_one_line(folder, hub, place, status, advice):
    hub.status[place] = status
    done = run("--model", folder, "--to", REPOSITORY, "--json")
    assert done.exit_code == 2
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("notice:")]
    assert line.startswith(f"error: push to {REPOSITORY}: the Hub answers {status}; {advice}")
    assert f"stub says {status}" in line
    assert not hub.commits


def test_without_a_token_nothing_is_asked(folder, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(folder / "no_token"))
    monkeypatch.setattr("huggingface_hub.utils._auth._get_token_from_google_colab", lambda: None)
    done = run("--model", folder, "--to", REPOSITORY)
    assert done.exit_code == 2
    assert "wanted a token of the Hub with write access; got none" in done.stderr
    assert hub.requests == []


def test_a_hub_that_is_not_there_is_one_line(folder, hub, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        done = run("--model", folder, "--to", REPOSITORY)
    assert done.exit_code == 2
    assert "the Hub cannot be reached" in done.stderr
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    done = run("--model", folder, "--to", REPOSITORY)
    assert done.exit_code == 2
    assert "the Hub cannot be reached" in done.stderr


@pytest.mark.parametrize("name", ["tiny-room", "some one/tiny", "a/b/c", "", "someone/.git"])
def test_a_name_that_is_none_is_told_before_anything_is_read(folder, name):
    done = run("--model", folder, "--to", name, "--dry-run")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: --to: wanted owner/name")


# ---------------------------------------------------------------------- what is not pushed at all


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "data.pkl", "results/scores.pkl"])
def test_pickles_are_refused(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(pickle.dumps({"a": 1}))
    refused(folder, f"got {name}, which may run code")


def test_what_does_not_load_is_refused(folder):
    weights = load_file(folder / "model.safetensors")
    kept = (folder / "model.safetensors").read_bytes()

    def with_weights(changed, message):
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        refused(folder, message)
        (folder / "model.safetensors").write_bytes(kept)

    name = sorted(weights)[0]
    with_weights(
        {key: value for key, value in weights.items() if key != name}, f"1 weights are missing, such as {name}"
    )
    with_weights({**weights, "more": weights[name].clone()}, "1 weights are not the model's, such as more")
    with_weights({**weights, name: weights[name].flatten()[:1].clone()}, f"{name}: wanted shape")
    (folder / "model.safetensors").write_bytes(kept[:-100])
    refused(folder, "model.safetensors: cannot be read")
    (folder / "model.safetensors").write_bytes(kept)
    (folder / "model-00001-of-00002.safetensors").write_bytes(kept)
    refused(folder, "wanted model.safetensors, or model.safetensors.index.json and its files")


def test_files_that_are_missing_are_named(folder):
    for name in ("README.md", "generation_config.json", "chat_template.jinja", "layers_vidllm.py"):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        refused(folder, f"{name} missing")
        (folder / name).write_bytes(kept)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "elsewhere_vidllm.Model"}}))
    refused(folder, "AutoModel: wanted a file of the folder; got elsewhere_vidllm.Model")
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "wanted an auto_map")


def test_code_of_another_version_is_told(folder):
    (folder / "layers_vidllm.py").write_text((folder / "layers_vidllm.py").read_text() + "\n")
    (notice,) = [line for line in plan_push(folder).notices if line.startswith("code: ")]
    assert "layers_vidllm.py differ" in notice


def test_a_file_that_is_too_large_is_refused(folder, monkeypatch):
    size = (folder / "model.safetensors").stat().st_size
    monkeypatch.setattr(pushing, "MOST_BYTES", size)
    plan_push(folder)
    monkeypatch.setattr(pushing, "MOST_BYTES", size - 1)
    refused(folder, f"wanted files of at most {size - 1:,} bytes; model.safetensors has {size:,}")


def test_a_card_is_compared_with_its_results(folder, hub):
    (folder / "results" / "easy").mkdir(parents=True)
    path = folder / "results" / "easy" / "results.json"
    document = results_of(folder)
    path.write_text(json.dumps(document))
    (folder / "results" / "easy" / "settings.json").write_text("{}")
    write_card(folder)
    plan = plan_push(folder)
    assert "results/easy/results.json" in dict(plan.files)
    assert "results/easy/settings.json" in dict(plan.left_out)
    assert not any("results" in notice for notice in plan.notices)
    # words may be added, numbers not
    card = folder / "README.md"
    card.write_text(card.read_text() + "\nMore words.\n")
    plan_push(folder)
    card.write_text(card.read_text().replace("| 0.562 |", "| 0.662 |"))
    refused(folder, "easy, scanqa, official, exact_match, model: wanted 0.562, as in results/; got 0.662")
    path.write_text("{}")
    refused(folder, "results.json: wanted the key 'runs'")


def test_a_hub_id_is_no_folder():
    refused("owner/name", "wanted a local checkpoint folder")

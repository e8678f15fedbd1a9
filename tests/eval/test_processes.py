"""Several processes share an evaluation: who does what, who waits, what is left when they are killed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from vidllm import cli_train
from vidllm.cli import app
from vidllm.eval import predict, run
from vidllm.eval.predictions import PredictionFile, PredictionFiles
from vidllm.eval.processes import Processes, alone_in, start_processes, steady_threads
from vidllm.eval.results import read_results
from vidllm.eval.run import run_evaluation
from vidllm.eval.train_facts import facts_of_rooms
from vidllm.processing.rooms.write import write_rooms
from vidllm.processing.video_reading_vidllm import VidLLMInputError


BENCHMARKS = ("scanqa", "sqa3d", "scanrefer", "scan2cap", "reconstruction")


def test_every_item_is_done_by_one():
    items = list(range(11))
    shares = [Processes(rank, 3).share(items) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert Processes().share(items) == items
    assert Processes(2, 3).share([1, 2]) == []


def test_one_process_waits_for_nobody(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    alone = start_processes(1)
    assert alone == Processes(0, 1, 0)
    alone.wait()
    assert alone.from_main(2.5) == 2.5
    assert alone.from_main(None) is None
    assert alone.device("cuda") == "cuda"
    with pytest.raises(VidLLMInputError, match=r"processes: wanted 2; the launcher started 1 .*--multi_gpu"):
        start_processes(2)


def test_a_folder_is_kept_for_one_evaluation(tmp_path):
    with alone_in(tmp_path / "out", Processes()):
        with (
            pytest.raises(VidLLMInputError, match="another evaluation is at work there"),
            alone_in(tmp_path / "out", Processes()),
        ):
            pytest.fail("two at once")
        with alone_in(tmp_path / "other", Processes()):
            pass
    with alone_in(tmp_path / "out", Processes()):
        pass


def test_a_killed_process_leaves_no_lock(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom vidllm.eval.processes import Processes, alone_in\n"
        "with alone_in(Path(sys.argv[1]), Processes()):\n    print('in', flush=True)\n    time.sleep(600)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"in\n"
        with pytest.raises(VidLLMInputError, match="another evaluation"), alone_in(tmp_path, Processes()):
            pytest.fail("two at once")
    finally:
        other.kill()
        other.wait()
    with alone_in(tmp_path, Processes()):
        pass


def test_small_models_compute_in_one_thread():
    class Model(torch.nn.Linear):
        device = torch.device("cpu")

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with steady_threads(Model(3, 3)):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with torch.device("meta"):
            large = Model(20_000, 20_000)
        with steady_threads(large):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_no_code_of_the_checkpoint_is_asked_for(model_dir):
    """A question of transformers would stand on stdout, and wait for an answer."""
    code = "import sys\nfrom vidllm.eval.run import load\nload(sys.argv[1], 'cpu')\nprint('loaded')\n"
    said = subprocess.run([sys.executable, "-c", code, str(model_dir)], stdin=subprocess.DEVNULL, capture_output=True)
    assert said.stdout == b"loaded\n", said.stdout + said.stderr


# ---- files of several processes


def add(folder, rank, *ids):
    files = PredictionFiles(folder, ["scanqa"], rank)
    files.of["scanqa"].add([{"id": key, "answer": f"of {key}"} for key in ids])
    return files


def test_what_any_process_made_is_known_to_all(tmp_path):
    add(tmp_path, None, "a")
    add(tmp_path, 0, "b")
    add(tmp_path, 1, "c", "a")
    with open(tmp_path / "scanqa.rank1.jsonl", "ab") as file:
        file.write(b'{"id": "half')
    assert add(tmp_path, 2).of["scanqa"].missing("abcd") == ["d"]
    # Only its own process cuts the half line off.
    assert (tmp_path / "scanqa.rank1.jsonl").read_bytes().endswith(b"half")
    files = PredictionFiles(tmp_path, ["scanqa"])
    files.gather({"scanqa": ["c", "b", "a"]})
    assert list(files.of["scanqa"].records) == ["c", "b", "a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scanqa.jsonl"]
    assert [json.loads(line)["id"] for line in (tmp_path / "scanqa.jsonl").read_text().splitlines()] == list("cba")
    with pytest.raises(VidLLMInputError, match="wanted a prediction of every row; 1 of scanqa have none, such as d"):
        files.gather({"scanqa": ["a", "d"]})


@pytest.mark.parametrize("after", ["replace", "unlink"])
def test_gathering_may_be_killed(tmp_path, monkeypatch, after):
    add(tmp_path, 0, "b")
    add(tmp_path, 1, "a")

    class KilledError(Exception):
        pass

    real = getattr(Path, after)

    def dying(self, *arguments):
        if after == "unlink":
            real(self, *arguments)
        raise KilledError

    monkeypatch.setattr(Path, after, dying)
    with pytest.raises(KilledError):
        PredictionFiles(tmp_path, ["scanqa"]).gather({"scanqa": ["a", "b"]})
    monkeypatch.setattr(Path, after, real)
    files = PredictionFiles(tmp_path, ["scanqa"])
    assert not files.of["scanqa"].missing("ab")
    files.gather({"scanqa": ["a", "b"]})
    assert list(files.of["scanqa"].records) == ["a", "b"]
    assert [path.name for path in sorted(tmp_path.glob("*.jsonl"))] == ["scanqa.jsonl"]


# ---- two threads that stand for processes


class Meeting(Processes):
    """Processes as threads."""

    barrier, told = threading.Barrier(2, timeout=60), {}

    def wait(self):
        self.barrier.wait()

    def from_main(self, number):
        if self.is_main:
            self.told["number"] = number
        self.wait()
        return self.told["number"]


class KilledError(Exception):
    """Stands for a signal that ends a process."""


def test_two_killed_and_resumed_or_not_make_what_one_makes(loaded, rooms_root, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "MAX_NEW_TOKENS", {"qa": 4, "sqa": 4, "caption": 6, "ground": 8})
    monkeypatch.setattr(run, "MAX_NEW_TOKENS", predict.MAX_NEW_TOKENS)
    facts = facts_of_rooms("easy", 5, 2)
    monkeypatch.setattr(run, "train_facts", lambda *_: facts)
    # The forward itself is done by one thread at a time; what is tested is who does what.
    lock, work = threading.Lock(), predict.Predictor.run

    def one_at_a_time(self, scene, files):
        with lock:
            work(self, scene, files)

    monkeypatch.setattr(run.Predictor, "run", one_at_a_time)
    options = {"num_frames": 3, "text": False, "command": "test", "model_name": "tiny", "with_given_geometry": True}
    alone = run_evaluation(BENCHMARKS, loaded, rooms_root, tmp_path / "one", **options)
    assert "given_geometry" in alone["runs"]["easy"]["baselines"]

    def by_two(folder):
        found = {}

        def one_of_two(rank):
            try:
                found[rank] = run_evaluation(
                    BENCHMARKS, loaded, rooms_root, tmp_path / folder, processes=Meeting(rank, 2, rank), **options
                )
            except KilledError:
                found[rank] = "killed"

        threads = [threading.Thread(target=one_of_two, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
        return found

    # Each of the two dies within its first scene, half of a line written.
    add, writes = PredictionFile.add, {}

    def dying(self, records):
        writes[self.path.suffixes[0]] = writes.get(self.path.suffixes[0], 0) + 1
        if writes[self.path.suffixes[0]] == 3:
            with open(self.path, "ab") as file:
                file.write(b'{"id": "half a li')
            raise KilledError
        add(self, records)

    monkeypatch.setattr(PredictionFile, "add", dying)
    assert by_two("killed") == {0: "killed", 1: "killed"}
    monkeypatch.setattr(PredictionFile, "add", add)
    assert not (tmp_path / "killed" / "results.json").exists()
    assert set(writes) == {".rank0", ".rank1"}
    assert 0 < lines_in(tmp_path / "killed") < lines_in(tmp_path / "one")
    for folder in ("killed", "two"):
        found = by_two(folder)
        assert found[1] == {}
        same_but_for_time(found[0], alone)
        same_files(tmp_path / "one", tmp_path / folder)
        same_files(tmp_path / "one", tmp_path / folder, "predictions/given_geometry")


def same_but_for_time(one, other):
    one, other = json.loads(json.dumps(one)), json.loads(json.dumps(other))
    for document in (one, other):
        document["provenance"].pop("seconds_per_scene")
    assert one == other


def same_files(one, other, place="predictions"):
    names = sorted(path.name for path in (one / place).iterdir())
    assert names == sorted(path.name for path in (other / place).iterdir())
    assert {f"{name}.jsonl" for name in BENCHMARKS} < set(names)
    for name in BENCHMARKS:
        files = [(folder / place / f"{name}.jsonl").read_bytes() for folder in (one, other)]
        assert files[0] == files[1], name
    settings = [json.loads((folder / "settings.json").read_text()) for folder in (one, other)]
    assert settings[0] == settings[1]


# ---- the command


def test_the_command_starts_several(model_dir, rooms_root, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(cli_train, "run_launcher", lambda words: seen.append(words) or 3)
    given = ["--model", model_dir, "--data-root", rooms_root, "--out", tmp_path / "out", "--frames", 3, "--no-text"]
    asked = ["eval", "scanqa", "scanrefer", *given, "--num-processes", 2, "--proposals", "true"]
    # What the user typed, whatever started these tests.
    monkeypatch.setattr(sys, "argv", ["/somewhere/vidllm", "eval", "scanqa", "--out", "a folder"])
    result = CliRunner().invoke(app, [str(word) for word in asked])
    assert result.exit_code == 2
    (words,) = seen
    assert "--multi_gpu" in words
    module = words[words.index("-m", 3) + 1 :]
    assert module[:3] == ["vidllm.eval.run", "scanqa", "scanrefer"]
    told = dict(pairwise(module))
    assert (told["--processes"], told["--frames"], told["--proposals"]) == ("2", "3", "true")
    assert (told["--model"], told["--out"]) == (str(model_dir), str(tmp_path / "out"))
    assert "--no-text" in module
    assert "--with-given-geometry" not in module
    assert told["--command"] == "vidllm eval scanqa --out 'a folder'"
    # Wrong words are found before anything is started.
    for wrong in (
        ["--data-root", "nowhere"],
        ["--model", "nowhere"],
        ["--split", "train"],
        ["--geometry", "none"],
        ["--prompts", "terse"],
        ["--proposals", "nowhere.json"],
    ):
        result = CliRunner().invoke(app, [str(word) for word in [*asked, *wrong]])
        assert result.exit_code == 2
        assert sum(line.startswith("error: ") for line in result.stderr.splitlines()) == 1
    assert len(seen) == 1


def test_wrong_words_of_a_process_are_one_line(tmp_path, capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    given = ["scanqa", "--model", "none", "--data-root", str(tmp_path), "--out", str(tmp_path / "out")]
    assert run.main([*given, "--processes", "2"]) == 2
    assert run.main([*given, "--geometry", "none"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert errors[0].startswith("error: processes: wanted 2")
    assert errors[1].startswith("error: geometry: wanted predicted or given")


def descendants(pid):
    """A process and all that it has started, itself last."""
    children = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        children += [int(word) for word in task.read_text().split()]
    return [found for child in children for found in descendants(child)] + [pid]


def kill(launcher):
    """End a launcher and everything below it, as the system would when it runs out of memory."""
    for pid in descendants(launcher.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    launcher.wait()


def lines_in(folder):
    return sum(path.read_bytes().count(b"\n") for path in (folder / "predictions").glob("*.jsonl"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc to find all processes")
def test_two_processes_killed_and_resumed_make_what_one_undisturbed_makes(model_dir, tmp_path):
    rooms = tmp_path / "rooms"
    write_rooms(rooms, 8, seed=7, difficulty="easy", split="val", size_hw=(48, 64), video=False)
    given = [*BENCHMARKS, "--model", str(model_dir), "--data-root", str(rooms), "--frames", "3", "--train-rooms", "2"]
    given += ["--command", "same", "--no-text", "--batch-size", "4"]
    # As people start it: one process may take all cores, and launchers give each of several one.
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}

    def start(out, *words):
        log = open(tmp_path / "log.txt", "ab")  # noqa: SIM115 - the process writes to it
        return subprocess.Popen(
            [*words, *given, "--out", str(out)], env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )

    undisturbed = tmp_path / "undisturbed"
    assert start(undisturbed, sys.executable, "-m", "vidllm.eval.run").wait() == 0, (tmp_path / "log.txt").read_text()
    of_all, out = lines_in(undisturbed), tmp_path / "killed"
    two = cli_train.launch_command("vidllm.eval.run", 2, None, cpu=False)
    kills = []
    for share in (0.02, 0.3, 0.55, 0.8):
        launcher = start(out, *two)
        before = lines_in(out)
        # Until it has written something, and so much of the whole.
        while launcher.poll() is None and lines_in(out) <= max(before, share * of_all):
            time.sleep(0.005)
        if launcher.poll() is not None:
            break
        assert len(descendants(launcher.pid)) >= 3, "the launcher and two processes"
        kill(launcher)
        kills.append(lines_in(out))
        assert not (out / "results.json").exists()
    assert len(kills) >= 3, kills
    assert kills == sorted(kills)
    assert {path.name for path in (out / "predictions").glob("scanqa*")} == {
        "scanqa.rank0.jsonl",
        "scanqa.rank1.jsonl",
    }
    # In the end by two, and of the same by one.
    one_left = tmp_path / "one_left"
    subprocess.run(["cp", "-r", str(out), str(one_left)], check=True)
    assert start(out, *two, "--processes", "2").wait() == 0, (tmp_path / "log.txt").read_text()
    assert start(one_left, sys.executable, "-m", "vidllm.eval.run").wait() == 0, (tmp_path / "log.txt").read_text()
    for folder in (out, one_left):
        same_but_for_time(read_results(folder), read_results(undisturbed))
        same_files(folder, undisturbed)

"""The bench: every number is there, means what it says, and memory is seen."""

import copy
import json
import mmap

import pytest
import torch
from typer.testing import CliRunner

from vidllm.cli import app
from vidllm.eval import speed
from vidllm.eval.speed import BenchSettings, PeakMemory, bench, fitted, size_of
from vidllm.train.initialise import build_untrained


SETTINGS = BenchSettings(
    frames=(2, 5), size_hw=(28, 42), new_tokens=4, questions=6, questions_encoding=2, repeats=2, warmup=0
)


@pytest.fixture(scope="module")
def tiny():
    return build_untrained("vidllm-tiny")


def test_a_ladder_has_all_numbers(tiny):
    told = []
    document = bench(*tiny, SETTINGS, told.append)
    assert told == ["2 frames", "5 frames"]
    assert [rung["frames"] for rung in document["rungs"]] == [2, 5]
    for rung in document["rungs"]:
        assert all(value > 0 for value in rung.values()), rung
        # both say how long all questions take, with and without the scene kept
        assert rung["ratio"] == pytest.approx(
            rung["questions_per_minute_kept"] / rung["questions_per_minute_encoding"], rel=1e-6
        )
        assert rung["answer_s"] > rung["encode_s"]
    assert document["environment"]["parameters"] == sum(p.numel() for p in tiny[0].parameters())
    assert document["environment"]["dtype"] == "float32"
    json.dumps(document)


def test_numbers_follow_from_the_times(tiny, monkeypatch):
    """With a clock of whole seconds: each call takes as long as its part is said to take, and reading a new scene's tokens 7 more."""
    durations = {"reconstruct": 4.0, "encode_scene": 6.0}
    now = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    model, processor = tiny
    scene = model.encode_scene(torch.randn(1, 2, 3, 28, 42))

    def takes(name, result):
        def call(*_, **__):
            now[0] += durations[name]
            return copy.copy(result)

        return call

    def generate(**arguments):
        assert arguments["min_new_tokens"] == arguments["max_new_tokens"]
        now[0] += 1.0 + 0.5 * (arguments["max_new_tokens"] - 1)
        if not arguments["scene"].prefix_caches:
            arguments["scene"].prefix_caches["read"] = True
            now[0] += 7.0

    monkeypatch.setattr(model, "reconstruct", takes("reconstruct", None), raising=False)
    monkeypatch.setattr(model, "encode_scene", takes("encode_scene", scene), raising=False)
    monkeypatch.setattr(model, "generate", generate, raising=False)
    (rung,) = bench(model, processor, BenchSettings(frames=(2,), size_hw=(28, 42), new_tokens=5, questions=12))[
        "rungs"
    ]
    assert rung["reconstruct_s"] == 4.0
    assert rung["encode_s"] == 6.0
    assert rung["first_token_s"] == 7.0 + 1.0
    assert rung["next_first_token_s"] == 1.0
    assert rung["tokens_per_s"] == pytest.approx(2.0)
    assert rung["answer_s"] == 6.0 + 7.0 + 3.0
    assert rung["questions_per_minute_kept"] == pytest.approx(12 / ((6 + 7 + 12 * 3) / 60))
    assert rung["questions_per_minute_encoding"] == pytest.approx(60 / 16)
    assert rung["ratio"] == pytest.approx(12 * 16 / (6 + 7 + 12 * 3))


def test_geometry_alone(tiny):
    (rung,) = bench(*tiny, BenchSettings(frames=(3,), size_hw=(28, 42), repeats=1, warmup=0, with_answers=False))[
        "rungs"
    ]
    assert set(rung) == {"frames", "reconstruct_s", "peak_memory_mib", "memory_before_mib"}


def test_memory_that_is_freed_again_is_seen_and_the_mark_starts_anew():
    with PeakMemory(torch.device("cpu")) as large, mmap.mmap(-1, 160 * 2**20) as pages:
        # Pages of its own: an allocator may give out what an earlier test left resident.
        pages.write(bytes([1]) * len(pages))
    with PeakMemory(torch.device("cpu")) as small:
        torch.ones(1000).sum()
    if large.bytes is None:
        pytest.skip("this system does not tell the memory of a process")
    assert large.bytes - large.bytes_before > 150 * 2**20
    assert small.bytes - small.bytes_before < 100 * 2**20


def test_fits_recover_what_was_planted():
    frames = (8, 16, 32, 64)
    assert fitted(frames, [3 + 2 * n for n in frames], 1) == pytest.approx([3, 2])
    assert fitted(frames, [1 + 0.5 * n + 0.01 * n * n for n in frames], 2) == pytest.approx([1, 0.5, 0.01])
    with pytest.raises(ValueError, match="wanted more than 2 different numbers of frames"):
        fitted((8, 16, 16), (1, 2, 2), 2)


def test_fits_need_more_rungs_than_coefficients(tiny):
    settings = {"size_hw": (28, 42), "repeats": 1, "warmup": 0, "with_answers": False}
    assert not bench(*tiny, BenchSettings(frames=(1, 2), **settings))["fits"]
    assert set(bench(*tiny, BenchSettings(frames=(1, 2, 3), **settings))["fits"]) == {"peak_memory_mib"}
    document = bench(*tiny, BenchSettings(frames=(1, 2, 3, 5), **settings))
    seconds = [rung["reconstruct_s"] for rung in document["rungs"]]
    assert document["fits"]["reconstruct_s"] == pytest.approx(fitted((1, 2, 3, 5), seconds, 2))


def test_a_preset_without_its_language_model_reconstructs_the_same():
    whole, _ = build_untrained("vidllm-tiny", seed=4)
    part, _ = build_untrained("vidllm-tiny", seed=4, only_geometry=True)
    assert part.config.text_config.num_hidden_layers == 1 < whole.config.text_config.num_hidden_layers
    # other weights were drawn; of the same shape
    shapes = {name: value.shape for name, value in whole.model.reconstruction.named_parameters()}
    assert shapes == {name: value.shape for name, value in part.model.reconstruction.named_parameters()}
    part.model.load_state_dict(
        {n: v for n, v in whole.model.state_dict().items() if "language_model" not in n}, strict=False
    )
    pixels = torch.randn(1, 3, 3, 28, 42, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(part.reconstruct(pixels).points_world, whole.reconstruct(pixels).points_world)


def test_sizes_have_names():
    assert size_of("paper") == (518, 686)
    assert size_of("96x128") == (96, 128)
    for wrong in ("big", "96", "0x28", "96x"):
        with pytest.raises(ValueError, match="--size: wanted paper, vggt, small or HEIGHTxWIDTH"):
            size_of(wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"new_tokens": 1}, "new_tokens: wanted at least 2; got 1"),
        ({"frames": ()}, "frames: wanted numbers from 1"),
        ({"frames": (0,)}, "frames: wanted numbers from 1"),
        ({"repeats": 0}, "repeats: wanted at least 1"),
    ],
)
def test_wrong_settings(change, message):
    with pytest.raises(ValueError, match=message):
        BenchSettings(**change)


def test_a_size_that_patches_do_not_fill_is_refused(tiny):
    with pytest.raises(ValueError, match="wanted multiples of the patch size 14"):
        bench(*tiny, BenchSettings(frames=(1,), size_hw=(30, 42)))


def test_the_command(capsys):
    runner = CliRunner()
    given = ["--preset", "vidllm-tiny", "--size", "28x42", "--frames", "2", "--questions", "2", "--repeats", "1"]
    done = runner.invoke(app, ["bench", *given, "--new-tokens", "3", "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["model"] == "vidllm-tiny, random weights"
    assert document["rungs"][0]["frames"] == 2
    done = runner.invoke(app, ["bench", *given, "--only-geometry"])
    assert done.exit_code == 0, done.output
    assert "reconstruct s" in done.output
    assert "tokens/s" not in done.output
    for wrong, message in (
        (["bench"], "wanted either --model or --preset"),
        (["bench", "--preset", "vidllm-tiny", "--frames", "2,x"], "--frames: wanted numbers from 1"),
    ):
        done = runner.invoke(app, wrong)
        assert done.exit_code != 0
        assert message in done.output

"""Starting checkpoints from pretrained parts: each part says the same as before, and a broken source leaves nothing behind."""

import contextlib
import copy
import hashlib
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.processing.processing_vidllm import VidLLMProcessor
from vidllm.train import compose as module
from vidllm.train.compose import compose, fresh_tensors, grown
from vidllm.train.initialise import initialise_from_sources, untrained_notice
from vidllm.train.presets import preset
from vidllm.train.shard_writer import ShardWriter
from vidllm.train.weight_sources import WeightSource

from .source_parts import DECODERS, Trap, nothing_left, save_decoder, tokenizer_with, vggt_of


TINY = preset("vidllm-tiny")
FRAMES = torch.randn(2, 3, 3, 28, 42, generator=torch.Generator().manual_seed(8))

# ---------------------------------------------------------------------- language models


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", DECODERS)
def test_a_language_model_answers_as_before(tmp_path, kind, tied):
    before = save_decoder(tmp_path / "decoder", kind, tied, vocab_size=261)
    report = initialise_from_sources("vidllm-tiny", tmp_path / "out", language_model=str(tmp_path / "decoder"))
    model = VidLLMForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert model.dtype == torch.float32
    ids = torch.tensor([[72, 101, 108, 108, 111], [33, 12, 200, 7, 90]])
    with torch.no_grad():
        wanted, got = before(input_ids=ids).logits, model(input_ids=ids).logits
    assert got.shape[-1] >= 264 > 261
    assert torch.equal(got[..., :261], wanted)
    assert got.isfinite().all()
    assert model.config.text_config.model_type == DECODERS[kind][0]
    assert (model.lm_head.weight is model.model.get_input_embeddings().weight) == tied
    assert report["parts"]["language_model"]["keys_left_out"] == []
    # rows that the language model does not have are fresh, and reported as such
    rows = {"model.language_model.embed_tokens.weight": [261, 264], "lm_head.weight": [261, 264]}
    assert report["parts"]["fresh"]["rows"] == {name: rows[name] for name in list(rows)[: 1 if tied else 2]}
    drawn = sum(dict(model.named_parameters())[name].numel() for name in report["parts"]["fresh"]["names"])
    assert report["parts"]["fresh"]["parameters"] == drawn + 3 * 48 * (1 if tied else 2)
    # what stands in for word vectors is of their size
    rows = model.model.get_input_embeddings().weight[:261]
    assert model.config.scene_token_scale == pytest.approx(rows.square().mean().sqrt().item(), rel=1e-3)

    processor = VidLLMProcessor.from_pretrained(tmp_path / "out")
    family = "llama3" if kind == "llama" else "chatml"
    turn_end = "<|eot_id|>" if family == "llama3" else "<|im_end|>"
    assert processor.tokenizer.eos_token == turn_end
    assert processor.tokenizer.pad_token == DECODERS[kind][1][0]
    assert model.generation_config.eos_token_id == processor.tokenizer.convert_tokens_to_ids(turn_end)
    chat = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert turn_end in text
    # every turn mark is one token
    assert len(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) < len(text) / 2
    for name in ("video", "coord", "loc"):
        assert (
            getattr(model.config, f"{name}_token_id") == processor.tokenizer.convert_tokens_to_ids(f"<{name}>") >= 259
        )


def test_rows_that_a_language_model_has_beyond_its_tokens_are_used_and_stay(tmp_path):
    before = save_decoder(tmp_path / "decoder", "qwen2", tied=False, vocab_size=300)
    made = compose(TINY, language_model=str(tmp_path / "decoder"))
    assert made.config.text_config.vocab_size == 300
    initialise_from_sources("vidllm-tiny", tmp_path / "out", language_model=str(tmp_path / "decoder"))
    model = VidLLMForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert torch.equal(model.model.language_model.embed_tokens.weight, before.model.embed_tokens.weight)


def test_new_word_vectors_are_near_the_mean_of_the_others():
    rows = 3 + 0.5 * torch.randn(50, 7, generator=torch.Generator().manual_seed(1)).bfloat16()
    more = grown(rows, 53, torch.Generator().manual_seed(2))
    assert more.dtype == torch.bfloat16
    assert torch.equal(more[:50], rows)
    assert ((more[50:].float() - rows.float().mean(0)).abs() < 0.4).all()
    assert not torch.equal(more[50], more[51])


def test_word_vectors_are_measured_a_few_rows_at_a_time(monkeypatch):
    """They are the largest tensor of all: a copy of it in float32 would double the memory."""
    rows = torch.randn(100, 7, generator=torch.Generator().manual_seed(1))
    whole = grown(rows, 103, torch.Generator().manual_seed(2))
    parts = []
    monkeypatch.setattr(module, "CHUNK_VALUES", 70)
    mean = module._chunked_mean(rows, lambda part: parts.append(part) or part.square())
    assert max(part.numel() for part in parts) <= 70
    torch.testing.assert_close(mean, rows.double().square().mean(0))
    torch.testing.assert_close(grown(rows, 103, torch.Generator().manual_seed(2)), whole)
    drawn = torch.randn(3, 7, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(whole[100:], rows.mean(0) + 0.1 * rows.std(0) * drawn)


def test_a_head_that_is_the_embedding_may_be_stored_too(tmp_path):
    save_decoder(tmp_path / "decoder", "qwen3", tied=True)
    tensors = load_file(tmp_path / "decoder" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(tensors, tmp_path / "decoder" / "model.safetensors")
    report = initialise_from_sources("vidllm-tiny", tmp_path / "out", language_model=str(tmp_path / "decoder"))
    left_out = report["parts"]["language_model"]["keys_left_out"]
    assert left_out == ["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]


def test_half_precision_stays_what_it_is_and_geometry_stays_float32(tmp_path, vggt):
    save_decoder(tmp_path / "decoder", "qwen2", tied=True).to(torch.bfloat16).save_pretrained(tmp_path / "decoder")
    initialise_from_sources(
        "vidllm-tiny", tmp_path / "out", geometry=str(vggt), language_model=str(tmp_path / "decoder")
    )
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        kinds = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    assert kinds["model.language_model.layers.0.mlp.up_proj.weight"] == "BF16"
    assert kinds["model.encoder.model.layernorm.weight"] == "F32"
    # fresh parts are of the language model's dtype
    assert {kind for key, kind in kinds.items() if key.startswith(("model.adapter.", "model.scene_tokens."))} == {
        "BF16"
    }
    assert kinds["model.reconstruction.camera_head.pose_branch.fc2.weight"] == "F32"
    assert VidLLMForConditionalGeneration.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    initialise_from_sources(
        "vidllm-tiny", tmp_path / "cast", language_model=str(tmp_path / "decoder"), dtype="float16"
    )
    cast = VidLLMForConditionalGeneration.from_pretrained(tmp_path / "cast")
    assert cast.dtype == torch.float16
    assert cast.model.reconstruction.camera_head.pose_branch.fc2.weight.dtype == torch.float32


def test_vggt_beside_a_language_model_in_half_precision(tmp_path, vggt, geometry_model):
    """An ordinary load is in the language model's dtype: VGGT's within rounding, exactly VGGT's in VGGT's dtype, and the report says which."""
    save_decoder(tmp_path / "decoder", "qwen2", tied=True).to(torch.bfloat16).save_pretrained(tmp_path / "decoder")
    told = []
    report = initialise_from_sources(
        "vidllm-tiny", tmp_path / "out", str(vggt), language_model=str(tmp_path / "decoder"), progress=told.append
    )
    assert told == [
        "writing geometry",
        "writing language_model",
        "writing fresh parts",
        "checksums of the sources",
    ]
    with torch.no_grad():
        wanted = geometry_model.model(pixel_values_videos=FRAMES).raw_reconstruction.depth_relative
        for options, exact in (({}, False), ({"dtype": torch.float32}, True)):
            model = VidLLMForConditionalGeneration.from_pretrained(tmp_path / "out", **options).eval()
            got = model.model(pixel_values_videos=FRAMES).raw_reconstruction.depth_relative
            assert torch.equal(got, wanted) == exact
            torch.testing.assert_close(got, wanted, rtol=0.1, atol=0.0)
    said = "if loaded with dtype=torch.float32; a usual load is in bfloat16, the language model's dtype, and VGGT's within rounding"
    assert report["reconstruction"] == f"VGGT's, in relative units, {said}"
    assert report["parts"]["geometry"]["dtypes"] == ["float32"]
    assert said in (tmp_path / "out" / "README.md").read_text()
    assert untrained_notice(tmp_path / "out").endswith(f"reconstruction: {report['reconstruction']}")
    # dtypes are those of what is written
    cast = initialise_from_sources("vidllm-tiny", tmp_path / "cast", str(vggt), dtype="bfloat16")
    assert cast["reconstruction"] == "VGGT's within rounding to bfloat16, in relative units"
    assert cast["parts"]["geometry"]["dtypes"] == ["bfloat16", "float32"]
    half = {key: value.bfloat16() for key, value in load_file(vggt).items()}
    save_file(half, vggt)
    both = initialise_from_sources(
        "vidllm-tiny", tmp_path / "both", str(vggt), language_model=str(tmp_path / "decoder")
    )
    assert both["reconstruction"] == "VGGT's, in relative units"


def test_a_shortened_word_matrix_is_refused(tmp_path):
    """Only rows that the config does not count are drawn."""
    save_decoder(tmp_path / "decoder", "qwen2", tied=False, vocab_size=300)
    path = tmp_path / "decoder" / "model.safetensors"
    whole = load_file(path)
    for key, name in (("model.embed_tokens.weight", "embed_tokens"), ("lm_head.weight", "lm_head")):
        save_file({**whole, key: whole[key][:100].clone()}, path)
        with pytest.raises(ValueError, match=rf"{name}.weight: wanted shape \(300, 48\); got \(100, 48\)"):
            initialise_from_sources("vidllm-tiny", tmp_path / "out", language_model=str(tmp_path / "decoder"))
        nothing_left(tmp_path / "out")


def test_a_tokenizer_without_turn_marks_is_refused(tmp_path):
    save_decoder(tmp_path / "decoder", "qwen2", tied=True)
    tokenizer_with(["<|endoftext|>"]).save_pretrained(tmp_path / "decoder")
    with pytest.raises(ValueError, match="wanted a tokenizer with the turn marks of a chat model"):
        initialise_from_sources("vidllm-tiny", tmp_path / "out", language_model=str(tmp_path / "decoder"))
    nothing_left(tmp_path / "out")


# ---------------------------------------------------------------------- geometry and vision


@pytest.mark.parametrize("form", ["safetensors", "pt", "nested", "folder", "shards"])
def test_reconstruction_is_that_of_the_source(tmp_path, geometry_model, form):
    tensors = vggt_of(geometry_model)
    if form == "shards":
        source = tmp_path / "folder"
        source.mkdir()
        keys = sorted(tensors)
        parts = {f"model-0000{n + 1}-of-00003.safetensors": keys[n::3] for n in range(3)}
        for name, part in parts.items():
            save_file({key: tensors[key] for key in part}, source / name)
        index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
    elif form in ("pt", "nested"):
        source = tmp_path / "vggt.pt"
        torch.save(tensors if form == "pt" else {"model": tensors, "epoch": 3}, source)
    else:
        source = tmp_path / ("vggt.safetensors" if form == "safetensors" else "folder/model.safetensors")
        source.parent.mkdir(exist_ok=True)
        save_file(tensors, source)
        source = source.parent if form == "folder" else source
    report = initialise_from_sources("vidllm-tiny", tmp_path / "out", geometry=str(source), max_shard_bytes=200_000)
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    model = VidLLMForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        wanted = geometry_model.model(pixel_values_videos=FRAMES).raw_reconstruction
        got = model.model(pixel_values_videos=FRAMES).raw_reconstruction
    assert torch.equal(got.pose_encodings, wanted.pose_encodings)
    assert torch.equal(got.depth_relative, wanted.depth_relative)
    assert torch.equal(got.depth_confidence, wanted.depth_confidence)
    part = report["parts"]["geometry"]
    assert part["keys_left_out"] == ["point_head.norm.weight", "track_head.tracker.mask_token"]
    assert sorted(part["keys_used"] + part["keys_left_out"]) == sorted(tensors)
    assert all(len(digest) == 64 for digest in part["sha256"].values())
    assert report["reconstruction"] == "VGGT's, in relative units"
    assert not model.config.is_metric
    with pytest.raises(ValueError, match=r"metre|metric"):
        model.reconstruct(FRAMES, metric=True)


@pytest.mark.parametrize("kind", ["dinov2_with_registers", "dinov2"])
def test_an_encoder_of_ones_own_gives_what_transformers_gives(tmp_path, vggt, kind):
    more = {"num_register_tokens": 3} if kind == "dinov2_with_registers" else {}
    fields = {
        key: value for key, value in TINY.vision_config.items() if key not in ("model_type", "num_register_tokens")
    }
    config = AutoConfig.for_model(kind, **fields, **more)
    torch.manual_seed(2)
    vision = AutoModel.from_config(config).eval()
    vision.save_pretrained(tmp_path / "vision")
    report = initialise_from_sources(
        "vidllm-tiny", tmp_path / "out", geometry=str(vggt), vision=str(tmp_path / "vision")
    )
    model = VidLLMForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    pixels = FRAMES.flatten(0, 1)
    with torch.no_grad():
        wanted = vision(pixel_values=pixels).last_hidden_state[:, -6:]
        got = model.model.encoder(pixels, return_layers=False).patch_tokens
    assert torch.equal(got, wanted)
    assert "not VGGT's until it is distilled" in report["reconstruction"]
    left_out = report["parts"]["geometry"]["keys_left_out"]
    assert "aggregator.patch_embed.cls_token" in left_out
    assert not [key for key in report["parts"]["geometry"]["keys_used"] if key.startswith("aggregator.patch_embed.")]
    assert report["parts"]["vision"]["source"] == str(tmp_path / "vision")
    digest = hashlib.sha256((tmp_path / "vision" / "model.safetensors").read_bytes()).hexdigest()
    assert report["parts"]["vision"]["sha256"] == {"model.safetensors": digest}
    assert sorted(load_file(tmp_path / "vision" / "model.safetensors")) == report["parts"]["vision"]["keys_used"]


def test_fresh_parts_are_drawn_as_transformers_draws_them(geometry_model):
    made = compose(TINY)
    usual = VidLLMForConditionalGeneration(copy.deepcopy(made.config)).state_dict()
    names = {name for name in made.shapes if "adapter" in name or "grounding" in name or "room_head" in name}
    fresh = fresh_tensors(made.model, names, seed=5)
    assert set(fresh) == names
    for name, value in fresh.items():
        other = usual[name]
        assert value.shape == other.shape, name
        assert value.isfinite().all(), name
        # constants are the same, what is drawn has the same size
        if other.numel() > 100:
            assert value.std().item() == pytest.approx(other.std().item(), rel=0.35, abs=1e-7), name
        if not other.any() or (other == 1).all():
            assert torch.equal(value, other), name
    again = fresh_tensors(compose(TINY).model, names, seed=5)
    assert all(torch.equal(value, again[name]) for name, value in fresh.items())


# ---------------------------------------------------------------------- broken sources


def broken(kind, tensors, folder):
    """A geometry source that is wrong in one way, and what is said of it."""
    path = folder / "vggt.safetensors"
    if kind == "extra":
        save_file({**tensors, "aggregator.surprise": torch.ones(2)}, path)
        return path, "aggregator.surprise: wanted a VGGT-1B tensor; got an unknown key"
    if kind == "missing":
        save_file({key: value for key, value in tensors.items() if key != "aggregator.camera_token"}, path)
        return path, r"aggregator.camera_token: wanted a tensor of shape \(1, 2, 1, 32\); got no such key"
    if kind == "shape":
        save_file({**tensors, "aggregator.camera_token": torch.ones(1, 2, 1, 31)}, path)
        return path, r"aggregator.camera_token: wanted shape \(1, 2, 1, 32\); got \(1, 2, 1, 31\)"
    if kind == "truncated":
        save_file(tensors, path)
        path.write_bytes(path.read_bytes()[:-1000])
        return path, "wanted a complete safetensors file"
    if kind == "pickle":
        path = folder / "vggt.pt"
        path.write_bytes(pickle.dumps({**tensors, "trap": Trap()}))
        return path, "wanted plain tensors in"
    if kind == "trap":
        path = folder / "vggt.pt"
        torch.save({**tensors, "trap": Trap()}, path)
        return path, "wanted plain tensors in"
    if kind == "numbers":
        path = folder / "vggt.pt"
        torch.save({**tensors, "step": 3}, path)
        return path, "wanted tensors by name in .*; got step, which is none"
    if kind == "absent":
        return folder / "nowhere" / "at" / "all", "wanted a Hub id, a folder or a file"
    if kind == "other":
        (folder / "vggt.onnx").write_bytes(b"x")
        return folder / "vggt.onnx", "wanted weights in .safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    return folder, "names gone.safetensors, which is not there"


@pytest.mark.parametrize(
    "kind",
    ["extra", "missing", "shape", "truncated", "pickle", "trap", "numbers", "absent", "other", "shard"],
)
def test_a_broken_source_is_one_clear_line_and_leaves_nothing(tmp_path, geometry_model, monkeypatch, kind):
    (tmp_path / "source").mkdir()
    monkeypatch.chdir(tmp_path)
    source, message = broken(kind, vggt_of(geometry_model), tmp_path / "source")
    with pytest.raises(ValueError, match=message) as error:
        initialise_from_sources("vidllm-tiny", tmp_path / "out", geometry=str(source))
    assert "\n" not in str(error.value)
    nothing_left(tmp_path / "out")
    assert not (tmp_path / "executed").exists()


def test_language_model_keys_are_checked_too(tmp_path):
    save_decoder(tmp_path / "decoder", "qwen2", tied=False)
    path = tmp_path / "decoder" / "model.safetensors"
    tensors = load_file(path)
    for change, message in (
        ({"model.layers.7.mlp.up_proj.weight": torch.ones(64, 48)}, "model.layers.7.mlp.up_proj.weight: wanted a tensor of the decoder"),
        ({"model.norm.weight": None}, r"model.norm.weight: wanted a tensor of shape \(48,\); got no such key"),
        ({"lm_head.weight": None}, "lm_head.weight: wanted a tensor of shape .*; got no such key"),
        ({"model.norm.weight": torch.ones(47)}, r"model.norm.weight: wanted shape \(48,\); got \(47,\)"),
    ):  # fmt: skip
        changed = {key: value for key, value in {**tensors, **change}.items() if value is not None}
        save_file(changed, path)
        with pytest.raises(ValueError, match=message):
            initialise_from_sources("vidllm-tiny", tmp_path / "out", language_model=str(tmp_path / "decoder"))
        nothing_left(tmp_path / "out")


def test_no_source_is_refused(tmp_path):
    with pytest.raises(ValueError, match="wanted at least one source"):
        initialise_from_sources("vidllm-tiny", tmp_path / "out")


# Everything is imported by a first run; then one process for each folder that is named, told by its number and killed or not.
_FORKING = """
import os, sys
from vidllm.train.initialise import initialise_from_sources
def run(out):
    initialise_from_sources("vidllm-tiny", out, geometry=sys.argv[1], max_shard_bytes=100_000)
run(sys.argv[2])
for line in sys.stdin:
    child = os.fork()
    if not child:
        run(line.strip())
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def test_a_kill_at_any_moment_leaves_nothing_that_loads(tmp_path, vggt):
    """The moments are spread over what a whole run takes here."""
    rng = random.Random(3)
    server = subprocess.Popen(
        [sys.executable, "-c", _FORKING, str(vggt), str(tmp_path / "first")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )

    def start(out):
        server.stdin.write(f"{out}\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    def ended():
        """Exit status as the system tells it: 0, or the signal."""
        return int(server.stdout.readline())

    try:
        start(tmp_path / "second")
        begun = time.monotonic()
        assert ended() == 0
        duration = time.monotonic() - begun
        killed = 0
        for number in range(20):
            if killed == 5:
                break
            out = tmp_path / f"out{number}"
            child = start(out)
            time.sleep(rng.uniform(0.0, 0.9) * duration)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            status = ended()
            if out.exists():
                # it was faster than the first one: then it is complete
                VidLLMForConditionalGeneration.from_pretrained(out)
                continue
            assert status == signal.SIGKILL
            killed += 1
            for partial in tmp_path.glob(f".{out.name}.*"):
                with pytest.raises(OSError, match=r"no file named model\.safetensors"):
                    VidLLMForConditionalGeneration.from_pretrained(partial)
        assert killed == 5
    finally:
        server.stdin.close()
        assert server.wait() == 0


# ---------------------------------------------------------------------- files


def test_shards_are_plain_safetensors(tmp_path):
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "b.half": torch.randn(3, 5, generator=generator).bfloat16(),
        "a.full": torch.randn(7, generator=generator),
        "c.none": torch.zeros(0, 4),
        "d.one": torch.tensor(3.5),
        "e.count": torch.arange(5),
    }
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    dtypes = {name: value.dtype for name, value in tensors.items()}
    for limit, count in ((10**9, 1), (40, 3)):
        folder = tmp_path / str(limit)
        folder.mkdir()
        with ShardWriter(folder, shapes, dtypes, limit) as writer:
            for name in ("e.count", "a.full", "d.one", "b.half", "c.none"):
                writer.write(name, tensors[name])
        files = sorted(folder.glob("*.safetensors"))
        assert len(files) == count
        read = {key: value for path in files for key, value in load_file(path).items()}
        assert set(read) == set(tensors)
        assert all(torch.equal(read[name], value) for name, value in tensors.items())
        if count > 1:
            index = json.loads((folder / "model.safetensors.index.json").read_text())
            assert {key: index["weight_map"][key] for path in files for key in load_file(path)} == index["weight_map"]


def test_a_writer_wants_each_tensor_once_and_all_of_them(tmp_path):
    shapes, dtypes = {"a": (2,), "b": (3,)}, {"a": torch.float32, "b": torch.float32}
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(ShardWriter(tmp_path, shapes, dtypes))
        writer.write("a", torch.ones(2))
        with pytest.raises(ValueError, match="a: wanted a tensor that is still to be written"):
            writer.write("a", torch.ones(2))
        with pytest.raises(ValueError, match=r"b: wanted shape \(3,\); got \(2,\)"):
            writer.write("b", torch.ones(2))
        with pytest.raises(ValueError, match="b was not written"):
            stack.close()
    with pytest.raises(ValueError, match="a: wanted a dtype that safetensors stores"):
        ShardWriter(tmp_path, {"a": (2,)}, {"a": torch.complex64})


def test_a_source_reads_every_tensor_once_however_often_it_opens_the_file(tmp_path, monkeypatch):
    tensors = {f"t{n}": torch.full((n + 1, 10), float(n)) for n in range(12)}
    save_file(tensors, tmp_path / "model.safetensors")
    monkeypatch.setattr("vidllm.train.weight_sources.BYTES_PER_MAPPING", 500)
    source = WeightSource(tmp_path, "geometry")
    assert len(source) == 12
    assert "t3" in source
    read = [(key, tensor.clone()) for key, tensor in source.tensors()]
    assert sorted(key for key, _ in read) == sorted(tensors)
    assert all(torch.equal(value, tensors[key]) for key, value in read)

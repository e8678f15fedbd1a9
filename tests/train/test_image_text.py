"""The image-text model on rooms: sentences say what is seen, pairs are learned, and the folder is a teacher."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModel

from vidllm.train.image_text import (
    IMAGE_TEXT_RECIPES,
    NOTHING,
    ImageTextCollator,
    build_image_text,
    debug_image_text,
    main,
    sentence_of,
    train_image_text,
)
from vidllm.train.recipes import with_settings
from vidllm.train.room_source import BACKGROUND, CATEGORY_NAMES, COLOUR_NAMES, RoomScenes, RoomSource
from vidllm.train.teachers import VisionTeacher


def labels(*names):
    return np.array([[CATEGORY_NAMES.index(c), -1 if k is None else COLOUR_NAMES.index(k)] for c, k in names])


def test_sentences_name_what_is_seen_largest_first():
    things = labels(("chair", "red"), ("couch", None), ("table", "blue"))
    instance = np.full((96, 128), BACKGROUND, np.uint8)
    assert sentence_of(instance, things) == NOTHING
    instance[:10, :12], instance[40:80, :50], instance[91, :90] = 0, 1, 2
    # the table has too few pixels
    assert sentence_of(instance, things) == "a couch, a red chair"
    # of a picture of half the size, a quarter is enough
    assert sentence_of(instance[::2, ::2], things) == "a couch, a red chair"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("image_text") / "run"
    torch.set_num_threads(1)
    chosen = with_settings(debug_image_text(), ["steps=60", "batch_size=6", "learning_rate=3e-3", "save_every=30"])
    return out, train_image_text(chosen, out, use_cpu=True), chosen


def test_pairs_are_learned(run):
    out, _, chosen = run
    losses = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])
    assert json.loads((out / "recipe.json").read_text())["recipe"]["name"] == "debug_image_text"
    assert (out / "checkpoint-60").is_dir()
    assert chosen.steps == 60


def test_the_folder_is_a_teacher(run):
    out, _, chosen = run
    teacher = VisionTeacher(str(out))
    frames = torch.rand(2, 3, 28, 42, generator=torch.Generator().manual_seed(1))
    features, grid = teacher.features(frames, ())
    assert (features.shape, grid) == ((2, 6, chosen.width), (2, 3))
    vision = AutoModel.from_pretrained(out).vision_model.state_dict()
    assert all(torch.equal(value, vision[name]) for name, value in teacher.encoder.model.state_dict().items())


def test_batches_have_one_picture_and_sentence_per_visit(tmp_path):
    chosen = debug_image_text()
    model, tokenizer = build_image_text(chosen)
    visits = RoomScenes(RoomSource(chosen.rooms, tmp_path), 3, num_frames=1, prompts_per_scene=0)
    batch = ImageTextCollator(tokenizer)([visits[0], visits[1], visits[2]])
    assert batch["pixel_values"].shape == (3, 3, 28, 42)
    ends = [row[mask.bool()][-1].item() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert ends == [tokenizer.eos_token_id] * 3
    assert len(set(batch.pop("sample_ids"))) == 3
    output = model(**batch, interpolate_pos_encoding=True, return_loss=True)
    assert output.logits_per_image.shape == (3, 3)
    assert output.loss.isfinite()


def test_bad_input_is_one_line(tmp_path, capsys):
    assert set(IMAGE_TEXT_RECIPES) == {"debug_image_text", "nano_image_text"}
    for words, message in (
        (["nano_imag_text"], "did you mean 'nano_image_text'"),
        (["debug_image_text", "--set", "batch_size=1"], "wanted at least 2 pictures to tell apart"),
        (["debug_image_text", "--set", "precision=half"], "wanted float32 or bfloat16"),
        (["debug_image_text", "--set", "steps=0"], "steps: wanted at least 1"),
    ):
        assert main([*words, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1

"""Small rooms to evaluate on, and an untrained model whose answers differ from prompt to prompt."""

import pytest
from tiny import randomise

from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.processing.processing_vidllm import VidLLMProcessor
from vidllm.processing.rooms.write import write_rooms
from vidllm.train.initialise import initialise


@pytest.fixture(scope="session")
def rooms_root(tmp_path_factory):
    """Three easy rooms, as every benchmark evaluates them."""
    root = tmp_path_factory.mktemp("eval") / "rooms"
    write_rooms(root, 3, seed=5, difficulty="easy", split="val", size_hw=(48, 64), video=False)
    return root


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A tiny checkpoint with random weights everywhere."""
    folder = tmp_path_factory.mktemp("eval") / "tiny"
    initialise("vidllm-tiny", folder, seed=3)
    model = VidLLMForConditionalGeneration.from_pretrained(folder)
    randomise(model, 3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def loaded(model_dir):
    """The same, loaded, with its processor."""
    model = VidLLMForConditionalGeneration.from_pretrained(model_dir).eval()
    return model, VidLLMProcessor.from_pretrained(model_dir)

"""A small data root of rooms, and its benchmarks, for the tests of training; and a small VGGT."""

import datasets
import pytest
import torch
from safetensors.torch import save_file

from vidllm.processing.benchmarks import load_benchmark
from vidllm.processing.rooms.write import write_rooms
from vidllm.train.initialise import build_untrained

from .source_parts import vggt_of


VARIANTS = {"scanqa": "default", "sqa3d": "default", "scanrefer": "default", "scan2cap": "per_description"}


@pytest.fixture(scope="session")
def rooms_root(tmp_path_factory):
    """Three easy rooms, training split, frames of 28 x 42."""
    root = tmp_path_factory.mktemp("rooms") / "root"
    write_rooms(root, 3, seed=3, difficulty="easy", size_hw=(28, 42))
    return root


@pytest.fixture(scope="session")
def rooms_rows(rooms_root):
    """Rows of the four benchmarks of `rooms_root`, by name."""
    datasets.disable_progress_bars()
    return {
        name: load_benchmark(name, rooms_root, "train", variant=variant, cache_dir=rooms_root.parent / "cache")
        for name, variant in VARIANTS.items()
    }


@pytest.fixture(scope="session")
def geometry_model():
    """A model whose geometry is as far from its first values as a trained one's."""
    model = build_untrained("vidllm-tiny", seed=11)[0]
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if name.startswith(("encoder", "reconstruction")) and "room_head" not in name:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.fixture
def vggt(geometry_model, tmp_path):
    """Its geometry as VGGT's file."""
    path = tmp_path / "vggt.safetensors"
    save_file(vggt_of(geometry_model), path)
    return path

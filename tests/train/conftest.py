"""A small data root of rooms, and its benchmarks, for the tests of training."""

import datasets
import pytest

from vidllm.processing.benchmarks import load_benchmark
from vidllm.processing.rooms.write import write_rooms


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

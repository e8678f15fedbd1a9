"""ScanQA, SQA3D, ScanRefer, Scan2Cap and people's own videos as data sets of samples. Importing this package loads nothing."""

from importlib import import_module
from typing import Any


_HOME = {
    "BENCHMARKS": "load",
    "BenchmarkReport": "load",
    "benchmark_report": "load",
    "load_benchmark": "load",
    "FEATURES": "builder",
    "STYLES": "prompts",
    "SceneFrames": "frames",
    "frames_of": "frames",
    "open_sample": "frames",
    "usable_rows": "frames",
    "scanqa_type": "question_types",
    "sqa3d_type": "question_types",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name from the file that defines it."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

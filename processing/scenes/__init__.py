"""Readers of filmed scenes behind one interface, boxes and labels of ScanNet scans. Importing this package loads nothing."""

from importlib import import_module
from typing import Any


_HOME = {
    "Frame": "base",
    "SceneReader": "base",
    "SkipCounter": "base",
    "annotation_from_world": "base",
    "cam_from_world": "base",
    "choose_frames": "choose",
    "LAYOUTS": "open",
    "find_scenes": "open",
    "open_path": "open",
    "open_scene": "open",
    "SensReader": "sens",
    "SceneObjects": "annotations",
    "find_scan_dir": "annotations",
    "load_scene_objects": "annotations",
    "LabelMap": "labels",
    "find_label_tsv": "labels",
    "read_label_map": "labels",
    "unique_multiple": "labels",
    "write_layout": "write",
    "extract_frames": "frames",
    "check_data_root": "check",
}


def __dir__() -> list[str]:
    return sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name from the file that defines it."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

"""Writes a checkpoint's tensors one at a time, in any order, into safetensors shards of which none is ever in memory.

safetensors' own writer wants all tensors of a file at once; the format itself is a JSON header and the bytes that it points into.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch


INDEX_NAME = "model.safetensors.index.json"
# Stands in the names of files that are not to be found by a loader yet; transformers calls it a variant.
HIDDEN = "partial"
MAX_SHARD_BYTES = 5 * 10**9
_NAMES_OF_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class ShardWriter:
    """Shards of a checkpoint, laid out before the first tensor is there; a context manager.

    Args:
        folder (`Path`): Existing folder.
        shapes (`Mapping[str, tuple[int, ...]]`): Of every tensor that will be written.
        dtypes (`Mapping[str, torch.dtype]`): Of the same.
        max_shard_bytes (`int`): A shard grows up to this; one tensor may be larger.
        hidden (`bool`): Whether the files get names that no loader finds, until `reveal_weights`.

    Raises:
        ValueError: A dtype that safetensors does not know; at the end: tensors that were never written.

    Source:
        Upstream: huggingface/safetensors format (eight bytes of length, JSON padded to a multiple of eight, data without gaps), huggingface
        transformers file names. Ours: tensors of a shard lie by element size, so that every one starts at a multiple of it.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, torch.dtype],
        max_shard_bytes: int = MAX_SHARD_BYTES,
        hidden: bool = False,
    ):
        self.folder, self.shapes, self.dtypes = Path(folder), dict(shapes), dict(dtypes)
        unknown = sorted(name for name in shapes if dtypes[name] not in _NAMES_OF_DTYPES)
        if unknown:
            raise ValueError(f"{unknown[0]}: wanted a dtype that safetensors stores; got {dtypes[unknown[0]]}")
        self.sizes = {name: _count(shape) * dtypes[name].itemsize for name, shape in self.shapes.items()}
        groups: list[list[str]] = [[]]
        filled = 0
        for name in sorted(self.shapes):
            if groups[-1] and filled + self.sizes[name] > max_shard_bytes:
                groups.append([])
                filled = 0
            groups[-1].append(name)
            filled += self.sizes[name]
        stem = f"model.{HIDDEN}" if hidden else "model"
        self._index = _hidden_index(self.folder) if hidden else self.folder / INDEX_NAME
        self.file_of: dict[str, str] = {}
        self._layouts: dict[str, dict[str, tuple[int, int]]] = {}
        for number, names in enumerate(groups, start=1):
            file_name = f"{stem}.safetensors"
            if len(groups) > 1:
                file_name = f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors"
            place, layout = 0, {}
            for name in sorted(names, key=lambda n: (-self.dtypes[n].itemsize, n)):
                layout[name] = (place, place + self.sizes[name])
                place += self.sizes[name]
                self.file_of[name] = file_name
            self._layouts[file_name] = layout
        self._left = set(self.shapes)

    def __enter__(self) -> "ShardWriter":
        self._files, self._data_starts = {}, {}
        for file_name, layout in self._layouts.items():
            header: dict = {"__metadata__": {"format": "pt"}}
            for name, (start, end) in layout.items():
                kind = _NAMES_OF_DTYPES[self.dtypes[name]]
                header[name] = {"dtype": kind, "shape": list(self.shapes[name]), "data_offsets": [start, end]}
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            file = open(self.folder / file_name, "wb")
            file.write(struct.pack("<Q", len(text)) + text)
            self._files[file_name], self._data_starts[file_name] = file, 8 + len(text)
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor.

        Args:
            name (`str`): One of those announced, not yet written.
            tensor (`torch.Tensor` of shape `(...)`, as announced): On any device; cast to the announced dtype.

        Raises:
            ValueError: Unknown or written already, or of another shape.
        """
        if name not in self._left:
            raise ValueError(f"{name}: wanted a tensor that is still to be written; got {sorted(self._left)[:3]} left")
        if tuple(tensor.shape) != tuple(self.shapes[name]):
            raise ValueError(f"{name}: wanted shape {tuple(self.shapes[name])}; got {tuple(tensor.shape)}")
        data = tensor.detach().to("cpu", self.dtypes[name]).contiguous().reshape(-1)
        file_name = self.file_of[name]
        file = self._files[file_name]
        file.seek(self._data_starts[file_name] + self._layouts[file_name][name][0])
        if data.numel():
            file.write(memoryview(data.view(torch.uint8).numpy()))
        self._left.remove(name)

    def __exit__(self, kind: type | None, *_: object) -> None:
        for file in self._files.values():
            file.close()
        if kind is not None:
            return
        if self._left:
            raise ValueError(
                f"weights: wanted all tensors; {sorted(self._left)[0]} was not written ({len(self._left)} in all)"
            )
        if len(self._layouts) > 1:
            index = {
                "metadata": {"total_size": sum(self.sizes.values())},
                "weight_map": dict(sorted(self.file_of.items())),
            }
            self._index.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _hidden_index(folder: Path) -> Path:
    """Where transformers writes the index of weights with hidden names."""
    return folder / INDEX_NAME.replace(".json", f".{HIDDEN}.json")


def reveal_weights(folder: Path) -> None:
    """Give hidden files of weights the names that loaders look for, the last step of a checkpoint.

    Args:
        folder (`Path`): Everything else is in it; weights of a [`ShardWriter`] or of `save_pretrained(variant=HIDDEN)`.

    Source:
        Ours: transformers makes a default model of a folder without `config.json`, but refuses one without weights at once.
    """
    index = _hidden_index(folder)
    if index.is_file():
        text = index.read_text(encoding="utf-8")
        index.write_text(text.replace(f'"model.{HIDDEN}-', '"model-'), encoding="utf-8")
    for path in sorted(folder.glob(f"model.{HIDDEN}*.safetensors")):
        path.rename(path.with_name(path.name.replace(f".{HIDDEN}", "", 1)))
    if index.is_file():
        index.rename(folder / INDEX_NAME)


def _count(shape: tuple[int, ...]) -> int:
    """Elements of a shape."""
    count = 1
    for size in shape:
        count *= size
    return count


__all__ = ["HIDDEN", "MAX_SHARD_BYTES", "ShardWriter", "reveal_weights"]

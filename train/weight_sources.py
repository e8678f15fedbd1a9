"""Weights that a checkpoint starts from: a Hub id, a folder or a file, read one tensor at a time.

Nothing is unpickled but plain tensors: `.safetensors` holds nothing else, `.pt` and `.bin` are read with `weights_only=True`.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open


WEIGHTS_NAME, INDEX_SUFFIX = "model.safetensors", ".safetensors.index.json"
PICKLE_SUFFIXES = (".pt", ".pth", ".bin")
# A memory-mapped file is closed and opened again after so many bytes: pages that were read count as memory of the process.
BYTES_PER_MAPPING = 512 * 2**20
_HUB_ID = re.compile(r"^[\w-][\w.-]*/[\w-][\w.-]*$")
# What is fetched from the Hub besides weights: configs and tokenizers.
_SMALL_FILES = ("*.json", "*.txt", "*.jinja", "tokenizer*", "*.model")


_DTYPES_OF_SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class WeightSource:
    """Tensors by name, none of them in memory until it is asked for.

    Args:
        place (`str` or `Path`): As it was given: Hub id, folder, or file.
        what (`str`): Of what these are the weights, for messages (`geometry`, `vision`, `language model`).

    Raises:
        ValueError: Nothing is there, or it is not a complete set of weights.

    Source:
        Ours.
    """

    def __init__(self, place: str | Path, what: str):
        self.place, self.what = str(place), what
        self.folder, self.files = _located(self.place, what)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._file_of: dict[str, Path] = {}
        for path in self.files:
            for key, shape, dtype in self._listed(path):
                if key in self._file_of:
                    raise ValueError(
                        f"{what}: {key} is in {self._file_of[key].name} and in {path.name}; wanted it once"
                    )
                self.shapes[key], self.dtypes[key], self._file_of[key] = shape, dtype, path
        self._check_index()

    def _listed(self, path: Path) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of the tensors of a file."""
        if path.suffix == ".safetensors":
            with _opened(path, self.what) as file:
                for key in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                    part = file.get_slice(key)
                    yield key, tuple(part.get_shape()), _DTYPES_OF_SAFETENSORS[part.get_dtype()]
            return
        for key, tensor in _unpickled(path, self.what).items():
            yield key, tuple(tensor.shape), tensor.dtype

    def _check_index(self) -> None:
        """The index beside shards names what they hold."""
        indices = [] if self.folder is None else sorted(self.folder.glob(f"*{INDEX_SUFFIX}"))
        if len(self.files) < 2 or not indices:
            return
        listed = json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"]
        for key, name in listed.items():
            if self._file_of.get(key, Path()).name != name:
                raise ValueError(f"{self.what}: {indices[0]}: wanted {key} in {name}; it is not there")

    def __contains__(self, key: str) -> bool:
        return key in self.shapes

    def __len__(self) -> int:
        return len(self.shapes)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor once, file by file, in the order of their names within a file.

        Yields:
            `tuple` of `str` and `torch.Tensor` of shape `(...)`: on the CPU, in its own dtype. Only good until the next one is asked for.

        Raises:
            ValueError: A file ends early.

        Source:
            Ours.
        """
        for path in self.files:
            keys = sorted(key for key, file in self._file_of.items() if file == path)
            if path.suffix != ".safetensors":
                loaded = _unpickled(path, self.what)
                for key in keys:
                    yield key, loaded[key]
                continue
            while keys:
                read = 0
                with _opened(path, self.what) as file:
                    while keys and read < BYTES_PER_MAPPING:
                        key = keys.pop(0)
                        tensor = file.get_tensor(key)
                        read += tensor.numel() * tensor.element_size()
                        yield key, tensor
                        del tensor

    def sha256(self) -> dict[str, str]:
        """Checksum of each file.

        Returns:
            `dict[str, str]`: file name to hexadecimal SHA-256.

        Source:
            Ours.
        """
        sums = {}
        for path in self.files:
            with open(path, "rb") as file:
                sums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        return sums


def _located(place: str, what: str) -> tuple[Path | None, list[Path]]:
    """Folder with the small files (None for a bare file), and the files of weights."""
    path = Path(place).expanduser()
    if path.is_file():
        if path.suffix not in (".safetensors", *PICKLE_SUFFIXES):
            raise ValueError(
                f"{what}: wanted weights in .safetensors, {', '.join(PICKLE_SUFFIXES)}; got {path.name} ({path})"
            )
        return None, [path]
    if not path.is_dir():
        if not _HUB_ID.match(place):
            raise ValueError(f"{what}: wanted a Hub id, a folder or a file; got {place}, which does not exist")
        path = _fetched(place, what)
    return path, _weight_files(path, what)


def _fetched(repo_id: str, what: str) -> Path:
    """Folder of a Hub repository's small files and weights; safetensors where it has some."""
    try:
        names = HfApi().list_repo_files(repo_id)
        patterns = ["*.safetensors"] if any(n.endswith(".safetensors") for n in names) else ["*.pt", "*.bin"]
        return Path(snapshot_download(repo_id, allow_patterns=[*_SMALL_FILES, *patterns]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        try:
            return Path(snapshot_download(repo_id, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError, OSError):
            raise ValueError(
                f"{what}: {repo_id} is no local path, and cannot be fetched from the Hub: {' '.join(str(error).split())}"
            ) from error


def _weight_files(folder: Path, what: str) -> list[Path]:
    """Files that together hold a folder's weights."""
    indices = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    if indices:
        names = sorted(set(json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{what}: {indices[0]} names {missing[0]}, which is not there ({len(missing)} missing)")
        return [folder / name for name in names]
    whole = sorted(folder.glob("*.safetensors"))
    if len(whole) > 1:
        whole = [path for path in whole if path.name == WEIGHTS_NAME] or whole
    if not whole:
        whole = sorted(path for suffix in PICKLE_SUFFIXES for path in folder.glob(f"*{suffix}"))
    if len(whole) != 1:
        got = ", ".join(path.name for path in whole) or "none"
        raise ValueError(f"{what}: wanted one file of weights in {folder}, or an index of its shards; got {got}")
    return whole


def _opened(path: Path, what: str):
    """A safetensors file, or one clear error."""
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{what}: wanted a complete safetensors file; {path} is none ({error})") from error


def _unpickled(path: Path, what: str) -> Mapping[str, torch.Tensor]:
    """Tensors of a file of torch's; code in it is refused, not run."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{what}: wanted plain tensors in {path}; it cannot be read as such ({reason})") from error
    for name in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping):
            loaded = loaded[name]
    wrong = not isinstance(loaded, Mapping) or [k for k, v in loaded.items() if not isinstance(v, torch.Tensor)]
    if wrong:
        got = type(loaded).__name__ if wrong is True else f"{wrong[0]}, which is none"
        raise ValueError(f"{what}: wanted tensors by name in {path}; got {got}")
    return loaded


__all__ = ["WeightSource"]

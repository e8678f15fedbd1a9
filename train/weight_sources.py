"""Weights that a checkpoint starts from: a Hub id, a folder or a file, read one tensor at a time.

Nothing is unpickled but plain tensors: `.safetensors` holds nothing else, `.pt` and `.bin` are read with `weights_only=True`.
A folder's files lie in it: an index that names others is refused.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub import HfApi, snapshot_download

# of the HTTP client, which is not the same library in every version
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError
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
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "C64": torch.complex64,
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
        self.files, index = _located(self.place, what)
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
        for key, name in index.items():
            if self._file_of.get(key, Path()).name != name:
                raise ValueError(
                    f"{what}: wanted {key} in {self.files[0].parent / name}, as the index says; it is not there"
                )

    def _listed(self, path: Path) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of the tensors of a file."""
        if path.suffix == ".safetensors":
            with _opened(path, self.what) as file:
                for key in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                    part = file.get_slice(key)
                    kind = part.get_dtype()
                    if kind not in _DTYPES_OF_SAFETENSORS:
                        raise ValueError(
                            f"{self.what}: {key} in {path}: wanted one of {', '.join(_DTYPES_OF_SAFETENSORS)}; got {kind}"
                        )
                    yield key, tuple(part.get_shape()), _DTYPES_OF_SAFETENSORS[kind]
            return
        for key, tensor in _unpickled(path, self.what).items():
            yield key, tuple(tensor.shape), tensor.dtype

    def file_of(self, key: str) -> Path:
        """File of a tensor.

        Args:
            key (`str`): Name of a tensor.

        Returns:
            `Path`

        Source:
            Ours: for messages.
        """
        return self._file_of[key]

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


def folder_of_source(place: str, what: str) -> Path:
    """Folder with a source's config and tokenizer; of a Hub id its small files, no code among them.

    Args:
        place (`str`): Hub id or folder.
        what (`str`): Of what, for messages.

    Returns:
        `Path`

    Raises:
        ValueError: It is neither, or it cannot be fetched.

    Source:
        Ours.
    """
    path = Path(place).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not _HUB_ID.match(place):
        raise ValueError(
            f"{what}: wanted a Hub id (owner/name) or a folder with a config; got {place}, which is neither"
        )
    return _fetched(place, what, with_weights=False)


def _located(place: str, what: str) -> tuple[list[Path], Mapping[str, str]]:
    """The files of weights, and what an index says of them: name of a tensor to file name, empty without one."""
    path = Path(place).expanduser()
    if path.is_file():
        if path.suffix not in (".safetensors", *PICKLE_SUFFIXES):
            raise ValueError(
                f"{what}: wanted weights in .safetensors, {', '.join(PICKLE_SUFFIXES)}; got {path.name} ({path})"
            )
        return [path], {}
    if not path.is_dir():
        if not _HUB_ID.match(place):
            raise ValueError(f"{what}: wanted a Hub id, a folder or a file; got {place}, which does not exist")
        path = _fetched(place, what, with_weights=True)
    return _weight_files(path, what)


def _fetched(repo_id: str, what: str, with_weights: bool) -> Path:
    """Folder of a Hub repository's small files and, if asked for, weights; what is in the cache where the Hub cannot be reached."""
    patterns: Sequence[str] = _SMALL_FILES
    try:
        if with_weights:
            names = HfApi().list_repo_files(repo_id)
            kinds = ["*.safetensors"] if any(n.endswith(".safetensors") for n in names) else ["*.pt", "*.bin"]
            patterns = [*_SMALL_FILES, *kinds]
        return Path(snapshot_download(repo_id, allow_patterns=list(patterns)))
    except (HTTPError, HFValidationError, OSError) as error:
        try:
            return Path(snapshot_download(repo_id, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError, OSError):
            raise ValueError(
                f"{what}: {repo_id} is no local path, and cannot be fetched from the Hub: {' '.join(str(error).split())}"
            ) from error


def _weight_files(folder: Path, what: str) -> tuple[list[Path], Mapping[str, str]]:
    """Files that together hold a folder's weights, and their index."""
    indices = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    if indices:
        listed = _read_index(indices[0], what)
        names = sorted(set(listed.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{what}: {indices[0]} names {missing[0]}, which is not there ({len(missing)} missing)")
        return [folder / name for name in names], listed
    whole = sorted(folder.glob("*.safetensors"))
    if len(whole) > 1:
        whole = [path for path in whole if path.name == WEIGHTS_NAME] or whole
    if not whole:
        whole = sorted(path for suffix in PICKLE_SUFFIXES for path in folder.glob(f"*{suffix}"))
    if len(whole) != 1:
        got = ", ".join(path.name for path in whole) or "none"
        raise ValueError(f"{what}: wanted one file of weights in {folder}, or an index of its shards; got {got}")
    return whole, {}


def _read_index(path: Path, what: str) -> dict[str, str]:
    """Name of a tensor to the name of a safetensors file beside the index."""
    wanted = f"{what}: {path}: wanted a JSON object with `weight_map`, names of tensors to names of files"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{wanted}; got something else ({' '.join(str(error).split())})") from error
    listed = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{wanted}; got {str(document)!r:.60}")
    for key, name in listed.items():
        # No part of a path: the index could name any file of the machine.
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\]+\.safetensors", name):
            raise ValueError(
                f"{what}: {path}: wanted the name of a .safetensors file beside it for {key}; got {name!r}"
            )
    return listed


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
    except (
        UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        OSError,
        LookupError,
        TypeError,
        AttributeError,
        AssertionError,
    ) as error:
        raise ValueError(
            f"{what}: wanted plain tensors in {path}; it cannot be read as such ({_why(error)})"
        ) from error
    for name in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping):
            loaded = loaded[name]
    wrong = not isinstance(loaded, Mapping) or [k for k, v in loaded.items() if not isinstance(v, torch.Tensor)]
    if wrong:
        got = type(loaded).__name__ if wrong is True else f"{wrong[0]}, which is none"
        raise ValueError(f"{what}: wanted tensors by name in {path}; got {got}")
    return loaded


def _why(error: Exception) -> str:
    """Why a file of torch's cannot be read, without the advice that torch gives: to run the code in it."""
    foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
    if foreign:
        return f"it holds {foreign[1]}, and code in a file is not run"
    if isinstance(error, UnpicklingError) or not str(error).strip():
        return "it is no file of tensors alone"
    return str(error).strip().splitlines()[0]


__all__ = ["WeightSource", "folder_of_source"]

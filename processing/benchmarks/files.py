"""Annotation files as their authors distribute them: where they lie, what is in a row, and what is wrong with it. No tensors."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vidllm.processing.scenes.base import SkipCounter, check_scene_id
from vidllm.processing.video_reading_vidllm import VidLLMInputError, VidLLMMissingFileError


FOLDER = "annotations"
LFS_MARK = b"version https://git-lfs"
_MISSING = object()


class MalformedRowError(VidLLMInputError):
    """A row of an annotation file cannot be used; says file, row and field. `reason` is the same without the row.

    Args:
        where (`str`): File and row.
        problem (`str`): Field, what was wanted, what is there.
        kind (`str`): The kind of problem, for counting.

    Source:
        Ours: rows like this are an error, or skipped and counted where the caller says so.
    """

    def __init__(self, where: str, problem: str, kind: str):
        super().__init__(f"{where}, {problem}")
        self.where, self.problem, self.kind = where, problem, kind

    def __reduce__(self) -> tuple:
        return type(self), (self.where, self.problem, self.kind)


class AnnotatedRow:
    """One row of a file, whose fields are read with a check.

    Args:
        path (`Path`): The file.
        number (`int`): Position of the row, from 0 (of a JSON Lines file: its line, from 1).
        values: What the file says.
        what (`str`): How messages call it.

    Raises:
        MalformedRowError: It is no object.

    Source:
        Ours.
    """

    def __init__(self, path: Path, number: int, values: Any, what: str = "row"):
        self.path, self.number, self.name = path, number, f"{what} {number}"
        self.where = f"{path}, {self.name}"
        self.values = values
        if not isinstance(values, Mapping):
            raise MalformedRowError(self.where, f"wanted an object; got {_shown(values)}", "not an object")

    def error(self, field: str, wanted: str, got: Any = _MISSING) -> MalformedRowError:
        """The error for a field."""
        got = self.values.get(field, _MISSING) if got is _MISSING else got
        said = "nothing" if got is _MISSING else _shown(got)
        return MalformedRowError(
            self.where, f"field {field!r}: wanted {wanted}; got {said}", f"{field}: wanted {wanted}"
        )

    def get(self, field: str, wanted: str, check: Callable[[Any], bool], default: Any = _MISSING) -> Any:
        """A field that passes a check; where it is absent (or null), the default if there is one."""
        value = self.values.get(field, _MISSING)
        if value is _MISSING or (value is None and default is not _MISSING):
            if default is _MISSING:
                raise self.error(field, wanted)
            return default
        if not check(value):
            raise self.error(field, wanted)
        return value

    def text(self, field: str, default: Any = _MISSING) -> str:
        """A text that is not blank."""
        return self.get(field, "a text", lambda value: isinstance(value, str) and bool(value.strip()), default)

    def texts(self, field: str, default: Any = _MISSING) -> list[str]:
        """A list of texts."""
        return self.get(
            field, "a list of texts", lambda v: isinstance(v, list) and all(isinstance(x, str) for x in v), default
        )

    def integer(self, field: str, default: Any = _MISSING) -> int:
        """A whole number."""
        return self.get(field, "a whole number", _is_integer, default)

    def integers(self, field: str, default: Any = _MISSING) -> list[int]:
        """A list of whole numbers."""
        return self.get(
            field, "a list of whole numbers", lambda v: isinstance(v, list) and all(map(_is_integer, v)), default
        )

    def number_text(self, field: str) -> int:
        """A whole number, written as text or as a number."""
        value = self.get(field, "a whole number (as text)", lambda v: _is_integer(v) or _is_decimal(v))
        return int(value)

    def scene(self, field: str = "scene_id") -> str:
        """A scene's name."""
        name = self.text(field)
        try:
            return check_scene_id(name)
        except VidLLMInputError:
            raise self.error(field, "a scene's name without folders") from None

    def named_numbers(self, field: str, names: Iterable[str]) -> list[float]:
        """Numbers of an object by their keys, in the order asked for, whatever their order in the file."""
        names = tuple(names)
        value = self.get(field, f"an object with the keys {', '.join(names)}", lambda v: isinstance(v, Mapping))
        for name in names:
            if not _is_number(value.get(name)):
                raise self.error(f"{field}.{name}", "a finite number", value.get(name, _MISSING))
        return [float(value[name]) for name in names]

    def boxes(self, field: str, sides: int = 6) -> list[list[float]] | None:
        """A list of lists of numbers, None if absent."""
        wanted = f"a list of lists of {sides} finite numbers"

        def check(value: Any) -> bool:
            return isinstance(value, list) and all(
                isinstance(row, list) and len(row) == sides and all(map(_is_number, row)) for row in value
            )

        value = self.get(field, wanted, check, None)
        return None if value is None else [[float(x) for x in row] for row in value]


def find_annotation_file(data_root: str | Path, name: str) -> Path:
    """A file of a data root's `annotations` folder, or up to two folders below it (as the archives unpack).

    Args:
        data_root (`str` or `Path`): The root.
        name (`str`): Name of the file as distributed.

    Returns:
        `Path`

    Raises:
        VidLLMInputError: There is none (then also `FileNotFoundError`), or several.

    Source:
        Ours.
    """
    folder = Path(data_root).expanduser() / FOLDER
    if (folder / name).is_file():
        return folder / name
    found = sorted(path for pattern in ("*", "*/*") for path in folder.glob(f"{pattern}/{name}") if path.is_file())
    if len(found) > 1:
        raise VidLLMInputError(f"{name}: wanted one such file below {folder}; got {', '.join(map(str, found))}")
    if not found:
        raise VidLLMMissingFileError(
            f"{folder / name}: no such file; wanted the annotations as their authors distribute them"
        )
    return found[0]


def read_annotation_bytes(path: Path) -> bytes:
    """A file's bytes.

    Args:
        path (`Path`): The file.

    Returns:
        `bytes`

    Raises:
        VidLLMInputError: It is absent (then also `FileNotFoundError`), unreadable, or only a pointer of Git LFS.

    Source:
        Ours: repositories that are copied without LFS hold small text files of the right name.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise VidLLMMissingFileError(f"{path}: no such file") from None
    except OSError as error:
        raise VidLLMInputError(f"{path}: cannot be read ({error.strerror or error})") from None
    if content.startswith(LFS_MARK):
        raise VidLLMInputError(f"{path}: only a pointer of Git LFS; fetch the file itself (git lfs pull)")
    return content


def parse_json(path: Path, content: bytes) -> Any:
    """JSON of a file; any kind of line ends, with or without a byte-order mark.

    Args:
        path (`Path`): The file, for messages.
        content (`bytes`): Its bytes.

    Returns:
        What the file says.

    Raises:
        VidLLMInputError: Not UTF-8, or not JSON; names line and column.

    Source:
        Ours.
    """
    try:
        return json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise VidLLMInputError(f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise VidLLMInputError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None


def parse_json_lines(path: Path, content: bytes) -> list[tuple[int, Any]]:
    """JSON Lines of a file; blank lines are left out.

    Args:
        path (`Path`): The file, for messages.
        content (`bytes`): Its bytes.

    Returns:
        `list[tuple[int, Any]]`: number of the line, from 1, and what it says.

    Raises:
        VidLLMInputError: Not UTF-8, or a line is not JSON; names it.

    Source:
        Ours: lines end at LF, CR LF or CR; other signs that Unicode calls line ends may stand inside a text.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise VidLLMInputError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    rows = []
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append((number, json.loads(line)))
        except json.JSONDecodeError as error:
            raise VidLLMInputError(f"{path}, line {number}, column {error.colno}: not JSON ({error.msg})") from None
    return rows


def list_of(path: Path, content: Any, key: str | None = None) -> list:
    """The rows of a file: its list, or the list under a key.

    Args:
        path (`Path`): The file, for messages.
        content: What it says.
        key (`str`, *optional*): Where the list stands.

    Returns:
        `list`

    Raises:
        VidLLMInputError: There is no list.

    Source:
        Ours.
    """
    if key is not None:
        if not isinstance(content, Mapping) or key not in content:
            raise VidLLMInputError(f"{path}: wanted an object with the key {key!r}; got {_shown(content)}")
        content = content[key]
    if not isinstance(content, list):
        raise VidLLMInputError(
            f"{path}: wanted a list of rows{f' under {key!r}' if key else ''}; got {_shown(content)}"
        )
    return content


def checked_rows(
    rows: Iterable[tuple[Any, ...]], convert: Callable[..., Any], skipped: SkipCounter | None
) -> Iterator[Any]:
    """Convert rows one by one; a malformed one is an error, or skipped and counted.

    Args:
        rows (`Iterable[tuple]`): Arguments of `convert`.
        convert (callable): Returns a record or raises `MalformedRowError`.
        skipped (`SkipCounter`, *optional*): Where to count; None: the first malformed row is an error.

    Returns:
        `Iterator`: what `convert` returned.

    Raises:
        MalformedRowError: Without `skipped`.

    Source:
        Ours: nothing is dropped in silence.
    """
    for row in rows:
        try:
            yield convert(*row)
        except MalformedRowError as error:
            if skipped is None:
                raise
            skipped.add(error.kind, error.where)


def sha256_of(content: bytes) -> str:
    """SHA-256 of bytes, hexadecimal.

    Args:
        content (`bytes`): The bytes.

    Returns:
        `str`

    Source:
        Ours.
    """
    return hashlib.sha256(content).hexdigest()


def _is_integer(value: Any) -> bool:
    """A whole number that is not a truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_decimal(value: Any) -> bool:
    """A text of digits."""
    return isinstance(value, str) and value.isascii() and value.isdecimal()


def _is_number(value: Any) -> bool:
    """A finite number that is not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: Any) -> str:
    """A value for a message: keys of an object, else its beginning."""
    if isinstance(value, Mapping):
        return f"an object with the keys {sorted(map(str, value))}"[:120]
    if isinstance(value, list) and len(repr(value)) > 60:
        return f"a list of {len(value)}"
    return repr(value)[:80]


__all__ = [
    "AnnotatedRow",
    "MalformedRowError",
    "checked_rows",
    "find_annotation_file",
    "list_of",
    "parse_json",
    "parse_json_lines",
    "read_annotation_bytes",
    "sha256_of",
]

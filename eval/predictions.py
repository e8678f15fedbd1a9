"""Predictions on disk: one JSON line each, keyed by id, written as they are made. No tensors.

```
<folder>/<benchmark>.jsonl           all of them, in the order of the benchmark's file, when a run has ended
<folder>/<benchmark>.rank<N>.jsonl   what process N of several has made; taken over into the file above at the end
<folder>/timing.jsonl                seconds per scene
```
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vidllm.processing.video_reading_vidllm import VidLLMInputError


TIMING = "timing"


def read_records(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Whole lines of a file of records.

    Args:
        path (`Path`): JSON Lines file; one that is absent has no records.

    Returns:
        `tuple`: records by id, in the file's order; bytes up to the end of the last whole line.

    Raises:
        VidLLMInputError: A whole line is not a record, or an id is there twice; names file and line.

    Source:
        Ours: what follows the last line end is what a killed process could not finish.
    """
    content = path.read_bytes() if path.is_file() else b""
    whole = content.rfind(b"\n") + 1
    records: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            key = record["id"]
        except (ValueError, KeyError, TypeError):
            raise VidLLMInputError(f"{path}, line {number}: wanted a record with an id; got {line[:80]!r}") from None
        if key in records:
            raise VidLLMInputError(f"{path}, line {number}: wanted every id once; {key} is there twice")
        records[key] = record
    return records, whole


class PredictionFile:
    """A file of records that survives being killed at any moment.

    Opening it reads what is there; a half-written last line is cut off. Records are appended and handed to the system at once.

    Args:
        path (`str` or `Path`): JSON Lines file; made with its folders if it does not exist.
        others (`Iterable[Path]`): Files of other processes: what they hold is known too, and they are only read.

    Raises:
        VidLLMInputError: A line other than the last is not a record, or an id is there twice; names file and line.

    Source:
        Ours.
    """

    def __init__(self, path: str | Path, others: Iterable[Path] = ()):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.records, whole = read_records(self.path)
        if self.path.is_file() and whole < self.path.stat().st_size:
            os.truncate(self.path, whole)
        for other in others:
            for key, record in read_records(other)[0].items():
                self.records.setdefault(key, record)

    def __contains__(self, key: str) -> bool:
        return key in self.records

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those ids that have no record yet, in the order given."""
        return [key for key in keys if key not in self.records]

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        """Append records whose ids are new; others stay as they were."""
        new = [record for record in records if record["id"] not in self.records]
        if not new:
            return
        with open(self.path, "ab") as file:
            file.write(_lines(new))
            file.flush()
            os.fsync(file.fileno())
        # As they will be read back.
        self.records.update({record["id"]: json.loads(json.dumps(record)) for record in new})


def _lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    """Records as lines; half of a surrogate pair, which UTF-8 cannot hold, as an escape."""
    lines = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    return "".join(lines).encode("utf-8", "backslashreplace")


class PredictionFiles:
    """The files of a run, one per benchmark, and one with the time that each scene took.

    Args:
        folder (`str` or `Path`): Where they lie.
        benchmarks (`Sequence[str]`): Which are written.
        rank (`int`, *optional*): This process among several, which writes to files of its own; None: there is one.

    Raises:
        VidLLMInputError: A file is malformed; names file and line.

    Source:
        Ours: whatever process made a prediction, it is known to all when they start, however many there are.
    """

    def __init__(self, folder: str | Path, benchmarks: Sequence[str], rank: int | None = None):
        self.folder = Path(folder)
        own = "" if rank is None else f".rank{rank}"
        opened = {}
        for name in (*benchmarks, TIMING):
            path = self.folder / f"{name}{own}.jsonl"
            opened[name] = PredictionFile(path, [other for other in self._parts(name) if other != path])
        self.timing = opened.pop(TIMING)
        self.of = opened

    def _parts(self, name: str) -> list[Path]:
        """All files that hold predictions of a benchmark: the common one first."""
        common = self.folder / f"{name}.jsonl"
        return [path for path in (common, *sorted(self.folder.glob(f"{name}.rank*.jsonl"))) if path.is_file()]

    def gather(self, order: Mapping[str, Sequence[str]]) -> None:
        """Put everything that all processes made into the common files, each in its order; to be called when they have ended their work.

        Args:
            order (`Mapping`): Ids by benchmark and of `timing`; records of other ids are kept behind them.

        Raises:
            VidLLMInputError: A file is malformed, or an id has no record.
        """
        for name, ids in order.items():
            file = self.timing if name == TIMING else self.of[name]
            parts = self._parts(name)
            found: dict[str, dict[str, Any]] = {}
            for path in parts:
                for key, record in read_records(path)[0].items():
                    found.setdefault(key, record)
            absent = [] if name == TIMING else [key for key in ids if key not in found]
            if absent:
                raise VidLLMInputError(
                    f"{self.folder}: wanted a prediction of every row; {len(absent)} of {name} have none, such as {absent[0]}; run it again"
                )
            known = [key for key in ids if key in found]
            found = {**{key: found[key] for key in known}, **found}
            common = self.folder / f"{name}.jsonl"
            content = _lines(found.values())
            if not common.is_file() or common.read_bytes() != content:
                part = common.with_suffix(".part")
                with open(part, "wb") as stream:
                    stream.write(content)
                    stream.flush()
                    os.fsync(stream.fileno())
                part.replace(common)
            for path in parts:
                if path != common:
                    path.unlink()
            file.path, file.records = common, found


__all__ = ["TIMING", "PredictionFile", "PredictionFiles", "read_records"]

"""Predictions on disk: one JSON line each, keyed by id, written as they are made. No tensors."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vidllm.processing.video_reading_vidllm import VidLLMInputError


class PredictionFile:
    """A file of records that survives being killed at any moment.

    Opening it reads what is there; a half-written last line is cut off. Records are appended and handed to the system at once.

    Args:
        path (`str` or `Path`): JSON Lines file; made with its folders if it does not exist.

    Raises:
        VidLLMInputError: A line other than the last is not a record, or an id is there twice; names file and line.

    Source:
        Ours.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.records: dict[str, dict[str, Any]] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = self.path.read_bytes() if self.path.is_file() else b""
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self.path, whole)
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                record = json.loads(line)
                key = record["id"]
            except (ValueError, KeyError, TypeError):
                raise VidLLMInputError(
                    f"{self.path}, line {number}: wanted a record with an id; got {line[:80]!r}"
                ) from None
            if key in self.records:
                raise VidLLMInputError(f"{self.path}, line {number}: wanted every id once; {key} is there twice")
            self.records[key] = record

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
        lines = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in new)
        with open(self.path, "ab") as file:
            file.write(lines.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
        # As they will be read back.
        self.records.update({record["id"]: json.loads(json.dumps(record)) for record in new})


__all__ = ["PredictionFile"]

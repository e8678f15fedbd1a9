"""Logs of a run as files of JSON lines, of which each says its step.

Shapes: none.
"""

import json
import os
from pathlib import Path


def drop_lines_after(path: Path, step: int) -> None:
    """Shorten a log to the lines up to a step; a last line that was cut while it was written goes too.

    Args:
        path (`Path`): A file of JSON lines with `step`, or none.
        step (`int`): The last that stays.

    Raises:
        ValueError: A line is none of a log.

    Source:
        Ours.
    """
    if not path.is_file():
        return
    # What has no end was cut while it was written.
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    kept = []
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}:{number}: wanted a JSON object with `step`; got {line[:60]!r}") from None
        if found <= step:
            kept.append(line + "\n")
    part = path.with_suffix(".part")
    part.write_text("".join(kept), encoding="utf-8")
    os.replace(part, path)


__all__ = ["drop_lines_after"]

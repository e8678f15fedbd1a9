"""Texts that do not tell on which machine they were made. No tensors."""

import re
from collections.abc import Mapping
from typing import Any


# From the root, from a home folder, from a drive or a share; an address on the net, `owner/name`, `1/2` and the `\.` of an expression are none.
_PATH = re.compile(r"(?<![\w.~$}/:\\-])(?:/|~[/\\]|[A-Za-z]:[/\\]|\\\\)(?:[^\s/\\'\"`,;]+[/\\])*([^\s/\\'\"`,;]+)")


def without_places(value: Any) -> Any:
    """The same with the last part in place of every path from the root.

    Args:
        value: JSON.

    Returns:
        JSON; numbers and keys are as they were.

    Source:
        Ours: a card and what lies beside it are passed on.
    """
    if isinstance(value, str):
        return _PATH.sub(r"\1", value)
    if isinstance(value, Mapping):
        return {key: without_places(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(item) for item in value]
    return value


__all__ = ["without_places"]

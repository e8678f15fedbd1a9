"""Fields of recipes changed by texts that are parsed by the field's type and never evaluated, and written as JSON takes them."""

import difflib
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any


Recipe = typing.TypeVar("Recipe")


def require(held: bool, where: str, wanted: str, got: Any) -> None:
    """One clear error.

    Args:
        held (`bool`): Whether all is well.
        where (`str`): The field.
        wanted (`str`): What it may be.
        got: What it is.

    Raises:
        ValueError: It is not held.

    Source:
        Ours.
    """
    if not held:
        raise ValueError(f"{where}: wanted {wanted}; got {got!r}")


def check_expression(where: str, expression: str) -> None:
    """A regular expression that compiles.

    Args:
        where (`str`): The field.
        expression (`str`): As given.

    Raises:
        ValueError: It does not compile.

    Source:
        Ours.
    """
    try:
        re.compile(expression)
    except re.error as error:
        raise ValueError(f"{where}: wanted a regular expression; got {expression!r} ({error})") from None


def check_factors(factors: Mapping[str, float]) -> None:
    """Factors of learning rates by regular expression of parameter names.

    Args:
        factors (`Mapping[str, float]`): As given.

    Raises:
        ValueError: An expression does not compile, or a factor is negative or not finite.

    Source:
        Ours.
    """
    for expression, factor in factors.items():
        check_expression("learning_rate_factors", expression)
        require(0 <= factor < math.inf, f"learning_rate_factors.{expression}", "a factor of at least 0", factor)


def known_name(where: str, name: str, known: typing.Iterable[str]) -> str:
    """A known name, or an error with the closest one.

    Args:
        where (`str`): What is named, for the message.
        name (`str`): As given.
        known (`Iterable[str]`): All names.

    Returns:
        `str`: the name.

    Raises:
        ValueError: It is not known.

    Source:
        Ours.
    """
    known = list(known)
    if name in known:
        return name
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"{where}: wanted one of {', '.join(known)}; got {name!r}{hint}")


def with_settings(base: Recipe, settings: Sequence[str]) -> Recipe:
    """A recipe with other values.

    Args:
        base (a dataclass such as `JointRecipe`): To start from.
        settings (`Sequence[str]`): `field=value`; parts of a field by dots (`rooms.num_rooms=100`, `benchmarks.scanqa=0.5`). `none` empties
            a field that may be empty, `default` gives one of several parts its defaults; tuples are separated by commas, mappings
            written as `name:value,name:value`.

    Returns:
        The same kind of recipe; the others unchanged.

    Raises:
        ValueError: No `=`, an unknown field (the closest one is suggested), or a value of another type or out of range.

    Source:
        Ours: parsed by the field's type.
    """
    changed = base
    for setting in settings:
        path, separator, text = setting.partition("=")
        if not separator:
            raise ValueError(f"--set {setting}: wanted field=value")
        changed = _replaced(changed, path.strip().split("."), text.strip(), f"--set {path.strip()}")
    return changed


def _replaced(part: Any, path: list[str], text: str, where: str) -> Any:
    """A dataclass with one value changed, however deep it lies."""
    name = known_name(where, path[0], [item.name for item in fields(part)])
    hint = typing.get_type_hints(type(part))[name]
    value, inner = getattr(part, name), _without_none(hint)
    if len(path) == 1:
        return replace(part, **{name: _parsed(hint, text, where)})
    if is_dataclass(inner):
        value = inner() if value is None else value
        return replace(part, **{name: _replaced(value, path[1:], text, where)})
    if typing.get_origin(inner) is Mapping:
        entry = _parsed(typing.get_args(inner)[1], text, where)
        return replace(part, **{name: {**value, ".".join(path[1:]): entry}})
    raise ValueError(f"{where}: wanted {name} without further parts")


def _without_none(hint: Any) -> Any:
    """`X` of `X | None`."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return next(option for option in typing.get_args(hint) if option is not type(None))
    return hint


def _parsed(hint: Any, text: str, where: str) -> Any:
    """A value of a type from its text."""
    inner = _without_none(hint)
    if inner is not hint and text.lower() == "none":
        return None
    if is_dataclass(inner):
        require(
            text == "default", where, f"{'none or ' * (inner is not hint)}default, or one of its parts by a dot", text
        )
        return inner()
    origin = typing.get_origin(inner)
    if origin is tuple:
        kinds, texts = typing.get_args(inner), text.split(",")
        kinds = (kinds[0],) * len(texts) if kinds[-1] is ... else kinds
        require(len(texts) == len(kinds), where, f"{len(kinds)} values separated by commas", text)
        return tuple(_parsed(kind, item.strip(), where) for kind, item in zip(kinds, texts, strict=True))
    if origin is Mapping:
        pairs = [pair.rpartition(":") for pair in text.split(",") if pair.strip()]
        require(all(middle for _, middle, _ in pairs), where, "name:value, several separated by commas", text)
        return {key.strip(): _parsed(typing.get_args(inner)[1], value.strip(), where) for key, _, value in pairs}
    if inner is bool:
        require(text.lower() in ("true", "false"), where, "true or false", text)
        return text.lower() == "true"
    if inner is str:
        return text
    try:
        value = inner(text)
    except ValueError:
        value = math.nan
    require(math.isfinite(value), where, {int: "a whole number", float: "a number"}[inner], text)
    return value


def plain(value: Any) -> Any:
    """Settings as JSON takes them.

    Args:
        value: A dataclass, or anything in its fields.

    Returns:
        dicts, lists, texts, numbers.

    Source:
        Ours.
    """
    if is_dataclass(value):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


__all__ = ["check_expression", "check_factors", "known_name", "plain", "require", "with_settings"]

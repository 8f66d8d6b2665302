"""Frozen dataclasses ↔ strict JSON (RFC 8259), guided by their type hints.

JSON has no infinity: +∞ travels as the string ``"inf"`` where the field is a
number, and NaN and −∞ are refused in both directions. Decoding is as strict as
encoding: missing, unknown and wrongly typed keys are errors that name the key.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from fedlr import checks

T = TypeVar("T")

_INFINITY = "inf"


def encode(record: object, *, indent: int | None = None) -> str:
    """Return the JSON text of a dataclass instance, keys in field order.

    Args:
        record: Instance of a dataclass of numbers, strings, None, tuples,
            string-keyed mappings and further dataclasses.
        indent: Spaces per level; None writes a single line.

    Raises:
        ValueError: A number is NaN or −∞.
        TypeError: A value of another type.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Spent:
        ...     epsilon: float
        >>> encode(Spent(epsilon=math.inf))
        '{"epsilon": "inf"}'
    """
    return json.dumps(_plain("", record), indent=indent, ensure_ascii=False, allow_nan=False)


def decode(kind: type[T], text: str, later: Mapping[str, object] | None = None) -> T:
    """Return the ``kind`` that `encode` wrote as ``text``.

    Args:
        kind: A dataclass whose fields are int, float, str, bool, ``X | None``,
            ``tuple[X, ...]``, ``Mapping[str, X]`` or further dataclasses.
        text: One JSON object.
        later: Keys that versions before this one did not write, with what JSON holds for
            them where they are absent: all of them at once, else they are missing.

    Raises:
        ValueError: Not JSON, a NaN or infinity literal, a missing, unknown or
            repeated key, a wrong type, or a value that ``kind`` refuses.
    """
    data = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    if later and isinstance(data, dict) and not later.keys() & data.keys():
        data |= later
    decoded: T = _typed(kind.__name__, kind, data)
    return decoded


def _plain(name: str, value: object) -> object:
    """Return ``value`` in terms of dict, list, str, int, float and None."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        if math.isnan(value) or value == -math.inf:
            raise ValueError(f"{name} = {value} has no place in a record; use None or a number")
        return _INFINITY if math.isinf(value) else value
    if isinstance(value, tuple | list):
        return [_plain(f"{name}[{index}]", item) for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {str(key): _plain(f"{name}[{key!r}]", item) for key, item in value.items()}
    if is_dataclass(value):
        return {f.name: _plain(f.name, getattr(value, f.name)) for f in fields(value)}
    raise TypeError(f"{name} is a {type(value).__name__}, which a record cannot hold")


def _typed(name: str, kind: Any, value: object) -> Any:
    """Return the JSON ``value`` as an instance of the type hint ``kind``."""
    if get_origin(kind) is types.UnionType:
        (inner,) = (option for option in get_args(kind) if option is not types.NoneType)
        return None if value is None else _typed(name, inner, value)
    if isinstance(kind, type) and is_dataclass(kind):
        return _record(name, kind, _expect(name, dict, value))
    if get_origin(kind) is tuple:
        item_kind = get_args(kind)[0]
        items = _expect(name, list, value)
        return tuple(_typed(f"{name}[{i}]", item_kind, item) for i, item in enumerate(items))
    if get_origin(kind) is Mapping:
        item_kind = get_args(kind)[1]
        pairs = _expect(name, dict, value)
        return {key: _typed(f"{name}[{key!r}]", item_kind, item) for key, item in pairs.items()}
    if kind is float:
        return _number(name, value)
    return _expect(name, kind, value)


def _record(name: str, kind: Callable[..., Any], data: dict[str, object]) -> Any:
    hints = get_type_hints(kind)
    if missing := sorted(hints.keys() - data.keys()):
        raise ValueError(f"{name} lacks the key {', '.join(missing)}")
    if unknown := sorted(data.keys() - hints.keys()):
        raise ValueError(f"{name} has the unknown key {', '.join(unknown)}")
    return kind(**{key: _typed(key, hints[key], data[key]) for key in hints})


def _number(name: str, value: object) -> float:
    """Return a finite number or +∞; a literal such as 1e999 is neither."""
    if value == _INFINITY:
        return math.inf
    if isinstance(value, int) and not isinstance(value, bool):
        value = float(str(value))
    return checks.finite(name, _expect(name, float, value))


def _expect(name: str, kind: Any, value: Any) -> Any:
    """Return ``value`` if its type is ``kind`` (a bool is not an int)."""
    if isinstance(value, bool) is not (kind is bool) or not isinstance(value, kind):
        raise ValueError(f"{name} = {value!r} must be of type {kind.__name__}")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError(f"a key is repeated among {[key for key, _ in pairs]}")
    return data


def _refuse_constant(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is not JSON; infinity is written as the string 'inf'")

"""Plain mapping or canonical JSON → `RunConfig`, all problems at once."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any, Literal, TypeVar, cast

from fedlr.config.rules import cross_problems, range_problems
from fedlr.config.schema import RunConfig
from fedlr.errors import ConfigError

_T = TypeVar("_T")


def from_mapping(values: Mapping[str, Any]) -> RunConfig:
    """Build and check a `RunConfig` from a nested mapping of plain values.

    Args:
        values: Sections by name; missing keys take their defaults.

    Returns:
        The checked configuration.

    Raises:
        ConfigError: With one sentence per unknown key, wrong type, value out of
            range, or contradiction between fields.

    Example:
        >>> from_mapping({"federation": {"clients": 6, "clients_per_round": 3}}).seed
        0
    """
    problems = _unknown_keys(RunConfig, values, "")
    ill_typed: list[str] = []
    config = _build(RunConfig, values, "", ill_typed)
    problems += [*ill_typed, *range_problems(config)]
    if not ill_typed:  # a default in the place of a bad value would contradict others
        problems += cross_problems(config)
    if problems:
        raise ConfigError(problems)
    return config


def to_json(config: RunConfig) -> str:
    """Return the canonical JSON of ``config``: sorted keys, no spaces, round-trips exactly."""
    return json.dumps(asdict(config), sort_keys=True, separators=(",", ":"), allow_nan=False)


def from_json(text: str) -> RunConfig:
    """Inverse of `to_json`; ConfigError on anything `from_mapping` refuses."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError([f"the configuration is not JSON: {error}"]) from error
    return from_mapping(values)


def _unknown_keys(kind: type[Any], values: Any, prefix: str) -> list[str]:
    """Name the keys of a section and of those within it that are no settings."""
    if not isinstance(values, Mapping):
        return []
    hints = typing.get_type_hints(kind)
    problems = [
        f"{prefix}{key} is not a setting; known here: {', '.join(hints)}"
        for key in values
        if key not in hints
    ]
    for name, hint in hints.items():
        if is_dataclass(hint) and name in values:
            problems += _unknown_keys(cast(type[Any], hint), values[name], f"{prefix}{name}.")
    return problems


def _build(kind: type[_T], values: Any, prefix: str, problems: list[str]) -> _T:
    """Build one dataclass; problems are appended, defaults stand in for bad fields."""
    if not isinstance(values, Mapping):
        problems.append(f"{prefix.rstrip('.') or 'configuration'} = {values!r} must be a section")
        return kind()
    hints = typing.get_type_hints(kind)
    known = {item.name: item for item in fields(cast(Any, kind))}
    built: dict[str, Any] = {}
    for name, item in known.items():
        path = f"{prefix}{name}"
        if name not in values:
            if item.default is MISSING and item.default_factory is MISSING:
                problems.append(f"{path} is missing")
            continue
        hint = hints[name]
        if is_dataclass(hint):
            built[name] = _build(cast(type[Any], hint), values[name], f"{path}.", problems)
            continue
        converted, complaint = _convert(hint, values[name])
        if complaint:
            problems.append(f"{path} = {values[name]!r} must be {complaint}")
        else:
            built[name] = converted
    return kind(**built)


def _convert(hint: Any, value: Any) -> tuple[Any, str | None]:
    """Return (value as ``hint``, None) or (None, what it must be)."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        inner = [choice for choice in typing.get_args(hint) if choice is not type(None)]
        if value is None:
            return None, None
        converted, complaint = _convert(inner[0], value)
        return converted, f"{complaint} or null" if complaint else None
    if origin is Literal:
        choices = typing.get_args(hint)
        return (value, None) if value in choices else (None, f"one of {', '.join(choices)}")
    if origin is tuple:
        element = typing.get_args(hint)[0]
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            return None, "a list"
        pairs = [_convert(element, item) for item in value]
        bad = next((complaint for _, complaint in pairs if complaint), None)
        return (None, f"a list, each {bad}") if bad else (tuple(item for item, _ in pairs), None)
    return _convert_scalar(hint, value)


def _convert_scalar(hint: type, value: Any) -> tuple[Any, str | None]:
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-5 as a string
            return float(value), None
        except (ValueError, OverflowError):
            return None, "a number"
    if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value, None
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}
    return None, names.get(hint, hint.__name__)

"""Plain mapping or canonical JSON → `RunConfig`, all problems at once."""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from typing import Any, Literal, TypeVar, cast

from fedlr.config.rules import cross_problems, missing, range_problems
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
    ill_typed: dict[str, str] = {}
    config = _build(RunConfig, values, "", ill_typed)
    problems += [*ill_typed.values(), *range_problems(config)]
    # A default stands in the place of a bad value: what names that field is no contradiction.
    problems += [
        problem
        for problem in cross_problems(config)
        if not any(re.search(rf"(?<![\w.]){re.escape(path)}\b", problem) for path in ill_typed)
    ]
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


def setting_names(kind: type[Any] = RunConfig, prefix: str = "") -> tuple[str, ...]:
    """Return the dotted names of all settings and of the sections they are in.

    Example:
        >>> [name for name in setting_names() if name.startswith("partition")]
        ['partition', 'partition.kind', 'partition.alpha']
    """
    names: list[str] = []
    for name, hint in typing.get_type_hints(kind).items():
        names.append(f"{prefix}{name}")
        if is_dataclass(hint):
            names += setting_names(cast(type[Any], hint), f"{prefix}{name}.")
    return tuple(names)


def _unknown_keys(kind: type[Any], values: Any, prefix: str) -> list[str]:
    """Name the keys of a section and of those within it that are no settings."""
    if not isinstance(values, Mapping):
        return []
    hints = typing.get_type_hints(kind)
    problems = []
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f" did you mean {prefix}{near[0]}?" if near else ""
            known = ", ".join(hints)
            problems.append(f"{prefix}{key} is not a setting;{hint} known here: {known}")
    for name, hint in hints.items():
        if is_dataclass(hint) and name in values:
            problems += _unknown_keys(cast(type[Any], hint), values[name], f"{prefix}{name}.")
    return problems


def _build(kind: type[_T], values: Any, prefix: str, problems: dict[str, str]) -> _T:
    """Build one dataclass; problems are added by name, defaults stand in for bad fields."""
    if not isinstance(values, Mapping):
        section = prefix.rstrip(".") or "configuration"
        problems[section] = f"{section} = {_shown(values)} must be a section"
        return kind()
    hints = typing.get_type_hints(kind)
    known = {item.name: item for item in fields(cast(Any, kind))}
    built: dict[str, Any] = {}
    for name, item in known.items():
        path = f"{prefix}{name}"
        if name not in values:
            if item.default is MISSING and item.default_factory is MISSING:
                problems[path] = f"{path} is missing"
            continue
        hint = hints[name]
        if is_dataclass(hint):
            built[name] = _build(cast(type[Any], hint), values[name], f"{path}.", problems)
            continue
        converted, complaint = _convert(hint, _spelt(item, values[name]))
        if complaint and "spelt" in item.metadata and not isinstance(values[name], list | tuple):
            complaint = f"{item.metadata['spelt']}, {complaint}"
        if not complaint:
            built[name] = converted
        elif values[name] is None:
            problems[path] = missing(path, complaint)
        else:
            problems[path] = f"{path} = {_shown(values[name])} must be {complaint}"
    return kind(**built)


def _spelt(item: Field[Any], value: Any) -> Any:
    """Return what a text means in a field that has a short spelling; else ``value``."""
    spelling = item.metadata.get("spelling")
    meant = spelling(value) if spelling is not None and isinstance(value, str) else None
    return value if meant is None else meant


def _shown(value: Any) -> str:
    """Return ``value`` as it is written in YAML and on the command line."""
    names = {None: "null", True: "true", False: "false"}
    return names[value] if value is None or isinstance(value, bool) else repr(value)


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

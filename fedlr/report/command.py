"""The command line that gives a configuration again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_PLAIN = re.compile(r"[A-Za-z_][\w./+-]*", re.ASCII)
_WORDS = ("null", "true", "false", "nan", "inf")
"""What Hydra reads as something else than a text, in any case."""

_NONE: Mapping[str, str] = {}


def overrides(
    config: Mapping[str, Any], default: Mapping[str, Any], stand_ins: Mapping[str, str] = _NONE
) -> tuple[str, ...]:
    """Return the words by which ``config`` differs from ``default``, as Hydra reads them.

    Args:
        config: A configuration as nested mappings of numbers, texts, lists, booleans and None.
        default: What ``fedlr simulate`` composes without a word. A setting that only one of
            the two has is left out: it is another version's.
        stand_ins: By dotted name, what is shown where a setting differs instead of its value.

    Example:
        >>> overrides({"seed": 1, "data": {"path": "a b"}}, {"seed": 0, "data": {"path": None}})
        ('data.path="a b"', 'seed=1')
    """
    before = dict(leaves(default))
    return tuple(
        f"{name}={_value(stand_ins.get(name, value))}"
        for name, value in sorted(leaves(config))
        if name in before and value != before[name]
    )


def shell(words: Sequence[str]) -> str:
    """Return a command line for a POSIX shell: what has to be quoted is.

    Example:
        >>> shell(["fedlr", "simulate", 'data.path="a b"'])
        'fedlr simulate \\'data.path="a b"\\''
    """
    return shlex.join(words)


def settings(
    config: Mapping[str, Any], stand_ins: Mapping[str, str] = _NONE
) -> tuple[tuple[str, str], ...]:
    """Return every setting by its dotted name, in alphabetical order, as Hydra reads it.

    ``stand_ins`` are shown as they are, instead of the values of their names.
    """
    return tuple(
        (name, stand_ins[name] if name in stand_ins else _value(value))
        for name, value in sorted(leaves(config))
    )


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every setting and its dotted name."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _value(value: Any) -> str:
    """Return a value in the grammar of Hydra's overrides."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(_value(item) for item in value)}]"
    if isinstance(value, str):
        return value if _is_plain(value) else _quoted(value)
    return repr(value)


def _is_plain(text: str) -> bool:
    return bool(_PLAIN.fullmatch(text)) and text.lower() not in _WORDS


def _quoted(text: str) -> str:
    """Return a text in double quotes, what would end or be looked up in them escaped."""
    # Backslashes count only where they stand before a quote, or before the end.
    text = re.sub(r'(\\*)"', r'\1\1\\"', text)
    text = re.sub(r"(\\+)$", r"\1\1", text)
    return '"' + re.sub(r"(\\*)\$\{", r"\1\1\\${", text) + '"'

"""The command line that gives a configuration again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_PLAIN = re.compile(r"[A-Za-z_][\w./+-]*")
_WORDS = ("null", "true", "false", "nan", "inf")
"""What Hydra reads as something else than a text, in any case."""


def overrides(config: Mapping[str, Any], default: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the words by which ``config`` differs from ``default``, as Hydra reads them.

    Args:
        config: A configuration as nested mappings of numbers, texts, lists, booleans and None.
        default: What ``fedlr simulate`` composes without a word. A setting that only one of
            the two has is left out: it is another version's.

    Example:
        >>> overrides({"seed": 1, "data": {"path": "a b"}}, {"seed": 0, "data": {"path": None}})
        ('data.path="a b"', 'seed=1')
    """
    before = dict(_leaves(default))
    return tuple(
        f"{name}={_value(value)}"
        for name, value in sorted(_leaves(config))
        if name in before and value != before[name]
    )


def shell(words: Sequence[str]) -> str:
    """Return a command line for a POSIX shell: what has to be quoted is.

    Example:
        >>> shell(["fedlr", "simulate", 'data.path="a b"'])
        'fedlr simulate \\'data.path="a b"\\''
    """
    return shlex.join(words)


def settings(config: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return every setting by its dotted name, in alphabetical order, as Hydra reads it."""
    return tuple((name, _value(value)) for name, value in sorted(_leaves(config)))


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
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

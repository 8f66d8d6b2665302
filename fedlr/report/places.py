"""Settings that name a place, and what stands for them where others read.

A folder's name can tell who is in the data: no page, and no other tool, is told one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

PLACES = (
    *("output", "data.path", "data.cache", "privacy.policies"),
    *("federation.address", "tracking.uri", "subspace.public"),
)
"""Settings that name folders or machines, whatever their value."""

FILES = ("data.train_split", "data.validation_split")
"""Settings that name files where ``data.kind`` is ``file``."""

NAMES = ("model.name", "data.name")
"""Settings that name something on the hub, or a folder of this machine."""

Kind = Literal["folder", "file", "address"]
"""What is named; in a command ``<kind>`` stands for it, which the reader fills in."""

WORDS: Mapping[Kind, str] = {
    "folder": "(a folder of this machine)",
    "file": "(a file of this machine)",
    "address": "(an address)",
}
"""What stands for it elsewhere."""

RUN_FOLDER = "<run folder>"
"""What stands for the folder of the run itself."""

_ADDRESSES = ("federation.address", "tracking.uri")
_ON_THE_HUB = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def withheld(settings: Mapping[str, object]) -> dict[str, Kind]:
    """Return the settings that name a place, by dotted name, and what each names.

    Args:
        settings: A configuration by dotted name; what is None names nothing.

    Example:
        >>> withheld({"data.path": "/ward-7", "model.name": "a/b", "data.name": None})
        {'data.path': 'folder'}
    """
    kinds: dict[str, Kind] = dict.fromkeys(PLACES, "folder")
    kinds |= dict.fromkeys(_ADDRESSES, "address")
    kinds |= dict.fromkeys(FILES if settings.get("data.kind") == "file" else (), "file")
    kinds |= dict.fromkeys((n for n in NAMES if not is_public(settings.get(n))), "folder")
    return {name: kind for name, kind in kinds.items() if settings.get(name) is not None}


def is_public(name: object) -> bool:
    """Return whether a model or a data set is named as on the hub, and is no folder here."""
    return (
        isinstance(name, str) and _ON_THE_HUB.fullmatch(name) is not None and not _is_folder(name)
    )


def without(text: str, places: Iterable[object], instead: str) -> str:
    """Return ``text`` with ``instead`` for every path among ``places``, the longest first.

    Example:
        >>> without("/ward/a.csv has no test split", ["/ward/a.csv", "runs"], "(a file)")
        '(a file) has no test split'
    """
    for place in sorted({str(place) for place in places}, key=len, reverse=True):
        if len(place) > 1 and "/" in place:
            text = text.replace(place, instead)
    return text


def shown(words: Iterable[str]) -> list[str]:
    """Return overrides as others may read them: ``<folder>`` and the like for each place.

    Example:
        >>> shown(["data=file", "data.path=/ward-7", "seed=1"])
        ['data=file', 'data.path=<folder>', 'seed=1']
    """
    split = [word.lstrip("+").partition("=") for word in words]
    settings: dict[str, object] = {name: value.strip("'\"") for name, _, value in split}
    settings.setdefault("data.kind", settings.get("data"))
    kinds = withheld(settings)
    return [
        f"{name}=<{kinds[name]}>" if name in kinds else f"{name}{equals}{value}"
        for name, equals, value in split
    ]


def _is_folder(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):
        return False

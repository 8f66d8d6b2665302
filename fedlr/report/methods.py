"""Methods, combiners and subspaces as tables: the records of ``fedlr methods``."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

_WIDE = 96
"""Columns from which tables are read; below, every choice is a paragraph."""

_NARROWEST = 30

NOTE = (
    "Numbers are float32 values per site of shape m × n at rank r, one client and round, with K "
    "clients a round; a | b are rounds in turn. A trained head goes both ways beside them. "
    "secure: the server needs a weighted sum alone, as secure aggregation gives. releases: of "
    "private data in a round; what the server does with them costs no ε."
)


@dataclass(frozen=True, kw_only=True)
class MethodRow:
    """A method, or a refresh of one.

    Attributes:
        name: As in the configuration.
        title: Name in the literature.
        trains: Factors that its rounds train.
        up: Numbers that a client sends in a round, per site.
        down: Numbers that it receives.
        exchanges: Phases of a round.
        private_releases: Those of them that release something of private data.
        exact: Whether the aggregate is the weighted mean of the clients' models.
        limit: What it is not exact in, or what it costs.
        secure: Whether it is fit for secure aggregation.
        combiners: Whether another combiner than the weighted mean composes with it.
        refreshes: Whether its subspace can be moved.
        mixed_ranks: Whether a client may train the leading columns alone.
        folds: Whether it adds a residual to the base weights.
        source: Authors and arXiv number.
    """

    name: str
    title: str
    trains: str
    up: str
    down: str
    exchanges: int
    private_releases: int
    exact: bool
    limit: str
    secure: bool
    combiners: bool
    refreshes: bool
    mixed_ranks: bool
    folds: bool
    source: str


@dataclass(frozen=True, kw_only=True)
class CombinerRow:
    """A combiner.

    Attributes:
        name: As in the configuration.
        title: Name in the literature.
        guarantee: What holds while no more clients lie than it bears.
        breakdown: How many it bears.
        secure: Whether it is fit for secure aggregation.
        source: Authors and arXiv number.
    """

    name: str
    title: str
    guarantee: str
    breakdown: str
    secure: bool
    source: str


@dataclass(frozen=True, kw_only=True)
class SubspaceRow:
    """Where the first A comes from.

    Attributes:
        name: As in the configuration.
        about: What it is.
        looks_at: What it needs beside a public seed; never private data.
    """

    name: str
    about: str
    looks_at: str


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """Everything that can be chosen.

    Attributes:
        methods: ``method=<name>``.
        combiners: ``combine=<name>``.
        subspaces: ``subspace=<name>``.
        refreshes: ``subspace.refresh=<name>``, each around the same method.
    """

    methods: tuple[MethodRow, ...]
    combiners: tuple[CombinerRow, ...]
    subspaces: tuple[SubspaceRow, ...]
    refreshes: tuple[MethodRow, ...]


Rows = Sequence[Sequence[str]]


def text(found: Catalogue, width: int) -> str:
    """Return the catalogue for a terminal.

    Args:
        found: What there is.
        width: Columns of the terminal; below `_WIDE` every choice is a paragraph.

    Guarantees:
        No line is longer than ``width``, or than 30 where it is less.
    """
    width = max(width, _NARROWEST)
    parts = [
        section
        for title, headings, rows in _sections(found)
        for section in (*textwrap.wrap(title, width), "", _shown(headings, rows, width), "")
    ]
    return "\n".join([*parts, *textwrap.wrap(NOTE, width)]) + "\n"


def _sections(found: Catalogue) -> list[tuple[str, tuple[str, ...], Rows]]:
    words = ("name", "in the literature", "limit")
    return [
        ("method=", _METHOD, [_method(row) for row in found.methods]),
        (
            "method=, in words",
            words,
            [(row.name, f"{row.title}, {row.source}", row.limit) for row in found.methods],
        ),
        (
            "combine=",
            ("name", "bears", "secure", "guarantee", "in the literature"),
            [
                (row.name, row.breakdown, _yes(row.secure), row.guarantee, row.source)
                for row in found.combiners
            ],
        ),
        (
            "subspace=",
            ("name", "looks at", "what it is"),
            [(row.name, row.looks_at, row.about) for row in found.subspaces],
        ),
        (
            f"subspace.refresh=, {found.refreshes[0].title.partition(',')[0]} as the example",
            (*_METHOD[:5], "releases", "limit"),
            [(*_method(row)[:5], str(row.private_releases), row.limit) for row in found.refreshes],
        ),
    ]


_METHOD = (
    *("name", "trains", "up", "down", "exact", "secure", "releases", "combiners", "refresh"),
    "mixed ranks",
)


def _method(row: MethodRow) -> tuple[str, ...]:
    releases = str(row.private_releases)
    if row.exchanges > 1:
        releases += f" in {row.exchanges} exchanges"
    flags = (row.combiners, row.refreshes, row.mixed_ranks)
    return (
        *(row.name, row.trains, row.up, row.down, _yes(row.exact), _yes(row.secure), releases),
        *map(_yes, flags),
    )


def _shown(headings: Sequence[str], rows: Rows, width: int) -> str:
    return _table(headings, rows, width) if width >= _WIDE else _paragraphs(headings, rows, width)


def _table(headings: Sequence[str], rows: Rows, width: int) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for heading in headings:
        short = heading in ("name", "trains", "up", "exact", "secure", "looks at")
        table.add_column(heading, no_wrap=short, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    sink = io.StringIO()
    Console(file=sink, width=width, color_system=None, force_terminal=False).print(table)
    return "\n".join(line.rstrip() for line in sink.getvalue().splitlines())


def _paragraphs(headings: Sequence[str], rows: Rows, width: int) -> str:
    lines = list[str]()
    for name, *values in rows:
        told = "; ".join(f"{key}: {value}" for key, value in zip(headings[1:], values, strict=True))
        lines += [name, *textwrap.wrap(told, width, initial_indent="  ", subsequent_indent="  ")]
    return "\n".join(lines)


def _yes(value: bool) -> str:
    return "yes" if value else "no"

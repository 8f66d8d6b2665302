"""What the tuning runs of a sweep chose, and what of it is still to come.

The choice is a function of the tuning runs alone, so a sweep that was killed chooses the same.
Once a run that is to be reported exists, its value stays: a tuning run that failed and would be
better on another try must not part a combination's seeds between two values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fedlr.report.sweep import Cell, Sweep

SEED = "seed"
"""The setting by which runs of one combination differ."""

Key = frozenset[tuple[str, str]]
"""A combination: (setting, value) pairs without the seed."""


@dataclass(frozen=True)
class Try:
    """One value of the tuned setting.

    Attributes:
        value: As on the command line.
        accuracy: Of its run, [0, 1]; None where it failed, diverged or ended early, and
            where it has not finished.
        settled: Whether it is known how it went.
    """

    value: str
    accuracy: float | None
    settled: bool


@dataclass(frozen=True)
class Choice:
    """What was chosen for one combination.

    Attributes:
        values: The combination: value by axis, without the seed.
        tries: In rising order of their values.
        value: The chosen value; None where nothing is chosen.
    """

    values: Mapping[str, str]
    tries: tuple[Try, ...]
    value: str | None

    @property
    def failed(self) -> bool:
        """Whether no value gave a whole run, so that nothing can be chosen."""
        return self.value is None and all(one.settled for one in self.tries)

    @property
    def edge(self) -> Literal["smallest", "largest"] | None:
        """Whether the best value is the smallest or largest tried: one beyond may be better."""
        if self.value is None:
            return None
        if self.value == self.tries[0].value:
            return "smallest"
        return "largest" if self.value == self.tries[-1].value else None


def best(tries: Sequence[Try]) -> str | None:
    """Return the value of the best accuracy, the smaller one of equals; None without any.

    Args:
        tries: In any order; those without an accuracy lose.

    Example:
        >>> best([Try("4", 0.75, True), Try("2", 0.75, True), Try("1", None, True)])
        '2'
    """
    known = [
        (-one.accuracy, float(one.value), one.value) for one in tries if one.accuracy is not None
    ]
    return min(known)[2] if known else None


def choices_of(sweep: Sweep) -> tuple[Choice, ...]:
    """Return the choice of every combination that tuning runs were made for, in their order.

    A combination with a run to be reported has the value of that run. One whose tuning runs
    have not all ended has none yet.
    """
    tried: dict[Key, list[Cell]] = {}
    kept: dict[Key, str] = {}
    for cell in sweep.cells:
        key = key_of(cell.facts.values)
        if cell.facts.tuning:
            tried.setdefault(key, []).append(cell)
        elif cell.facts.tuned is not None:
            kept.setdefault(key, cell.facts.tuned)
    return tuple(_choice(cells, kept.get(key)) for key, cells in tried.items())


def key_of(values: Mapping[str, str]) -> Key:
    """Return the combination that a cell's values belong to."""
    return frozenset((name, value) for name, value in values.items() if name != SEED)


def choice_by_key(sweep: Sweep) -> dict[Key, Choice]:
    """Return `choices_of` by `key_of`."""
    return {key_of(choice.values): choice for choice in choices_of(sweep)}


def left(sweep: Sweep) -> tuple[Cell, ...]:
    """Return the cells that have not finished and still matter.

    A tuning run that failed where another value was chosen is none of them.
    """
    chosen = {key for key, one in choice_by_key(sweep).items() if one.value is not None}
    return tuple(
        cell
        for cell in sweep.cells
        if cell.state != "finished"
        and not (cell.facts.tuning and key_of(cell.facts.values) in chosen)
    )


def is_complete(sweep: Sweep) -> bool:
    """Return whether all that was asked for is there."""
    return not left(sweep) and all(choice.value is not None for choice in choices_of(sweep))


def _choice(cells: Sequence[Cell], kept: str | None) -> Choice:
    tries = sorted(map(_try, cells), key=lambda one: float(one.value))
    values = {name: value for name, value in cells[0].facts.values.items() if name != SEED}
    open_ = not all(one.settled for one in tries)
    return Choice(values, tuple(tries), kept or (None if open_ else best(tries)))


def _try(cell: Cell) -> Try:
    summary = cell.summary
    settled = cell.state in ("finished", "failed")
    whole = summary is not None and summary.rounds >= cell.facts.rounds
    loss = cell.rounds[-1].loss if cell.rounds else None
    if summary is None or not whole or (loss is not None and not math.isfinite(loss)):
        return Try(cell.facts.tuned or "", None, settled)
    return Try(cell.facts.tuned or "", summary.accuracy, settled)

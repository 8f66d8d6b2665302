"""The rows of one `make bench`: no number without a parity that was green before it.

A benchmark first shows that the two things it is about to compare compute the same
(`Report.parity`); only what that returns can measure (`Gate`), so there is no way to
a row around it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from .interval import LEVEL, Spread, spread
from .machine import line
from .ratios import Side, alternate, most

SCHEMA = 1


class ParityFailed(AssertionError):
    """Two things that were to be compared do not compute the same."""


@dataclass(frozen=True)
class Goal:
    """A bound that the far end of the interval has to keep, not only the median."""

    kind: Literal["at most", "at least"]
    bound: float

    def met(self, found: Spread) -> bool:
        """Whether it is kept; by the median alone where there is no interval."""
        if self.kind == "at most":
            return (found.median if found.high is None else found.high) <= self.bound
        return (found.median if found.low is None else found.low) >= self.bound

    def __str__(self) -> str:
        return f"{'≤' if self.kind == 'at most' else '≥'} {self.bound:g}"


@dataclass(frozen=True)
class Row:
    """One number.

    Attributes:
        setting: What was done: step, shape, job.
        quantity: ``numerator / denominator``, or what an absolute number is of.
        unit: ``×`` for a ratio, else a unit of time or memory.
        found: Median and interval.
        base: Median of the denominator, with its unit; empty for an absolute number.
        parity: How far the two were apart before anything was measured.
        parity_bound: How far they may be.
        parity_of: In what.
        goal: What it should be; None where there is no goal.
        met: Whether it is; None without a goal.
        note: What a reader of the number has to know.
    """

    setting: str
    quantity: str
    unit: str
    found: Spread
    base: str
    parity: float
    parity_bound: float
    parity_of: str
    goal: str | None
    met: bool | None
    note: str


@dataclass
class Report:
    """Collects rows.

    Attributes:
        rows: In the order they were measured.
        withheld: Settings without a number, each with the reason.
    """

    rows: list[Row] = field(default_factory=list)
    withheld: list[str] = field(default_factory=list)

    def parity(self, setting: str, figure: float, bound: float, of: str) -> Gate:
        """Open the way to numbers about ``setting``.

        Args:
            setting: What will be measured.
            figure: How far the two are apart, ≥ 0.
            bound: How far they may be.
            of: What was compared, in which unit.

        Raises:
            ParityFailed: ``figure`` is above ``bound`` or not a number; the setting
                is listed as withheld, and the benchmark fails.
        """
        if not figure <= bound:
            self.withheld.append(f"{setting}: parity {figure:.2g} > {bound:.2g} ({of})")
            raise ParityFailed(self.withheld[-1])
        return Gate(self, setting, figure, bound, of)

    def table(self, machine: dict[str, Any]) -> list[str]:
        """Return the table as lines: machine, rows, notes, what was withheld."""
        columns = ["setting", "ratio", "n", "median", "95 %", "base", "parity", "goal"]
        cells = [columns, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        lines = [line(machine), ""]
        for number, entry in enumerate(cells):
            pairs = zip(entry, widths, strict=True)
            lines.append("  ".join(cell.ljust(width) for cell, width in pairs).rstrip())
            if number == 0:
                lines.append("  ".join("─" * width for width in widths))
        notes = dict.fromkeys(row.note for row in self.rows if row.note)
        lines += ["", *(f"· {note}" for note in notes)] if notes else []
        lines += [f"withheld: {reason}" for reason in self.withheld]
        return lines

    def save(self, path: Path, machine: dict[str, Any]) -> None:
        """Write everything as JSON; folders are made."""
        content = {
            "schema": SCHEMA,
            "level": LEVEL,
            "machine": machine,
            "rows": [asdict(row) for row in self.rows],
            "withheld": self.withheld,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Gate:
    """A green parity: the only thing that measures. Made by `Report.parity`."""

    report: Report
    setting: str
    figure: float
    bound: float
    of: str

    def ratio(
        self, upper: Side, lower: Side, pairs: int, goal: Goal | None = None, note: str = ""
    ) -> Spread:
        """Add the ratio of times upper/lower over alternating pairs."""
        above, below = alternate(upper, lower, most(pairs))
        base = _time(spread(below).median)
        return self.quotients(
            f"{upper.name} / {lower.name}", (above, below), base, goal=goal, note=note
        )

    def quotients(
        self,
        quantity: str,
        values: tuple[Sequence[float], Sequence[float]],
        base: str,
        goal: Goal | None = None,
        note: str = "",
    ) -> Spread:
        """Add the ratio of two columns of numbers, pair by pair."""
        found = spread([above / below for above, below in zip(*values, strict=True)])
        return self._add(quantity, "×", found, base, goal, note)

    def absolute(
        self,
        quantity: str,
        measure: Callable[[], Sequence[float]],
        unit: str,
        goal: Goal | None = None,
        note: str = "",
    ) -> Spread:
        """Add a number that is no ratio; ``measure`` gives independent values in ``unit``."""
        return self._add(quantity, unit, spread(measure()), "", goal, note)

    def _add(
        self, quantity: str, unit: str, found: Spread, base: str, goal: Goal | None, note: str
    ) -> Spread:
        met = None if goal is None else goal.met(found)
        wanted = None if goal is None else str(goal)
        agreed = (self.figure, self.bound, self.of)
        row = Row(self.setting, quantity, unit, found, base, *agreed, wanted, met, note)
        self.report.rows.append(row)
        return found


def at_most(bound: float) -> Goal:
    """The upper end of the interval must not be above ``bound``."""
    return Goal("at most", bound)


def at_least(bound: float) -> Goal:
    """The lower end of the interval must not be below ``bound``."""
    return Goal("at least", bound)


def megabytes(size: float) -> str:
    """Return a number of bytes for the column of bases."""
    return f"{size / 1e6:.0f} MB"


def _cells(row: Row) -> list[str]:
    found = row.found
    unit = "" if row.unit == "×" else f" {row.unit}"
    ends = (found.low, found.high)
    interval = "–" if None in ends else " … ".join(_number(end) for end in ends if end is not None)
    goal = "" if row.goal is None else f"{row.goal} {'met' if row.met else 'MISSED'}"
    median = f"{_number(found.median)}{unit}"
    parity = f"{row.parity:.1e}" if row.parity else "0"
    return [
        *(row.setting, row.quantity, str(found.count)),
        *(median, interval, row.base, parity, goal),
    ]


def _number(value: float) -> str:
    """Three digits after the point near one, none above a hundred."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 6)}f}" if abs(value) >= 10 or abs(value) < 0.1 else f"{value:.3f}"


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.0f} µs"

"""The table that closes a sweep, and the sentences on what is not finished."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING, TextIO

from fedlr.report import units
from fedlr.report.chosen import choices_of, left
from fedlr.report.live import is_terminal
from fedlr.report.sweep import Cell, Sweep

if TYPE_CHECKING:
    from rich.table import Table

_WIDTH = 100

MEND = (
    "bring the file that is named back from a copy, or delete it where it is summary.json or "
    "failure.json, and give the same command again"
)
"""The way out for a cell of whose run a file cannot be read."""


def show_sweep(sweep: Sweep, stream: TextIO) -> None:
    """Write one line per cell: styled on a terminal, plain text elsewhere."""
    from rich.console import Console

    if is_terminal(stream):
        Console(file=stream, highlight=False).print(_table(sweep))
    else:
        sink = io.StringIO()
        Console(file=sink, width=_WIDTH, color_system=None, force_terminal=False).print(
            _table(sweep)
        )
        stream.write("\n".join(line.rstrip() for line in sink.getvalue().splitlines()) + "\n")
    stream.flush()


def show_settings(sweep: Sweep, stream: TextIO) -> None:
    """Write one line per setting where cells are repeats or were tuned; else nothing.

    Raises:
        RunError: A file that the sweep's cells need is damaged.
    """
    from rich.console import Console

    from fedlr.report.page.sweep_cells import read_grid
    from fedlr.report.page.sweep_summary import note, summary_table

    grid = read_grid(sweep)
    if not grid.settings or len(grid.settings) == len(grid.results):
        return
    table = summary_table(grid)
    shown = _rich([column.heading for column in table.columns])
    for row in table.rows:
        shown.add_row(*(cell.text for cell in row))
    stream.write("\n")
    if is_terminal(stream):
        Console(file=stream, highlight=False, markup=False).print(shown, note(grid), sep="\n")
    else:
        sink = io.StringIO()
        Console(
            file=sink, width=_WIDTH, color_system=None, force_terminal=False, markup=False
        ).print(shown, note(grid), sep="\n")
        stream.write("\n".join(line.rstrip() for line in sink.getvalue().splitlines()) + "\n")
    stream.flush()


def _rich(headings: Iterable[str]) -> Table:
    """Return an empty table whose first column, a name, is to the left."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    return table


def failures(sweep: Sweep) -> list[str]:
    """Return a sentence for each cell that is not finished, and what helps them."""
    told = [f"{cell.facts.cell}: {_why(cell)}" for cell in sweep.cells if cell.state != "finished"]
    told += [
        f"{', '.join(choice.values.values()) or 'all cells'}: every tuning run failed, so nothing "
        "is reported of it"
        for choice in choices_of(sweep)
        if choice.failed
    ]
    damaged, open_ = len(sweep.of("damaged")), len(left(sweep))
    if open_:
        others = "the others" if not damaged else f"{open_ - damaged} of the others"
        again = f"; the same command tries {others} again" if damaged < open_ else ""
        finished = len(sweep.of("finished"))
        told.append(f"{finished} of {len(sweep.cells)} cells are finished{again}")
    if damaged:
        told.append(
            f"{damaged} {'cell is' if damaged == 1 else 'cells are'} damaged and left alone: {MEND}"
        )
    return told


def _why(cell: Cell) -> str:
    return cell.state if cell.problem is None else f"{cell.state}: {cell.problem}"


def _table(sweep: Sweep) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("cell", justify="right")
    for axis in sweep.facts.axes:
        table.add_column(axis, overflow="fold")
    tuning = sweep.facts.tuning
    if tuning is not None:
        table.add_column(tuning.setting, justify="right", overflow="fold")
    for name in ("accuracy", "ε max"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for cell in sweep.cells:
        row = _row(sweep.facts.axes, cell, tuning is not None)
        table.add_row(*(Text(units.printable(text)) for text in row))
    return table


def _row(axes: Iterable[str], cell: Cell, tuned: bool) -> list[str]:
    summary = cell.summary
    accuracy, spent = "—", "—"
    if summary is not None:
        accuracy = units.percent(summary.accuracy)
        # No privacy at all promises nothing, which is what ∞ says.
        spent = "∞" if summary.epsilon_max is None else units.privacy_loss(summary.epsilon_max)
    values = [_short(cell.facts.values.get(axis, "—")) for axis in axes]
    if tuned:
        values.append(_short(cell.facts.tuned or "—"))
    state: str = cell.state
    if summary is not None and summary.rounds < cell.facts.rounds:
        state = f"ended after {summary.rounds} of {cell.facts.rounds} rounds"
    if cell.facts.tuning:
        state += ", tuning"
    return [f"{cell.facts.number:03d}", *values, accuracy, spent, state]


def _short(value: str) -> str:
    """Return a value as read: a searched number has more digits than anyone needs.

    Example:
        >>> _short("3.7454011884736254"), _short("fedsvd"), _short("0.5")
        ('3.745', 'fedsvd', '0.5')
    """
    try:
        return f"{float(value):.4g}" if len(value) > 8 else value
    except ValueError:
        return value

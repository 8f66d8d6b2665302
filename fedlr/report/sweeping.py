"""The table that closes a sweep, and the sentences on what is not finished."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING, TextIO

from fedlr.report import units
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


def failures(sweep: Sweep) -> list[str]:
    """Return a sentence for each cell that is not finished, and what helps them."""
    left = [cell for cell in sweep.cells if cell.state != "finished"]
    told = [f"{cell.facts.cell}: {_why(cell)}" for cell in left]
    damaged = len(sweep.of("damaged"))
    if left:
        others = "the others" if not damaged else f"{len(left) - damaged} of the others"
        again = f"; the same command tries {others} again" if damaged < len(left) else ""
        told.append(
            f"{len(sweep.cells) - len(left)} of {len(sweep.cells)} cells are finished{again}"
        )
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
    for name in ("accuracy", "ε max"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for cell in sweep.cells:
        table.add_row(*(Text(units.printable(text)) for text in _row(sweep.facts.axes, cell)))
    return table


def _row(axes: Iterable[str], cell: Cell) -> list[str]:
    summary = cell.summary
    accuracy, spent = "—", "—"
    if summary is not None:
        accuracy = units.percent(summary.accuracy)
        # No privacy at all promises nothing, which is what ∞ says.
        spent = "∞" if summary.epsilon_max is None else units.privacy_loss(summary.epsilon_max)
    values = [_short(cell.facts.values.get(axis, "—")) for axis in axes]
    state: str = cell.state
    if summary is not None and summary.rounds < cell.facts.rounds:
        state = f"ended after {summary.rounds} of {cell.facts.rounds} rounds"
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

"""The tables of a sweep's page, and ``summary.csv``: the numbers of its cells for a program."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from fedlr.report import units
from fedlr.report.chosen import SEED, Choice
from fedlr.report.page.sweep_axis import label_of, value_of
from fedlr.report.page.sweep_cells import EPSILON, Grid, Result, number_of
from fedlr.report.page.sweep_tests import Comparison, Comparisons
from fedlr.report.page.sweep_trade import on_front
from fedlr.report.page.table import (
    Cell,
    Column,
    Table,
    epsilon,
    milliseconds,
    number,
    seconds,
    share,
    size,
    word,
)
from fedlr.report.records import write_atomically
from fedlr.report.statistics import FEWEST_FOR_WILCOXON
from fedlr.report.sweep import CELLS, RUN

CSV_FILE = "summary.csv"

ABOUT_CELLS = (
    "Accuracy and loss are on the public validation data, ε is that of the dearest client by its "
    "ledger, bytes up and down are those of one client in one round, and the payload is that of "
    "all clients and rounds, both ways; server is the median time of one aggregation. "
    f"The run folder of a cell is {CELLS}/<cell>/{RUN}. A dash "
    "is a number that is not there yet, or that nothing tells."
)
ABOUT_SETTINGS = (
    "The mean is over the finished seeds of a setting; from and to are its 95 % interval by "
    "Student's t, cut to what an accuracy can be; one run alone has none. Bytes up and down are "
    "means of one client in one round, server is the median time of one aggregation. On the front "
    "is what no other setting beats in accuracy, ε and bytes at once."
)
EDGE = "↕"
"""Marks a chosen value that is the smallest or largest of those tried."""
ABOUT_TUNING = (
    "The value of {setting} was chosen for each setting by one run per value on seed {seed}: the "
    "most accurate one, the smaller of equals. Those runs are in no mean and no test, and in the "
    "ε of having chosen. {edge} marks a best value at the edge of those tried: one beyond it may "
    "be better."
)
ABOUT_TESTS = (
    "Pairs are complete pairs of cells, left out are cells without a partner. The difference is "
    "that of accuracy, first less second, in points, with its 95 % interval; p "
    "is that of the paired t test, corrected by Holm's method for all comparisons of its table; "
    f"Wilcoxon's signed-rank test needs {FEWEST_FOR_WILCOXON} differences."
)
"""What tells a reader how to read a table, above it."""

_NUMBERS = (
    *("accuracy", "loss", "epsilon_max", "delta", "bytes_up", "bytes_down", "bytes_total"),
    *("wall_s", "server_s", "rounds"),
)
"""Columns of ``summary.csv`` after the axes, named as in ``summary.json``; ``server_s`` is the
median of a completed round."""


def cells_table(grid: Grid) -> Table:
    """Return all cells, sortable; what has not finished has dashes."""
    headings = (
        *("accuracy", "loss", "ε max", "δ", "bytes up", "bytes down", "payload of the run"),
        *("wall time", "server", "rounds"),
    )
    columns = (
        Column("cell"),
        *(axis_column(name, grid) for name in grid.axes),
        *((chosen_column(grid),) if grid.sweep.facts.tuning is not None else ()),
        *(Column(heading, numeric=True) for heading in headings),
        Column("state"),
    )
    caption = "All cells; click a heading to sort"
    return Table(caption, columns, tuple(_cell_row(grid, result) for result in grid.results))


def settings_table(grid: Grid) -> Table:
    """Return the repeats of each setting together; where a value was tuned, how it was chosen."""
    axes = [name for name in grid.axes if name != SEED]
    chosen, tuned = on_front(grid), grid.sweep.facts.tuning is not None
    headings = (
        *("runs", "mean accuracy", "from", "to", "ε max", "bytes up", "bytes down", "server"),
        "payload of a run",
    )
    columns = (
        *(axis_column(name, grid) for name in axes),
        *((chosen_column(grid),) if tuned else ()),
        *(Column(heading, numeric=True) for heading in headings),
        Column("front"),
    )
    rows = tuple(
        (
            *(axis_value(name, setting.value(name)) for name in axes),
            *((chosen_value(setting.choice),) if tuned else ()),
            number(setting.accuracy.n),
            share(setting.accuracy.mean),
            _end(setting.accuracy.low),
            _end(setting.accuracy.high),
            epsilon(setting.epsilon),
            size(setting.bytes_up),
            size(setting.bytes_down),
            milliseconds(setting.server_s),
            size(setting.traffic),
            word("yes" if setting.values in chosen else "no"),
        )
        for setting in grid.settings
    )
    caption = "Finished cells by setting"
    return Table(caption, columns, (*rows, *unchosen_rows(grid, axes, len(columns))))


def about_tuning(grid: Grid) -> str:
    """Return what tells how values were tuned; empty where none was."""
    tuning = grid.sweep.facts.tuning
    if tuning is None:
        return ""
    setting = units.printable(tuning.setting)
    return ABOUT_TUNING.format(setting=setting, seed=tuning.seed, edge=EDGE)


def chosen_column(grid: Grid) -> Column:
    """Return the column of the tuned setting; a sweep that tunes."""
    tuning = grid.sweep.facts.tuning
    return Column("" if tuning is None else label_of(tuning.setting), numeric=True)


def chosen_value(choice: Choice | None) -> Cell:
    """Return the chosen value, among which it was, and whether it is at their edge.

    Example:
        >>> from fedlr.report.chosen import Try
        >>> tries = tuple(Try(value, 0.5, True) for value in ("1", "2", "4"))
        >>> chosen_value(Choice({}, tries, "4")).text
        '4 of 1, 2, 4 ↕'
    """
    if choice is None:
        return Cell("—")
    tried = units.printable(", ".join(one.value for one in choice.tries))
    if choice.value is None:
        return Cell(f"none of {tried}: all failed")
    edge = f" {EDGE}" if choice.edge is not None else ""
    return Cell(f"{units.printable(choice.value)} of {tried}{edge}", float(choice.value))


def unchosen_rows(grid: Grid, axes: Sequence[str], width: int) -> tuple[tuple[Cell, ...], ...]:
    """Return the combinations of which nothing is reported: each of their tuning runs failed.

    Args:
        grid: The sweep.
        axes: The axes that are the first columns; the tuned setting comes next.
        width: Number of columns.
    """
    return tuple(
        (
            *(axis_value(name, choice.values.get(name)) for name in axes),
            chosen_value(choice),
            *(Cell("—") for _ in range(width - len(axes) - 1)),
        )
        for choice in grid.unchosen
    )


def tests_table(found: Comparisons, comparisons: Sequence[Comparison]) -> Table:
    """Return paired differences with their tests.

    Args:
        found: What ``comparisons`` are part of.
        comparisons: All of its pairs, or all of its pairs by setting.
    """
    apart = any(one.where for one in comparisons)
    repeats = "seeds" if found.by_seed else "settings"
    headings = (
        *("pairs", "left out", repeats, "difference", "from", "to", "p", "p (Holm)"),
        "p (Wilcoxon)",
    )
    columns = (
        Column(label_of(found.axis)),
        *((Column("setting"),) if apart else ()),
        *(Column(heading, numeric=True) for heading in headings),
    )
    where = "by setting" if apart else "over all settings"
    caption = f"{label_of(found.axis)}: {_counted(len(comparisons))} {where}"
    return Table(caption, columns, tuple(_test_row(one, apart) for one in comparisons))


def write_csv(grid: Grid, folder: Path) -> Path:
    """Write ``summary.csv``: a line per cell, ∞ as ``inf``, empty where there is no number.

    Raises:
        RunError: The folder cannot be written.
    """
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    tuned = [] if grid.sweep.facts.tuning is None else [grid.sweep.facts.tuning.setting]
    writer.writerow(("cell", *grid.axes, *tuned, *_NUMBERS, "stage", "state"))
    for result in grid.results:
        writer.writerow(
            (
                result.name,
                *(units.printable(result.values.get(name, "")) for name in grid.axes),
                *(units.printable(result.cell.facts.tuned or "") for _ in tuned),
                *_numbers(result),
                "tuning" if result.cell.facts.tuning else "run",
                result.cell.state,
            )
        )
    path = folder / CSV_FILE
    write_atomically(path, sink.getvalue().encode())
    return path


def _numbers(result: Result) -> tuple[float | None, ...]:
    """Return the numbers of a cell in the order of `_NUMBERS`."""
    return (
        *(result.accuracy, result.loss, result.epsilon, result.delta),
        *(result.bytes_up, result.bytes_down, result.traffic, result.wall_s),
        *(result.server_s, result.rounds),
    )


def _cell_row(grid: Grid, result: Result) -> tuple[Cell, ...]:
    facts, state = result.cell.facts, str(result.cell.state)
    if facts.tuning:
        state += ", tuning"
    if facts.cell in grid.strangers:
        state += ", left out"
    return (
        word(result.name),
        *(axis_value(name, result.values.get(name)) for name in grid.axes),
        *((axis_value("", facts.tuned),) if grid.sweep.facts.tuning is not None else ()),
        share(result.accuracy),
        number(result.loss),
        epsilon(result.epsilon),
        number(result.delta),
        size(result.bytes_up),
        size(result.bytes_down),
        size(result.traffic),
        seconds(result.wall_s),
        milliseconds(result.server_s),
        Cell(f"{result.rounds} of {facts.rounds}", result.rounds),
        word(state),
    )


def _test_row(one: Comparison, apart: bool) -> tuple[Cell, ...]:
    found = one.found
    where = ", ".join(f"{label_of(name)} {value_of(name, value)}" for name, value in one.where)
    return (
        word(f"{one.first} − {one.second}"),
        *((word(where),) if apart else ()),
        number(one.pairs),
        number(found.incomplete),
        number(found.n),
        points(found.difference.mean),
        points(found.difference.low),
        points(found.difference.high),
        probability(found.p),
        probability(one.p_corrected),
        probability(found.p_wilcoxon),
    )


def points(value: float | None) -> Cell:
    """Return a difference of shares in points of per cent, with its sign.

    Example:
        >>> points(-0.0123).text, points(None).text
        ('−1.23', '—')
    """
    if value is None:
        return Cell("—")
    return Cell(f"{100 * value:+.2f}".replace("-", "−"), value)


def probability(value: float | None) -> Cell:
    """Return a p value; what is small is bounded, not rounded to 0.

    Example:
        >>> probability(0.04567).text, probability(1e-9).text
        ('0.046', '< 0.001')
    """
    if value is None:
        return Cell("—")
    return Cell("< 0.001" if value < 0.001 else f"{value:.3f}", value)


def _end(value: float | None) -> Cell:
    """Return an end of an interval of accuracy, cut to [0, 1], where the truth is."""
    return share(None if value is None else min(max(value, 0.0), 1.0))


def axis_column(name: str, grid: Grid) -> Column:
    """Return the column of an axis."""
    heading = "ε asked for" if name == EPSILON else label_of(name)
    return Column(heading, numeric=all(number_of(value) is not None for value in grid.axes[name]))


def axis_value(name: str, value: str | None) -> Cell:
    """Return a value of an axis; numbers are sorted as such."""
    if value is None:
        return Cell("—")
    found = number_of(value)
    return Cell(value_of(name, value), units.printable(value) if found is None else found)


def _counted(count: int) -> str:
    return "1 comparison" if count == 1 else f"{count} comparisons"

"""The settings of a sweep in one short table: for a terminal, and as Markdown for a README."""

from __future__ import annotations

from fedlr.report import units
from fedlr.report.chosen import left
from fedlr.report.page.sweep_cells import Grid, Setting
from fedlr.report.page.sweep_choice import SweepCost, spent
from fedlr.report.page.sweep_tables import (
    EDGE,
    axis_column,
    axis_value,
    chosen_column,
    chosen_value,
    unchosen_rows,
)
from fedlr.report.page.table import Cell, Column, Table, epsilon, milliseconds, size


def summary_table(grid: Grid) -> Table:
    """Return one row per setting: what was varied, what it reached, and what it costs.

    Axes with one value are left out; all numbers are those of
    `fedlr.report.page.sweep_tables.settings_table`.
    """
    axes = list(grid.varied)
    tuned = grid.sweep.facts.tuning is not None
    columns = (
        *(axis_column(name, grid) for name in axes),
        *((chosen_column(grid),) if tuned else ()),
        Column("accuracy (95 % interval)", numeric=True),
        Column("ε max", numeric=True),
        Column("up", numeric=True),
        Column("down", numeric=True),
        Column("server", numeric=True),
    )
    rows = tuple(
        (
            *(axis_value(name, setting.value(name)) for name in axes),
            *((chosen_value(setting.choice),) if tuned else ()),
            _accuracy(setting),
            epsilon(setting.epsilon),
            size(setting.bytes_up),
            size(setting.bytes_down),
            milliseconds(setting.server_s),
        )
        for setting in grid.settings
    )
    return Table("Settings", columns, (*rows, *unchosen_rows(grid, axes, len(columns))))


def note(grid: Grid) -> str:
    """Return what a reader of `summary_table` must know, a sentence or more."""
    runs = sorted({setting.accuracy.n for setting in grid.settings})
    counted = str(runs[0]) if len(runs) == 1 else f"{runs[0]} to {runs[-1]}" if runs else "no"
    seeds = "seed" if runs == [1] else "seeds"
    told = [
        f"Mean validation accuracy over {counted} {seeds} with its 95 % interval (Student's t); "
        "ε is that of the dearest client of one run; bytes are those of one client in one round; "
        "server is the median time it aggregates a round."
    ]
    if (tuning := grid.sweep.facts.tuning) is not None:
        offered = ", ".join(tuning.values)
        without = ", ".join(tuning.without_privacy)
        apart = f" (without privacy {without})" if without else ""
        told.append(
            f"{tuning.setting} was chosen for each row from {offered}{apart} by one run on seed "
            f"{tuning.seed}, which is in no mean."
        )
        if any(one.choice is not None and one.choice.edge for one in grid.settings):
            told.append(f"{EDGE}: the best of them is at their edge, one beyond may be better.")
    if missing := len(left(grid.sweep)):
        verb = "has" if missing == 1 else "have"
        told.append(f"{missing} of {len(grid.sweep.cells)} cells {verb} not finished.")
    return " ".join(told)


def markdown(grid: Grid, cost: SweepCost) -> str:
    """Return the settings as GitHub's Markdown, with a line end behind them.

    Args:
        grid: The sweep.
        cost: What its runs spent together: whoever picks a row pays that.

    Returns:
        `summary_table`, `note`, and what a choice costs.
    """
    told = [note(grid), "Whoever chooses a row by its result has looked at all runs.", spent(cost)]
    if cost.epsilon_max is None:
        told += [f"{notice.rstrip('.')}." for notice in cost.notices]
    return f"{to_markdown(summary_table(grid))}\n{_escaped(' '.join(told))}\n"


def to_markdown(table: Table) -> str:
    r"""Return a table as GitHub's Markdown, a line per row.

    Args:
        table: Its caption is left out.

    Example:
        >>> columns = (Column("name"), Column("n", numeric=True))
        >>> print(to_markdown(Table("", columns, ((Cell("a|b"), Cell("1")),))))
        | name | n |
        | :--- | ---: |
        | a\|b | 1 |
        <BLANKLINE>
    """
    lines = [
        [_escaped(column.heading) for column in table.columns],
        ["---:" if column.numeric else ":---" for column in table.columns],
        *([_escaped(cell.text) for cell in row] for row in table.rows),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _escaped(text: str) -> str:
    """Return a text that Markdown shows as it is, on one line."""
    plain = units.printable(text)
    for mark in ("\\", "|", "*", "_", "`", "<", "["):
        plain = plain.replace(mark, f"\\{mark}")
    return plain


def _accuracy(setting: Setting) -> Cell:
    found = setting.accuracy
    mean = units.percent(found.mean)
    if found.low is None or found.high is None:
        return Cell(mean, found.mean)
    low, high = 100 * max(found.low, 0.0), units.percent(min(found.high, 1.0))
    return Cell(f"{mean} ({low:.1f} to {high})", found.mean)

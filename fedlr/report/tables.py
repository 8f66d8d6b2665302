"""The table that closes a run, for a terminal, a log file or a README."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from fedlr import checks
from fedlr.report import units
from fedlr.report.live import is_terminal
from fedlr.report.records import RoundRecord, Summary

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


def closing_table(summary: Summary, records: Sequence[RoundRecord], width: int = 100) -> str:
    """Return the closing table as plain text, without colour or control codes.

    Args:
        summary: The finished run.
        records: Its rounds; they add what was refused.
        width: Longest line, in columns, ≥ 40.

    Raises:
        ValueError: ``width`` is below 40.
    """
    from rich.console import Console

    checks.at_least("width", width, 40)
    sink = io.StringIO()
    console = Console(file=sink, width=width, color_system=None, force_terminal=False)
    console.print(closing_view(summary, records))
    return "\n".join(line.rstrip() for line in sink.getvalue().splitlines()) + "\n"


def show_closing(summary: Summary, records: Sequence[RoundRecord], stream: TextIO) -> None:
    """Write the closing table: styled on a terminal, plain text elsewhere."""
    if is_terminal(stream):
        from rich.console import Console

        Console(file=stream, highlight=False).print(closing_view(summary, records))
    else:
        stream.write(closing_table(summary, records))
    stream.flush()


def closing_view(summary: Summary, records: Sequence[RoundRecord]) -> Group:
    """Return the closing table for a rich console: the run, its clients, its notices."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    run = Table(box=None, show_header=False, pad_edge=False)
    run.add_column(style="bold", no_wrap=True)
    run.add_column(overflow="fold")
    for name, value in _run_rows(summary, records):
        run.add_row(Text(name), Text(units.printable(value)))
    notices = [Text(f"Note: {units.printable(notice)}") for notice in summary.notices]
    return Group(run, _client_table(summary), *notices)


def _run_rows(summary: Summary, records: Sequence[RoundRecord]) -> list[tuple[str, str]]:
    start, end = units.percent(summary.accuracy_start), units.percent(summary.accuracy)
    up, down = units.data_size(summary.bytes_up), units.data_size(summary.bytes_down)
    wall, server = units.duration(summary.wall_s), units.duration(summary.server_s)
    rows = [
        ("method", f"{summary.method}, {summary.model} on {summary.data}"),
        ("rounds", str(summary.rounds)),
        ("accuracy", f"{start} → {end}  (majority class {units.percent(summary.majority)})"),
        ("privacy", _privacy(summary)),
        ("per client and round", f"{up} up, {down} down"),
        ("wall time", f"{wall}, of it aggregation {server}"),
    ]
    if summary.accountant is not None:
        rows.insert(4, ("accountant", summary.accountant))
    codes = Counter(refusal.code for record in records for refusal in record.refused)
    if codes:
        listed = ", ".join(f"{code} {count}" for code, count in sorted(codes.items()))
        rows.append(("refused updates", f"{codes.total()}  ({listed})"))
    return rows


def _privacy(summary: Summary) -> str:
    if summary.privacy_mode == "none":
        return "off: the updates were not protected"
    if summary.privacy_mode == "dry":
        return "ε = ∞: a dry run adds no noise"
    budget = summary.epsilon_budget
    bound = "" if budget is None else f", budget {units.privacy_loss(budget)}"
    spent = f"ε max {units.privacy_loss(summary.epsilon_max)} at δ = {summary.delta:.3g}"
    return f"{spent} per {summary.unit or 'unit'}{bound}"


def _client_table(summary: Summary) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    private = summary.privacy_mode != "none"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("client", overflow="fold")
    for heading in ("joins", "steps", *(("σ", "ε") if private else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    for client in summary.clients:
        cells = [client.client, str(client.joins), f"{client.steps:,}"]
        if private:
            sigma = client.noise_multiplier
            cells += ["—" if sigma is None else f"{sigma:.3f}", units.privacy_loss(client.epsilon)]
        table.add_row(*(Text(units.printable(cell)) for cell in cells))
    return table

"""The display of a run while it goes on.

It writes to standard error: the last line of standard output is the path of
the run folder and belongs to the shell.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, TextIO

from fedlr.report import units
from fedlr.report.records import RoundRecord

if TYPE_CHECKING:
    from rich.console import Group
    from rich.live import Live
    from rich.progress import Progress as Bars


def say(line: str) -> None:
    """Print one line about what is being done, on standard error."""
    sys.stderr.write(f"fedlr: {line}\n")
    sys.stderr.flush()


class Progress(Protocol):
    """What the round loop tells a display; called in this order, from one thread."""

    def start(self, total_rounds: int, title: str) -> None:
        """Announce a run of ``total_rounds`` ≥ 1 rounds, earlier ones of a resumed run included."""
        ...

    def round_started(self, round: int, cohort: Sequence[str]) -> None:
        """Announce round ``round`` (1-based) and the clients asked."""
        ...

    def client_finished(self, client: str, steps: int) -> None:
        """Report that ``client`` has answered after ``steps`` local steps."""
        ...

    def round_finished(self, record: RoundRecord) -> None:
        """Report a finished round."""
        ...

    def finish(self) -> None:
        """End the display; may be called twice and after a failure."""
        ...


class SilentProgress:
    """Shows nothing: for tests, sweeps and libraries."""

    def start(self, total_rounds: int, title: str) -> None:
        """Do nothing."""

    def round_started(self, round: int, cohort: Sequence[str]) -> None:
        """Do nothing."""

    def client_finished(self, client: str, steps: int) -> None:
        """Do nothing."""

    def round_finished(self, record: RoundRecord) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""


class LiveProgress:
    """Two bars and a status line on a terminal, one plain line per round elsewhere.

    Args:
        epsilon_budget: The ε that stops a client, shown beside ε max; None if
            there is none.
        stream: Where to write; None means standard error.
    """

    def __init__(self, epsilon_budget: float | None = None, stream: TextIO | None = None) -> None:
        self._budget = epsilon_budget
        self._stream = sys.stderr if stream is None else stream
        self._total = 0
        self._seconds: list[float] = []
        self._accuracy: float | None = None
        self._screen: _Screen | None = None

    def start(self, total_rounds: int, title: str) -> None:
        """Announce the run; on a terminal the display opens."""
        self._total = total_rounds
        self._seconds.clear()
        if is_terminal(self._stream):
            self._screen = _Screen(self._stream, total_rounds, units.printable(title))
        else:
            self._write(f"{units.printable(title)}: {total_rounds} rounds")

    def round_started(self, round: int, cohort: Sequence[str]) -> None:
        """Show the round and its cohort; nothing off a terminal."""
        if self._screen is not None:
            self._screen.open_round(round, [units.printable(name) for name in cohort])

    def client_finished(self, client: str, steps: int) -> None:
        """Advance the bar of the clients; nothing off a terminal."""
        if self._screen is not None:
            self._screen.advance(units.printable(client), steps)

    def round_finished(self, record: RoundRecord) -> None:
        """Show the round's numbers."""
        self._seconds.append(record.wall_s)
        self._accuracy = self._accuracy if record.accuracy is None else record.accuracy
        if self._screen is not None:
            self._screen.close_round(record.round, self._status(record))
        else:
            self._write(f"round {record.round}/{self._total}  {self._status(record)}")

    def finish(self) -> None:
        """Close the display; the last state stays visible."""
        if self._screen is not None:
            self._screen.close()
            self._screen = None

    def _status(self, record: RoundRecord) -> str:
        """Return the numbers of one round, shown in both forms of the display."""
        parts = [f"clients {record.accepted}/{len(record.cohort)}"]
        if self._accuracy is not None:
            parts.append(f"accuracy {units.percent(self._accuracy)}")
        if record.epsilon_max is not None:
            bound = "" if self._budget is None else f" of {units.privacy_loss(self._budget)}"
            parts.append(f"ε max {units.privacy_loss(record.epsilon_max)}{bound}")
        parts.append(f"up {units.data_size(record.bytes_up)}")
        parts.append(f"down {units.data_size(record.bytes_down)}")
        left = (self._total - record.round) * sum(self._seconds) / len(self._seconds)
        if record.round < self._total:
            parts.append(f"left {units.duration(left)}")
        return "  ".join(parts)

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


def is_terminal(stream: TextIO) -> bool:
    """Return whether ``stream`` is a terminal that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


class _Screen:
    """The open display on a terminal: title, bar of rounds, bar of clients, status."""

    def __init__(self, stream: TextIO, total_rounds: int, title: str) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bars
        from rich.table import Column

        label = TextColumn(
            "{task.description}", markup=False, table_column=Column(no_wrap=True, min_width=8)
        )
        self._bars: Bars = Bars(label, BarColumn(bar_width=32), MofNCompleteColumn())
        self._rounds = self._bars.add_task("rounds", total=total_rounds)
        self._clients = self._bars.add_task("clients", total=None)
        self._title = title
        self._status = self._activity = ""
        self._live: Live = Live(
            self._view(),
            console=Console(file=stream, highlight=False),
            refresh_per_second=8,
            redirect_stdout=False,
        )
        self._live.start()

    def open_round(self, number: int, cohort: Sequence[str]) -> None:
        """Reset the bar of clients to the round's cohort."""
        self._bars.update(self._rounds, completed=number - 1)
        self._bars.reset(self._clients, total=len(cohort))
        self._activity = f"round {number}: {', '.join(cohort)}"
        self._live.update(self._view())

    def advance(self, client: str, steps: int) -> None:
        """Count one client that has answered."""
        self._bars.advance(self._clients)
        self._activity = f"{client}: {steps} steps"
        self._live.update(self._view())

    def close_round(self, number: int, status: str) -> None:
        """Count the round and show its numbers."""
        self._bars.update(self._rounds, completed=number)
        self._status, self._activity = status, ""
        self._live.update(self._view())

    def close(self) -> None:
        """Draw the last state and give the terminal back."""
        self._live.stop()

    def _view(self) -> Group:
        from rich.console import Group
        from rich.text import Text

        lines = [Text(line, overflow="ellipsis") for line in (self._status, self._activity) if line]
        return Group(Text(self._title, style="bold"), self._bars, *lines)

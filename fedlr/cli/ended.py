"""Whether a run came to its last round: what an exit status must tell."""

from __future__ import annotations

from pathlib import Path

from fedlr.errors import EndedEarly
from fedlr.report.records import SUMMARY_FILE, read_summary
from fedlr.report.units import printable


def check_ended(folder: Path, rounds: int, again: str) -> None:
    """Raise EndedEarly, with why and where, unless the result of a run is that of all its rounds.

    Args:
        folder: A run folder with a summary.
        rounds: Rounds that were asked for.
        again: The command that goes on with the run.
    """
    summary = read_summary(folder / SUMMARY_FILE)
    if summary.rounds >= rounds:
        return
    # Why a run ended before its last round is said last (`server.results.summarise`).
    why = printable(summary.notices[-1].rstrip(".")) if summary.notices else "no reason is recorded"
    raise EndedEarly(
        f"the run ended after {summary.rounds} of {rounds} rounds ({why}); what it reached is in "
        f"{folder}, and {again} goes on where the reason is gone"
    )

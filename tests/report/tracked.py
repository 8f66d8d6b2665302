"""A run that the tests of trackers show, twice: interrupted, then resumed."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from fedlr.report.records import RoundRecord
from fedlr.report.tracking.tracker import TrackedRun, Tracker
from tests.report.samples import RECORD, SUMMARY

RUN = "2031-05-01-12-00-00-simulate-1a2b3c4d"

ROUNDS = tuple(
    replace(RECORD, round=number, accuracy=number / 8, loss=1.0 / number, bytes_up=10**number)
    for number in range(1, 5)
)
"""Four rounds, every number of which differs from the others."""

DRY = replace(RECORD, epsilon_max=math.inf, epsilon_by_client={"site-0": math.inf})


def announced(folder: Path, earlier: tuple[RoundRecord, ...] = ()) -> TrackedRun:
    """The run in ``folder``/run, which is made."""
    (folder / "run").mkdir(exist_ok=True)
    return TrackedRun(
        run=RUN,
        folder=folder / "run",
        output=folder,
        rounds=4,
        settings={"seed": 0, "optimizer.learning_rate": 4.0, "method.name": "fedsvd"},
        earlier=earlier,
    )


def interrupted(tracker: Tracker, folder: Path) -> None:
    """Three rounds; the third was not journaled before the process ended."""
    tracker.start(announced(folder))
    for record in ROUNDS[:3]:
        tracker.round(record)
    tracker.close()


def resumed(tracker: Tracker, folder: Path) -> None:
    """Go on after two rounds, repeat the third, and finish."""
    tracker.start(announced(folder, ROUNDS[:2]))
    for record in ROUNDS[2:]:
        tracker.round(record)
    tracker.finish(SUMMARY)
    tracker.close()

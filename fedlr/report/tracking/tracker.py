"""The interface of a tracker, and the names under which a run's numbers are sent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fedlr.report.records import RoundRecord, Summary

Setting = str | int | float | bool
"""A value of the configuration."""


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """A run that is announced to a tracker; all of it public.

    Attributes:
        run: Identifier; no two runs share one.
        folder: The run folder; exists.
        output: Folder of all runs.
        rounds: Rounds it is to have in the end, ≥ 1.
        settings: The configuration by dotted name, without what names a place.
        earlier: Closed rounds of a resumed run, in rising order.
    """

    run: str
    folder: Path
    output: Path
    rounds: int
    settings: Mapping[str, Setting] = field(default_factory=dict)
    earlier: tuple[RoundRecord, ...] = ()


class Tracker(Protocol):
    """Shows a run in another tool; called in this order, from one thread.

    Steps are rounds. A round that the tool has already is not sent again.
    """

    def start(self, run: TrackedRun) -> None:
        """Announce ``run``, or go on with it, and send the earlier rounds that are missing."""
        ...

    def round(self, record: RoundRecord) -> None:
        """Send the numbers of a closed round."""
        ...

    def finish(self, summary: Summary) -> None:
        """Send the result of a run that has ended by itself."""
        ...

    def close(self) -> None:
        """Let go of the tool; without `finish` before, the run was interrupted."""
        ...


class NoTracker:
    """Sends nothing."""

    def start(self, run: TrackedRun) -> None:
        """Do nothing."""

    def round(self, record: RoundRecord) -> None:
        """Do nothing."""

    def finish(self, summary: Summary) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def series(record: RoundRecord) -> dict[str, float]:
    """Return the numbers of a round by name; the step is ``record.round``.

    ======================  ====================================================
    name                    unit
    ======================  ====================================================
    ``accuracy``            share of the public validation data, [0, 1]
    ``loss``                mean cross-entropy on the same, nats
    ``epsilon_max``         ε spent, the largest of any client
    ``epsilon/<client>``    ε spent by that client
    ``accepted, refused``   clients
    ``bytes_up``            payload of all clients in this round, bytes
    ``bytes_down``          the same, to all clients
    ``wall_s, server_s``    seconds
    ======================  ====================================================

    What is None was not measured and is left out. So is ∞, which no axis has: ε in dry
    mode, where nothing is promised, and the loss of a model that diverged.

    Example:
        >>> record = RoundRecord(
        ...     round=1, cohort=("a",), accepted=1, bytes_down=8, bytes_up=4, wall_s=2.0,
        ...     server_s=0.5, steps=3, accuracy=0.5, loss=math.inf,
        ... )
        >>> sorted(series(record))
        ['accepted', 'accuracy', 'bytes_down', 'bytes_up', 'refused', 'server_s', 'wall_s']
    """
    return _finite(
        {
            "accuracy": record.accuracy,
            "loss": record.loss,
            "epsilon_max": record.epsilon_max,
            **{f"epsilon/{client}": spent for client, spent in record.epsilon_by_client.items()},
            "accepted": record.accepted,
            "refused": len(record.refused),
            "bytes_up": record.bytes_up,
            "bytes_down": record.bytes_down,
            "wall_s": record.wall_s,
            "server_s": record.server_s,
        }
    )


def closing(summary: Summary) -> dict[str, float]:
    """Return the numbers of a finished run by name, all under ``result/``; no None, no ∞.

    The payloads are means of one client in one round, bytes.
    """
    return _finite(
        {
            "result/accuracy": summary.accuracy,
            "result/accuracy_start": summary.accuracy_start,
            "result/majority": summary.majority,
            "result/epsilon_max": summary.epsilon_max,
            "result/epsilon_budget": summary.epsilon_budget,
            "result/delta": summary.delta,
            "result/rounds": summary.rounds,
            "result/bytes_up_per_client_and_round": summary.bytes_up,
            "result/bytes_down_per_client_and_round": summary.bytes_down,
            "result/wall_s": summary.wall_s,
            "result/server_s": summary.server_s,
        }
    )


def promise(summary: Summary) -> dict[str, str]:
    """Return what the numbers of ε mean, in words; ε = ∞ is said here.

    Model, data and notices are left out: they may name folders of this machine.
    """
    words = {
        "privacy_mode": summary.privacy_mode,
        "unit": summary.unit,
        "accountant": summary.accountant,
        "epsilon": "inf" if summary.epsilon_max == math.inf else None,
    }
    return {name: word for name, word in words.items() if word is not None}


def _finite(values: Mapping[str, float | None]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in values.items()
        if value is not None and math.isfinite(value)
    }

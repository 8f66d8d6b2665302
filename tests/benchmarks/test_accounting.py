"""Seconds of a site's budget check: the whole history and one more round, nothing cached."""

from __future__ import annotations

import pytest

from fedlr.privacy import accounting
from fedlr.privacy.accounting import epsilon
from fedlr.privacy.events import Release

from .ratios import most, seconds
from .report import Report

pytestmark = pytest.mark.bench

DELTA = 1e-5


def history(count: int) -> list[Release]:
    """``count`` runs of ten rounds by five steps, each with noise and rate of its own."""
    return [
        Release(0.8 + 0.02 * number, 0.005 + 0.0003 * number, 50, "example")
        for number in range(count)
    ]


def forget() -> None:
    """Empty the caches of the accountant."""
    accounting._divergences.cache_clear()
    accounting._cached.cache_clear()


@pytest.mark.parametrize("count", [1, 10, 100, 1000])
def test_budget_check(report: Report, count: int) -> None:
    epsilon([Release(1.0, 0.5, 1, "example")], DELTA)  # imports
    next_round = Release(1.0, 0.1, 5, "example")
    events = [*history(count), next_round]
    tight, loose = epsilon(events, DELTA), epsilon(events, DELTA, "rdp")
    excess = max(0.0, tight / loose - 1) if tight > 0 else float("inf")
    gate = report.parity(f"ε of {count} runs", excess, 0.0, "PRV above RDP, relative")
    first, later, again = [], [], []
    for _ in range(most(6 if count < 1000 else 1)):
        forget()
        first.append(1e3 * seconds(lambda: epsilon(events, DELTA)))
        longer = [*events, next_round]
        later.append(1e3 * seconds(lambda longer=longer: epsilon(longer, DELTA)))
        again.append(1e3 * seconds(lambda longer=longer: epsilon(longer, DELTA)))
    for what, times in (("first", first), ("a round later", later), ("repeated", again)):
        gate.absolute(f"time of a budget check, {what}", lambda times=times: times, "ms")

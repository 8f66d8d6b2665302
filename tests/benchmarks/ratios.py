"""Times of two things in alternation in one process: what drifts hits both alike."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PAIRS_VARIABLE = "FEDLR_BENCH_PAIRS"
"""Environment variable: no benchmark measures more pairs; for a quick look."""

CLOCK_VARIABLE = "FEDLR_BENCH_CLOCK"
"""Environment variable: ``cpu`` counts this process's CPU time instead of wall time. For a
machine that others use: waiting for a core is not counted, nor is waiting for a disk."""


@dataclass(frozen=True)
class Side:
    """One of two things that are compared.

    Attributes:
        name: What the table calls it.
        call: Does it once.
        repeats: Calls per measurement, for what takes less than a millisecond.
        warm: It needs no call before the first measurement: it has run already, or
            takes so long that a cold start is nothing.
        wait: Returns when a device has done what it was given; called before the clock
            starts and before it stops.
    """

    name: str
    call: Callable[[], Any]
    repeats: int = 1
    warm: bool = False
    wait: Callable[[], None] = lambda: None


def most(pairs: int) -> int:
    """Return ``pairs``, or what the environment allows if that is less."""
    return max(1, min(pairs, int(os.environ.get(PAIRS_VARIABLE, pairs))))


def alternate(first: Side, second: Side, pairs: int) -> tuple[list[float], list[float]]:
    """Measure ``pairs`` pairs, in random order inside a pair, each side warm.

    The order is drawn from a fixed seed: whatever the first call of a pair does to
    caches or to the allocator is shared out between both, and not by turns.

    Returns:
        Seconds of one call of each side, pair by pair.
    """
    order = random.Random(0)
    sides = (first, second)
    times: tuple[list[float], list[float]] = ([], [])
    for side in sides:
        if not side.warm:
            side.call()
    for _ in range(pairs):
        for index in order.sample((0, 1), 2):
            side = sides[index]
            times[index].append(seconds(side.call, side.repeats, side.wait))
    return times


def clock() -> str:
    """Return ``wall``, or ``cpu`` where the environment asks for it."""
    return "cpu" if os.environ.get(CLOCK_VARIABLE) == "cpu" else "wall"


def now() -> float:
    """Seconds on the clock that is in use."""
    return time.process_time() if clock() == "cpu" else time.perf_counter()


def seconds(
    call: Callable[[], Any], repeats: int = 1, wait: Callable[[], None] = lambda: None
) -> float:
    """Time of one call, in s; the garbage collector runs as it does for a user.

    Args:
        call: What is measured.
        repeats: Calls between the two readings of the clock.
        wait: See `Side`.
    """
    wait()
    before = now()
    for _ in range(repeats):
        call()
    wait()
    return (now() - before) / repeats

"""Ratios of two things timed in alternation in one process: drift hits both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from fedlr.build import Workbench, build
from fedlr.cli.compose import compose
from fedlr.data.batching import UnitIndex
from fedlr.privacy.dpsgd import Mechanism, clip_groups
from fedlr.privacy.noise import public_stream
from fedlr.training.local import LocalTask


def ratio(slow: Callable[[], Any], fast: Callable[[], Any], pairs: int) -> tuple[float, float]:
    """Return the median of slow/fast over alternating pairs, and the median time of fast in s."""
    slow(), fast()
    quotients, times = [], []
    for _ in range(pairs):
        first, second = seconds(slow), seconds(fast)
        quotients.append(first / second)
        times.append(second)
    return statistics.median(quotients), statistics.median(times)


def seconds(call: Callable[[], Any]) -> float:
    """Wall time of one call."""
    before = time.perf_counter()
    call()
    return time.perf_counter() - before


def workbench(*overrides: str) -> Workbench:
    """The default model and layers, 240 real rows, one client that draws 64 of them a step."""
    small = ("data.max_examples=240", "federation.clients=1", "federation.clients_per_round=1")
    return build(compose(["privacy=dry", "optimizer.steps=1", *small, *overrides]))


def round_of(bench: Workbench, private: bool) -> Callable[[], Any]:
    """One step of the client, private (σ = 0) or plain, on the same draw each time."""
    state = bench.method.init(bench.layout, public_stream("bench").torch_generator())
    parts, train = bench.method.broadcast(state), bench.method.plan(state).phases[0].train
    keys = [key for key in parts if key.role in train]
    mechanism = Mechanism(1.0, clip_groups(keys, 1.0, None), 0.0, 64) if private else None
    units: UnitIndex = bench.clients[0].units

    def step() -> Any:
        task = LocalTask(
            parts, train, 64 / 240, mechanism, public_stream("draw"), public_stream("noise")
        )
        return bench.trainer.train(task, units)

    return step

"""How long a sweep will take: from its finished cells, or from one measured task."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedlr.cli.cells import Planned, shares
from fedlr.config import RunConfig
from fedlr.report.sweep import Cell

if TYPE_CHECKING:
    from fedlr.build import Workbench


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Time of the cells that are not finished, one after the other.

    Attributes:
        seconds: Of all of them.
        source: What it was taken from, in words.
    """

    seconds: float
    source: str


def from_cells(finished: Sequence[Cell], left: Sequence[Planned]) -> Estimate:
    """Return the estimate that finished cells give; at least one, with a summary."""
    spent = sum(cell.summary.wall_s for cell in finished if cell.summary is not None)
    rounds = sum(cell.facts.rounds for cell in finished)
    each = spent / rounds
    count = "1 finished cell" if len(finished) == 1 else f"{len(finished)} finished cells"
    return Estimate(
        seconds=sum(each * cell.facts.rounds for cell in left), source=f"{count} of this sweep"
    )


def from_measurement(left: Sequence[Planned], say: Callable[[str], None]) -> Estimate:
    """Build what the first cell needs, and time one client's passes and one evaluation.

    Nothing is released and no ledger is touched: the task has no noise, and what it
    trained is thrown away.

    Args:
        left: At least one cell; another one costs what its rounds, clients and steps cost.
        say: Told what is being done.
    """
    from fedlr.build import build
    from fedlr.reuse import Reuse

    first, reuse = left[0].config, Reuse()
    began = time.monotonic()
    bench = build(first, say, noise=_no_noise(first), reuse=reuse)
    built = time.monotonic()
    build(first, noise=_no_noise(first), reuse=reuse)
    again = time.monotonic() - built
    say("timing one client's task and one evaluation")
    task_s, evaluation_s = _time(bench)
    seconds = 0.0
    known: set[object] = set()
    for cell in left:
        federation = cell.config.federation
        scale = cell.config.optimizer.steps / first.optimizer.steps
        scale *= cell.config.optimizer.expected_batch / first.optimizer.expected_batch
        tasks = federation.rounds * federation.clients_per_round
        evaluations = 2 + federation.rounds // federation.evaluate_every
        seconds += again if shares(cell.config) in known else built - began
        seconds += tasks * task_s * scale + evaluations * evaluation_s
        known.add(shares(cell.config))
    return Estimate(seconds=seconds, source="one measured client task, without other processes")


def _no_noise(config: RunConfig) -> dict[str, float]:
    """Return σ = 1 for every client: nothing is calibrated for a measurement."""
    from fedlr.planning import client_name

    return {client_name(index): 1.0 for index in range(config.federation.clients)}


def _time(bench: Workbench) -> tuple[float, float]:
    """Return seconds of (one client's round, one evaluation), without noise and release."""
    from fedlr.doctor.subject import Subject, left_as_it_was
    from fedlr.restore import RunModel

    with left_as_it_was(bench.adapted):
        subject = Subject.of(RunModel.of(bench), bench.method, noise_multiplier=1.0)
        client = max(bench.clients, key=lambda plan: plan.units.count)
        size = max(1, client.declared_size)
        rate = min(1.0, bench.config.optimizer.expected_batch / size)
        task = subject.task(0.0, rate)
        if bench.config.privacy.mode == "none":
            task = replace(task, mechanism=None)
        began = time.monotonic()
        bench.trainer.train(task, client.units)
        trained = time.monotonic()
        bench.evaluator(subject.parts)
        return trained - began, time.monotonic() - trained

"""The best cell of a sweep, and what having chosen it costs."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedlr.report import places, units
from fedlr.report.chosen import SEED
from fedlr.report.page.frame import Block, Code, Listing, Text
from fedlr.report.page.sweep_cells import Grid, Result, Setting


@dataclass(frozen=True, kw_only=True)
class SweepCost:
    """What all runs of a sweep spent together, by their ledgers.

    Attributes:
        runs: Runs that began, finished or not.
        epsilon_max: Largest ε of any client over all of them; ∞ where one had no privacy,
            None where it is not known, which ``notices`` explain.
        delta: δ of it; None where no run had privacy.
        by_client: ε by client; empty where clients of one name hold different rows in
            different runs.
        private_epsilon: The same of the runs with privacy alone; None where all have it,
            none has, or it is not known.
        notices: Sentences a reader of these numbers must know.
    """

    runs: int
    epsilon_max: float | None
    delta: float | None = None
    by_client: Mapping[str, float] = field(default_factory=dict)
    private_epsilon: float | None = None
    notices: tuple[str, ...] = ()


def best(grid: Grid, private: bool = False) -> Result | None:
    """Return the most accurate cell; of equal ones that of the least ε, bytes and number.

    Args:
        grid: The sweep.
        private: Whether only cells with privacy count.
    """
    found = [
        result
        for result in grid.counted
        if not private or (result.epsilon is not None and math.isfinite(result.epsilon))
    ]
    return min(found, key=_rank, default=None)


def blocks(grid: Grid, cost: SweepCost | None) -> tuple[Block, ...]:
    """Return the section of the best cell: its command, its accuracy, its honest ε."""
    chosen = best(grid)
    if chosen is None:
        return (Text("No cell has finished with an accuracy, so there is nothing to choose."),)
    shown: list[Block] = [*_cell("The most accurate cell", chosen, grid)]
    private = best(grid, private=True)
    if private is not None and private is not chosen:
        shown += _cell("The most accurate cell with privacy", private, grid)
    shown.append(
        Text(
            f"The best of {len(grid.counted)} results is best by luck too (the winner's curse): "
            "expect the same command with another seed to be less accurate, and trust the mean of "
            "its setting."
        )
    )
    shown += [Text(sentence) for sentence in honest(grid, cost)]
    if cost is not None and cost.by_client:
        shown.append(Listing(tuple(_by_client(cost))))
    if cost is not None and cost.notices:
        shown.append(Listing(cost.notices))
    return tuple(shown)


def honest(grid: Grid, cost: SweepCost | None) -> list[str]:
    """Return what choosing among the cells costs, in words."""
    everyone = (
        "Whoever chooses one of several runs by its result has looked at all of them: the choice "
        "costs what all runs on the same private data spent together, not the ε of the chosen one."
    )
    return [everyone, *_about_tuning(grid), spent(cost), _about_validation(grid)]


def _about_tuning(grid: Grid) -> list[str]:
    """Say that tuning was a choice too; nothing where nothing was tuned."""
    count = sum(result.cell.facts.tuning for result in grid.results)
    if not count:
        return []
    runs = "1 run was" if count == 1 else f"{count} runs were"
    return [f"{runs} there to tune: they looked at the same data, and are among all runs here."]


def spent(cost: SweepCost | None) -> str:
    """Say what a choice by these results costs; without ``cost``, what computes it."""
    if cost is None:
        return (
            "That ε is composed from the ledgers of all runs, which this page was made without; "
            "`fedlr report <the sweep's folder>` computes it."
        )
    if cost.epsilon_max is None:
        return "What the runs spent together is not known here; the reasons are below."
    if math.isinf(cost.epsilon_max):
        also = ""
        if cost.private_epsilon is not None:
            private = units.privacy_loss(cost.private_epsilon)
            also = (
                f" Without those runs it would cost ε = {private} at δ = {_delta(cost)}: what the "
                "runs with privacy spent together."
            )
        return (
            "A run without privacy is among them, so ε of the choice is ∞: on private data it is "
            f"not private at all.{also}"
        )
    return (
        f"The honest ε of this choice is {units.privacy_loss(cost.epsilon_max)} at δ = "
        f"{_delta(cost)}: that of all runs ({cost.runs}) composed, the dearest client's."
    )


def _about_validation(grid: Grid) -> str:
    looked = (
        "Accuracy is measured on validation data that are declared public, so looking at it costs "
        "nothing beyond the runs themselves."
    )
    if _all_public(grid):
        looked += (
            " The training data of this sweep are declared public as well: its ε are what the "
            "same runs would cost on private data."
        )
    return looked


def _all_public(grid: Grid) -> bool:
    return all(_is_public(result) for result in grid.results)


def _is_public(result: Result) -> bool:
    """Return whether a cell's configuration declares its data public."""
    try:
        data = json.loads(result.cell.facts.config)["data"]
        return bool(data["public"] is True)
    except (ValueError, KeyError, TypeError):
        return False


def _cell(title: str, chosen: Result, grid: Grid) -> list[Block]:
    facts = chosen.cell.facts
    words = " ".join(["fedlr simulate", *map(shlex.quote, places.shown(facts.overrides))])
    epsilon = units.privacy_loss(chosen.epsilon)
    spent = "without privacy" if epsilon == "∞" else f"with ε = {epsilon} of its own"
    if chosen.cumulative:
        spent = f"with ε = {epsilon}, which counts other runs in the ledgers of operators too"
    sentence = f"{title} is {chosen.name}: {units.percent(chosen.accuracy)} {spent}."
    (setting,) = (one for one in grid.settings if chosen in one.results)
    return [Text(f"{sentence} {_of_setting(setting)}".strip()), Code("To run it again:", words)]


def _of_setting(setting: Setting) -> str:
    found = setting.accuracy
    if found.low is None or found.high is None:
        return "Its setting was run with one seed, so nothing tells how much of that is luck."
    low, high = units.percent(max(found.low, 0.0)), units.percent(min(found.high, 1.0))
    return (
        f"The mean of its setting over {found.n} values of {SEED} is {units.percent(found.mean)} "
        f"(95 % interval {low} to {high})."
    )


def _by_client(cost: SweepCost) -> list[str]:
    return [f"{name}: ε = {units.privacy_loss(spent)}" for name, spent in cost.by_client.items()]


def _rank(result: Result) -> tuple[float, float, float, int]:
    return (
        -(result.accuracy or 0.0),
        math.inf if result.epsilon is None else result.epsilon,
        math.inf if result.traffic is None else result.traffic,
        result.cell.facts.number,
    )


def _delta(cost: SweepCost) -> str:
    return "unknown" if cost.delta is None else f"{cost.delta:.3g}"

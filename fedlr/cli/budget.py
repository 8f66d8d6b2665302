"""``fedlr sweep --plan``: cells, noise, ε and time of a sweep before it is run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedlr.cli import cells as grid
from fedlr.cli import tuned
from fedlr.cli.estimate import Estimate, from_cells, from_measurement
from fedlr.cli.plan import MOST_RUNS, plan_runs
from fedlr.cli.plan import Request as PlanRequest
from fedlr.errors import ConfigError
from fedlr.report import strict_json, units
from fedlr.report.live import say
from fedlr.report.plan import Plan, plan_tables
from fedlr.report.sweep import Cell, SweepFacts, is_sweep, read_sweep

if TYPE_CHECKING:
    from fedlr.cli.cells import Planned
    from fedlr.cli.studies import Search


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """What ``fedlr sweep --plan`` answers.

    Attributes:
        folder: Where the sweep is, or would be.
        cells: Number of cells, those for tuning among them.
        finished: Those of them that are finished already, by name.
        time: Of the others; None where nothing is left.
        plan: Noise and ε of every cell, and of all together.
        tuning: Those of the cells that choose a value for the others, which come first.
    """

    folder: str
    cells: int
    finished: tuple[str, ...]
    time: Estimate | None
    plan: Plan
    tuning: int = 0


def print_plan(facts: SweepFacts, folder: Path, search: Search | None, as_json: bool) -> None:
    """Plan the sweep of ``facts`` and print what was found; nothing is trained or written.

    Args:
        facts: What its cells have in common.
        folder: Where it is, or would be.
        search: Where its values are searched; None for a grid.
        as_json: Whether to print one JSON object.

    Raises:
        FedlrError: As `fedlr.cli.plan.plan`.
    """
    sweep = read_sweep(folder) if is_sweep(folder) else None
    there = () if sweep is None else sweep.cells
    known = [cell.facts for cell in there]
    unknown = set[str]()
    if facts.tuning is not None:
        stages = tuned.stages(facts, sweep)
        planned = [*stages.tuning, *stages.runs, *stages.open]
        unknown = {cell.facts.cell for cell in stages.open}
    elif search is None:
        planned = grid.plan_cells(facts, grid.combinations(facts.axes), known)
    else:
        planned = _proposable(facts, search)
    if len(planned) > MOST_RUNS:
        raise ConfigError([f"the sweep has more than {MOST_RUNS} cells; plan it in parts"])
    grid.check_libraries(planned)
    finished = [cell for cell in there if cell.state == "finished"]
    shown = [tuned.shown(facts, one.facts, one.facts.cell not in unknown) for one in planned]
    configs = [cell.config for cell in planned]
    found = SweepPlan(
        folder=str(folder),
        cells=len(planned),
        finished=tuple(cell.facts.cell for cell in finished),
        time=_time(planned, finished, search),
        plan=plan_runs(configs, shown, PlanRequest(), say),
        tuning=sum(cell.facts.tuning for cell in planned),
    )
    print(strict_json.encode(found) if as_json else _tables(found).rstrip("\n"))


def _proposable(facts: SweepFacts, search: Search) -> list[Planned]:
    """Return as many cells as there will be trials, each at a value that may be proposed.

    What is searched here decides neither σ nor ε, or the plan shows those of these values.
    """
    values = [
        {
            name: repr(known.low + (known.high - known.low) * number / max(1, search.trials - 1))
            for name, known in search.parameters.items()
        }
        for number in range(search.trials)
    ]
    return grid.plan_cells(facts, values)


def _time(planned: list[Planned], finished: list[Cell], search: Search | None) -> Estimate | None:
    done = {cell.facts.cell for cell in finished}
    left = [cell for cell in planned if cell.facts.cell not in done]
    if search is not None:  # a proposal is not known before it is made
        left = planned[len(finished) :]
    if not left:
        return None
    return (
        from_cells(finished, left)
        if finished
        else from_measurement(grid.in_running_order(left), say)
    )


def _tables(found: SweepPlan) -> str:
    stages = f", {found.tuning} of them for tuning first" if found.tuning else ""
    lines = [
        f"cells     {found.cells}, of them finished {len(found.finished)}{stages}",
        f"folder    {found.folder}",
    ]
    if found.time is not None:
        length = units.duration(found.time.seconds)
        lines.append(f"time      about {length} one after the other, from {found.time.source}")
    return "\n".join([*lines, "", plan_tables(found.plan)])

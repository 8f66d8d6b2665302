"""Values that are searched: Optuna proposes, a cell is run, its accuracy is the answer.

Optuna is called directly, one trial after the other. Its trials are in ``search.db`` of the
sweep's folder, each trial's cell beside the others: a search that was killed goes on with the
trial that was under way, and its cell with the round after its last whole one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedlr.cli.cells import plan_cells
from fedlr.cli.launch import run_one, shared
from fedlr.cli.studies import Search
from fedlr.errors import ConfigError, RunError
from fedlr.report.live import say
from fedlr.report.sweep import CELLS, Cell, CellFacts, SweepFacts, read_sweep, write_cell

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.samplers import BaseSampler

FILE = "search.db"
"""Optuna's trials, SQLite, in the sweep's folder."""

_TRIES = 2
_MOST_REPEATS = 20
"""Proposals in a row that make no new cell: a range that has no more values of four digits."""


@dataclass(frozen=True)
class Searching:
    """A search in its folder.

    Attributes:
        folder: The sweep's folder.
        facts: What all cells have in common.
        search: Ranges, and how many cells there are to be.
        seed: Public seed of the proposals.
    """

    folder: Path
    facts: SweepFacts
    search: Search
    seed: int


def check_optuna() -> None:
    """Raise ConfigError where Optuna, or what it keeps trials with, is not installed."""
    if any(importlib.util.find_spec(name) is None for name in ("optuna", "sqlalchemy")):
        raise ConfigError(
            [
                "a search needs the package optuna; install it with pip install 'fedlr[search]', "
                "or sweep over values of your own: optimizer.learning_rate=1,2,4"
            ]
        )


def search(task: Searching) -> None:
    """Carry the search on until it has `Search.trials` cells; each is tried twice at most.

    Raises:
        RunError: `FILE` is damaged, or proposals repeat themselves.

    Guarantees:
        The n-th proposal is a function of seed, earlier results and n: a search that was
        interrupted proposes what one in one go would have.
    """
    study = _open(task)
    try:
        _settle(study, task)
        _again(study, task)
        repeats, count = 0, len(_cells(task.folder))
        while count < task.search.trials:
            if repeats == _MOST_REPEATS:
                raise RunError(
                    f"the last {repeats} proposals were values that have a cell already, so the "
                    f"search ends with {count} of {task.search.trials} cells; take a wider range, "
                    "or fewer search.trials"
                )
            _answer(study, _ask(study, task), task)
            before, count = count, len(_cells(task.folder))
            repeats = repeats + 1 if count == before else 0
    finally:
        shared.cache_clear()


def _open(task: Searching) -> Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = task.folder.resolve() / FILE
    try:
        study = optuna.create_study(
            storage=f"sqlite:///{path}",
            study_name="search",
            direction="maximize",
            load_if_exists=True,
        )
        study.get_trials(deepcopy=False)
        return study
    except Exception as error:  # of Optuna, or of what it keeps trials with
        reason = " ".join(str(error).split()).partition(" [SQL")[0].rstrip(".")
        raise RunError(
            f"{path} cannot be read: {reason}; bring it back from a copy, or search anew under "
            "another name=<name>"
        ) from error


def _settle(study: Study, task: Searching) -> None:
    """Finish the trials that a process left under way: they keep what they proposed."""
    import optuna

    for frozen in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        study.sampler = _sampler(frozen.number, task)
        _answer(study, optuna.trial.Trial(study, frozen._trial_id), task)


def _again(study: Study, task: Searching) -> None:
    """Try the cells once more that had failed before this call."""
    for cell in _cells(task.folder):
        if cell.state in ("failed", "interrupted", "waiting"):
            study.enqueue_trial({name: float(value) for name, value in cell.facts.values.items()})
            _answer(study, _ask(study, task), task)


def _ask(study: Study, task: Searching) -> Trial:
    """Return the next trial."""
    study.sampler = _sampler(len(study.get_trials(deepcopy=False)), task)
    return study.ask()


def _sampler(number: int, task: Searching) -> BaseSampler:
    """Return the sampler of one trial: its seed is its own, so that no restart repeats draws."""
    import optuna

    return optuna.samplers.TPESampler(seed=(1_000_003 * task.seed + number) % 2**32)


def _answer(study: Study, trial: Trial, task: Searching) -> None:
    """Run the cell of a trial, twice where it fails, and tell what came out."""
    import optuna

    values = {
        name: trial.suggest_float(name, known.low, known.high, log=known.log)
        for name, known in task.search.parameters.items()
    }
    # What is run has four digits, for people: the sampler's model is far coarser than that.
    shown = {name: f"{value:.4g}" for name, value in values.items()}
    facts = _cell(task, shown)
    listed = " ".join(f"{name}={value}" for name, value in shown.items())
    say(f"cell {facts.number + 1} of {task.search.trials}: {listed}")
    for _ in range(_TRIES):
        cell = run_one(task.folder, facts.cell, shared())
        if cell is not None and cell.summary is not None and cell.summary.accuracy is not None:
            study.tell(trial, cell.summary.accuracy)
            return
    study.tell(trial, state=optuna.trial.TrialState.FAIL)


def _cell(task: Searching, values: Mapping[str, str]) -> CellFacts:
    """Return the cell of these values, made where there is none."""
    known = [cell.facts for cell in _cells(task.folder)]
    (planned,) = plan_cells(task.facts, [values], known)
    if planned.facts not in known:
        folder = task.folder / CELLS / planned.facts.cell
        folder.mkdir(parents=True, exist_ok=True)
        write_cell(folder, planned.facts)
    return planned.facts


def _cells(folder: Path) -> tuple[Cell, ...]:
    return read_sweep(folder).cells


def check_bounds(task: Searching) -> None:
    """Compose the two ends of every range: what is wrong with one is told before a trial runs.

    Raises:
        ConfigError: As `fedlr.cli.cells.plan_cells`.
    """
    ends = [
        {name: repr(getattr(known, end)) for name, known in task.search.parameters.items()}
        for end in ("low", "high")
    ]
    plan_cells(task.facts, ends)

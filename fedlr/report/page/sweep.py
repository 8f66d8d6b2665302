"""The page of a sweep: what was varied, what it gave, and what it cost."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedlr.errors import RunError
from fedlr.report import places, units
from fedlr.report.chosen import SEED, left
from fedlr.report.page import frame, sweep_choice, sweep_figures, sweep_tables, sweep_tests
from fedlr.report.page.frame import Block, Code, Facts, Figures, Folded, Page, Section, Text
from fedlr.report.page.sweep_axis import name_of, value_of
from fedlr.report.page.sweep_cells import EPSILON, VARIANT, Grid, number_of, read_grid
from fedlr.report.page.sweep_choice import SweepCost
from fedlr.report.page.sweep_trade import trade as trade_of
from fedlr.report.sweep import SWEEPS, CellState, Sweep, SweepFacts, read_sweep
from fedlr.report.sweeping import MEND
from fedlr.report.tuning import Tuning, slug

__all__ = ["SweepCost", "page", "write"]

_MOST_NAMES = 12
"""Cells that one sentence names; the table has all of them."""

_STATES: tuple[tuple[CellState, str, str], ...] = (
    ("failed", "failed", "failed"),
    ("damaged", "is damaged", "are damaged"),
    ("running", "is running", "are running"),
    ("interrupted", "was interrupted", "were interrupted"),
    ("waiting", "has not begun", "have not begun"),
)


def write(
    folder: Path,
    output: Path | None = None,
    cost: SweepCost | None = None,
    figures: bool = True,
) -> Path:
    """Write the page of the sweep in ``folder``, its figures and ``summary.csv``.

    Args:
        folder: The sweep's folder. What has not finished is told, never left out.
        output: Folder for the page, made where it is missing; None is ``folder``.
        cost: What all runs spent together; without it the page says how to get it.
        figures: Whether to write every figure as SVG and PNG too.

    Returns:
        ``report.html``.

    Raises:
        RunError: ``folder`` is no sweep, is damaged or has no cells, or ``output`` cannot
            be written.
    """
    grid = read_grid(read_sweep(folder))
    made = page(grid, cost)
    place = folder if output is None else output
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"output = {str(place)!r} cannot be made: {error.strerror or error}; choose a folder "
            "of your own"
        ) from error
    sweep_tables.write_csv(grid, place)
    return frame.write(made, place, figures)


def page(grid: Grid, cost: SweepCost | None = None) -> Page:
    """Return the page.

    Raises:
        RunError: The sweep has no cells.
    """
    sweep = grid.sweep
    if not sweep.cells:
        raise RunError(
            f"the sweep in {str(sweep.folder)!r} has no cells yet, so there is nothing to report; "
            f"start it with: {command(sweep)}"
        )
    return Page(
        title=f"Sweep {units.printable(sweep.facts.name)}",
        subtitle=units.printable(sweep.facts.about) or f"A grid over {', '.join(grid.axes)}",
        sections=tuple(section for section in _sections(grid, cost) if section.blocks),
        notices=notices(grid),
    )


def notices(grid: Grid) -> tuple[str, ...]:
    """Return what a reader must know first: what is missing, and what does not belong here."""
    # A tuning run that failed where another value was chosen is no gap.
    sweep, told = _that_matters(grid.sweep), list[str]()
    finished, total = len(sweep.of("finished")), len(sweep.cells)
    for choice in grid.unchosen:
        told.append(
            f"{name_of(tuple(choice.values.items()))}: every tuning run failed, so nothing is "
            "reported of it."
        )
    if finished < total:
        parts = [part for state, one, many in _STATES if (part := _of(sweep, state, one, many))]
        have = f"{'cell' if total == 1 else 'cells'} {'has' if finished == 1 else 'have'}"
        told.append(
            f"{finished} of {total} {have} finished; {'; '.join(parts)}. This is a partial "
            f"report: {_public_command(sweep)} runs what is missing.{_mend(sweep)}"
        )
    if grid.strangers:
        told.append(
            "The folder mixes what does not belong together: "
            + _listed([f"{name} ({reason})" for name, reason in grid.strangers.items()])
            + ". These cells are left out of the pictures, means and tests; find out how they "
            "came here, and bring back what was there. What a removed cell has spent is no longer "
            "counted."
        )
    silent = [
        units.printable(cell.facts.cell)
        for cell in sweep.of("finished")
        if cell.summary and cell.summary.accuracy is None
    ]
    if silent:
        told.append(f"{_listed(silent)}: finished without an accuracy, and not in the pictures.")
    return (*told, *_of_runs(sweep))


def _that_matters(sweep: Sweep) -> Sweep:
    kept = {cell.facts.cell for cell in (*left(sweep), *sweep.of("finished"))}
    return replace(sweep, cells=tuple(c for c in sweep.cells if c.facts.cell in kept))


def command(sweep: Sweep) -> str:
    """Return the command that makes the sweep, or goes on with it, on this machine."""
    return " ".join(map(shlex.quote, _words(sweep)))


def _public_command(sweep: Sweep) -> str:
    """Return it as the page tells it: ``<folder>`` stands for a place of this machine."""
    return " ".join(map(shlex.quote, places.shown(_words(sweep))))


def _words(sweep: Sweep) -> list[str]:
    facts = sweep.facts
    words = ["fedlr", "sweep", *([f"sweep={facts.study}"] if facts.study else [])]
    axes = () if facts.search else facts.axes.items()
    words += [
        *facts.fixed,
        *(word for name, values in axes if (word := _axis(facts, name, values))),
    ]
    if facts.tuning is not None:
        words += _tuning(facts.tuning)
    if facts.search and facts.study:
        words.append(f"search.trials={max(len(sweep.cells), facts.trials or 1)}")
    # The folder may have been renamed: its name is what finds it.
    return [*words, f"name={_place(sweep.folder).name}", *_output(sweep.folder)]


def _axis(facts: SweepFacts, name: str, values: Sequence[str]) -> str:
    """Return an axis as a word; empty where it is all the variants of the study."""
    if name != VARIANT:
        return f"{name}={','.join(values)}"
    return "" if set(values) == set(facts.variants) else f"{name}={','.join(map(slug, values))}"


def _tuning(tuning: Tuning) -> list[str]:
    without = ",".join(tuning.without_privacy)
    return [
        f"tune.values={','.join(tuning.values)}",
        *([f"tune.without_privacy={without}"] if without else []),
        f"tune.seed={tuning.seed}",
    ]


def _output(folder: Path) -> list[str]:
    """Return the override of the place that a sweep's folder is in; none for the usual one."""
    place = _place(folder)
    output = place.parent.parent
    usual = place.parent.name != SWEEPS or str(output) == "runs"
    return [] if usual else [f"output={output}"]


def _place(folder: Path) -> Path:
    return folder if len(folder.parts) > 2 else folder.resolve()


def _sections(grid: Grid, cost: SweepCost | None) -> tuple[Section, ...]:
    pictures, trade = sweep_figures.pictures(grid), trade_of(grid)
    drawings = (*pictures, *((trade,) if trade else ()))
    figures = (Figures(drawings),) if drawings else ()
    settings = _settings(grid)
    tests = sweep_tests.compare(grid)
    return (
        Section("In short", _short(grid, cost)),
        Section("Accuracy and cost", (*figures, *settings)),
        Section("Paired tests", _tests(tests) if tests else ()),
        Section("The best cell", sweep_choice.blocks(grid, cost)),
        Section("All cells", (Text(sweep_tables.ABOUT_CELLS), sweep_tables.cells_table(grid))),
        Section("This sweep", _about(grid)),
    )


def _settings(grid: Grid) -> tuple[Block, ...]:
    if not grid.settings and not grid.unchosen:
        return ()
    tuned = sweep_tables.about_tuning(grid)
    about = (Text(sweep_tables.ABOUT_SETTINGS), *((Text(tuned),) if tuned else ()))
    return (*about, sweep_tables.settings_table(grid))


def _short(grid: Grid, cost: SweepCost | None) -> tuple[Block, ...]:
    sweep = grid.sweep
    items = [("finished", f"{len(sweep.of('finished'))} of {len(sweep.cells)} cells")]
    private = [setting for setting in grid.settings if math.isfinite(setting.epsilon)]
    for label, settings in (("", grid.settings), (" with privacy", private)):
        top = max(settings, key=lambda setting: setting.accuracy.mean, default=None)
        if top is not None and (not label or len(private) < len(grid.settings)):
            name, n = name_of(top.values), top.accuracy.n
            runs = f"{n} {'run' if n == 1 else 'runs'}"
            of = f"{name}, {runs}" if name else runs
            items.append((f"best mean accuracy{label}: {of}", units.percent(top.accuracy.mean)))
    if cost is not None and cost.epsilon_max is not None:
        items.append(("ε of having chosen", units.privacy_loss(cost.epsilon_max)))
    return (Facts(tuple(items), prominent=True),)


def _tests(found: sweep_tests.Comparisons) -> tuple[Block, ...]:
    if found.by_seed:
        how = (
            "Cells are paired that agree in everything else, the seed included. Those of one seed "
            "share the split of the data and the clients of every round, so each seed counts once: "
            "by the mean of its differences over all settings."
        )
    else:
        how = (
            "Cells are paired that agree in everything else. There is one seed, so settings stand "
            "for repeats: the tests tell of these settings, not of another seed."
        )
    shown: list[Block] = [
        Text(f"{how} {sweep_tables.ABOUT_TESTS}"),
        sweep_tables.tests_table(found, found.overall),
    ]
    if found.by_setting:
        table = sweep_tables.tests_table(found, found.by_setting)
        shown.append(Folded("The same in every setting by itself", (table,)))
    return tuple(shown)


def _about(grid: Grid) -> tuple[Block, ...]:
    facts = grid.sweep.facts
    axes = tuple(
        (name, ", ".join(value_of(name, value) for value in values))
        for name, values in grid.axes.items()
    )
    study = (("study", facts.study),) if facts.study else ()
    fixed = (("fixed", " ".join(places.shown(facts.fixed))),) if facts.fixed else ()
    budgets = map(number_of, grid.axes.get(EPSILON, ()))
    if facts.without_privacy and math.inf in budgets:
        fixed = (*fixed, ("at ε = ∞", " ".join(facts.without_privacy)))
    repeats = len(grid.axes.get(SEED, ()))
    seeds = "Every setting has the same seeds." if repeats > 1 else "Every setting has one seed."
    how = (
        "Values were searched for, one after the other: later ones depend on earlier results, so "
        "they are no fair sample of the settings."
        if facts.search
        else seeds
    )
    variants = tuple(
        (name, " ".join(places.shown(facts.variants[name])))
        for name in facts.axes.get(VARIANT, ())
        if name in facts.variants
    )
    if facts.tuning is not None:
        how += f" {sweep_tables.about_tuning(grid)}"
    return (
        Facts((*study, *axes, *fixed, *variants)),
        Text(how),
        Code("To make it, or to go on with it:", _public_command(grid.sweep)),
    )


def _mend(sweep: Sweep) -> str:
    """Say that no command mends what is damaged; empty where nothing is."""
    return f" What is damaged is left alone: {MEND}." if sweep.of("damaged") else ""


def _of(sweep: Sweep, state: CellState, one: str, many: str) -> str:
    """Return how many cells are in a state, and which and why where something went wrong."""
    cells = sweep.of(state)
    if not cells:
        return ""
    counted = f"{len(cells)} {one if len(cells) == 1 else many}"
    if state not in ("failed", "damaged"):
        return counted
    named = [
        f"{units.printable(cell.facts.cell)} ({units.printable(_first_line(cell.problem))})"
        for cell in cells
    ]
    return f"{counted}: {_listed(named)}"


def _of_runs(sweep: Sweep) -> tuple[str, ...]:
    """Return what runs tell of themselves, each sentence once, with how many cells say it."""
    found: dict[str, int] = {}
    for cell in sweep.of("finished"):
        for notice in cell.summary.notices if cell.summary else ():
            found[notice] = found.get(notice, 0) + 1
    return tuple(
        notice if count == len(sweep.of("finished")) else f"{notice} ({count} of the cells)"
        for notice, count in found.items()
    )


def _first_line(text: str | None) -> str:
    return (text or "no reason was written").strip().partition("\n")[0].rstrip(".")


def _listed(names: list[str]) -> str:
    shown = "; ".join(names[:_MOST_NAMES])
    left = len(names) - _MOST_NAMES
    return f"{shown}; and {left} more" if left > 0 else shown

"""The cells of a sweep as numbers: what each reached, what repeats of a setting reached, and
which cells do not belong to the others.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedlr.errors import RunError
from fedlr.report import units
from fedlr.report.chosen import SEED, Choice, choice_by_key
from fedlr.report.facts import read_facts
from fedlr.report.folder import CONFIG_FILE
from fedlr.report.statistics import Interval, interval
from fedlr.report.sweep import Cell, Sweep

EPSILON, METHOD, VARIANT = "privacy.epsilon", "method", "variant"
"""Settings that mean something to a report; of all others it knows the values alone."""

Values = tuple[tuple[str, str], ...]
"""(setting, value) pairs, in the order of the axes."""

MAIN = (VARIANT, METHOD)
"""Axes whose values are known by their own names, the first one first."""


@dataclass(frozen=True)
class Result:
    """One cell as a reader compares it.

    Attributes:
        cell: The cell.
        values: Its value by axis, in the order of the axes.
        accuracy: Of the finished run, [0, 1]; None without one.
        loss: Of the same evaluation, nats; None where it is not known.
        epsilon: Largest ε of any client by its ledger; ∞ without privacy; None for a run
            that has not finished.
        delta: δ of that ε; None without privacy.
        bytes_up: Mean payload of one client in one round, upwards.
        bytes_down: The same, downwards.
        traffic: Payload of all clients and rounds, both ways, bytes.
        wall_s: Duration, seconds.
        rounds: Finished rounds.
        cumulative: Whether that ε counts other runs too: a client's ledger is its
            operator's.
        server_s: Median over the completed rounds of what the server spent aggregating,
            seconds; None where no round tells.
    """

    cell: Cell
    values: Mapping[str, str]
    accuracy: float | None
    loss: float | None
    epsilon: float | None
    delta: float | None
    bytes_up: int | None
    bytes_down: int | None
    traffic: int | None
    wall_s: float | None
    rounds: int
    cumulative: bool = False
    server_s: float | None = None

    @property
    def name(self) -> str:
        """Name of the cell's folder."""
        return units.printable(self.cell.facts.cell)

    def without(self, *names: str) -> Values:
        """Return its values but those of ``names``."""
        return tuple((name, value) for name, value in self.values.items() if name not in names)


@dataclass(frozen=True)
class Setting:
    """The repeats of one combination: cells that differ in the seed alone.

    Attributes:
        values: What they have in common.
        results: The finished ones.
        accuracy: Mean and interval over them.
        epsilon: The largest ε of any of them.
        traffic: Mean payload of a whole run, bytes; None where one is not known.
        bytes_up: Mean payload of one client in one round, upwards.
        bytes_down: The same, downwards.
        server_s: Median over the runs of their `Result.server_s`; None where none tells.
        choice: How the tuned value was chosen; None where nothing is tuned.
    """

    values: Values
    results: tuple[Result, ...]
    accuracy: Interval
    epsilon: float
    traffic: float | None
    bytes_up: float
    bytes_down: float
    server_s: float | None
    choice: Choice | None = None

    def value(self, name: str) -> str:
        """Return the value of one axis."""
        return dict(self.values)[name]


@dataclass(frozen=True)
class Grid:
    """A sweep in numbers.

    Attributes:
        sweep: The sweep.
        axes: Values by setting, in the order of the study; then those that cells have
            beyond it, as a search does.
        results: Every cell, in the order of numbers.
        strangers: Why a cell does not belong to the others, by its folder's name.
    """

    sweep: Sweep
    axes: Mapping[str, tuple[str, ...]]
    results: tuple[Result, ...]
    strangers: Mapping[str, str]

    @cached_property
    def counted(self) -> tuple[Result, ...]:
        """Finished cells with an accuracy that belong to the others: what pictures show.

        Runs that were there to choose a value are none of them.
        """
        return tuple(
            result
            for result in self.results
            if result.accuracy is not None
            and result.cell.facts.cell not in self.strangers
            and not result.cell.facts.tuning
        )

    @property
    def varied(self) -> tuple[str, ...]:
        """Axes with several values, the seed not among them."""
        return tuple(name for name, values in self.axes.items() if len(values) > 1 and name != SEED)

    @cached_property
    def settings(self) -> tuple[Setting, ...]:
        """The counted cells by combination, in the order of the axes' values."""
        found: dict[Values, list[Result]] = defaultdict(list)
        for result in self.counted:
            found[result.without(SEED)].append(result)
        chosen = choice_by_key(self.sweep)
        return tuple(
            _setting(values, found[values], chosen.get(frozenset(values)))
            for values in sorted(found, key=self._place)
        )

    @cached_property
    def unchosen(self) -> tuple[Choice, ...]:
        """Combinations whose tuning runs have all failed: nothing is reported of them."""
        found = choice_by_key(self.sweep).values()
        return tuple(choice for choice in found if choice.failed)

    def _place(self, values: Values) -> tuple[int, ...]:
        return tuple(self.axes[name].index(value) for name, value in values)


def read_grid(sweep: Sweep) -> Grid:
    """Return a sweep in numbers."""
    strangers = _strangers(sweep)
    axes = {
        name: tuple(dict.fromkeys((*values, *_seen(sweep, name, strangers))))
        for name, values in sweep.facts.axes.items()
    }
    results = tuple(_result(cell, axes) for cell in sweep.cells)
    return Grid(sweep, axes, results, strangers)


def of_unbounded(grid: Grid, settings: Iterable[Setting]) -> str:
    """Say what the cells at ε = ∞ among ``settings`` take of their own; empty where nothing."""
    words = units.printable(" ".join(grid.sweep.facts.without_privacy))
    budgets = (dict(setting.values).get(EPSILON) for setting in settings)
    unbounded = any(number_of(value) == math.inf for value in budgets if value is not None)
    return f" At ε = ∞ cells take {words}." if words and unbounded else ""


def number_of(value: str) -> float | None:
    """Return the number that a value on the command line is; None where it is none.

    Example:
        >>> number_of("1e-3"), number_of("inf"), number_of("iid"), number_of("nan")
        (0.001, inf, None, None)
    """
    try:
        found = float(value)
    except ValueError:
        return None
    return None if math.isnan(found) else found


def _seen(sweep: Sweep, name: str, strangers: Mapping[str, str]) -> Iterable[str]:
    return (
        cell.facts.values[name]
        for cell in sweep.cells
        if cell.facts.cell not in strangers and not cell.facts.tuning
    )


def _result(cell: Cell, axes: Iterable[str]) -> Result:
    given = cell.facts.values
    values = {name: given[name] for name in axes if name in given}
    values |= {name: value for name, value in given.items() if name not in values}
    rounds, summary = cell.rounds, cell.summary
    reached = rounds[-1].round if rounds else 0
    if summary is None:
        nothing = (None,) * 8
        return Result(cell, values, *nothing, reached)
    # The loss of the last round is that of the result only if it is of the same evaluation.
    same = bool(rounds) and rounds[-1].accuracy == summary.accuracy
    whole = bool(rounds) or not summary.rounds
    return Result(
        cell=cell,
        values=values,
        accuracy=summary.accuracy,
        loss=rounds[-1].loss if same else None,
        epsilon=math.inf if summary.epsilon_max is None else summary.epsilon_max,
        delta=summary.delta,
        bytes_up=summary.bytes_up,
        bytes_down=summary.bytes_down,
        traffic=sum(one.bytes_up + one.bytes_down for one in rounds) if whole else None,
        wall_s=summary.wall_s,
        rounds=summary.rounds,
        cumulative=summary.epsilon_max is not None and _is_cumulative(cell.run),
        server_s=_middle([one.server_s for one in rounds if one.accepted]),
    )


def _middle(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _is_cumulative(run: Path) -> bool:
    """Return whether a client of the run keeps a ledger over its runs."""
    try:
        facts = read_facts(run)
    except RunError:  # the run says nothing of it
        return False
    own = [f"{facts.run}/{one.client}" for one in facts.clients]
    return bool(facts.sources) and list(facts.sources) != own


def _setting(values: Values, results: Sequence[Result], choice: Choice | None) -> Setting:
    known = [result.traffic for result in results if result.traffic is not None]
    return Setting(
        values=values,
        results=tuple(results),
        accuracy=interval([result.accuracy for result in results if result.accuracy is not None]),
        epsilon=max(result.epsilon for result in results if result.epsilon is not None),
        traffic=sum(known) / len(known) if len(known) == len(results) else None,
        bytes_up=statistics.fmean(result.bytes_up or 0 for result in results),
        bytes_down=statistics.fmean(result.bytes_down or 0 for result in results),
        server_s=_middle([one.server_s for one in results if one.server_s is not None]),
        choice=choice,
    )


def _strangers(sweep: Sweep) -> dict[str, str]:
    """Return why a cell does not belong to the others, by name."""
    found: dict[str, str] = {}
    known: dict[str, str] = {}
    for cell in sweep.cells:
        name = cell.facts.cell
        if reason := _misfit(cell, sweep) or _swapped(cell):
            found[name] = reason
        elif cell.facts.config in known:
            found[name] = f"it has the configuration of {known[cell.facts.config]}"
        else:
            known[cell.facts.config] = name
    rest = [cell for cell in sweep.cells if cell.facts.cell not in found]
    return {**found, **_of_other_data(rest)}


def _misfit(cell: Cell, sweep: Sweep) -> str | None:
    """Say how a cell's values do not fit the axes; None where they do."""
    axes, values = sweep.facts.axes, cell.facts.values
    if (cell.facts.tuned is not None) is not (sweep.facts.tuning is not None):
        return "it is tuned and the others are not, or the other way round"
    if cell.facts.tuning and sweep.facts.tuning is not None:
        axes = {**axes, SEED: (str(sweep.facts.tuning.seed),)}
    if set(values) != set(axes):
        differing = units.printable(", ".join(sorted(set(values) ^ set(axes))))
        return f"its axes are not those of sweep.json ({differing})"
    if sweep.facts.search:
        return None
    strange = [f"{name}={value}" for name, value in values.items() if value not in axes[name]]
    return f"{units.printable(', '.join(strange))} is not in sweep.json" if strange else None


def _swapped(cell: Cell) -> str | None:
    """Say that a run folder holds a run of another configuration; None where it does not."""
    planned, done = _mapping(cell.facts.config), _config_of(cell.run / CONFIG_FILE)
    if planned is None or done is None:
        return None
    names = planned.keys() & done.keys()  # another version may know other sections
    differing = sorted(name for name in names if planned.get(name) != done.get(name))
    if not differing:
        return None
    return f"its run folder holds a run with other settings ({', '.join(differing)})"


def _of_other_data(cells: Sequence[Cell]) -> dict[str, str]:
    """Return the cells whose data are not those of the others with the same data settings."""
    groups: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        if cell.summary is not None:
            groups[_data_settings(cell)].append(cell)
    found = {}
    for group in groups.values():
        digests = Counter(cell.summary.data_sha256 for cell in group if cell.summary)
        usual, _ = digests.most_common(1)[0]  # of equally many, the first
        for cell in group:
            if cell.summary and cell.summary.data_sha256 != usual:
                found[cell.facts.cell] = (
                    "it was run on other data than the cells with the same settings of data"
                )
    return found


def _data_settings(cell: Cell) -> str:
    """Return what decides the digest of a cell's data: it draws the validation split too."""
    config = _mapping(cell.facts.config) or {}
    privacy = config.get("privacy")
    unit = privacy.get("unit") if isinstance(privacy, dict) else None
    return json.dumps([config.get("data"), config.get(SEED), unit], sort_keys=True)


def _config_of(path: Path) -> dict[str, Any] | None:
    try:
        whole = _mapping(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = (whole or {}).get("config")
    return found if isinstance(found, dict) else None


def _mapping(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None

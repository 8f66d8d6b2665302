"""Paired tests between the values of one axis, methods above all.

Cells are paired that agree in everything else, the seed included. Those of one seed share
the split of the data, the cohorts and the validation rows, so they are no independent
repeats: over several settings each seed counts once, by its mean.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedlr.report.chosen import SEED
from fedlr.report.page.sweep_cells import EPSILON, MAIN, Grid, Result, Values
from fedlr.report.statistics import Paired, holm, paired

MOST_VALUES = 8
"""More values of an axis make more pairs than anybody reads: of methods and variants the first
is compared with each other one then, of other axes nothing is.
"""


@dataclass(frozen=True)
class Comparison:
    """One value of an axis against another.

    Attributes:
        first: The value whose accuracy is taken first.
        second: The value whose accuracy is subtracted.
        where: The setting they are compared in; empty for all settings together.
        pairs: Complete pairs of cells.
        found: Difference and tests over the independent repeats among them.
        p_corrected: p of the t test, corrected for all comparisons of the table.
    """

    first: str
    second: str
    where: Values
    pairs: int
    found: Paired
    p_corrected: float | None


@dataclass(frozen=True)
class Comparisons:
    """Everything that is compared.

    Attributes:
        axis: The setting whose values are compared.
        by_seed: Whether seeds are the repeats; if not, there is one seed, and settings are.
        overall: One per pair of values.
        by_setting: One per pair and setting; empty where there is one setting.
    """

    axis: str
    by_seed: bool
    overall: tuple[Comparison, ...]
    by_setting: tuple[Comparison, ...]


def compare(grid: Grid) -> Comparisons | None:
    """Return the comparisons of variants, methods or the first other axis; None without any.

    A search has none: its values were chosen by their results.
    """
    axis = _axis(grid)
    if axis is None:
        return None
    by_seed = len({result.values.get(SEED) for result in grid.counted}) > 1
    overall, single = list[Comparison](), list[Comparison]()
    for first, second in _pairs(grid.axes[axis]):
        arms = (_arm(grid, axis, first), _arm(grid, axis, second))
        if (found := _overall(arms, by_seed)) is not None:
            overall.append(Comparison(first, second, (), *found, None))
        for where in dict.fromkeys(_where(result, axis) for result in grid.counted):
            parts = [{key: a for key, a in arm.items() if _settled(key) == where} for arm in arms]
            if where and (one := paired(*parts)) is not None:
                single.append(Comparison(first, second, where, one.n, one, None))
    if not overall:
        return None
    several = by_seed and len({one.where for one in single}) > 1
    return Comparisons(axis, by_seed, _corrected(overall), _corrected(single) if several else ())


def _pairs(values: Sequence[str]) -> list[tuple[str, str]]:
    if len(values) > MOST_VALUES:
        return [(values[0], other) for other in values[1:]]
    return list(itertools.combinations(values, 2))


def _axis(grid: Grid) -> str | None:
    if grid.sweep.facts.search:
        return None
    names = [name for name in grid.varied if name != EPSILON]
    chosen = next((name for name in (*MAIN, *names) if name in names), None)
    if chosen is None or (chosen not in MAIN and len(grid.axes[chosen]) > MOST_VALUES):
        return None
    return chosen


def _arm(grid: Grid, axis: str, value: str) -> dict[Values, float]:
    """Return accuracy by everything but ``axis``."""
    return {
        result.without(axis): result.accuracy
        for result in grid.counted
        if result.values[axis] == value and result.accuracy is not None
    }


def _where(result: Result, axis: str) -> Values:
    return result.without(axis, SEED)


def _settled(key: Values) -> Values:
    """Return a key of `_arm` without its seed."""
    return tuple((name, value) for name, value in key if name != SEED)


def _overall(
    arms: tuple[Mapping[Values, float], Mapping[Values, float]], by_seed: bool
) -> tuple[int, Paired] | None:
    """Return the number of complete pairs of cells, and the comparison over the repeats."""
    first, second = arms
    cells = paired(first, second)
    if cells is None or not by_seed:
        return None if cells is None else (cells.n, cells)
    common = [key for key in first if key in second]
    means = [_by_seed({key: arm[key] for key in common}) for arm in arms]
    found = paired(*means)
    if found is None:
        return None
    return cells.n, Paired(found.difference, found.p, found.p_wilcoxon, cells.incomplete)


def _by_seed(arm: Mapping[Values, float]) -> dict[str | None, float]:
    """Return the mean over settings of each seed."""
    groups: dict[str | None, list[float]] = {}
    for key, accuracy in arm.items():
        groups.setdefault(dict(key).get(SEED), []).append(accuracy)
    return {seed: statistics.fmean(values) for seed, values in groups.items()}


def _corrected(found: Sequence[Comparison]) -> tuple[Comparison, ...]:
    """Return the comparisons with p values that allow for their number."""
    p_values = holm([one.found.p for one in found])
    return tuple(
        Comparison(one.first, one.second, one.where, one.pairs, one.found, p)
        for one, p in zip(found, p_values, strict=True)
    )

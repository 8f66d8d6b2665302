"""What accuracy costs: the settings of a sweep by ε and bytes, and their front."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from fedlr.report import units
from fedlr.report.page import sweep_axis
from fedlr.report.page.drawing import Drawing, Theme, draw, literal
from fedlr.report.page.sweep_axis import MARKERS, Scale, legend, name_of
from fedlr.report.page.sweep_cells import (
    EPSILON,
    MAIN,
    Grid,
    Setting,
    Values,
    number_of,
    of_unbounded,
)
from fedlr.report.page.sweep_figures import MOST_LINES
from fedlr.report.pareto import Offer, front

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_LARGEST, _SMALLEST = 170.0, 12.0
"""Areas of marks, square points: of the most bytes, and what is still seen."""


def trade(grid: Grid) -> Drawing | None:
    """Return accuracy against ε with areas by bytes, and the front joined.

    Where all settings have one ε, accuracy is drawn against bytes; None where those are
    the same too, or fewer than two settings are known whole.
    """
    known = [setting for setting in grid.settings if setting.traffic is not None]
    if len(known) < 2:
        return None
    by_epsilon = _differ([setting.epsilon for setting in known])
    if not by_epsilon and not _differ([setting.traffic or 0.0 for setting in known]):
        return None
    best = [known[place] for place in front([_offer(setting) for setting in known])]
    what = "ε, with the payload of a run as the area of a mark" if by_epsilon else "payload"
    dearest = max(setting.epsilon for setting in known)
    same = f" All have ε ≤ {units.privacy_loss(dearest)}." if math.isfinite(dearest) else ""
    same = "" if by_epsilon else same or " None has privacy."
    caption = (
        f"Mean accuracy against {what}. Ringed: the front, which no other setting beats in "
        "accuracy, ε and bytes at once; joined: what no other one beats in the two of the "
        f"axes.{same}{of_unbounded(grid, known)}{_of_ledgers(known)}"
    )
    listed = "; ".join(
        f"{name_of(setting.values)}: {units.percent(setting.accuracy.mean)}, "
        f"ε {units.privacy_loss(setting.epsilon)}, {units.data_size(setting.traffic or 0)}"
        for setting in best
    )
    alternative = f"On the front: {listed}."
    plot = partial(_plot_trade, grid, known, best, by_epsilon)
    return draw("trade", caption, alternative, plot)


def on_front(grid: Grid) -> frozenset[Values]:
    """Return the settings that no other one beats; those whose bytes are not known are out."""
    known = [setting for setting in grid.settings if setting.traffic is not None]
    return frozenset(known[place].values for place in front([_offer(setting) for setting in known]))


def _of_ledgers(known: Sequence[Setting]) -> str:
    """Say that ε is no run's own where operators keep ledgers; empty where none does."""
    if not any(result.cumulative for setting in known for result in setting.results):
        return ""
    return " ε is cumulative: ledgers of operators count other runs too."


def _offer(setting: Setting) -> Offer:
    return Offer(setting.accuracy.mean, setting.epsilon, setting.traffic or 0.0)


def _differ(values: Sequence[float]) -> bool:
    """Return whether values differ by more than the last digits of noise calibration."""
    return min(values) < max(values) and not (
        math.isfinite(max(values)) and max(values) <= 1.05 * min(values)
    )


def _plot_trade(
    grid: Grid,
    known: Sequence[Setting],
    best: Sequence[Setting],
    by_epsilon: bool,
    figure: Figure,
    theme: Theme,
) -> None:
    axes = figure.subplots()
    largest = max(setting.traffic or 0.0 for setting in known) or 1.0
    scale = _trade_scale(grid, known) if by_epsilon else None

    def place(setting: Setting) -> float:
        return (
            scale.place(setting.epsilon) if scale else (setting.traffic or 0.0) / _unit(largest)[0]
        )

    def area(setting: Setting) -> float:
        return max(_LARGEST * (setting.traffic or 0.0) / largest, _SMALLEST) if by_epsilon else 60.0

    styles = _styles(grid, known, theme)
    flat = front([Offer(setting.accuracy.mean, place(setting), 0.0) for setting in known])
    path = sorted((known[at] for at in flat), key=place)
    axes.plot(
        [place(setting) for setting in path],
        [100 * setting.accuracy.mean for setting in path],
        color=theme.muted,
        linewidth=1.2,
        zorder=1,
    )
    chosen = {setting.values for setting in best}
    for setting in sorted(known, key=area, reverse=True):
        colour, marker = styles[setting.values]
        axes.scatter(
            place(setting),
            100 * setting.accuracy.mean,
            s=area(setting),
            color=colour,
            marker=marker,
            edgecolors=theme.text if setting.values in chosen else theme.background,
            linewidths=1.6 if setting.values in chosen else 0.6,
            alpha=0.9,
            zorder=2,
        )
    if scale:
        sweep_axis.apply(scale, axes, theme)
        sizes = sorted(
            {units.data_size(s.traffic or 0.0): s.traffic or 0.0 for s in known}.values()
        )
        if len(sizes) > 1:
            text = f"area: payload of a run, {_from_to(sizes)}"
            axes.set_title(text, loc="left", fontsize="small")
    axes.margins(y=0.12)
    label = "largest ε of any client, by its ledger"
    axes.set_xlabel(label if by_epsilon else f"payload of a run ({_unit(largest)[1]})")
    axes.set_ylabel("mean accuracy (%)")
    legend(figure, _keys(grid, known, theme))


def _trade_scale(grid: Grid, known: Sequence[Setting]) -> Scale:
    """Return the axis of what was spent; its ticks are the budgets, where those were varied."""
    finite = sorted({s.epsilon for s in known if math.isfinite(s.epsilon)})
    unbounded = any(math.isinf(setting.epsilon) for setting in known)
    if not finite:
        finite = [1.0]
    budgets = [(number_of(value), value) for value in grid.axes.get(EPSILON, ())]
    ticks = sorted(
        (number, units.printable(value))
        for number, value in budgets
        if number is not None and math.isfinite(number)
    ) or [(value, units.privacy_loss(value)) for value in finite]
    return sweep_axis.scale_of_numbers(
        sorted({*finite, *(at for at, _ in ticks)}), unbounded, ticks
    )


def _coloured_by(grid: Grid) -> str | None:
    """Return the setting that colours tell: variant or method, else what is not along the axis."""
    others = [name for name in grid.varied if name != EPSILON]
    chosen = next((name for name in (*MAIN, *others) if name in others), None)
    return None if chosen is None or len(grid.axes[chosen]) > MOST_LINES else chosen


def _styles(grid: Grid, known: Sequence[Setting], theme: Theme) -> Mapping[Values, tuple[str, str]]:
    name = _coloured_by(grid)
    orders = {s.values: 0 if name is None else grid.axes[name].index(s.value(name)) for s in known}
    return {
        values: (theme.palette[order % len(theme.palette)], MARKERS[order % len(MARKERS)])
        for values, order in orders.items()
    }


def _keys(grid: Grid, known: Sequence[Setting], theme: Theme) -> list[Line2D]:
    """Return the keys of colours; none where they tell nothing."""
    from matplotlib.lines import Line2D

    name = _coloured_by(grid)
    if name is None:
        return []
    styles = {setting.value(name): _styles(grid, known, theme)[setting.values] for setting in known}
    return [
        Line2D(
            [],
            [],
            color=styles[value][0],
            marker=styles[value][1],
            markersize=7,
            linestyle="none",
            label=literal(name_of(((name, value),))),
        )
        for value in grid.axes[name]
        if value in styles
    ]


def _from_to(sizes: Sequence[float]) -> str:
    return f"{units.data_size(sizes[0])} to {units.data_size(sizes[-1])}"


def _unit(largest: float) -> tuple[float, str]:
    """Return the decimal unit in which ``largest`` bytes are read, and its name.

    Example:
        >>> _unit(58_432)
        (1000.0, 'kB')
    """
    power = min(int(math.log10(max(largest, 1.0))) // 3, 4)
    return 1000.0**power, ("B", "kB", "MB", "GB", "TB")[power]

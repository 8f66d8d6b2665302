"""The pictures of a sweep: accuracy against what was varied."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from fedlr.report import units
from fedlr.report.chosen import SEED
from fedlr.report.page import sweep_axis
from fedlr.report.page.drawing import SIZE, Drawing, Theme, draw, literal
from fedlr.report.page.sweep_axis import (
    MARKERS,
    Scale,
    label_of,
    legend,
    name_of,
    scale_of,
    value_of,
)
from fedlr.report.page.sweep_cells import (
    EPSILON,
    MAIN,
    METHOD,
    Grid,
    Setting,
    Values,
    number_of,
    of_unbounded,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

MOST_LINES, MOST_PICTURES = 7, 6
"""More lines than colours are parted over pictures; what does not fit is in the table."""


@dataclass(frozen=True)
class Line:
    """The settings of one line of a picture.

    Attributes:
        label: What they have in common.
        order: Its colour and mark: the same in every picture.
        points: In the order of the horizontal axis.
    """

    label: str
    order: int
    points: tuple[Setting, ...]


@dataclass(frozen=True)
class Picture:
    """One picture of accuracy.

    Attributes:
        axis: The setting along it.
        scale: Its places.
        lines: At least one.
        joined: Whether points are joined: not those of a search, which differ in more.
        title: What all lines have in common; empty where nothing is left out.
        majority: Accuracy of a constant answer, [0, 1].
        unbounded: What cells at ε = ∞ take of their own, a sentence; empty where nothing.
    """

    axis: str
    scale: Scale
    lines: tuple[Line, ...]
    joined: bool
    title: str
    majority: float
    unbounded: str = ""


def pictures(grid: Grid) -> tuple[Drawing, ...]:
    """Return accuracy against ε, or against the first other setting that was varied.

    One line per method, or per combination of what else was varied; more of them than
    `MOST_LINES` are parted over several pictures. A search has a picture per setting.
    Seeds alone are no axis: a sweep over nothing else has none.
    """
    settings = grid.settings
    if not settings:
        return ()
    found = _of_search(grid, settings) if grid.sweep.facts.search else _of_grid(grid, settings)
    names = ["accuracy", *(f"accuracy-{number}" for number in range(2, len(found) + 1))]
    return tuple(
        draw(name, _caption(picture), _words(picture), partial(_plot, picture), _size(picture))
        for name, picture in zip(names, found[:MOST_PICTURES], strict=False)
    )


def _size(picture: Picture) -> tuple[float, float]:
    """Width and height, inches: long labels must not take the height of the axes."""
    return SIZE[0], SIZE[1] + sweep_axis.extra_height(picture.scale)


def horizontal(grid: Grid) -> str:
    """Return the setting along the pictures of accuracy; never the seed."""
    varied = grid.varied
    for name in (EPSILON, *(name for name in varied if name not in MAIN), *MAIN, *grid.axes):
        if name in varied:
            return name
    return next((name for name in grid.axes if name != SEED), METHOD)


def _of_grid(grid: Grid, settings: Sequence[Setting]) -> list[Picture]:
    if set(grid.axes) <= {SEED}:
        return []
    axis = horizontal(grid)
    others = [name for name in grid.varied if name != axis]
    combinations = list(dict.fromkeys(_part(setting.values, others) for setting in settings))
    inner = others
    if len(combinations) > MOST_LINES:
        inner = [name for name in MAIN if name in others][:1] or others[:1]
    outer = [name for name in others if name not in inner]
    parts = dict.fromkeys(_part(setting.values, outer) for setting in settings)
    return [
        _picture(grid, axis, group, inner, name_of(part) if part else "")
        for part in parts
        for group in _groups(
            [setting for setting in settings if _part(setting.values, outer) == part], inner
        )
    ]


def _groups(settings: Sequence[Setting], inner: Sequence[str]) -> list[list[Setting]]:
    """Return the settings of one picture, parted so that none has more than `MOST_LINES`."""
    lines = list(dict.fromkeys(_part(setting.values, inner) for setting in settings))
    parts = [lines[at : at + MOST_LINES] for at in range(0, len(lines), MOST_LINES)]
    return [[one for one in settings if _part(one.values, inner) in part] for part in parts]


def _of_search(grid: Grid, settings: Sequence[Setting]) -> list[Picture]:
    inner = [METHOD] if METHOD in grid.varied else []
    axes = [name for name in grid.varied if name not in inner] or list(grid.axes)[:1]
    return [_picture(grid, axis, settings, inner, "") for axis in axes]


def _picture(
    grid: Grid, axis: str, settings: Sequence[Setting], inner: Sequence[str], title: str
) -> Picture:
    """Return a picture of ``settings``, a line per combination of ``inner``."""
    seen = {setting.value(axis) for setting in settings}
    values = [value for value in grid.axes[axis] if value in seen]
    scale = scale_of(values)
    every = list(itertools.product(*(grid.axes[name] for name in inner)))
    lines = []
    for part in dict.fromkeys(_part(setting.values, inner) for setting in settings):
        points = [setting for setting in settings if _part(setting.values, inner) == part]
        points.sort(key=lambda setting: scale.place(setting.value(axis)))
        order = every.index(tuple(value for _, value in part))
        lines.append(Line(name_of(part), order, tuple(points)))
    majorities = [
        result.cell.summary.majority
        for setting in settings
        for result in setting.results
        if result.cell.summary
    ]
    majority = sum(majorities) / len(majorities)
    joined = not grid.sweep.facts.search
    unbounded = of_unbounded(grid, settings)
    return Picture(axis, scale, tuple(lines), joined, title, majority, unbounded)


def _part(values: Values, names: Sequence[str]) -> Values:
    return tuple((name, value) for name, value in values if name in names)


def _caption(picture: Picture) -> str:
    counts = sorted({setting.accuracy.n for line in picture.lines for setting in line.points})
    of = f"{picture.title}. " if picture.title else ""
    if counts == [1]:
        once = "Every setting was run once."
        return f"{of}Accuracy on the public validation data. {once}{picture.unbounded}"
    runs = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    alone = "; a setting that was run once has none" if counts[0] == 1 else ""
    beyond = " Bars that meet the edge go on beyond it." if _leaves(picture) else ""
    return (
        f"{of}Mean accuracy on the public validation data over {runs} seeds, with its 95 % "
        f"interval (Student's t{alone}); small points are single runs.{beyond}"
        f"{picture.unbounded}"
    )


def _words(picture: Picture) -> str:
    """Return what a picture shows, in words and numbers."""
    parts = []
    for line in picture.lines:
        points = ", ".join(
            f"{value_of(picture.axis, setting.value(picture.axis))}: "
            f"{units.percent(setting.accuracy.mean)}{_spread(setting)}"
            for setting in line.points
        )
        parts.append(f"{line.label}: {points}" if line.label else points)
    return f"Accuracy by {label_of(picture.axis)}. {'; '.join(parts)}."


def _spread(setting: Setting) -> str:
    half = setting.accuracy.half_width
    return "" if half is None else f" ± {100 * half:.1f}"


def _plot(picture: Picture, figure: Figure, theme: Theme) -> None:
    axes = figure.subplots()
    handles = [_draw_line(axes, picture, line, theme) for line in picture.lines]
    sweep_axis.apply(picture.scale, axes, theme)
    axes.set_xlabel(_axis_label(picture.axis))
    axes.set_ylabel("validation accuracy (%)")
    drawn, bounds = axes.get_ylim(), _bounds(picture)
    low, high = max(drawn[0], bounds[0]), min(drawn[1], bounds[1])
    axes.set_ylim(low, high)
    if low <= 100 * picture.majority <= high:
        label = f"majority class, {units.percent(picture.majority)}"
        line = axes.axhline(100 * picture.majority, color=theme.muted, linestyle="--", label=label)
        handles.append(line)
    legend(figure, [handle for handle in handles if handle.get_label()])


def _draw_line(axes: Axes, picture: Picture, line: Line, theme: Theme) -> Line2D:
    """Draw one line with its intervals and single runs; return its key for the legend."""
    from matplotlib.lines import Line2D

    colour = theme.palette[line.order % len(theme.palette)]
    marker = MARKERS[line.order % len(MARKERS)]
    shift = 0.02 * (picture.lines.index(line) - (len(picture.lines) - 1) / 2)
    joined = picture.joined and picture.scale.kind != "category"
    x = [picture.scale.place(setting.value(picture.axis), shift) for setting in line.points]
    y = [100 * setting.accuracy.mean for setting in line.points]
    bars = [100 * (setting.accuracy.half_width or 0.0) for setting in line.points]
    if joined:
        # What has no privacy is no continuation of a curve over ε.
        open_end = picture.scale.infinity is not None and _is_unbounded(line.points[-1], picture)
        last = len(x) - 1 if open_end else len(x)
        axes.plot(x[:last], y[:last], color=colour)
        axes.plot(x[last - 1 :], y[last - 1 :], color=colour, linestyle="--", linewidth=1.2)
    if any(bars):
        axes.errorbar(x, y, yerr=bars, fmt="none", ecolor=colour, elinewidth=1.4, capsize=3.5)
    axes.plot(x, y, color=colour, linestyle="none", marker=marker, markersize=6)
    _draw_runs(axes, picture, line, colour, shift + 0.009)
    key = Line2D([], [], color=colour, marker=marker, label=literal(line.label))
    key.set_linestyle("-" if joined else "none")
    return key


def _draw_runs(axes: Axes, picture: Picture, line: Line, colour: str, shift: float) -> None:
    """Draw the single runs beside their mean."""
    single = [
        (picture.scale.place(setting.value(picture.axis), shift), 100 * result.accuracy)
        for setting in line.points
        for result in setting.results
        if result.accuracy is not None and setting.accuracy.n > 1
    ]
    axes.plot(
        [at for at, _ in single],
        [value for _, value in single],
        color=colour,
        linestyle="none",
        marker="o",
        markersize=2.8,
        alpha=0.55,
    )


def _is_unbounded(setting: Setting, picture: Picture) -> bool:
    return number_of(setting.value(picture.axis)) == math.inf


def _axis_label(name: str) -> str:
    label = label_of(name)
    return label if label == name else f"{label}  ({literal(name)})"


def _bounds(picture: Picture) -> tuple[float, float]:
    """Return what is shown at most, %: two seeds make a bar of any length."""
    values = [
        100 * value
        for line in picture.lines
        for setting in line.points
        for value in (setting.accuracy.mean, *(result.accuracy or 0 for result in setting.results))
    ]
    low, high = min(values), max(values)
    room = max(high - low, 1.0)
    return max(low - 0.6 * room, -2.0), min(high + 0.6 * room, 102.0)


def _leaves(picture: Picture) -> bool:
    """Return whether an interval is longer than what is shown."""
    low, high = _bounds(picture)
    ends = [
        (setting.accuracy.low, setting.accuracy.high)
        for line in picture.lines
        for setting in line.points
    ]
    return any(
        one is not None and other is not None and (100 * one < low or 100 * other > high)
        for one, other in ends
    )

"""The figures of where a run's updates point: spectra, effective rank, angles, intruders."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from fedlr.report.page.drawing import SIZE, Drawing, Theme, draw, literal
from fedlr.report.spectra import Intruders, SiteSpectrum, SpectrumRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

T = TypeVar("T")

MOST_PANELS = 12
"""Layers that have a panel of their own, and rounds in each; of more, as many are chosen evenly,
and the caption says so."""

_LONGEST_NAME = 25
_PANEL_COLUMNS = 2


@dataclass(frozen=True)
class Grid:
    """Numbers by layer and something else.

    Attributes:
        rows: Names of layers.
        columns: Names along the other axis.
        values: One row per layer; None where there is no number.
        across: What the other axis is.
        what: What the numbers are.
        low: Smallest colour.
        high: Largest colour.
        logarithmic: Whether colours go by powers of ten.
    """

    rows: Sequence[str]
    columns: Sequence[int]
    values: Sequence[Sequence[float | None]]
    across: str
    what: str
    low: float
    high: float
    logarithmic: bool = False


def short_names(names: Sequence[str]) -> list[str]:
    """Return layer names without what all of them have in common, cut to fit beside a figure.

    Example:
        >>> short_names(["encoder.layer.4.query", "encoder.layer.5.output.dense"])
        ['4.query', '5.output.dense']
    """
    parts = [name.split(".") for name in names]
    least = min((len(part) for part in parts), default=1)
    common = 0
    while common < least - 1 and len({part[common] for part in parts}) == 1:
        common += 1
    short = [".".join(part[common:]) for part in parts]
    return [
        name if len(name) <= _LONGEST_NAME else f"{name[:8]}…{name[9 - _LONGEST_NAME :]}"
        for name in short
    ]


def spread(items: Sequence[T], most: int = MOST_PANELS) -> list[T]:
    """Return at most ``most`` ≥ 2 items, evenly over all, first and last among them.

    Example:
        >>> spread([1, 2, 3], 5), spread(list(range(10)), 4)
        ([1, 2, 3], [0, 3, 6, 9])
    """
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def spectrum_by_site(last: SpectrumRecord) -> Drawing | None:
    """Draw the singular values of every layer after one round; None where all are zero."""
    longest = max((len(site.singular_values) for site in last.sites), default=0)
    positive = [v for site in last.sites for v in site.singular_values if v > 0]
    if not positive:
        return None
    high = max(positive)
    low = max(min(positive), high * 1e-6)
    grid = Grid(
        rows=short_names([site.site for site in last.sites]),
        columns=list(range(1, longest + 1)),
        values=[[*site.singular_values] for site in last.sites],
        across="index of the singular value",
        what="singular value of s·B·A",
        low=low,
        high=high,
        logarithmic=low < high,
    )
    return _heat(
        "spectrum-sites",
        grid,
        f"Singular values of the update of each layer after round {last.round}, largest first.",
        f"Heat map of {longest} singular values in {len(last.sites)} layers, from {low:.2g} to "
        f"{high:.2g}.",
    )


def spectrum_by_round(records: Sequence[SpectrumRecord]) -> Drawing | None:
    """Draw the singular values of each layer in every round; None before the second round."""
    names = [site.site for site in records[-1].sites] if records else []
    if len(records) < 2 or not any(_positive(records)):
        return None
    chosen = spread(names)
    shown = spread(records)
    rows = math.ceil(len(chosen) / _PANEL_COLUMNS)
    marks = _log_marks([v for r in records for s in r.sites for v in s.singular_values if v > 0])
    titles = dict(zip(names, short_names(names), strict=True))

    def plot(figure: Figure, theme: Theme) -> None:
        panels = figure.subplots(rows, _PANEL_COLUMNS, squeeze=False, sharex=True, sharey=True)
        for index, (axes, name) in enumerate(zip(panels.flat, chosen, strict=False)):
            for place, record in enumerate(shown, start=1):
                values = [v for s in record.sites if s.site == name for v in s.singular_values]
                axes.plot(
                    range(1, len(values) + 1),
                    [v if v > 0 else math.nan for v in values],
                    color=theme.palette[0],
                    alpha=0.25 + 0.75 * place / len(shown),
                    linewidth=1.2,
                )
            axes.set_title(literal(titles[name]), fontsize=9.5, loc="left")
            axes.set_yscale("log")
            axes.minorticks_off()
            axes.set_yticks(marks, [f"{mark:g}" for mark in marks])
            axes.tick_params(labelbottom=index >= len(chosen) - _PANEL_COLUMNS)
            _whole_numbers(axes)
        for axes in list(panels.flat)[len(chosen) :]:
            axes.remove()
        figure.supxlabel("index of the singular value", fontsize=11)
        figure.supylabel("singular value of s·B·A", fontsize=11)

    some = f" {len(chosen)} of {len(names)} layers." if len(chosen) < len(names) else ""
    if len(shown) < len(records):
        some += f" {len(shown)} of {len(records)} rounds."
    return draw(
        "spectrum-rounds",
        f"The same by round, one panel per layer: the fainter a line, the earlier its round. The "
        f"axis is logarithmic.{some}",
        f"Lines of singular values for {len(chosen)} layers in {len(shown)} rounds.",
        plot,
        (SIZE[0], 0.7 + 1.25 * rows),
    )


def effective_rank(records: Sequence[SpectrumRecord]) -> Drawing | None:
    """Draw the effective rank of every layer by round; None without a record."""
    if not records or not records[-1].sites:
        return None
    values = _by_site(records, lambda site: site.effective_rank)
    found = [value for row in values for value in row if value is not None]
    rank = max(len(site.singular_values) for site in records[-1].sites)
    low, high = math.floor(min(found)), max(float(rank), *found)
    grid = _by_round(records, values, "effective rank", (low, high))
    return _heat(
        "effective-rank",
        grid,
        "Effective rank of the update: 1 is one direction alone; the adapter's rank is all of them "
        f"equally. Here it is between {min(found):.2f} and {max(found):.2f}.",
        f"Heat map of effective rank by layer and round, between {min(found):.2f} and "
        f"{max(found):.2f}.",
    )


def angles(records: Sequence[SpectrumRecord]) -> Drawing | None:
    """Draw the largest principal angle to the first A; None where no layer has one."""
    values = _by_site(records, lambda s: None if s.angle_rad is None else math.degrees(s.angle_rad))
    found = [value for row in values for value in row if value is not None]
    if not found:
        return None
    high = max(5.0, *found)
    grid = _by_round(records, values, "largest principal angle (degrees)", (0.0, high))
    return _heat(
        "angles",
        grid,
        "Largest principal angle between the row space of A and that of the first A: 0° is the "
        f"same input subspace, 90° one with a new direction. Here it is {_at_most(max(found))}.",
        f"Heat map of angles by layer and round; it is {_at_most(max(found))}.",
    )


def intruders(found: Intruders) -> Drawing | None:
    """Draw how well the base weight knows the leading directions; None without a layer."""
    if not found.sites:
        return None
    longest = max(len(site.similarity) for site in found.sites)
    total = sum(found.count(site) for site in found.sites)
    grid = Grid(
        rows=short_names([site.site for site in found.sites]),
        columns=list(range(1, longest + 1)),
        values=[[*site.similarity] for site in found.sites],
        across="index of the singular vector of W + s·B·A",
        what="largest cosine with one of W",
        low=0.0,
        high=1.0,
    )
    return _heat(
        "intruders",
        grid,
        f"How well the base weight knows each leading direction of the tuned one. Below "
        f"{found.threshold:g} it is an intruder dimension.",
        f"Heat map of cosines for the {longest} leading directions of {len(found.sites)} layers; "
        f"{total} are below {found.threshold:g}.",
    )


def _at_most(degrees: float) -> str:
    return "below 0.01°" if degrees < 0.01 else f"at most {degrees:.2f}°"


def _positive(records: Sequence[SpectrumRecord]) -> list[bool]:
    return [v > 0 for r in records for site in r.sites for v in site.singular_values]


def _by_site(
    records: Sequence[SpectrumRecord], value: Callable[[SiteSpectrum], float | None]
) -> list[list[float | None]]:
    """Return one row per layer of the last record, one column per record."""
    names = [site.site for site in records[-1].sites] if records else []
    by_round = [{site.site: value(site) for site in record.sites} for record in records]
    return [[found.get(name) for found in by_round] for name in names]


def _by_round(
    records: Sequence[SpectrumRecord],
    values: Sequence[Sequence[float | None]],
    what: str,
    span: tuple[float, float],
) -> Grid:
    return Grid(
        rows=short_names([site.site for site in records[-1].sites]),
        columns=[record.round for record in records],
        values=values,
        across="closed rounds",
        what=what,
        low=span[0],
        high=span[1],
    )


def _heat(name: str, grid: Grid, caption: str, alternative: str) -> Drawing:
    """Draw a grid as one picture with a bar of colours above it."""
    few = len(grid.rows) <= 16
    height = (0.27 if few else 0.17) * len(grid.rows)

    def plot(figure: Figure, theme: Theme) -> None:
        from matplotlib.colors import LogNorm, Normalize
        from matplotlib.ticker import MaxNLocator

        axes = figure.subplots()
        width = max(map(len, grid.values))
        rows = [[math.nan if v is None else v for v in row] for row in grid.values]
        square = [[*row, *[math.nan] * (width - len(row))] for row in rows]
        span = (grid.low, grid.high if grid.high > grid.low else grid.low + 1.0)
        norm = LogNorm(*span, clip=True) if grid.logarithmic else Normalize(*span)
        image = axes.imshow(square, norm=norm, aspect="auto", interpolation="none")
        axes.grid(visible=False)
        labels = [literal(row) for row in grid.rows]
        axes.set_yticks(range(len(labels)), labels, fontsize=9.5 if few else 9)
        step = math.ceil(width / 8)
        axes.set_xticks(range(0, width, step), [str(c) for c in grid.columns[::step]])
        axes.set_xlabel(grid.across)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        bar = figure.colorbar(image, ax=axes, location="top", aspect=40, label=grid.what)
        bar.outline.set_visible(False)
        if grid.logarithmic:
            marks = [grid.low * (grid.high / grid.low) ** (i / 3) for i in range(4)]
            bar.set_ticks(marks, labels=[f"{mark:.2g}" for mark in marks], minor=False)
            bar.minorticks_off()
        else:
            bar.locator = MaxNLocator(nbins=5)
            bar.update_ticks()

    return draw(name, caption, alternative, plot, (SIZE[0], 1.45 + height))


def _log_marks(values: Sequence[float]) -> list[float]:
    """Return a few round numbers within what is drawn: powers of ten where they suffice.

    Example:
        >>> _log_marks([2.0, 30.0]), _log_marks([0.02, 4000.0])
        ([2.0, 5.0, 10.0, 20.0], [0.1, 1.0, 10.0, 100.0, 1000.0])
    """
    low, high = min(values), max(values)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    tens = [10.0**power for power in powers if low <= 10.0**power <= high]
    if len(tens) >= 3:
        return tens[:: math.ceil(len(tens) / 5)]
    return [
        mark
        for power in powers
        for mark in (10.0**power, 2 * 10.0**power, 5 * 10.0**power)
        if low <= mark <= high
    ]


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))

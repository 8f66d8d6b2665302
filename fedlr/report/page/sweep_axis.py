"""Values of a setting as places on a horizontal axis, where ∞ has its own at the right end; and
what else the pictures of a sweep share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fedlr.report import units
from fedlr.report.page.sweep_cells import EPSILON, MAIN, METHOD, Values, number_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from fedlr.report.page.drawing import Theme

Kind = Literal["log", "linear", "category"]

_NAMES = {
    EPSILON: "ε",
    METHOD: "method",
    "adapter.rank": "rank",
    "partition.alpha": "Dirichlet α",
    "optimizer.learning_rate": "learning rate",
    "federation.clients_per_round": "clients per round",
    "federation.clients": "clients",
}
_WIDE = 8.0
"""Largest over smallest from which a logarithmic axis shows values better."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""Marks of lines, in the order of use."""

_MOST_TICKS = 10
"""Of more values, as a search has them, round numbers are the ticks."""

_WIDEST_LABELS = 60
"""Characters of all names of a category that stand beside one another; of more, they lean."""

_LEAN = 35.0
"""Their angle, degrees."""

_CHARACTER = 0.075
"""Width of a character of a tick's label, inches."""

_BEYOND = 0.2
"""Distance of ∞ from the largest number, as a share of the axis of numbers."""


@dataclass(frozen=True)
class Scale:
    """Where values stand.

    Attributes:
        kind: Of the axis.
        low: The smallest number, > 0 where it is logarithmic.
        high: The largest finite one.
        ticks: Place and label, rising.
        infinity: The place of ∞; None where it is not among the values.
        places: Place by value of a category; empty for numbers.
    """

    kind: Kind
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    infinity: float | None = None
    places: Mapping[str, float] | None = None

    def place(self, value: str | float, shift: float = 0.0) -> float:
        """Return the place of a value, ``shift`` of the whole axis to its right."""
        if self.places is not None:
            at = self.places[str(value)]
        else:
            number = float(value)
            at = self.high if math.isinf(number) else number
            if math.isinf(number) and self.infinity is not None:
                at = self.infinity
        end = self.high if self.infinity is None else self.infinity
        if self.kind == "log":
            return at * math.exp(shift * math.log(end / self.low))
        return at + shift * (end - self.low)


def label_of(name: str) -> str:
    """Return the name of a setting as an axis has it.

    Example:
        >>> label_of("partition.alpha"), label_of("optimizer.momentum")
        ('Dirichlet α', 'momentum')
    """
    return _NAMES.get(name, units.printable(name.rpartition(".")[2].replace("_", " ")))


def value_of(name: str, value: str) -> str:
    """Return a value as it is read; ``inf`` is ∞."""
    number = number_of(value)
    return "∞" if number is not None and math.isinf(number) else units.printable(value)


def scale_of(values: Sequence[str]) -> Scale:
    """Return the scale of a setting's values: numbers where all of them are, else categories.

    Args:
        values: At least one, as on the command line.
    """
    numbers = [number_of(value) for value in values]
    finite = sorted({n for n in numbers if n is not None and math.isfinite(n)})
    if None in numbers or not finite or -math.inf in numbers:
        places = {value: float(index) for index, value in enumerate(values)}
        ticks = tuple((at, value_of("", value)) for value, at in places.items())
        return Scale("category", 0.0, len(values) - 1.0, ticks, None, places)
    labels = {
        number: value for number, value in zip(numbers, values, strict=True) if number is not None
    }
    return scale_of_numbers(
        finite,
        math.inf in numbers,
        [(number, units.printable(labels[number])) for number in finite],
    )


def scale_of_numbers(
    finite: Sequence[float], unbounded: bool, ticks: Sequence[tuple[float, str]]
) -> Scale:
    """Return a scale of numbers.

    Args:
        finite: The finite ones, rising, at least one.
        unbounded: Whether ∞ is a value too.
        ticks: Number and label, rising; ∞ gets its own.
    """
    low, high = finite[0], finite[-1]
    kind: Kind = "log" if low > 0 and (high / low >= _WIDE or unbounded) else "linear"
    infinity = None
    if unbounded and kind == "log":
        infinity = high * max((high / low) ** _BEYOND, 1.5)
    elif unbounded:
        infinity = high + max(_BEYOND * (high - low), 1.0)
    shown = ticks if len(ticks) <= _MOST_TICKS else _round_ticks(low, high, kind)
    all_ticks = (*shown, *(() if infinity is None else ((infinity, "∞"),)))
    return Scale(kind, low, high, all_ticks, infinity)


def apply(scale: Scale, axes: Axes, theme: Theme) -> None:
    """Give the horizontal axis its scale, its ticks and a margin; part ∞ from the numbers."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    if scale.kind == "log":
        axes.set_xscale("log")
    ticks = _thinned(scale)
    axes.xaxis.set_major_locator(FixedLocator([at for at, _ in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FixedFormatter([label.replace("$", r"\$") for _, label in ticks])
    )
    if _leans(scale):
        axes.tick_params(axis="x", labelrotation=_LEAN)
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right")
            label.set_rotation_mode("anchor")  # the end of a label is at its tick
    end = scale.high if scale.infinity is None else scale.infinity
    if scale.kind == "log" and end > scale.low:
        margin = (end / scale.low) ** 0.06
        axes.set_xlim(scale.low / margin, end * margin)
    elif end > scale.low:
        margin = 0.5 if scale.kind == "category" else 0.06 * (end - scale.low)
        axes.set_xlim(scale.low - margin, end + margin)
    else:
        axes.set_xlim(scale.low - 0.5, end + 0.5)
    if scale.infinity is not None:
        middle = math.sqrt(scale.high * end) if scale.kind == "log" else (scale.high + end) / 2
        axes.axvline(middle, color=theme.muted, linestyle=":", linewidth=1.0)


def extra_height(scale: Scale) -> float:
    """Return the inches that leaning labels need below the axis: a figure is that much taller."""
    if not _leans(scale):
        return 0.0
    longest = max(len(label) for _, label in scale.ticks)
    return longest * _CHARACTER * math.sin(math.radians(_LEAN))


def _leans(scale: Scale) -> bool:
    labels = [label for _, label in scale.ticks]
    return scale.kind == "category" and sum(map(len, labels)) > _WIDEST_LABELS


def name_of(values: Values) -> str:
    """Return values as a legend has them: a method or variant by its name, others with theirs."""
    return ", ".join(
        units.printable(value) if name in MAIN else f"{label_of(name)} {value_of(name, value)}"
        for name, value in values
    )


def legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Put the key below the axes, where it covers nothing."""
    if not handles:
        return
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = 1 if longest > 24 else 2 if longest > 13 else 3
    figure.legend(
        handles=list(handles),
        loc="outside lower center",
        ncols=min(columns, len(handles)),
        frameon=False,
    )


def _round_ticks(low: float, high: float, kind: Kind) -> list[tuple[float, str]]:
    """Return round numbers in [low, high]: powers of ten, with 2 and 5 times them where few."""
    from matplotlib.ticker import MaxNLocator

    if kind == "linear":
        found = [float(at) for at in MaxNLocator(6).tick_values(low, high)]
    else:
        powers = [10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)))]
        factors = (1.0,) if len(powers) > 4 else (1.0, 3.0) if len(powers) > 2 else (1.0, 2.0, 5.0)
        found = [factor * power for power in powers for factor in factors]
        found.append(10.0 ** math.ceil(math.log10(high)))
    return [(at, f"{at:g}") for at in found if low <= at <= high]


def _thinned(scale: Scale) -> list[tuple[float, str]]:
    """Return the ticks whose labels have room; the last one always has."""
    if scale.kind == "category" or not scale.ticks:
        return list(scale.ticks)
    end = scale.ticks[-1][0]
    span = math.log(end / scale.low) if scale.kind == "log" else end - scale.low

    def share(at: float) -> float:
        return (math.log(at / scale.low) if scale.kind == "log" else at - scale.low) / (span or 1.0)

    kept: list[tuple[float, str]] = []
    for at, label in reversed(scale.ticks):
        room = 0.025 + 0.0105 * (len(label) + (len(kept[-1][1]) if kept else 0))
        if not kept or share(kept[-1][0]) - share(at) >= room:
            kept.append((at, label))
    return kept[::-1]

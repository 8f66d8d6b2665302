"""``curves.png``: accuracy and ε over the rounds of one run."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedlr.report import units
from fedlr.report.records import RoundRecord, Summary, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE, _GREY = "#1f5fa8", "#c8551b", "#6b6b6b"


def curves(records: Sequence[RoundRecord], summary: Summary, path: Path) -> None:
    """Draw accuracy over rounds and, where ε is finite, ε max over rounds.

    Without a finite ε (privacy off, or a dry run) there is one wide panel and
    the title says why. Draws in memory; no display and no global state.

    Args:
        records: Rounds in rising order; may be empty.
        summary: The run they belong to.
        path: A PNG of 1200 × 500 pixels, replaced atomically.

    Raises:
        RunError: The file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    epsilons = [(r.round, r.epsilon_max) for r in records if r.epsilon_max is not None]
    spent = [(number, epsilon) for number, epsilon in epsilons if math.isfinite(epsilon)]
    figure = Figure(figsize=(12, 5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_title(summary), fontsize=14)
    panels = figure.subplots(1, 2 if spent else 1, squeeze=False)[0]
    _accuracy_panel(panels[0], records, summary)
    if spent:
        _epsilon_panel(panels[1], spent, summary)
    for axes in panels:
        _finish(axes, summary.rounds)
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=100)
    write_atomically(path, sink.getvalue())


def _title(summary: Summary) -> str:
    privacy = {"dp": "", "dry": "  (dry run: ε = ∞)", "none": "  (privacy off)"}
    names = units.printable(f"{summary.method} · {summary.model} · {summary.data}")
    return _literal(names) + privacy[summary.privacy_mode]


def _accuracy_panel(axes: Axes, records: Sequence[RoundRecord], summary: Summary) -> None:
    points = [(r.round, r.accuracy) for r in records if r.accuracy is not None]
    if summary.accuracy_start is not None:
        points.insert(0, (0, summary.accuracy_start))
    axes.plot(
        [number for number, _ in points],
        [100 * accuracy for _, accuracy in points],
        color=_BLUE,
        marker="o",
        markersize=4,
        label="validation accuracy",
    )
    if summary.accuracy_start is not None:
        axes.plot(
            [0],
            [100 * summary.accuracy_start],
            linestyle="none",
            marker="o",
            markersize=9,
            markerfacecolor="white",
            markeredgecolor=_BLUE,
            label=f"untrained, {units.percent(summary.accuracy_start)}",
        )
    axes.axhline(
        100 * summary.majority,
        color=_GREY,
        linestyle="--",
        label=f"majority class, {units.percent(summary.majority)}",
    )
    axes.set_ylabel("accuracy on public validation data (%)", fontsize=12)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -2.0), min(high, 102.0))


def _epsilon_panel(axes: Axes, spent: Sequence[tuple[int, float]], summary: Summary) -> None:
    axes.plot(
        [number for number, _ in spent],
        [epsilon for _, epsilon in spent],
        color=_ORANGE,
        marker="o",
        markersize=4,
        label=f"ε max, {units.privacy_loss(spent[-1][1])} after round {spent[-1][0]}",
    )
    budget = summary.epsilon_budget
    if budget is not None and math.isfinite(budget):
        label = f"budget, {units.privacy_loss(budget)}"
        axes.axhline(budget, color=_GREY, linestyle="--", label=label)
    unit = _literal(units.printable(summary.unit or "unit"))
    axes.set_ylabel(f"ε max at δ = {summary.delta:.3g}  (per {unit})", fontsize=12)
    axes.set_ylim(bottom=0.0)


def _finish(axes: Axes, rounds: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("finished rounds", fontsize=12)
    axes.set_xlim(-0.02 * max(rounds, 1), 1.02 * max(rounds, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=11)
    axes.grid(visible=True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=11, frameon=False, loc="best")


def _literal(text: str) -> str:
    """Keep matplotlib from reading a dollar sign in a name as mathematics."""
    return text.replace("$", r"\$")

"""The pictures of a sweep hold its numbers, in the places that their axes say."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from fedlr.report.page.drawing import LIGHT, Drawing
from fedlr.report.page.sweep_axis import scale_of
from fedlr.report.page.sweep_cells import Grid, read_grid
from fedlr.report.page.sweep_figures import MOST_LINES, pictures
from fedlr.report.page.sweep_trade import on_front, trade
from fedlr.report.sweep import read_sweep
from tests.report.sweeps import BUDGETS, make_sweep

RANKS = {"adapter.rank": ("2", "8", "32"), "method": ("fedsvd", "ffa_lora"), "seed": ("0", "1")}


@pytest.fixture(scope="module")
def budget(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    """The usual study, for tests that only read it."""
    return made(tmp_path_factory.mktemp("sweeps") / "budget")


def made(folder: Path, axes: Mapping[str, Sequence[str]] = BUDGETS) -> Grid:
    return read_grid(read_sweep(make_sweep(folder, axes)))


def axes_of(drawing: Drawing) -> Axes:
    """Draw once more, and return the axes."""
    figure = Figure()
    FigureCanvasAgg(figure)
    assert drawing.plot is not None
    drawing.plot(figure, LIGHT)
    (axes,) = figure.axes
    return axes


def marks(axes: Axes) -> Iterator[list[float]]:
    """The heights of the means, line by line."""
    for line in axes.lines:
        if line.get_markersize() == 6 and line.get_linestyle() == "None":
            yield np.asarray(line.get_ydata()).tolist()


def test_the_means_of_a_budget_stand_by_method_and_epsilon(budget: Grid) -> None:
    (drawing,) = pictures(budget)
    axes = axes_of(drawing)
    for heights, method in zip(marks(axes), BUDGETS["method"], strict=True):
        expected = [100 * s.accuracy.mean for s in budget.settings if s.value("method") == method]
        assert heights == pytest.approx(expected)
    assert axes.get_xscale() == "log"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "3", "8", "∞"]
    ends = [
        segment[:, 1].tolist()
        for found in axes.collections
        if not isinstance(found, PathCollection)
        for segment in found.get_segments()  # type: ignore[attr-defined]
    ]
    intervals = [
        [100 * (s.accuracy.low or 0), 100 * (s.accuracy.high or 0)] for s in budget.settings
    ]
    assert np.array(sorted(ends)) == pytest.approx(np.array(sorted(intervals)))


def test_the_words_of_a_picture_have_its_numbers(budget: Grid) -> None:
    (drawing,) = pictures(budget)
    assert "fedsvd: 1: 79.0 % ± 0.5" in drawing.alternative
    assert "∞: 91.7 %" in drawing.alternative
    assert "95 % interval" in drawing.caption


def test_without_budgets_the_first_other_setting_is_the_axis(tmp_path: Path) -> None:
    (drawing,) = pictures(made(tmp_path / "s", RANKS))
    axes = axes_of(drawing)
    assert "rank" in axes.get_xlabel()
    assert len(list(marks(axes))) == 2


def test_methods_alone_are_categories_and_are_not_joined(tmp_path: Path) -> None:
    (drawing,) = pictures(made(tmp_path / "s", {"method": BUDGETS["method"], "seed": ("0", "1")}))
    axes = axes_of(drawing)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == list(BUDGETS["method"])
    assert not [line for line in axes.lines if line.get_linestyle() == "-"]


def test_more_lines_than_colours_are_parted_over_pictures(tmp_path: Path) -> None:
    axes = {
        "method": ("fedsvd", "ffa_lora"),
        "adapter.rank": ("2", "4", "8", "16"),
        "privacy.epsilon": ("1", "8"),
    }
    found = pictures(made(tmp_path / "s", axes))
    assert MOST_LINES < 2 * 4
    assert [drawing.name for drawing in found] == [
        *("accuracy", "accuracy-2", "accuracy-3", "accuracy-4"),
    ]
    assert [drawing.caption.split(".")[0] for drawing in found] == [
        *("rank 2", "rank 4", "rank 8", "rank 16"),
    ]


def test_a_search_joins_nothing(tmp_path: Path) -> None:
    rates = [{"optimizer.learning_rate": value} for value in ("0.1", "0.35", "0.2", "4.0")]
    folder = make_sweep(
        tmp_path / "s", {"optimizer.learning_rate": ()}, search=True, combinations=rates
    )
    (drawing,) = pictures(read_grid(read_sweep(folder)))
    axes = axes_of(drawing)
    assert sum(map(len, marks(axes))) == 4
    assert not [line for line in axes.lines if line.get_linestyle() == "-"]


@pytest.mark.parametrize("state", ["waiting", "failed", "interrupted"])
def test_a_sweep_without_a_finished_cell_has_no_picture(tmp_path: Path, state: str) -> None:
    folder = make_sweep(tmp_path / "s", {"seed": ("0", "1")}, lambda number, values: state)
    grid = read_grid(read_sweep(folder))
    assert (pictures(grid), trade(grid)) == ((), None)


def test_the_trade_has_a_mark_per_setting_with_bytes_as_area(budget: Grid) -> None:
    drawing = trade(budget)
    assert drawing is not None
    found = [mark for mark in axes_of(drawing).collections if isinstance(mark, PathCollection)]
    assert len(found) == len(budget.settings)
    areas = {float(mark.get_sizes()[0]) for mark in found}
    # A of fedsvd is twice that of the other: 40 kB down and 20 kB up against 20 and 20.
    assert max(areas) / min(areas) == pytest.approx(60 / 40)


def test_settings_with_one_epsilon_are_drawn_against_bytes(tmp_path: Path) -> None:
    drawing = trade(made(tmp_path / "s", RANKS))
    assert drawing is not None
    assert "payload" in axes_of(drawing).get_xlabel()


def test_settings_that_cost_the_same_have_no_trade(tmp_path: Path) -> None:
    axes = {"optimizer.learning_rate": ("1.0", "2.0"), "seed": ("0", "1")}
    assert trade(made(tmp_path / "s", axes)) is None


def test_the_front_is_made_of_settings(budget: Grid) -> None:
    on_it = on_front(budget)
    for setting in budget.settings:
        beaten = any(
            other.accuracy.mean >= setting.accuracy.mean
            and other.epsilon <= setting.epsilon
            and (other.traffic or 0) <= (setting.traffic or 0)
            and other is not setting
            for other in budget.settings
        )
        assert (setting.values in on_it) == (not beaten)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (("1", "3", "8", "inf"), "log"),
        (("1", "2", "3"), "linear"),
        (("0", "0.5", "100"), "linear"),
        (("0.001", "0.1"), "log"),
        (("iid", "0.5"), "category"),
        (("inf",), "category"),
        (("fedsvd",), "category"),
    ],
)
def test_the_scale_is_what_the_values_suggest(values: tuple[str, ...], kind: str) -> None:
    scale = scale_of(values)
    assert scale.kind == kind
    places = [scale.place(value) for value in values]
    assert places == sorted(places)
    assert all(map(math.isfinite, places))
    assert places == pytest.approx([at for at, _ in scale.ticks])


def test_a_value_with_a_dollar_sign_is_a_value(tmp_path: Path) -> None:
    grid = made(tmp_path / "s", {"name": (r'"a$b"', r'"$\\x{$"')})
    (drawing,) = pictures(grid)
    assert "<svg" in drawing.light

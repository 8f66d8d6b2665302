"""What is compared with what: complete pairs, seeds as repeats, and SciPy's numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from scipy import stats

from fedlr.report.page.sweep_cells import Grid, read_grid
from fedlr.report.page.sweep_tests import Comparisons, compare
from fedlr.report.statistics import holm
from fedlr.report.sweep import read_sweep
from tests.report.sweeps import BUDGETS, Values, accuracy_of, make_sweep

METHODS = {"method": ("fedsvd", "ffa_lora", "fedavg_lora"), "seed": tuple("0123456")}


def grid_of(folder: Path) -> Grid:
    return read_grid(read_sweep(folder))


def compared(folder: Path) -> Comparisons:
    found = compare(grid_of(folder))
    assert found is not None
    return found


def accuracy(method: str, seed: str, epsilon: str | None = None) -> float:
    budget = {} if epsilon is None else {"privacy.epsilon": epsilon}
    return accuracy_of({"method": method, **budget, "seed": seed})


def test_methods_are_compared_over_seeds_as_scipy_does(tmp_path: Path) -> None:
    found = compared(make_sweep(tmp_path / "s", METHODS))
    assert (found.axis, found.by_seed, found.by_setting) == ("method", True, ())
    assert [(one.first, one.second) for one in found.overall] == [
        ("fedsvd", "ffa_lora"),
        ("fedsvd", "fedavg_lora"),
        ("ffa_lora", "fedavg_lora"),
    ]
    p_values = []
    for one in found.overall:
        arms = [[accuracy(name, seed) for seed in "0123456"] for name in (one.first, one.second)]
        theirs = stats.ttest_rel(*arms)
        p_values.append(theirs.pvalue)
        low, high = theirs.confidence_interval(0.95)
        assert one.found.p == pytest.approx(theirs.pvalue)
        assert (one.found.difference.low, one.found.difference.high) == pytest.approx((low, high))
        assert (one.pairs, one.found.n) == (7, 7)
    corrected = [one.p_corrected for one in found.overall]
    assert corrected == pytest.approx(holm(p_values))


def test_over_several_settings_each_seed_counts_once(tmp_path: Path) -> None:
    found = compared(make_sweep(tmp_path / "s"))
    (overall,) = found.overall
    budgets = BUDGETS["privacy.epsilon"]
    means = [
        [sum(accuracy(name, seed, budget) for budget in budgets) / 4 for seed in "012"]
        for name in ("fedsvd", "ffa_lora")
    ]
    assert (overall.pairs, overall.found.n) == (12, 3)
    assert overall.found.p == pytest.approx(stats.ttest_rel(*means).pvalue)
    assert [dict(one.where)["privacy.epsilon"] for one in found.by_setting] == list(budgets)
    for one in found.by_setting:
        budget = dict(one.where)["privacy.epsilon"]
        arms = [[accuracy(name, s, budget) for s in "012"] for name in ("fedsvd", "ffa_lora")]
        assert one.found.p == pytest.approx(stats.ttest_rel(*arms).pvalue)


def test_only_complete_pairs_count(tmp_path: Path) -> None:
    def state(number: int, values: Values) -> str:
        lost = values["method"] == "ffa_lora" and values["seed"] == "2"
        return "failed" if lost else "finished"

    (overall,) = compared(make_sweep(tmp_path / "s", state=state)).overall
    assert (overall.pairs, overall.found.n, overall.found.incomplete) == (8, 2, 4)


def test_with_one_seed_settings_are_the_repeats(tmp_path: Path) -> None:
    found = compared(make_sweep(tmp_path / "s", {**BUDGETS, "seed": ("0",)}))
    (overall,) = found.overall
    assert not found.by_seed
    arms = [
        [accuracy(name, "0", budget) for budget in BUDGETS["privacy.epsilon"]]
        for name in ("fedsvd", "ffa_lora")
    ]
    assert (overall.pairs, overall.found.n, found.by_setting) == (4, 4, ())
    assert overall.found.p == pytest.approx(stats.ttest_rel(*arms).pvalue)


def test_without_methods_the_first_other_axis_is_compared(tmp_path: Path) -> None:
    found = compared(
        make_sweep(tmp_path / "s", {"adapter.rank": ("4", "8"), "seed": ("0", "1", "2")})
    )
    assert found.axis == "adapter.rank"
    assert found.overall[0].found.n == 3


@pytest.mark.parametrize(
    "axes",
    [{"privacy.epsilon": ("1", "8"), "seed": ("0", "1")}, {"method": ("fedsvd",)}],
    ids=["budgets alone", "one method"],
)
def test_where_nothing_is_compared_there_is_nothing(
    tmp_path: Path, axes: dict[str, tuple[str, ...]]
) -> None:
    assert compare(grid_of(make_sweep(tmp_path / "s", axes))) is None


def test_a_search_is_no_sample(tmp_path: Path) -> None:
    axes = {"method": ("fedsvd", "ffa_lora"), "seed": ("0", "1")}
    assert compare(grid_of(make_sweep(tmp_path / "s", axes, search=True))) is None

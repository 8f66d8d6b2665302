"""Cells of a sweep: which there are, their names, and that one configuration is one cell."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict

import pytest

from fedlr.cli import cells
from fedlr.cli.cells import combinations, config_of, overrides_of, plan_cells, sort_words, widened
from fedlr.cli.compose import choices, compose, configuration_folder
from fedlr.cli.studies import read_studies
from fedlr.cli.sweep import read_request, settle
from fedlr.config import setting_names
from fedlr.errors import ConfigError
from fedlr.report.sweep import SweepFacts

STUDIES = read_studies(configuration_folder())


def facts(fixed: tuple[str, ...] = (), **axes: tuple[str, ...]) -> SweepFacts:
    named = {name.replace("__", "."): values for name, values in axes.items()}
    return SweepFacts(name="any", study=None, about="", fixed=fixed, axes=named)


def planned(sweep: SweepFacts, known: list[cells.CellFacts] | None = None) -> list[cells.Planned]:
    return plan_cells(sweep, combinations(sweep.axes), known or [])


def test_seeds_vary_fastest_and_every_combination_has_all_of_them() -> None:
    fixed, axes = sort_words(["seed=range(0,3)", "method=a,b", "privacy.epsilon=1,8", "x=1"], ())
    assert fixed == ("x=1",)
    assert list(axes) == ["method", "privacy.epsilon", "seed"]
    found = combinations(axes)
    assert [cell["seed"] for cell in found] == ["0", "1", "2"] * 4
    seeds = defaultdict(list)
    for cell in found:
        seeds[cell["method"], cell["privacy.epsilon"]].append(cell["seed"])
    assert set(map(tuple, seeds.values())) == {("0", "1", "2")}
    assert len(seeds) == 4


@pytest.mark.parametrize(
    ("words", "fixed", "axes"),
    [
        ((), ("p=dirichlet",), {"m": ("a", "b"), "seed": ("0", "1")}),
        (("m=c",), ("p=dirichlet",), {"m": ("c",), "seed": ("0", "1")}),
        (("m=c,d", "seed=5"), ("p=dirichlet",), {"m": ("c", "d"), "seed": ("5",)}),
        (("p=iid", "q=1,2"), ("p=iid",), {"m": ("a", "b"), "q": ("1", "2"), "seed": ("0", "1")}),
        (("p=iid,natural",), (), {"m": ("a", "b"), "p": ("iid", "natural"), "seed": ("0", "1")}),
    ],
)
def test_words_take_the_place_of_the_study(
    words: tuple[str, ...], fixed: tuple[str, ...], axes: dict[str, tuple[str, ...]]
) -> None:
    found = sort_words(words, ("p=dirichlet", "m=a,b", "seed=0,1"))
    assert found == (fixed, axes)
    assert list(found[1])[-1] == "seed"


def test_one_number_written_twice_is_one_value() -> None:
    _, axes = sort_words(["privacy.epsilon=1,1.0,3,1e0"], ())
    assert axes == {"privacy.epsilon": ("1", "3")}
    assert widened(axes, {"privacy.epsilon": ("3.0", "8")}) == {"privacy.epsilon": ("1", "3", "8")}


def test_an_infinite_epsilon_is_no_privacy() -> None:
    assert overrides_of(["privacy=dry", "seed=1"], {"privacy.epsilon": "inf"}) == (
        "seed=1",
        "privacy=none",
    )
    (cell,) = planned(facts(privacy__epsilon=("inf",)))
    assert cell.config.privacy.mode == "none"
    assert cell.config == compose(["privacy=none"])
    assert cell.facts.values == {"privacy.epsilon": "inf"}


def test_cells_without_privacy_have_steps_of_their_own() -> None:
    own = ("optimizer.learning_rate=0.5",)
    fixed = ("optimizer.learning_rate=4", "seed=1")
    unbounded = overrides_of(fixed, {"privacy.epsilon": "inf"}, own)
    assert unbounded == ("seed=1", "privacy=none", *own)
    assert overrides_of(fixed, {"privacy.epsilon": "8"}, own) == (*fixed, "privacy.epsilon=8")


@pytest.mark.parametrize(
    ("words", "rate"), [((), None), (("optimizer.learning_rate=2",), 2.0)], ids=["study", "user"]
)
def test_a_study_says_the_steps_without_privacy_unless_the_user_does(
    words: tuple[str, ...], rate: float | None
) -> None:
    study = STUDIES["privacy_budget"]
    request = read_request(["sweep=privacy_budget", "privacy.epsilon=8,inf", *words, "name=never"])
    found, _ = settle(request)
    wanted = float(study.without_privacy["optimizer.learning_rate"]) if rate is None else rate
    cells = [cell.config for cell in plan_cells(found, combinations(found.axes))]
    rates = {cell.privacy.mode: cell.optimizer.learning_rate for cell in cells}
    assert rates == {"dp": rate or compose([]).optimizer.learning_rate, "none": wanted}


def test_widened_axes_keep_names_and_numbers_go_on() -> None:
    first = planned(facts(seed=("0", "1"), method=("fedsvd",)))
    known = [cell.facts for cell in first]
    again = planned(facts(seed=("0", "1", "2"), method=("fedsvd", "ffa_lora")), known)
    assert [cell.facts for cell in again if cell.facts in known] == known
    assert sorted(cell.facts.number for cell in again) == list(range(6))
    assert len({cell.facts.cell for cell in again}) == 6
    assert [cell.facts.cell for cell in first] == ["000-0-fedsvd", "001-1-fedsvd"]


def test_a_cell_is_its_configuration_without_place_and_name() -> None:
    (plain,) = planned(facts(seed=("1",)))
    (moved,) = planned(facts(("output=elsewhere", "name=other"), seed=("1",)))
    assert plain.facts.config == moved.facts.config
    assert not {"output", "name"} & set(json.loads(plain.facts.config))
    assert config_of(plain.facts) == compose(["seed=1"])
    # Two ways to say one thing are one cell.
    assert len(planned(facts(privacy=("dp", "none"), privacy__epsilon=("8", "inf")))) == 2


def test_everything_wrong_in_any_cell_is_told_at_once_and_where() -> None:
    with pytest.raises(ConfigError) as caught:
        planned(facts(("zzz=1",), privacy__epsilon=("1", "-1"), adapter__rank=("4", "0")))
    alike, *others = caught.value.problems
    assert alike.startswith("zzz=1: there is no setting")
    assert alike.endswith("choice")  # of all cells: none is named
    assert any("privacy.epsilon = -1.0" in text and "in 2 of 4 cells" in text for text in others)
    assert any("adapter.rank = 0" in text and "first privacy.epsilon=1" in text for text in others)
    assert len(others) == 2


def test_cells_that_share_most_run_behind_one_another() -> None:
    found = planned(facts(method=("fedsvd", "ffa_lora"), seed=("0", "1")))
    order = [cell.facts.number for cell in cells.in_running_order(found)]
    assert order == [0, 2, 1, 3]  # one seed's rows, then the other's


def test_names_are_plain_and_short() -> None:
    assert cells.cell_name(3, ["fedsvd", "3", "1"]) == "003-fedsvd-3-1"
    odd = cells.cell_name(12, ['"a/b é"', "${adapter.rank}", "x" * 100])
    assert odd.startswith("012-a-b-adapter.rank-xxx")
    assert len(odd) == 80


def test_a_slip_of_a_thousand_cells_is_refused() -> None:
    with pytest.raises(ConfigError, match="has more than 1000 cells"):
        combinations({"seed": [str(number) for number in range(1001)]})
    _, axes = sort_words(["seed=range(0,5000)"], ())
    with pytest.raises(ConfigError, match="has more than 1000 cells"):
        combinations(axes)


@pytest.mark.parametrize(
    "words", [("seed=0,1", "seed=5"), ("seed=5", "+seed=0,1"), ("seed=0,1", "seed=2,3")]
)
def test_values_that_would_be_forgotten_are_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"seed is given already by .*; give it once"):
        sort_words(words, ("seed=0,1,2",))


def test_a_plus_before_a_setting_means_nothing() -> None:
    found = sort_words(["+x=1", "++y=1,2", "+s=3"], ("s=0,1",))
    assert found == (("x=1",), {"s": ("3",), "y": ("1", "2")})
    assert overrides_of(sort_words(["+privacy.epsilon=inf"], ())[0], {}) == ("privacy=none",)


def test_studies_are_no_choice_of_a_run() -> None:
    assert "sweep" not in choices()
    with pytest.raises(ConfigError, match="`fedlr sweep sweep=methods`"):
        compose(["sweep=methods"])


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_composes(name: str) -> None:
    study = STUDIES[name]
    assert study.about.endswith("?")
    place = ["data.path=somewhere"] if name == "methods_sst2" else []
    found, _ = settle(read_request([f"sweep={name}", "name=never", *place]))
    axes = found.axes
    if study.search is not None:
        assert set(axes) == set(study.search.parameters)
        ends = [
            {key: repr(getattr(r, end)) for key, r in study.search.parameters.items()}
            for end in ("low", "high")
        ]
        assert len(plan_cells(found, ends)) == 2
        return
    assert list(axes)[-1] == "seed"
    # The first value of each axis, and each other value of it once.
    base = {key: values[0] for key, values in axes.items()}
    chosen = [base, *({**base, key: value} for key, values in axes.items() for value in values[1:])]
    assert len(plan_cells(found, chosen)) == len(chosen)
    if found.tuning is not None:
        assert str(found.tuning.seed) not in axes["seed"]
        assert found.tuning.setting in setting_names()


def test_there_are_the_studies_that_are_promised() -> None:
    assert {
        "privacy_budget",
        "methods",
        "methods_tight",
        "methods_sst2",
        "subspaces",
        "ranks",
        "participation",
        "heterogeneity",
        "learning_rate",
    } <= set(STUDIES)
    _, axes = sort_words((), STUDIES["privacy_budget"].words)
    assert axes["privacy.epsilon"] == ("1", "2", "3", "6", "8", "inf")
    _, axes = sort_words((), STUDIES["ranks"].words)
    fixed, _ = sort_words((), STUDIES["ranks"].words)
    (one, two) = (
        compose(overrides_of(fixed, {"adapter.rank": rank})).adapter for rank in ("1", "4")
    )
    assert one.alpha / one.rank == two.alpha / two.rank
    assert size(axes) == 30


def size(axes: cells.Axes) -> int:
    return len(list(itertools.product(*axes.values())))

"""What a plan says is what the accountant says of the events a run would book."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pytest

from fedlr.config import RunConfig, from_mapping
from fedlr.errors import ConfigError
from fedlr.forecast import (
    PATH_POINTS,
    Bounds,
    Forecaster,
    Planned,
    compose_runs,
    expected_joins,
    forecast,
    path_rounds,
)
from fedlr.planning import plan_sizes
from fedlr.privacy.accounting import epsilon
from fedlr.privacy.booking import RECOVERED, Entry, History
from fedlr.privacy.earlier import Earlier
from fedlr.privacy.events import Release
from fedlr.report.plan import ClientForecast, Stop

COHORTS = [(0,), (1,), (0,), (0,)]
SIZES = (1000, 300)


def config(**privacy: object) -> RunConfig:
    return from_mapping(
        {
            "privacy": {"accountant": "rdp", "epsilon": 4.0, **privacy},
            "federation": {"clients": 2, "clients_per_round": 1, "rounds": 4},
        }
    )


def planned(
    run: RunConfig | None = None,
    sizes: tuple[int, ...] = SIZES,
    earlier: Mapping[str, Earlier] | None = None,
    **bounds: Bounds,
) -> Planned:
    """A run; bounds by client, with an underscore for the dash."""
    chosen = run or config()
    named = {name.replace("_", "-"): value for name, value in bounds.items()}
    return Planned(chosen, plan_sizes(chosen, sizes), named, earlier or {})


def spent(*events: Release, run: str = "before", day: int = 1) -> Earlier:
    """A ledger with one join for each event."""
    return Earlier(History(9, tuple(Entry(run, day, event) for event in events)), len(events))


def release(sigma: float, rate: float, steps: int) -> Release:
    return Release(sigma, rate, steps, "example")


def after(client: ClientForecast, joins: int, *earlier: Release) -> float:
    event = release(client.noise_multiplier, client.sample_rate, client.steps * joins)
    return epsilon([*earlier, event], client.delta, "rdp")


def test_a_path_is_the_cost_of_the_rounds_a_client_joins() -> None:
    run = forecast(planned(), COHORTS)
    first, second = run.clients
    assert (first.stop, second.stop) == (None, None)
    assert [point.round for point in first.path] == [1, 2, 3, 4]
    assert [p.maximum for p in first.path] == [after(first, joins) for joins in (1, 2, 3, 4)]
    assert [p.scheduled for p in first.path] == [after(first, joins) for joins in (1, 1, 2, 3)]
    assert [p.scheduled for p in second.path] == [after(second, joins) for joins in (0, 1, 1, 1)]
    # Half of 1, 2, 3, 4 rounds, rounded up to whole joins.
    assert [p.expected for p in second.path] == [after(second, joins) for joins in (1, 1, 2, 2)]
    assert (first.scheduled_joins, second.scheduled_joins, first.expected_joins) == (3, 1, 2.0)
    assert first.path[-1].maximum == first.epsilon_max <= 4.0
    assert run.epsilon_max == max(first.epsilon_max, second.epsilon_max)
    assert run.epsilon_scheduled == max(first.epsilon_scheduled, second.epsilon_scheduled)


def test_a_limit_on_joins_ends_every_path() -> None:
    (first, second) = forecast(planned(config(max_joins=2)), COHORTS).clients
    assert (first.max_joins, first.scheduled_joins, first.affordable_joins) == (2, 2, 2)
    assert [p.maximum for p in first.path] == [after(first, joins) for joins in (1, 2, 2, 2)]
    assert first.expected_joins < 2
    assert first.stop == Stop(by="privacy.max_joins", bound=2.0, joins=2, scheduled_round=3)
    # The second one's cohorts ask it once.
    assert second.stop == Stop(by="privacy.max_joins", bound=2.0, joins=2, scheduled_round=None)


def test_earlier_releases_leave_fewer_joins_and_are_in_every_number() -> None:
    earlier = release(1.2, 0.128, 10)
    first, second = forecast(planned(earlier={"client-000": spent(earlier)}), COHORTS).clients
    assert second.spent == 0.0
    assert second.affordable_joins == 4
    assert first.spent == epsilon([earlier], first.delta, "rdp")
    assert first.left == 4.0 - first.spent
    joins = first.affordable_joins
    assert 0 < joins < 4
    assert (
        first.epsilon_max == after(first, joins, earlier) <= 4.0 < after(first, joins + 1, earlier)
    )
    assert first.path[0].maximum == after(first, 1, earlier)


def test_a_spent_budget_leaves_nothing() -> None:
    earlier = release(0.5, 0.5, 100)
    first, _ = forecast(planned(earlier={"client-000": spent(earlier)}), COHORTS).clients
    assert (first.affordable_joins, first.left) == (0, 0.0)
    assert first.epsilon_max == first.spent > 4.0
    assert first.stop == Stop(by="privacy.epsilon", bound=4.0, joins=0, scheduled_round=0)
    assert (first.scheduled_joins, first.expected_joins) == (0, 0.0)


BEFORE = release(3.0, 0.128, 5)
LIMIT = 3.59  # between ε of two joins alone, and on top of BEFORE


@pytest.mark.parametrize(
    ("by", "bounds", "day", "run", "counts"),
    [
        ("policy.epsilon_total", Bounds(epsilon_total=LIMIT), 1, "before", True),
        ("policy.epsilon_per_run", Bounds(epsilon_per_run=LIMIT), 90, "before", False),
        # What was recovered from a witness may be of any run.
        ("policy.epsilon_per_run", Bounds(epsilon_per_run=LIMIT), 90, RECOVERED, True),
        (
            "policy.epsilon_per_month",
            Bounds(epsilon_per_month=LIMIT, month_start=80),
            79,
            "x",
            False,
        ),
        (
            "policy.epsilon_per_month",
            Bounds(epsilon_per_month=LIMIT, month_start=80),
            80,
            "x",
            True,
        ),
    ],
)
def test_each_budget_of_a_policy_ends_a_part_where_it_would_be_exceeded(
    by: str, bounds: Bounds, day: int, run: str, counts: bool
) -> None:
    ledger = {"client-000": spent(BEFORE, run=run, day=day)}
    one = planned(config(epsilon=4.5), earlier=ledger, client_000=bounds)
    (first, second) = forecast(one, COHORTS).clients
    joins, held = first.affordable_joins, [BEFORE] if counts else []
    assert joins == (1 if counts else 2)
    assert after(first, joins, *held) <= LIMIT < after(first, joins + 1, *held)
    assert first.left == pytest.approx(LIMIT - epsilon(held, first.delta, "rdp"))
    # ε is that of everything in the ledger, whatever a bound counts.
    assert first.epsilon_max == after(first, joins, BEFORE)
    assert first.path[-1].maximum == first.path[joins - 1].maximum == first.epsilon_max
    assert first.scheduled_joins == joins
    assert first.stop is not None
    assert (first.stop.by, first.stop.bound, first.stop.joins) == (by, LIMIT, joins)
    # The first client is in the cohorts of rounds 1, 3 and 4.
    assert first.stop.scheduled_round == {1: 1, 2: 3}[joins]
    assert (second.stop, second.affordable_joins) == (None, 4)


def test_the_smallest_bound_decides_and_the_run_s_own_is_one_of_them() -> None:
    tight = Bounds(epsilon_total=3.5, epsilon_per_run=2.7, max_joins=3)
    loose = Bounds(epsilon_total=9.0, epsilon_per_run=9.0, epsilon_per_month=9.0, max_joins=4)
    first, second = forecast(planned(client_000=tight, client_001=loose), COHORTS).clients
    assert first.stop is not None
    assert first.stop.by == "policy.epsilon_per_run"
    assert first.stop.joins == 1
    assert after(first, 1) <= 2.7 < after(first, 2)
    assert second.stop is None
    assert second.epsilon_max <= 4.0


def test_rounds_in_the_ledger_count_against_a_policy_s_joins() -> None:
    small = release(50.0, 0.01, 1)
    ledger = {"client-000": spent(small, small, small)}
    bounds = Bounds(max_joins=5)
    (first, _) = forecast(planned(earlier=ledger, client_000=bounds), COHORTS).clients
    assert first.stop == Stop(by="policy.max_joins", bound=5.0, joins=2, scheduled_round=3)
    none_left = planned(earlier=ledger, client_000=Bounds(max_joins=2))
    (first, _) = forecast(none_left, COHORTS).clients
    assert first.stop == Stop(by="policy.max_joins", bound=2.0, joins=0, scheduled_round=0)


def test_recovered_rounds_count_in_every_run() -> None:
    ledger = {"client-000": Earlier(joins=3, recovered=3)}
    (first, _) = forecast(planned(earlier=ledger), COHORTS).clients
    assert first.stop == Stop(by="privacy.max_joins", bound=4.0, joins=1, scheduled_round=1)


def test_with_a_ledger_over_all_runs_the_run_s_budget_is_the_run_s_alone() -> None:
    ledger = {"client-000": spent(BEFORE)}
    own = Bounds(epsilon_total=20.0, own_ledger=True)
    (first, _) = forecast(planned(earlier=ledger, client_000=own), COHORTS).clients
    assert (first.stop, first.affordable_joins) == (None, 4)
    assert first.epsilon_max == after(first, 4, BEFORE) > 4.0
    (first, _) = forecast(planned(earlier=ledger), COHORTS).clients
    assert first.stop is not None
    assert first.stop.by == "privacy.epsilon"


@pytest.mark.parametrize("budget", [0.0, 0.5, 1.0, 2.0, 100.0])
def test_affordable_joins_are_the_most_that_fit(budget: float) -> None:
    ahead = Forecaster(release(2.0, 0.05, 5), 1e-5, "rdp")
    joins = ahead.affordable(budget, 60)
    assert ahead.after(joins).epsilon <= budget
    assert joins == 60 or ahead.after(joins + 1).epsilon > budget


@pytest.mark.parametrize("mode", ["dry", "none"])
def test_without_noise_epsilon_is_infinite(mode: str) -> None:
    plain = from_mapping(
        {
            "privacy": {"mode": mode},
            "data": {"public": True},
            "federation": {"clients": 2, "clients_per_round": 1, "rounds": 4},
        }
    )
    run = forecast(planned(plain), COHORTS)
    assert run.epsilon_max == math.inf
    assert run.clients[0].stop is None
    # Whoever joined no round has released nothing.
    assert [p.scheduled for p in run.clients[1].path] == [0.0, math.inf, math.inf, math.inf]


def test_units_are_not_mixed() -> None:
    users = Release(1.0, 0.1, 1, "user")
    with pytest.raises(ConfigError, match=r"privacy.unit = example, but the ledger of client-000"):
        forecast(planned(earlier={"client-000": spent(users)}), COHORTS)
    runs = [planned(config()), planned(config(unit="user"))]
    with pytest.raises(ConfigError, match=r"privacy.unit takes several values"):
        compose_runs(runs, alike=True)


def test_a_sweep_costs_the_composition_of_its_runs() -> None:
    configs = [config(epsilon=1.0), config(epsilon=3.0)]
    before = release(2.0, 0.1, 30)
    # Both runs come after one ledger: it counts once.
    runs = [planned(one, earlier={"client-001": spent(before)}) for one in configs]
    found = compose_runs(runs, alike=True)
    for index, (name, value) in enumerate(found.by_client.items()):
        terms = [run.terms[index] for run in runs]
        events = [release(t.noise_multiplier, t.sample_rate, 20) for t in terms]
        held = [before] if name == "client-001" else []
        assert value == epsilon([*events, *held], found.delta, "rdp")
    assert found.epsilon_max == max(found.by_client.values())
    assert 3.0 < compose_runs([planned(one) for one in configs], True).epsilon_max < 1.0 + 3.0


def test_what_a_policy_stops_is_not_in_the_composition() -> None:
    bounds = Bounds(epsilon_per_run=2.65)
    configs = [config(epsilon=3.0), config(epsilon=4.0)]
    runs = [planned(one, client_000=bounds) for one in configs]
    joins = [forecast(run, COHORTS).clients[0].affordable_joins for run in runs]
    assert all(0 < most < 4 for most in joins)
    terms = [run.terms[0] for run in runs]
    events = [
        release(term.noise_multiplier, term.sample_rate, 5 * most)
        for term, most in zip(terms, joins, strict=True)
    ]
    found = compose_runs(runs, alike=True)
    assert found.by_client["client-000"] == epsilon(events, found.delta, "rdp")
    free = compose_runs([planned(one) for one in configs], alike=True)
    assert found.by_client["client-001"] == free.by_client["client-001"]
    assert found.by_client["client-000"] < free.by_client["client-000"]


def test_runs_that_deal_the_data_differently_cost_at_least_any_way_of_holding_a_unit() -> None:
    configs = [config(epsilon=1.0), config(epsilon=3.0)]
    dealt = [(900, 30), (40, 700)]
    runs = [planned(one, sizes) for one, sizes in zip(configs, dealt, strict=True)]
    found = compose_runs(runs, alike=False)
    assert found.by_client == {}
    for first in runs[0].terms:
        for second in runs[1].terms:
            terms = (first, second)
            events = [release(t.noise_multiplier, t.sample_rate, 20) for t in terms]
            assert epsilon(events, found.delta, "rdp") <= found.epsilon_max


def test_expected_joins_is_the_mean_of_the_bounded_count() -> None:
    generator = np.random.default_rng(0)
    for rounds, share, most in ((30, 0.3, 7), (100, 0.5, 50), (5, 0.9, 5), (400, 0.25, 90)):
        drawn = np.minimum(generator.binomial(rounds, share, 200_000), most)
        error = drawn.std() / math.sqrt(len(drawn))
        assert expected_joins(rounds, share, most) == pytest.approx(drawn.mean(), abs=5 * error)
    assert expected_joins(9, 1.0, 4) == 4.0


@pytest.mark.parametrize("rounds", [1, 2, 9, 10, 11, 17, 100, 1000])
def test_the_rounds_of_a_path_rise_from_the_first_to_the_last(rounds: int) -> None:
    found = path_rounds(rounds)
    assert len(found) == min(rounds, PATH_POINTS)
    assert (found[0], found[-1]) == (1, rounds)
    assert all(low < high for low, high in pairwise(found))

"""What a plan says is what the accountant says of the events a run would book."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from fedlr.config import RunConfig, from_mapping
from fedlr.errors import ConfigError, LedgerError
from fedlr.forecast import (
    PATH_POINTS,
    Forecaster,
    compose_runs,
    expected_joins,
    forecast,
    path_rounds,
    read_ledgers,
)
from fedlr.planning import plan_sizes
from fedlr.privacy.accounting import epsilon
from fedlr.privacy.events import Release
from fedlr.privacy.ledger import JobKey, SqliteLedger
from fedlr.report.plan import ClientForecast

COHORTS = [(0,), (1,), (0,), (0,)]
SIZES = (1000, 300)


def config(**privacy: object) -> RunConfig:
    return from_mapping(
        {
            "privacy": {"accountant": "rdp", "epsilon": 4.0, **privacy},
            "federation": {"clients": 2, "clients_per_round": 1, "rounds": 4},
        }
    )


def release(sigma: float, rate: float, steps: int) -> Release:
    return Release(sigma, rate, steps, "example")


def after(client: ClientForecast, joins: int, *earlier: Release) -> float:
    event = release(client.noise_multiplier, client.sample_rate, client.steps * joins)
    return epsilon([*earlier, event], client.delta, "rdp")


def test_a_path_is_the_cost_of_the_rounds_a_client_joins() -> None:
    run = forecast(config(), plan_sizes(config(), SIZES), COHORTS)
    first, second = run.clients
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
    limited = config(max_joins=2)
    (first, _) = forecast(limited, plan_sizes(limited, SIZES), COHORTS).clients
    assert (first.max_joins, first.scheduled_joins, first.affordable_joins) == (2, 2, 2)
    assert [p.maximum for p in first.path] == [after(first, joins) for joins in (1, 2, 2, 2)]
    assert first.expected_joins < 2


def test_earlier_releases_leave_fewer_joins_and_are_in_every_number() -> None:
    terms = plan_sizes(config(), SIZES)
    earlier = release(1.2, 0.128, 10)
    first, second = forecast(config(), terms, COHORTS, {"client-000": (earlier,)}).clients
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
    first, _ = forecast(
        config(), plan_sizes(config(), SIZES), COHORTS, {"client-000": (earlier,)}
    ).clients
    assert (first.affordable_joins, first.left) == (0, 0.0)
    assert first.epsilon_max == first.spent > 4.0


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
    run = forecast(plain, plan_sizes(plain, SIZES), COHORTS)
    assert run.epsilon_max == math.inf
    # Whoever joined no round has released nothing.
    assert [p.scheduled for p in run.clients[1].path] == [0.0, math.inf, math.inf, math.inf]


def test_units_are_not_mixed() -> None:
    users = Release(1.0, 0.1, 1, "user")
    with pytest.raises(ConfigError, match=r"privacy.unit = example, but the ledger of client-000"):
        forecast(config(), plan_sizes(config(), SIZES), COHORTS, {"client-000": (users,)})
    by_user = config(unit="user")
    runs = [(one, plan_sizes(one, SIZES)) for one in (config(), by_user)]
    with pytest.raises(ConfigError, match=r"privacy.unit takes several values"):
        compose_runs(runs, alike=True)


def test_a_sweep_costs_the_composition_of_its_runs() -> None:
    configs = [config(epsilon=1.0), config(epsilon=3.0)]
    runs = [(one, plan_sizes(one, SIZES)) for one in configs]
    earlier = {"client-001": (release(2.0, 0.1, 30),)}
    found = compose_runs(runs, alike=True, spent=earlier)
    for index, (name, value) in enumerate(found.by_client.items()):
        terms = [own[index] for _, own in runs]
        events = [release(t.noise_multiplier, t.sample_rate, 20) for t in terms]
        assert value == epsilon([*events, *earlier.get(name, ())], found.delta, "rdp")
    assert found.epsilon_max == max(found.by_client.values())
    assert 3.0 < compose_runs(runs, alike=True).epsilon_max < 1.0 + 3.0


def test_runs_that_deal_the_data_differently_cost_at_least_any_way_of_holding_a_unit() -> None:
    configs = [config(epsilon=1.0), config(epsilon=3.0)]
    dealt = [(900, 30), (40, 700)]
    runs = [(one, plan_sizes(one, sizes)) for one, sizes in zip(configs, dealt, strict=True)]
    found = compose_runs(runs, alike=False)
    assert found.by_client == {}
    for first in runs[0][1]:
        for second in runs[1][1]:
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


def test_ledgers_are_read_from_a_run_folder_or_from_their_own(tmp_path: Path) -> None:
    (tmp_path / "ledgers").mkdir()
    ledger = SqliteLedger(tmp_path / "ledgers" / "client-001.sqlite", "one source")
    ledger.reserve(JobKey("run", 0, "client-001", "nonce"), release(1.0, 0.1, 5))
    ledger.close()
    names = ["client-000", "client-001"]
    for folder in (tmp_path, tmp_path / "ledgers"):
        assert read_ledgers(folder, names) == {"client-001": (release(1.0, 0.1, 5),)}
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(LedgerError, match=r"holds no ledger of any client; .* client-007.sqlite"):
        read_ledgers(tmp_path, ["client-007"])
    assert sorted(path.name for path in tmp_path.rglob("*")) == before

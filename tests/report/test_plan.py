"""The tables of a plan say what its records hold, rounded so that nothing looks better."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from fedlr.report import strict_json
from fedlr.report.plan import (
    ClientForecast,
    Composed,
    PathPoint,
    Plan,
    RunForecast,
    Stop,
    listed,
    plan_tables,
    run_notices,
)


def client(name: str, top: float, scheduled: float | None = None) -> ClientForecast:
    half = top / 2
    last = top if scheduled is None else scheduled
    return ClientForecast(
        client=name,
        declared_size=1200,
        delta=1e-5,
        sample_rate=0.1067,
        noise_multiplier=2.7064,
        steps=10,
        max_joins=2,
        expected_joins=2.0,
        scheduled_joins=2,
        affordable_joins=2,
        spent=0.0,
        left=6.0,
        epsilon_max=top,
        epsilon_expected=top,
        epsilon_scheduled=last,
        accountant="prv",
        path=(
            PathPoint(round=1, maximum=half, expected=half, scheduled=half),
            PathPoint(round=2, maximum=top, expected=top, scheduled=last),
        ),
    )


def run(*clients: ClientForecast, overrides: tuple[str, ...] = ()) -> RunForecast:
    return RunForecast(
        overrides=overrides,
        data="stdlib",
        method="fedsvd",
        privacy_mode="dp",
        unit="example",
        accountant="prv",
        budget=6.0,
        rounds=2,
        clients_per_round=1,
        expected_batch=128,
        epsilon_max=max(c.epsilon_max for c in clients),
        epsilon_scheduled=max(c.epsilon_scheduled for c in clients),
        clients=clients,
    )


def line(text: str, start: str) -> list[str]:
    (found,) = (row.split() for row in text.splitlines() if row.strip().startswith(start))
    return found


def test_a_run_shows_its_clients_and_their_path() -> None:
    text = plan_tables(Plan(runs=(run(client("near", 5.991), client("far", 4.0)),)))
    assert "2 rounds, 1 of 2 clients; ε max 6.00 per example, budget 6.00, accountant prv" in text
    rows = [row.split() for row in text.splitlines() if row.strip().startswith("near")]
    assert rows[0] == ["near", "1,200", "1e-05", "0.1067", "2.706", "10", "2", "2", "2", "6.00"]
    assert rows[1] == ["near", "3.00", "6.00"]
    assert line(text, "largest") == ["largest", "3.00", "6.00"]
    assert "cohorts" not in text


def test_other_ways_of_joining_are_shown_where_they_differ() -> None:
    text = plan_tables(Plan(runs=(run(client("one", 5.0, 3.5)),)))
    assert "as the public cohorts of this seed fall" in text
    assert [row.split() for row in text.splitlines() if "3.50" in row] == [["one", "2.50", "3.50"]]


def test_equal_neighbours_are_one_line() -> None:
    names = [f"client-{number:03d}" for number in range(100)]
    clients = [client(name, 5.0) for name in names[:-1]]
    text = plan_tables(Plan(runs=(run(*clients, client(names[-1], 4.0)),)))
    assert text.count("client-000 to") == 2
    assert len(text.splitlines()) < 20


def test_earlier_spending_is_a_table_rounded_to_the_safe_side() -> None:
    earlier = replace(client("client-000", 5.0), spent=1.2301, left=4.7699, affordable_joins=1)
    text = plan_tables(Plan(runs=(run(earlier, client("two", 5.0)),)))
    # On one line each, not folded.
    assert line(text[text.index("Ledgers hold") :].split("ε after")[0], "client-000") == [
        *("client-000", "1.24", "4.76", "1")
    ]
    assert [row.split()[-1] for row in text.splitlines() if "1,200" in row] == ["5.00"]
    assert "ε max 5.00 per example with earlier runs, budget 6.00" in text
    assert "left" not in plan_tables(Plan(runs=(run(client("two", 5.0)),)))


def test_no_number_is_cut() -> None:
    wide = replace(client("a" * 30, 12345.0), declared_size=12_000_000, sample_rate=1.067e-5)
    wide = replace(wide, spent=1234.5, left=1.0, steps=12_345, noise_multiplier=12345.678)
    whole = Plan(runs=(run(wide),))
    wanted = sorted(filter(str.isdigit, plan_tables(whole, width=250)))
    for width in (60, 80, 100):
        text = plan_tables(whole, width)
        assert sorted(filter(str.isdigit, text)) == wanted
        assert max(map(len, text.splitlines())) <= width


def test_what_ends_a_part_early_is_named_with_its_round() -> None:
    names = ["policy.max_joins", "policy.epsilon_total", "privacy.epsilon"]
    stops = [
        Stop(by=names[0], bound=1.0, joins=1, scheduled_round=None),
        Stop(by=names[1], bound=2.5, joins=0, scheduled_round=0),
        Stop(by=names[2], bound=6.0, joins=1, scheduled_round=2),
    ]
    clients = [replace(client(f"{i}-site", 5.0), stop=stop) for i, stop in enumerate(stops)]
    for overrides in ((), ("seed=1",)):
        text = plan_tables(Plan(runs=(run(*clients, client("free", 5.0), overrides=overrides),)))
        after = text[text.index("before the last round") :].split("ε after")[0]
        assert line(after, "0-site") == ["0-site", "policy.max_joins", "=", "1", "1", "—"]
        assert line(after, "1-site")[1:4] == ["policy.epsilon_total", "=", "2.5"]
        assert after.count("joins none") == 2
        assert line(after, "2-site") == ["2-site", "privacy.epsilon", "=", "6", "1", "2"]
        assert "free" not in after
    assert "before the last round" not in plan_tables(Plan(runs=(run(client("free", 5.0)),)))


def test_notices_say_how_the_numbers_came_about() -> None:
    assert run_notices([run(client("one", 5.0))]) == []
    renyi = replace(client("one", 5.0), accountant="rdp")
    whole = replace(client("two", 5.0), sample_rate=1.0)
    stop = Stop(by="policy.epsilon_per_month", bound=1.0, joins=1, scheduled_round=1)
    month = replace(client("three", 5.0), stop=stop)
    found = run_notices([run(renyi, whole), run(month, renyi)])
    assert [notice.split(":")[0] for notice in found] == [
        "PRV failed, or was no better, for one",
        "the whole run is taken to fall into the thirty days that end today",
        "two",
    ]
    assert run_notices([replace(run(renyi, whole), privacy_mode="dry")]) == []
    assert listed("edcba") == "a, b, c and 2 more"


def test_one_round_is_no_rounds() -> None:
    assert "\n1 round, 1 of 1" in plan_tables(
        Plan(runs=(replace(run(client("a", 1.0)), rounds=1),))
    )


def test_a_sweep_ends_with_the_composition() -> None:
    runs = tuple(run(client("one", 3.0), overrides=(f"seed={seed}",)) for seed in (0, 1))
    plan = Plan(
        runs=runs,
        composed=Composed(epsilon_max=4.2, delta=1e-5, by_client={"one": 4.2}),
        notices=("a notice",),
    )
    text = plan_tables(plan)
    assert line(text, "all 2 runs composed, at δ = 1e-05")[-1] == "4.20"
    assert text.count("seed=1") == 2
    assert "after round" not in text
    assert text.endswith("Note: a notice\n")


@pytest.mark.parametrize(("mode", "says"), [("none", "privacy is off"), ("dry", "adds no noise")])
def test_without_noise_it_says_so(mode: str, says: str) -> None:
    plain = replace(run(client("one", math.inf)), privacy_mode=mode)
    text = plan_tables(Plan(runs=(plain,)))
    assert f"ε = ∞: {'a dry run ' if mode == 'dry' else ''}{says}" in text
    assert "6.00" not in text
    assert text.count("∞") == 4


def test_names_cannot_move_the_cursor_and_lines_are_no_longer_than_asked() -> None:
    named = run(client("one\x1b[2J", 3.0), overrides=("name=\x1b[2Jx",))
    text = plan_tables(Plan(runs=(named,)), width=90)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 90
    with pytest.raises(ValueError, match="width = 59 must be ≥ 60"):
        plan_tables(Plan(runs=(named,)), width=59)


def test_a_plan_survives_json() -> None:
    stop = Stop(by="policy.max_joins", bound=1.0, joins=1, scheduled_round=None)
    plan = Plan(
        runs=(run(client("one", math.inf), replace(client("two", 1.0), stop=stop)),),
        composed=Composed(epsilon_max=math.inf, delta=1e-6),
        notices=("a", "b"),
    )
    assert strict_json.decode(Plan, strict_json.encode(plan)) == plan

"""``fedlr plan``: what it says before a run is what the run's ledgers hold after it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from fedlr.cli.main import main
from fedlr.cli.overrides import spread
from fedlr.cli.plan import _varied
from fedlr.errors import EndedEarly
from fedlr.privacy import accounting, composition
from fedlr.privacy.events import Release
from fedlr.privacy.ledger import SqliteLedger
from fedlr.report import strict_json
from fedlr.report.plan import Plan, Stop
from fedlr.report.records import read_summary
from tests.cli.small import policies, simulate

QUICK = ("privacy.accountant=rdp", "federation.rounds=4", "optimizer.steps=2")


def planned(capfd: pytest.CaptureFixture[str], *words: str) -> Plan:
    """Plan with ``--json`` and return what came."""
    capfd.readouterr()
    assert main(["plan", *words, "--json"]) == 0
    return strict_json.decode(Plan, capfd.readouterr().out)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(tmp_path_factory.mktemp("run"), "federation.clients_per_round=1")


def words_of(run: Path) -> list[str]:
    """The overrides of `tests.cli.small`, with a model that cannot be loaded: none is."""
    data = run.parents[2] / "data"
    return [
        *("data=file", f"data.path={data}", "data.label_names=[no,yes]"),
        *("model=encoder", "model.name=absent/model", "privacy.accountant=rdp"),
        *("federation.clients=2", "federation.clients_per_round=1", "federation.rounds=3"),
        *("optimizer.steps=1", "optimizer.expected_batch=4"),
    ]


def test_the_run_costs_what_was_planned(
    run_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = planned(capfd, *words_of(run_folder))
    (forecast,), summary = found.runs, read_summary(run_folder / "summary.json")
    for client, done in zip(forecast.clients, summary.clients, strict=True):
        assert client.client == done.client
        assert client.noise_multiplier == done.noise_multiplier
        assert client.scheduled_joins == done.joins
        assert client.epsilon_scheduled == done.epsilon
    assert forecast.epsilon_scheduled == summary.epsilon_max
    assert any("--ledgers" in notice for notice in found.notices)


def test_what_a_run_has_spent_is_counted_in_the_next_plan(
    run_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    summary = read_summary(run_folder / "summary.json")
    found = planned(capfd, *words_of(run_folder), "--ledgers", str(run_folder))
    for client, done in zip(found.runs[0].clients, summary.clients, strict=True):
        assert client.spent == done.epsilon
        assert client.epsilon_max >= client.spent
        # σ is the same: what is left of three joins is what was not used.
        assert client.affordable_joins == 3 - done.joins
        assert client.stop is not None
        assert client.stop.by == "privacy.epsilon"
    (notice,) = found.notices
    assert "a simulated run begins a ledger of its own for client-000, client-001" in notice
    assert main(["plan", *words_of(run_folder), "--ledgers", str(run_folder)]) == 0
    assert "spent" in capfd.readouterr().out


def test_sizes_stand_for_the_data(capfd: pytest.CaptureFixture[str]) -> None:
    words = ("--sizes", "1264,316", "data=file", "data.path=absent", *QUICK)
    (run,) = planned(capfd, *words).runs
    assert [client.declared_size for client in run.clients] == [1200, 310]
    assert [client.sample_rate for client in run.clients] == [128 / 1200, 128 / 310]
    assert (run.clients_per_round, run.rounds) == (2, 4)
    assert main(["plan", *words]) == 0
    table = capfd.readouterr().out
    assert "client-001" in table
    assert "1,200" in table


def test_a_sweep_prints_every_run_and_all_of_them_composed(
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = ("--sizes", "500,300", *QUICK, "privacy.epsilon=1,3", "method=fedsvd,ffa_lora")
    found = planned(capfd, *words)
    assert [run.overrides for run in found.runs] == [
        (f"privacy.epsilon={epsilon}", f"method={method}")
        for epsilon in (1, 3)
        for method in ("fedsvd", "ffa_lora")
    ]
    assert found.composed is not None
    assert set(found.composed.by_client) == {"client-000", "client-001"}
    assert 3 < found.composed.epsilon_max < 1 + 1 + 3 + 3
    assert main(["plan", *words]) == 0
    assert "all 4 runs composed" in capfd.readouterr().out


@pytest.mark.parametrize("varied", ["seed=0,1", "partition.alpha=0.1,1"])
def test_sizes_that_are_dealt_anew_compose_at_the_worst_client(
    capfd: pytest.CaptureFixture[str], varied: str
) -> None:
    words = ("--sizes", "500,300", *QUICK)
    found = planned(capfd, *words, varied)
    assert found.composed is not None
    assert found.composed.by_client == {}
    assert any("deal the data differently" in notice for notice in found.notices)
    # Two equal runs with every client where it was cost less than with clients exchanged.
    alike = planned(capfd, *words, "method=fedsvd,ffa_lora")
    assert alike.composed is not None
    assert found.composed.epsilon_max > alike.composed.epsilon_max
    first, second = (run.clients for run in found.runs)
    for one, other in itertools.product(first, second):
        events = [
            Release(c.noise_multiplier, c.sample_rate, c.steps * c.max_joins, "example")
            for c in (one, other)
        ]
        assert accounting.epsilon(events, found.composed.delta, "rdp") <= found.composed.epsilon_max


def test_a_run_stops_where_its_policies_were_planned_to_stop_it(
    run_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*words_of(run_folder), "federation.clients_per_round=2"]
    free = planned(capfd, *words).runs[0].clients[0]
    bound = (free.path[1].maximum + free.path[2].maximum) / 2
    own = (
        'ledger = "ward.sqlite"\nsource_id = "ward"\n'
        f"[budget]\ndelta = 0.01\nepsilon_total = 99.0\nepsilon_per_run = {bound!r}\n"
    )
    given = policies(tmp_path / "p", client_000=own, client_001="[budget]\nmax_joins = 1\n")
    SqliteLedger(tmp_path / "p" / "ward.sqlite", "ward").close()
    found = planned(capfd, *words, given).runs[0]
    stops = [client.stop for client in found.clients]
    assert stops == [
        Stop(by="policy.epsilon_per_run", bound=bound, joins=2, scheduled_round=2),
        Stop(by="policy.max_joins", bound=1.0, joins=1, scheduled_round=1),
    ]
    run = simulate(tmp_path, given, status=EndedEarly.exit_code)
    summary = read_summary(run / "summary.json")
    assert [client.joins for client in summary.clients] == [2, 1]
    for forecast, done in zip(found.clients, summary.clients, strict=True):
        assert forecast.epsilon_scheduled == forecast.epsilon_max == done.epsilon
    # What the run has booked is what the next plan begins with.
    again = planned(capfd, *words, given)
    first, second = again.runs[0].clients
    assert (first.spent, second.spent) == (summary.clients[0].epsilon, 0.0)
    assert first.stop == stops[0]
    assert first.epsilon_max > first.spent
    assert again.notices == ("no ledger of client-001: nothing is counted there",)
    # As in the run, the policy's ledger counts and not one that is given beside it.
    beside = planned(capfd, *words, given, "--ledgers", str(run_folder))
    before = read_summary(run_folder / "summary.json").clients
    spent = [client.spent for client in beside.runs[0].clients]
    assert spent == [summary.clients[0].epsilon, before[1].epsilon]
    assert beside.notices[0].startswith("of client-000 the ledger counts that the policy names")
    assert main(["plan", *words, given]) == 0
    table = capfd.readouterr().out
    assert "A bound ends these clients' part before the last round" in table
    assert f"policy.epsilon_per_run = {bound:g}" in table


def test_a_sweep_over_what_a_policy_allows_in_all_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = policies(tmp_path / "p", client_000="[budget]\nepsilon_total = 3.2\n")
    words = ("--sizes", "500,300", *QUICK, given)
    found = planned(capfd, *words, "privacy.epsilon=3,3.1")
    assert found.composed is not None
    assert found.composed.by_client["client-000"] > 3.2
    assert any("policy.epsilon_total of client-000" in notice for notice in found.notices)
    below = planned(capfd, *words, "privacy.epsilon=1,2")
    assert not any("policy.epsilon_total" in notice for notice in below.notices)


def test_a_sweep_is_shown_as_it_was_typed(capfd: pytest.CaptureFixture[str]) -> None:
    words = ("--sizes", "500", *QUICK, "adapter.layers=top:1,top:2")
    found = planned(capfd, *words)
    assert [run.overrides for run in found.runs] == [
        ("adapter.layers=top:1",),
        ("adapter.layers=top:2",),
    ]
    assert main(["plan", *words]) == 0
    shown = capfd.readouterr()
    assert "run 2 of 2: adapter.layers=top:2" in shown.err
    assert "\\" not in shown.out + shown.err


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a=x,b:y", ["a=x", "a=b:y"]),
        ("a='x:y','z'", ["a='x:y'", "a='z'"]),
        (r"a='\:',z", [r"a='\:'", "a=z"]),
        (r"a=x\,y:z,b", [r"a=x\,y:z", "a=b"]),
        (r"a=x\\:,b", [r"a=x\\:", "a=b"]),
    ],
)
def test_only_the_escape_of_a_colon_is_left_out(text: str, shown: list[str]) -> None:
    """What is shown means what was meant: Hydra reads it back as the same value."""
    combinations = list(spread([text]))
    assert [words for (words,) in _varied(combinations)] == shown
    assert list(map(_value, shown)) == [_value(word) for (word,) in combinations]


def _value(word: str) -> object:
    return OverridesParser.create().parse_override(word).value()


def test_a_sweep_says_one_line_for_each_run(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--sizes", "500", *QUICK, "privacy.epsilon=1,3"]) == 0
    assert capfd.readouterr().err.splitlines() == [
        "fedlr: run 1 of 2: privacy.epsilon=1",
        "fedlr: run 2 of 2: privacy.epsilon=3",
        "fedlr: composing 2 runs",
    ]


def test_seeds_deal_the_data_anew_and_that_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    found = planned(capfd, "debug=tiny", *QUICK, "seed=0,1")
    assert found.composed is not None
    assert found.composed.by_client == {}
    assert found.composed.epsilon_max > max(run.epsilon_max for run in found.runs)
    assert any("deal the data differently" in notice for notice in found.notices)


def test_where_prv_fails_the_plan_says_whose_bound_it_is(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(*_: object) -> float:
        raise RuntimeError("diverged")

    monkeypatch.setattr(composition, "upper_epsilon", diverged)
    words = ("--sizes", "777", "federation.rounds=2", "privacy.epsilon=2.5")
    found = planned(capfd, *words)
    accounting._cached.cache_clear()
    assert found.runs[0].clients[0].accountant == "rdp"
    assert found.runs[0].epsilon_max <= 2.5
    assert any("client-000: ε there is the Rényi bound" in notice for notice in found.notices)


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (("--sizes", "12,x"), 2, "'x' must be a whole number ≥ 1"),
        (("--sizes", "0"), 2, "'0' must be a whole number ≥ 1"),
        (("--sizes", "9,9", "federation.clients=3"), 2, "--sizes gives 2 clients"),
        (("--sizes", "9", "federation.clients=1,2"), 2, "--sizes gives 1 client;"),
        (("--sizes", "100", "privacy.unit=example,user"), 2, "plan them one by one"),
        (("--sizes", "100", "privacy.delta=0.2"), 2, "must be < 1/N"),
        (("--sizes", "1200", "800"), 2, "write the sizes as one word, --sizes 1200,800"),
        (("--sizes", "100", "--ledgers", "absent"), 6, "'absent' is no folder"),
        (("--sizes", "100", "--ledgers", "."), 6, "holds no ledger of any client"),
        (("data=file", "data.path=absent"), 3, "absent"),
        (("privacy.epsilon=interval(1,2)",), 2, "gives several values"),
        (("privacy.epsilom=1,2",), 2, "did you mean privacy.epsilon?"),
        (("seed=range(0,300)",), 2, "more than 200 runs"),
        (("--rounds",), 2, "see `fedlr plan --help`"),
    ],
)
def test_a_mistake_meets_a_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    status: int,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *words]) == status
    found = capfd.readouterr()
    assert says in found.err
    assert "Traceback" not in found.err
    assert found.out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "combinations"),
    [
        ([], [[]]),
        (["seed=1"], [["seed=1"]]),
        (["a=1,2", "b=x"], [["a=1", "b=x"], ["a=2", "b=x"]]),
        (["a=1,2", "b=x,y"], [[f"a={a}", f"b={b}"] for a in (1, 2) for b in "xy"]),
        (["a=range(0,2)"], [["a=0"], ["a=1"]]),
        (["a=[1,2],[3]"], [["a=[1,2]"], ["a=[3]"]]),
        (['+a="x,y"'], [['+a="x,y"']]),
        (["+a=x,y"], [["+a=x"], ["+a=y"]]),
        (["a=[1", "--x", "a=interval(0,1)"], [["a=[1", "--x", "a=interval(0,1)"]]),
    ],
)
def test_several_values_spread(words: list[str], combinations: list[list[str]]) -> None:
    assert list(spread(words)) == combinations


def test_a_sweep_without_end_is_refused_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    endless = [
        f"{name}=range(0,1000000000)" for name in ("seed", "optimizer.steps", "adapter.rank")
    ]
    assert main(["plan", *endless]) == 2
    assert "more than 200 runs" in capfd.readouterr().err


def test_json_is_strict_where_epsilon_is_infinite(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--sizes", "90", *QUICK, "privacy=dry", "--json"]) == 0

    def refuse(literal: str) -> Any:
        raise AssertionError(literal)

    raw = json.loads(capfd.readouterr().out, parse_constant=refuse)
    assert raw["runs"][0]["epsilon_max"] == "inf"

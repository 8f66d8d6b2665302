"""Six operators, six budgets: everyone stops in time, and the run ends with a result."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

import pytest

from fedlr.cli.main import main
from fedlr.errors import EndedEarly
from fedlr.privacy.accounting import epsilon
from fedlr.privacy.events import Release
from fedlr.privacy.ledger import JobKey, SqliteLedger
from fedlr.report.records import read_rounds, read_summary
from tests.cli.small import simulate

WORDS = ("federation.clients=6", "federation.clients_per_round=6", "federation.rounds=8")

RUNS = ("federation.clients=2", "federation.clients_per_round=2", "federation.rounds=2")


def booked(run: Path, client: str) -> tuple[Release, ...]:
    return booked_in(run / "ledgers" / f"{client}.sqlite")


def booked_in(path: Path, source: str | None = None) -> tuple[Release, ...]:
    with closing(SqliteLedger(path, source)) as ledger:
        return ledger.spent()


def test_budgets_that_end_at_different_rounds(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The k-th site may spend what k + 1 rounds cost; the second of them by the run's bound."""
    first = tmp_path / "first"
    first.mkdir()
    run = simulate(first, *WORDS)
    (event,) = booked(run, "client-000")
    delta = read_summary(run / "summary.json").delta
    assert delta is not None
    one = Release(event.noise_multiplier, event.sample_rate, event.steps // 8, event.unit)
    cost = [epsilon([one] * rounds, delta, "rdp") for rounds in range(8)]
    second = tmp_path / "second"
    policies = second / "policies"
    policies.mkdir(parents=True)
    for index in range(6):
        name = "epsilon_per_run" if index == 1 else "epsilon_total"
        text = f"[budget]\n{name} = {cost[index + 1] * (1 + 1e-9)!r}\n"
        (policies / f"client-{index:03d}.toml").write_text(text)
    capfd.readouterr()
    words = (*WORDS, f"privacy.policies={policies}")
    run = simulate(second, *words, status=EndedEarly.exit_code)
    out = capfd.readouterr().out
    summary = read_summary(run / "summary.json")
    assert [client.joins for client in summary.clients] == [1, 2, 3, 4, 5, 6]
    assert summary.rounds == 6
    for index, client in enumerate(summary.clients):
        spent = booked(run, client.client)
        assert client.epsilon == epsilon(spent, delta, "rdp") <= cost[index + 1] * (1 + 1e-9)
        code = "run_budget" if index == 1 else "budget"
        rounds = "1 round" if index == 0 else f"{index + 1} rounds"
        text = f"client-{index:03d} took part in {rounds} and stopped before round"
        (notice,) = (line for line in summary.notices if line.startswith(text))
        assert notice.endswith(f"round {index + 2}: {notice.split(': ')[1]}")
        assert f"({code})" in notice
    rounds = read_rounds(run / "rounds.jsonl")
    assert [record.accepted for record in rounds] == [6, 5, 4, 3, 2, 1, 0]
    assert (run / "adapter" / "adapter_model.safetensors").exists()
    assert "stopped before round 2" in " ".join(out.split())


def test_a_policy_that_does_not_fit_is_a_sentence_before_anything_is_spent(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "client-001.toml").write_text("[budget]\nepsilon = 3\n")
    assert main(["simulate", "debug=tiny", "privacy.policies=policies"]) == 2
    said = capfd.readouterr().err
    assert "client-001.toml: there is no budget.epsilon" in said
    assert "Traceback" not in said
    (tmp_path / "policies" / "client-001.toml").rename(tmp_path / "policies" / "hospital-a.toml")
    assert main(["simulate", "debug=tiny", "privacy.policies=policies"]) == 2
    assert "hospital-a.toml is no client's; the clients are client-000" in capfd.readouterr().err
    assert main(["simulate", "debug=tiny", "privacy.policies=absent"]) == 2
    assert "privacy.policies = 'absent'" in capfd.readouterr().err
    (tmp_path / "policies" / "hospital-a.toml").unlink()
    (tmp_path / "policies" / "client-000.toml").write_text("declared_size = 7\n")
    assert main(["simulate", "debug=tiny", "privacy.policies=policies"]) == 2
    assert "policy of client-000 says declared_size = 7, the run" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["policies"]


def test_an_operators_ledger_holds_every_run_and_stops_the_one_that_would_exceed_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two runs fit the budget, of the third no round: whatever the run asks for."""
    policies = tmp_path / "policies"
    policies.mkdir()
    first = simulate(tmp_path, *RUNS)
    (event,) = booked(first, "client-000")
    delta = read_summary(first / "summary.json").delta
    assert delta is not None
    ward, name = policies / "ward.sqlite", "client-000.toml"
    words = ["ledger", "new", str(ward), "--source-id", "ward", "--disjoint", "a test"]
    assert main(words) == 0
    twice = epsilon([event, event], delta, "rdp")
    text = 'ledger = "ward.sqlite"\nsource_id = "ward"\n'
    text += f"[budget]\ndelta = {delta!r}\nepsilon_total = {twice!r}\n"
    (policies / name).write_text(text)
    spent = []
    for number, seed in enumerate((0, 0, 1)):
        words = [*RUNS, f"privacy.policies={policies}", f"seed={seed}"]
        (tmp_path / str(number)).mkdir()
        summary = read_summary(simulate(tmp_path / str(number), *words) / "summary.json")
        spent.append(summary.clients[0].epsilon)
        assert any("is that of their operators' own ledgers" in line for line in summary.notices)
    assert spent == [epsilon([event], delta, "rdp"), twice, twice]
    assert summary.clients[0].joins == 0
    assert summary.clients[1].joins == 2
    err = capfd.readouterr().err
    assert err.count("the rows of client-000 are not those that its ledger saw last") == 1
    ledger = SqliteLedger(ward, "ward")
    assert ledger.joins() == 4
    assert [ledger.joins(run) for run in {entry.run for entry in ledger.history().entries}] == [
        2,
        2,
    ]
    ledger.close()


def test_a_run_goes_on_with_the_ledgers_it_began_with_or_not_at_all(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Another ledger may hold more than the run ever reported, and nothing of the run."""
    policies = tmp_path / "policies"
    policies.mkdir()
    policy = policies / "client-000.toml"
    for ward in ("a", "b"):
        words = ("--source-id", ward, "--disjoint", "a test")
        assert main(["ledger", "new", str(policies / f"{ward}.sqlite"), *words]) == 0
    text = 'ledger = "a.sqlite"\nsource_id = "a"\n[budget]\ndelta = 0.01\nepsilon_total = 99\n'
    policy.write_text(text)
    run = simulate(tmp_path, *RUNS, f"privacy.policies={policies}")
    (run / "summary.json").unlink()
    (event,) = booked_in(policies / "a.sqlite", "a")
    with closing(SqliteLedger(policies / "b.sqlite", "b")) as other:
        for number in range(3):
            other.reserve(JobKey("another", number, "client-000", "n"), event)
    capfd.readouterr()
    policy.write_text(text.replace('"a', '"b'))
    assert main(["simulate", f"resume={run}"]) == 7
    assert "name other ledgers than the run began with" in capfd.readouterr().err
    policy.write_text(text)
    shutil.copy(policies / "b.sqlite", policies / "a.sqlite")
    assert main(["simulate", f"resume={run}"]) != 0
    assert "Traceback" not in capfd.readouterr().err
    policy.unlink()
    assert main(["simulate", f"resume={run}"]) == 7
    assert main(["export", str(run), "--output", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "ledgers of client-000 cannot be read here" in " ".join(card.split())


def test_a_resumed_run_does_not_start_without_its_ledgers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = simulate(tmp_path, *RUNS)
    (run / "summary.json").unlink()
    for path in (run / "ledgers").glob("client-001.sqlite*"):
        path.unlink()
    assert main(["simulate", f"resume={run}"]) != 0
    err = capfd.readouterr().err
    assert "client-001.sqlite of client-001 is gone" in err
    assert "Traceback" not in err

"""ε of clients that were asked and not heard; a run that goes on without some of its clients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import Message

from fedlr.config import RunConfig
from fedlr.methods.method import ClientUpdate
from fedlr.report.records import ROUNDS_FILE, RoundLog
from fedlr.training.jobs import Abstention, Job
from server.cohort import cohort
from server.hooks import Hooks
from server.journal import FileJournal, read_checkpoint
from server.membership import gather
from server.outcome import Checkpoint, Outcome, Patience
from server.results import reported
from server.strategy import FederatedStrategy
from tests.report.run_folder import FACTS
from tests.server.toys import (
    LAYOUT,
    PROVENANCE,
    Wrapped,
    config,
    evaluate,
    first_state,
    grid_of,
    method,
    strategy,
    toy_sites,
)

ALL = config(clients_per_round=4, min_clients=3, rounds=3)


def losing(*rounds: int) -> Callable[[list[Message]], list[Message]]:
    """A network that loses the first reply of these exchanges, counted from 1."""
    exchanges: list[int] = []

    def lose(replies: list[Message]) -> list[Message]:
        exchanges.append(len(replies))
        return replies[1:] if len(exchanges) in rounds else replies

    return lose


def run_with(tamper: Callable[[list[Message]], list[Message]]) -> Outcome:
    return strategy(ALL).run(grid_of(toy_sites(epsilon=1.0), tamper=tamper))


def test_a_client_that_was_not_heard_has_no_finite_epsilon_until_it_is() -> None:
    outcome = run_with(losing(2))
    spent = [record.epsilon_by_client["client-00"] for record in outcome.records]
    assert spent == [1.0, math.inf, 3.0]
    assert [record.epsilon_max for record in outcome.records] == [1.0, math.inf, 3.0]
    assert outcome.unheard == frozenset()


def test_one_that_never_reported_is_unknown_too() -> None:
    outcome = run_with(losing(1))
    assert outcome.records[0].epsilon_max == math.inf
    assert outcome.epsilon == dict.fromkeys(outcome.epsilon, 3.0)


@pytest.mark.parametrize("lost", [3, 0])
def test_the_result_of_real_sites_says_so(lost: int) -> None:
    outcome = run_with(losing(lost))
    clients = tuple(replace(FACTS.clients[0], client=f"client-{i:02d}") for i in range(4))
    told = reported(RunConfig(), replace(FACTS, clients=clients), outcome)
    assert told.epsilon["client-00"] == (math.inf if lost else 3.0)
    assert told.epsilon["client-01"] == 3.0
    notice = "client-00 reported ε = 2.00 and was asked again after that"
    assert any(notice in line for line in told.notices) is bool(lost)


def test_a_phase_that_trains_nothing_leaves_no_one_unheard() -> None:
    outcome = strategy(ALL, "two_phase").run(grid_of(toy_sites(epsilon=1.0)))
    assert [record.epsilon_max for record in outcome.records] == [1.0, 2.0, 3.0]
    assert outcome.unheard == frozenset()


def test_without_privacy_nothing_is_unknown() -> None:
    outcome = strategy(ALL).run(grid_of(toy_sites(), tamper=losing(2)))
    assert [record.epsilon_max for record in outcome.records] == [None] * 3


@pytest.mark.parametrize(
    ("code", "unknown"), [("busy", False), ("policy", False), ("failed", True), ("ledger", True)]
)
def test_a_code_without_an_epsilon_says_whether_it_may_have_paid(code: str, unknown: bool) -> None:
    def refuse(update: ClientUpdate, job: Job) -> ClientUpdate | Abstention:
        return Abstention(update.client, code) if job.round == 1 else update

    lazy, *others = toy_sites(epsilon=1.0)
    outcome = strategy(ALL).run(grid_of([Wrapped(lazy, refuse), *others]))
    spent = [record.epsilon_by_client["client-00"] for record in outcome.records]
    assert spent == [1.0, math.inf if unknown else 1.0, 3.0]


def test_late_is_not_heard() -> None:
    settings = replace(ALL, clients_per_round=3, patience=Patience(spare_clients=1))

    def slow(replies: list[Message]) -> list[Message]:
        return [*replies[1:], replies[0]]

    outcome = strategy(settings).run(grid_of(toy_sites(epsilon=1.0), tamper=slow))
    assert outcome.unheard == {"client-00"}
    assert [record.epsilon_max for record in outcome.records] == [math.inf] * 3


def test_who_was_not_heard_is_remembered_over_a_restart(tmp_path: Path) -> None:
    """The process dies while a round is open: all who were asked may have paid."""

    def dies(replies: list[Message]) -> list[Message]:
        raise KeyboardInterrupt

    sites = toy_sites(epsilon=1.0)
    _go_on(tmp_path, sites, losing(2), rounds=2)
    kept = read_checkpoint(tmp_path, LAYOUT)
    assert kept is not None
    assert kept.unheard == {"client-00"}
    with pytest.raises(KeyboardInterrupt):
        _go_on(tmp_path, sites, dies, rounds=3)
    found = _go_on(tmp_path, sites[:3], lambda replies: replies, rounds=3)
    # The fourth was asked before the restart, and is not there after it.
    assert found.unheard == {"client-03"}
    assert found.records[-1].epsilon_max == math.inf


@pytest.mark.parametrize("gone", range(4))
def test_who_paid_in_the_open_round_is_asked_first_after_a_restart(
    tmp_path: Path, gone: int
) -> None:
    """Three of five are asked and one of the five does not come back: the draw stays, and the
    ones who paid are in it.
    """

    def dies(replies: list[Message]) -> list[Message]:
        raise KeyboardInterrupt

    drawn = cohort(5, 0, range(5), 3)
    with pytest.raises(KeyboardInterrupt):
        _go_on(tmp_path, toy_sites(5, epsilon=1.0), dies, clients=5, clients_per_round=3)
    left = [site for index, site in enumerate(toy_sites(5, epsilon=1.0)) if index != gone]
    outcome = _go_on(tmp_path, left, lambda replies: replies, clients=5, clients_per_round=3)
    asked = set(outcome.records[0].cohort)
    assert {f"client-{i:02d}" for i in drawn if i != gone} <= asked
    assert len(asked) == 3


def test_a_newcomer_takes_no_place_of_one_that_the_run_began_with() -> None:
    known = ["client-01", "client-02"]
    settings = config(clients=2, clients_per_round=2)
    found = gather(grid_of(toy_sites(3)), settings, PROVENANCE, known)
    assert [(member.client, member.index) for member in found.members] == [
        ("client-01", 0),
        ("client-02", 1),
    ]
    assert found.notices == ("Client 'client-00' is left out: it is new to the run.",)


def test_one_that_is_gone_leaves_its_index_empty() -> None:
    known = ["client-00", "client-01", "client-09"]
    settings = config(clients=3, clients_per_round=3, min_clients=1)
    found = gather(grid_of(toy_sites(2)[1:]), settings, PROVENANCE, known)
    assert [(member.client, member.index) for member in found.members] == [("client-01", 1)]


def test_bytes_of_an_earlier_try_are_in_the_record() -> None:
    settings = replace(ALL, min_clients=4, rounds=1, patience=Patience(retries=1))
    tried = strategy(settings).run(grid_of(toy_sites(), tamper=losing(1))).records
    once = strategy(settings).run(grid_of(toy_sites())).records
    assert [record.accepted for record in tried] == [4]
    assert tried[0].bytes_down == 2 * once[0].bytes_down
    assert tried[0].bytes_up == once[0].bytes_up * 7 // 4


def _go_on(
    folder: Path,
    sites: list[object],
    tamper: Callable[[list[Message]], list[Message]],
    **changes: int,
) -> Outcome:
    """Run, or go on with, the run in `folder` as a new process would."""
    journal = FileJournal(folder)
    settings = config(**{"min_clients": 2, "clients_per_round": 4, **changes})
    try:
        hooks = Hooks(evaluate, RoundLog(folder / ROUNDS_FILE), journal=journal)
        start = journal.checkpoint(LAYOUT) or Checkpoint(first_state())
        known = [f"client-{i:02d}" for i in range(settings.clients)]
        grid = grid_of(sites, tamper=tamper)  # type: ignore[arg-type]
        members = gather(grid, settings, PROVENANCE, known)
        return FederatedStrategy(settings, method(), start, PROVENANCE, hooks, members).run(grid)
    finally:
        journal.close()

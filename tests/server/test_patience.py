"""Rounds that end: retries below the quorum, spare clients, pauses for clients that fail."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from flwr.app import Message

from fedlr.methods.method import ClientUpdate
from fedlr.report.records import RoundLog, read_rounds
from fedlr.training.jobs import Abstention, Job, SiteStatus
from server.backoff import BackOff
from server.cohort import cohort
from server.hooks import Hooks
from server.outcome import Checkpoint, Patience
from tests.server.toys import (
    ToySite,
    assert_same_parts,
    config,
    evaluate,
    grid_of,
    run,
    strategy,
    toy_sites,
)


@dataclass
class Once:
    """A site as the agent is: a nonce is paid for once, and answered the same ever after.

    `broken` is what it answers instead, one code for each time that it is asked.
    """

    site: ToySite
    broken: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    known: dict[str, ClientUpdate | Abstention] = field(default_factory=dict)

    def status(self) -> SiteStatus:
        return self.site.status()

    def train_many(self, jobs: Sequence[Job]) -> list[ClientUpdate | Abstention]:
        return [self.answer(job) for job in jobs]

    def answer(self, job: Job) -> ClientUpdate | Abstention:
        self.asked.append(job.nonce)
        if self.broken and (code := self.broken.pop(0)):
            return Abstention(self.site.client, code)
        if job.nonce not in self.known:
            self.known[job.nonce] = self.site.answer(job)
        return self.known[job.nonce]


class Memory:
    """The nonces of the open round, as `server.journal.FileJournal` keeps them."""

    def __init__(self) -> None:
        self.round, self.nonces = -1, dict[str, str]()

    def sending(self, round: int, phase: int, nonces: Mapping[str, str]) -> Mapping[str, str]:
        if round != self.round:
            self.round, self.nonces = round, {}
        self.nonces = {**nonces, **self.nonces}
        return {client: self.nonces[client] for client in nonces}

    def abandoned(self, refused: Collection[str]) -> None:
        self.nonces = {c: n for c, n in self.nonces.items() if c not in refused}

    def asked(self, round: int) -> frozenset[str]:
        return frozenset(self.nonces) if round == self.round else frozenset()

    def finished(self, checkpoint: Checkpoint) -> None:
        pass


def four(broken: Sequence[str] = (), which: int = 0) -> list[Once]:
    sites = [Once(site) for site in toy_sites(epsilon=1.0)]
    sites[which].broken = list(broken)
    return sites


def hooks(waits: list[float]) -> Hooks:
    return Hooks(evaluate, journal=Memory(), wait=waits.append)


ALL = config(clients_per_round=4, min_clients=4)


def patient(**changes: int) -> Patience:
    return Patience(retry_wait_s=7.0, **changes)


def test_a_round_below_the_quorum_is_tried_again_and_nobody_pays_twice() -> None:
    waits: list[float] = []
    sites = four(["failed", "failed"])
    settings = config(clients_per_round=4, min_clients=4, patience=patient(retries=2))
    outcome = run(sites, settings, hooks=hooks(waits))
    whole = run(four(), ALL)
    assert waits == [7.0, 7.0]
    assert outcome.stopped_reason is None
    assert [record.round for record in outcome.records] == [1, 2, 3]
    assert_same_parts(outcome.parts, whole.parts)
    # Three tries of round 1, at one price for those who had answered.
    assert [len(site.asked) for site in sites] == [5, 5, 5, 5]
    assert [site.site.joins for site in sites] == [3, 3, 3, 3]
    assert sites[1].asked[0] == sites[1].asked[1] == sites[1].asked[2]
    assert len(set(sites[0].asked)) == 3  # it might have paid, so it keeps its nonce
    assert outcome.epsilon == dict.fromkeys(whole.epsilon, 3.0)


def test_who_paid_and_was_not_heard_is_asked_for_the_same_again() -> None:
    """Both answers of the first try are lost on their way: the sites have paid, and do so once."""
    lost: list[int] = []

    def lose(replies: list[Message]) -> list[Message]:
        if lost:
            return replies
        lost.append(len(replies))
        return replies[2:]

    sites = four()
    settings = config(clients_per_round=4, min_clients=4, patience=patient(retries=1))
    grid = grid_of(sites, tamper=lose)
    outcome = strategy(settings, hooks=hooks([])).run(grid)
    assert outcome.stopped_reason is None
    assert lost == [4]
    assert [site.site.joins for site in sites] == [3, 3, 3, 3]
    assert [len(set(site.asked)) for site in sites] == [3, 3, 3, 3]


def test_after_the_last_try_the_run_ends_and_says_how_often() -> None:
    waits: list[float] = []
    sites = four(["failed"] * 9)
    settings = config(clients_per_round=4, min_clients=4, patience=patient(retries=2))
    outcome = run(sites, settings, hooks=hooks(waits))
    assert outcome.stopped_reason is not None
    assert outcome.stopped_reason.endswith("(refused: failed: 1); it was tried 3 times")
    assert len(waits) == 2
    assert outcome.state.round == 0
    assert [record.accepted for record in outcome.records] == [0]


def test_the_log_has_one_round_for_several_tries(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    made = Hooks(evaluate, log=RoundLog(path), journal=Memory(), wait=lambda _: None)
    settings = config(clients_per_round=4, min_clients=4, patience=patient(retries=1))
    outcome = run(four(["failed"]), settings, hooks=made)
    assert tuple(read_rounds(path)) == outcome.records
    assert len(path.read_text().splitlines()) == 4


def test_a_failing_client_is_left_out_for_longer_each_time() -> None:
    sites = four(["failed"] * 99, which=2)
    settings = config(rounds=12, clients_per_round=4, patience=patient(longest_pause=4))
    outcome = run(sites, settings, hooks=hooks([]))
    asked = [r.round for r in outcome.records if "client-02" in r.cohort]
    # After the first failure one round's pause, then two, then four, and never more.
    assert asked == [1, 3, 6, 11]
    assert [r.accepted for r in outcome.records] == [3] * 12


def test_a_client_that_answers_again_is_forgiven() -> None:
    sites = four(["failed", "", "failed"], which=2)
    settings = config(rounds=6, clients_per_round=4, patience=patient(longest_pause=4))
    outcome = run(sites, settings, hooks=hooks([]))
    asked = [r.round for r in outcome.records if "client-02" in r.cohort]
    assert asked == [1, 3, 4, 6]


def test_failing_clients_are_asked_where_the_others_are_too_few() -> None:
    sites = four(["failed"], which=2)
    settings = config(
        rounds=2, clients_per_round=4, min_clients=4, patience=patient(retries=1, longest_pause=8)
    )
    outcome = run(sites, settings, hooks=hooks([]))
    assert outcome.stopped_reason is None
    assert [r.accepted for r in outcome.records] == [4, 4]


def test_a_try_draws_others_in_the_place_of_those_who_failed() -> None:
    first = cohort(5, 0, range(4), 3)
    sites = four(["failed"] * 9, which=first[0])
    settings = config(
        rounds=1, clients_per_round=3, min_clients=3, patience=patient(retries=1, longest_pause=8)
    )
    outcome = run(sites, settings, hooks=hooks([]))
    left = [f"client-{i:02d}" for i in range(4) if i != first[0]]
    assert outcome.records[0].cohort == tuple(left)
    assert outcome.records[0].accepted == 3
    assert [site.site.joins for site in sites] == [int(i != first[0]) for i in range(4)]


def test_spare_clients_end_the_wait() -> None:
    """Of four who are asked the first three to answer are taken, and the fourth has paid."""
    sites = four()
    seen: list[int] = []

    def slowest_last(replies: list[Message]) -> list[Message]:
        seen.append(len(replies))
        return [*replies[1:], replies[0]]

    settings = config(clients_per_round=3, min_clients=3, patience=Patience(spare_clients=1))
    grid = grid_of(sites, tamper=slowest_last)
    outcome = strategy(settings, hooks=hooks([])).run(grid)
    assert seen == [4, 4, 4]
    assert [r.accepted for r in outcome.records] == [3, 3, 3]
    assert [[(x.client, x.code) for x in r.refused] for r in outcome.records] == [
        [("client-00", "late")]
    ] * 3
    assert outcome.joins["client-00"] == 0
    assert sites[0].site.joins == 3
    assert outcome.state.round == 3


def test_without_spare_clients_every_answer_counts() -> None:
    settings = config(clients_per_round=4, min_clients=3)
    outcome = run(four(), settings)
    assert [r.accepted for r in outcome.records] == [4, 4, 4]


def test_late_neither_counts_nor_forgives() -> None:
    """A node that is gone stays paused where the others answer first."""
    waits = BackOff(longest=8)
    waits.closed(answered=[], failed=["a"])
    waits.closed(answered=["b"], failed=[])  # a was late, which is in neither
    waits.closed(answered=["b"], failed=["a"])
    assert waits.paused() == {"a"}
    waits.closed(answered=["b"], failed=[])
    assert waits.paused() == {"a"}  # two in a row, not one


def test_late_is_no_failure() -> None:
    settings = config(
        clients_per_round=3, min_clients=3, patience=patient(spare_clients=1, longest_pause=8)
    )
    outcome = strategy(settings, hooks=hooks([])).run(grid_of(four()))
    assert [len(r.cohort) for r in outcome.records] == [4, 4, 4]


@pytest.mark.parametrize("name", ["spare_clients", "retries", "longest_pause", "retry_wait_s"])
def test_patience_out_of_bounds_names_the_field(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Patience(**{name: -1})  # type: ignore[arg-type]


def test_a_pause_never_overflows() -> None:
    waits = BackOff(longest=3)
    for _ in range(200):
        waits.closed([], ["a"])
    assert waits.paused() == {"a"}
    for _ in range(3):
        waits.closed([], [])
    assert waits.paused() == set()


def test_the_paid_come_first_and_the_failing_last() -> None:
    plain = cohort(5, 0, range(6), 3)
    others = tuple(i for i in range(6) if i not in plain)
    assert cohort(5, 0, range(6), 3, first=others) == others
    assert cohort(5, 0, range(6), 3, last=plain) == others
    assert set(cohort(5, 0, range(6), 4, last=plain)) > set(others)

"""What each client gets: a job at its own rank, and rotations with a basis it lacks once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from flwr.app import ArrayRecord
from torch import Tensor

from client.app import SiteLike
from fedlr.errors import RunError
from fedlr.lowrank.subspace import orthonormal
from fedlr.methods.ffa_lora import FFALoRA
from fedlr.methods.method import ClientUpdate, GlobalState, PartKey, Role
from fedlr.report.records import Refusal
from fedlr.training.jobs import Abstention, Job, SiteStatus
from server.dispatch import rank_of
from server.hooks import Hooks
from server.membership import Member
from server.outcome import Checkpoint, Outcome
from server.strategy import FederatedStrategy
from tests.server.toys import (
    LAYOUT,
    PROVENANCE,
    ToySite,
    Wrapped,
    assert_same_parts,
    by_hand,
    config,
    evaluate,
    first_state,
    grid_of,
    method,
    run,
    strategy,
    toy_sites,
)

FULL = [3, 2]
"""Ranks of the two sites."""
HEAD = 6


def floats_of(ranks: Sequence[int], a: bool = False, q: bool = False, basis: bool = False) -> int:
    """Numbers of B (m·k), head, and A (k·n), Q (k·r) or A₀ (r·n)."""
    total = HEAD
    for site, rank in zip(LAYOUT.sites, ranks, strict=True):
        total += rank * (site.out_features + a * site.in_features + q * site.rank)
        total += basis * site.rank * site.in_features
    return total


def ranked(*ranks: int | None) -> list[ToySite]:
    sites = toy_sites(len(ranks))
    for site, rank in zip(sites, ranks, strict=True):
        site.rank = rank
    return sites


EVERYBODY = config(clients=4, clients_per_round=4)


@pytest.mark.parametrize("name", ["fedsvd", "ffa_lora", "fedavg_lora", "flexlora", "hetlora"])
def test_every_client_gets_trains_and_sends_the_columns_of_its_rank(name: str) -> None:
    sites = ranked(None, 1, 2, 5)
    outcome = run(sites, EVERYBODY, name)
    assert [record.accepted for record in outcome.records] == [4, 4, 4]
    wanted = [FULL, [1, 1], [2, 2], FULL]
    for site, ranks in zip(sites, wanted, strict=True):
        for job in site.jobs:
            found = [v.shape[1] for k, v in sorted(job.parts.items()) if k.role is Role.B]
            assert found == ranks
    up = sum(floats_of(ranks, a=Role.A in sites[0].jobs[0].train) for ranks in wanted)
    down = sum(floats_of(ranks, a=True) for ranks in wanted)
    for record in outcome.records:
        assert (record.bytes_up, record.bytes_down) == (4 * up, 4 * down)
    assert outcome.loss is not None
    assert outcome.loss < evaluate(first_state(name).parts)[1]


def test_columns_that_nobody_can_train_stay_as_they_were() -> None:
    outcome = run(ranked(1, 1, 1, 1), EVERYBODY, "ffa_lora")
    for key, value in outcome.state.parts.items():
        if key.role is Role.B:
            assert bool(value[:, :1].any())
            assert not bool(value[:, 1:].any())


def test_an_update_is_held_against_the_rank_of_its_own_client() -> None:
    other = ToySite("client-01", seed=1)

    def whole(update: ClientUpdate, job: Job) -> ClientUpdate | Abstention:
        parts = {k: torch.zeros_like(v) for k, v in first_state().parts.items() if k.role is Role.B}
        return replace(update, parts={**update.parts, **parts})

    sites: list[SiteLike] = [ToySite("client-00", seed=0), Wrapped(other, whole)]
    two = config(clients=2, clients_per_round=2, rounds=1)
    assert run(sites, two).records[0].refused == ()
    other.rank = 1
    assert run(sites, two).records[0].refused == (Refusal("client-01", "shape"),)


def test_what_the_method_has_lowered_and_the_phase_bounds_count_too() -> None:
    status = SiteStatus("client-00", 10, 0.0, 0.0, PROVENANCE)
    state, phase = first_state(), method().plan(first_state()).phases[0]

    def rank(announced: int | None, lowered: int | None, exchanged: int | None) -> int | None:
        ranks = {} if lowered is None else {"client-00": lowered}
        member = Member(0, 1, replace(status, rank=announced))
        return rank_of(member, replace(state, ranks=ranks), replace(phase, rank=exchanged))

    assert rank(None, None, None) is None
    assert [rank(2, None, None), rank(None, 2, None), rank(None, None, 2)] == [2, 2, 2]
    assert [rank(2, 1, None), rank(1, 2, None), rank(2, 3, 1), rank(3, 2, 3)] == [1, 1, 1, 2]
    assert [rank(3, None, None), rank(9, 3, None)] == [None, None]


def test_a_client_whose_rank_the_method_lowers_gets_fewer_columns_from_then_on() -> None:
    sites = ranked(None, None, None, 2)
    outcome = run(sites, EVERYBODY, "lowering")
    columns = [
        [max(v.shape[1] for k, v in job.parts.items() if k.role is Role.B) for job in site.jobs]
        for site in sites
    ]
    assert columns == [[3, 2, 1]] * 3 + [[2, 2, 1]]
    assert all(record.refused == () for record in outcome.records)


def test_the_method_is_asked_once_for_each_rank_and_never_for_the_full_one() -> None:
    asked: list[int | None] = []

    class Spied(FFALoRA):
        def broadcast(self, state: GlobalState, rank: int | None = None) -> dict[PartKey, Tensor]:
            asked.append(rank)
            return super().broadcast(state, rank)

    settings = config(clients=5, clients_per_round=5, rounds=1)
    spied = Spied(orthonormal)
    FederatedStrategy(settings, spied, first_state("ffa_lora"), PROVENANCE).run(
        grid_of(ranked(None, 3, 1, 9, 1))
    )
    assert asked == [None, 1]


def test_a_method_that_mixes_no_ranks_refuses_before_the_first_round() -> None:
    sites = ranked(None, 2, 3, 2)
    with pytest.raises(RunError, match="client-01 of rank 2, client-03 of rank 2 cannot take"):
        run(sites, EVERYBODY, "two_phase")
    assert not any(site.jobs for site in sites)
    assert run(ranked(None, 3, 7, None), EVERYBODY, "two_phase").stopped_reason is None


SMALL = "fedsvd_rotation"


def down(outcome: Outcome) -> list[int]:
    return [record.bytes_down // 4 for record in outcome.records]


def test_the_basis_goes_down_once_and_the_model_is_that_of_full_broadcasts() -> None:
    outcome = run(toy_sites(), config(rounds=4, clients_per_round=3), SMALL)
    assert_same_parts(outcome.state.parts, by_hand(SMALL, toy_sites(), 4, 3)[-1].parts)
    seen: set[str] = set()
    for record in outcome.records:
        fresh = len(set(record.cohort) - seen)
        seen |= set(record.cohort)
        short, long = (floats_of(FULL, q=True, basis=basis) for basis in (False, True))
        assert record.bytes_down == 4 * (fresh * long + (3 - fresh) * short)
        assert record.bytes_up == 4 * 3 * floats_of(FULL)
    assert len(seen) == 4
    assert floats_of(FULL, q=True) < floats_of(FULL, a=True)


def test_a_client_of_lower_rank_gets_the_leading_rows_of_the_rotation() -> None:
    outcome = run(ranked(1, None, None, 2), EVERYBODY, SMALL)
    ranks = [[1, 1], FULL, FULL, [2, 2]]
    first, later = (
        sum(floats_of(rank, q=True, basis=basis) for rank in ranks) for basis in (True, False)
    )
    assert down(outcome) == [first, later, later]
    assert [record.accepted for record in outcome.records] == [4, 4, 4]
    full = run(ranked(1, None, None, 2), EVERYBODY, "fedsvd")
    for key, value in full.state.parts.items():
        torch.testing.assert_close(outcome.state.parts[key], value, atol=1e-5, rtol=0)


class Forgetful(ToySite):
    """Loses the basis after every answer, as a process that is started anew each time."""

    def answer(self, job: Job) -> ClientUpdate | Abstention:
        found = super().answer(job)
        if isinstance(found, ClientUpdate):
            self.basis = None
        return found


def test_a_client_that_lost_the_basis_is_sent_it_under_the_same_nonce() -> None:
    sites = [Forgetful("client-00", seed=0, size=10), *toy_sites()[1:]]
    outcome = run(sites, EVERYBODY, SMALL)
    assert_same_parts(outcome.state.parts, by_hand(SMALL, toy_sites(), 3, 4)[-1].parts)
    assert all(record.refused == () for record in outcome.records)
    short, long = (floats_of(FULL, q=True, basis=basis) for basis in (False, True))
    assert down(outcome) == [4 * long, 4 * short + long, 4 * short + long]
    nonces = [job.nonce for job in sites[0].jobs]
    assert len(nonces) == 5
    assert (nonces[1], nonces[3]) == (nonces[2], nonces[4])
    assert len(set(nonces)) == 3
    assert sites[0].joins == 3


@dataclass
class Processes:
    """One site in several processes that answer in turn, as actors do."""

    copies: list[ToySite]
    asked: int = 0

    def status(self) -> SiteStatus:
        return self.copies[0].status()

    def train_many(self, jobs: Sequence[Job]) -> list[ClientUpdate | Abstention]:
        self.asked += 1
        return self.copies[self.asked % len(self.copies)].train_many(jobs)


def test_a_site_in_several_processes_trains_the_same_model() -> None:
    split = Processes([ToySite("client-00", seed=0, size=10) for _ in range(3)])
    outcome = run([split, *toy_sites()[1:]], config(rounds=6, clients_per_round=4), SMALL)
    assert_same_parts(outcome.state.parts, by_hand(SMALL, toy_sites(), 6, 4)[-1].parts)
    assert all(record.refused == () for record in outcome.records)
    assert split.asked > 6


class Baseless(ToySite):
    """Says for ever that it has no basis."""

    def answer(self, job: Job) -> ClientUpdate | Abstention:
        self.jobs.append(job)
        return Abstention(self.client, "no_base")


def test_a_client_that_lacks_what_it_was_just_sent_is_refused() -> None:
    sites = [Baseless("client-00", seed=0), *toy_sites()[1:]]
    outcome = run(sites, EVERYBODY, SMALL)
    assert [r.refused for r in outcome.records] == [(Refusal("client-00", "no_base"),)] * 3
    assert [r.accepted for r in outcome.records] == [3, 3, 3]
    assert len(sites[0].jobs) == 3  # with the basis each time, which it never was believed to have
    assert run([Baseless("client-00", 0), *toy_sites()[1:]], EVERYBODY).records[0].accepted == 3


def test_a_wrong_belief_costs_one_exchange_and_nothing_else() -> None:
    begun = strategy(EVERYBODY, SMALL)
    begun.run(grid_of(toy_sites()))
    at = begun.checkpoint
    assert set(at.holders) == {f"client-{i:02d}" for i in range(4)}
    assert len(set(at.holders.values())) == 1
    longer = replace(EVERYBODY, rounds=4)

    def go_on(checkpoint: Checkpoint) -> Outcome:
        hooks = Hooks(evaluate)
        strategy = FederatedStrategy(longer, method(SMALL), checkpoint, PROVENANCE, hooks)
        return strategy.run(grid_of(toy_sites()))

    wrong, none = go_on(at), go_on(replace(at, holders={}))
    assert_same_parts(wrong.state.parts, none.state.parts)
    short, long = (floats_of(FULL, q=True, basis=basis) for basis in (False, True))
    assert (down(wrong)[-1], down(none)[-1]) == (4 * (short + long), 4 * long)


def test_flowers_own_loop_asks_again_too() -> None:
    sites = [Forgetful("client-00", seed=0, size=10), *toy_sites()[1:]]
    driven = strategy(EVERYBODY, SMALL)
    driven.start(grid_of(sites), ArrayRecord(), num_rounds=8)
    assert driven.checkpoint.state.round == 3
    expected = by_hand(SMALL, toy_sites(), 3, 4)[-1]
    assert_same_parts(driven.checkpoint.state.parts, expected.parts)

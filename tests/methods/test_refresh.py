"""Moved subspaces: the laws of every method, that moving changes no weight, and that it moves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlr.lowrank.factors import AdapterSite
from fedlr.lowrank.geometry import principal_angles
from fedlr.lowrank.subspace import Subspace, kaiming, ordered, orthonormal, singular_directions
from fedlr.methods.averaging import average
from fedlr.methods.combine import Combiner, weighted_mean
from fedlr.methods.fedavg_lora import FedAvgLoRA
from fedlr.methods.fedsvd import FedSVD
from fedlr.methods.ffa_lora import FFALoRA
from fedlr.methods.method import ClientUpdate, GlobalState, Layout, Method, PartKey, Role
from fedlr.methods.refresh import Alternating, Merging
from fedlr.methods.residual import SEED
from tests.methods import every, test_contract
from tests.methods.every import copies, identical, started
from tests.methods.federation import (
    LAYOUT,
    assert_same_weights,
    clients,
    effective,
    generator,
    mean_of_models,
    run_round,
)


def merging(inner: Any, rounds: int) -> Callable[..., Method]:
    return lambda subspace, combine=weighted_mean: Merging(
        inner(subspace, combine), subspace, rounds
    )


def alternating(inner: Any) -> Callable[..., Method]:
    return lambda subspace, combine=weighted_mean: Alternating(inner(subspace, combine))


WRAPPED: dict[str, Any] = {
    "fedsvd, merging": merging(FedSVD, 1),
    "fedsvd, merging every other round": merging(FedSVD, 2),
    "ffa_lora, merging": merging(FFALoRA, 1),
    "fedsvd, alternating": alternating(FedSVD),
    "ffa_lora, alternating": alternating(FFALoRA),
}

every_wrapped = pytest.mark.parametrize("name", WRAPPED)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the laws build the wrapped methods by name."""
    for name, builder in WRAPPED.items():
        monkeypatch.setitem(every.BUILDERS, name, builder)


def laws(of: type) -> type:
    """The laws of a class of the contract, without its methods; drawn cases are below."""
    found = {k: v for k, v in vars(of).items() if k.startswith("test_")}
    return type("Laws", (), {k: v for k, v in found.items() if not hasattr(v, "hypothesis")})


@every_wrapped
class TestLaws(laws(test_contract.TestLaws)):  # type: ignore[misc]
    """Of every method, for these."""


@every_wrapped
class TestTruncatedClients(laws(test_contract.TestTruncatedClients)):  # type: ignore[misc]
    """Of methods that average each column over its clients, for these."""


@every_wrapped
@pytest.mark.parametrize("rounds", [0, 1, 2, 3])
class TestEveryRound:
    def test_order_of_clients_and_scale_of_weights_do_not_matter(
        self, name: str, rounds: int
    ) -> None:
        method = every.build(name)
        state, weights = started(method, rounds), [0.4, 2.0, 1.0]
        plain, _ = run_round(method, state, clients(3), weights)
        turned, _ = run_round(method, state, clients(3), weights, lambda u, w: (u[::-1], w[::-1]))
        scaled, _ = run_round(method, state, clients(3), [8 * w for w in weights])
        assert identical(plain.parts, turned.parts)
        assert identical(plain.parts, scaled.parts)

    def test_the_aggregate_is_exact_and_a_switch_keeps_it(self, name: str, rounds: int) -> None:
        method = every.build(name, "kaiming")
        state, weights = started(method, rounds), [0.4, 2.0, 1.0]
        after, released = run_round(method, state, clients(3), weights)
        wanted = mean_of_models(state, released, weights)
        assert_same_weights(effective(LAYOUT, after.parts), wanted, tolerance=5e-6)
        before = effective(LAYOUT, state.parts)
        assert all(float((wanted[s.name] - before[s.name]).norm()) > 0.1 for s in LAYOUT.sites)

    def test_a_state_says_all_that_the_next_round_needs(self, name: str, rounds: int) -> None:
        """As after a resume: a new instance, and arrays that have been through a file."""
        state = started(every.build(name), rounds)
        stored = replace(state, parts=copies(state.parts), memory=copies(state.memory))
        here, _ = run_round(every.build(name), state, clients(2), [1, 1])
        there, _ = run_round(every.build(name), stored, clients(2), [1, 1])
        assert identical(here.parts, there.parts)
        assert identical(here.memory, there.memory)


@pytest.mark.parametrize("wrap", [lambda m: Merging(m, kaiming), Alternating])
@pytest.mark.parametrize(
    "inner", [FedAvgLoRA(kaiming), Merging(FedSVD(kaiming), kaiming), Alternating(FFALoRA(kaiming))]
)
def test_a_method_without_a_fixed_row_space_is_refused(
    inner: Method, wrap: Callable[[Method], Method]
) -> None:
    with pytest.raises(ValueError, match="has no fixed row space to move"):
        wrap(inner)


def test_facts_say_what_has_changed_and_the_name_stays() -> None:
    inner = FedSVD(orthonormal)
    merged, alternated = Merging(inner, orthonormal), Alternating(inner)
    assert merged.name == alternated.name == inner.name
    assert merged.facts.folds
    assert merged.facts.trains == {Role.B}
    assert not alternated.facts.folds
    assert alternated.facts.trains == {Role.A, Role.B}
    for facts in (merged.facts, alternated.facts):
        assert facts.exact == inner.facts.exact
        assert facts.linear == inner.facts.linear
        assert facts.limit != inner.facts.limit
        assert not facts.refreshes


@pytest.mark.parametrize("every_rounds", [0, -1])
def test_merging_needs_a_round_in_between(every_rounds: int) -> None:
    with pytest.raises(ValueError, match="every = "):
        Merging(FedSVD(kaiming), kaiming, every_rounds)


def array(state: GlobalState, site: AdapterSite, role: Role) -> Tensor:
    return state.parts[PartKey(site.name, role)]


class TestMerging:
    @pytest.mark.parametrize("every_rounds", [1, 2, 3])
    def test_it_merges_in_its_rounds_and_is_the_inner_method_in_the_others(
        self, every_rounds: int
    ) -> None:
        inner = FedSVD(orthonormal)
        method = Merging(inner, orthonormal, every_rounds)
        state = method.init(LAYOUT, generator())
        for done in range(1, 7):
            alone, _ = run_round(inner, state, clients(2, seed=done), [1, 2])
            state, _ = run_round(method, state, clients(2, seed=done), [1, 2])
            merged = done % every_rounds == 0
            assert identical(alone.parts, state.parts) is not merged
            assert_same_weights(effective(LAYOUT, state.parts), effective(LAYOUT, alone.parts))
            for site in LAYOUT.sites:
                assert bool(array(state, site, Role.B).any()) is not merged
                # Rank r with every merge; as large as the weight at most.
                grown = min(done // every_rounds * site.rank, site.out_features)
                assert array(state, site, Role.RESIDUAL_A).shape == (grown, site.in_features)
                assert array(state, site, Role.RESIDUAL_B).shape == (site.out_features, grown)

    def test_all_rounds_together_reach_more_than_one_round_can(self) -> None:
        method, plain = Merging(FedSVD(orthonormal), orthonormal), FedSVD(orthonormal)
        moved, fixed = (effective(LAYOUT, started(m, 3).parts) for m in (method, plain))
        for site in LAYOUT.sites:
            ranks = [int(torch.linalg.matrix_rank(w[site.name], rtol=1e-4)) for w in (moved, fixed)]
            assert ranks == [min(3 * site.rank, site.out_features), site.rank]

    def test_every_draw_is_new_and_a_function_of_seed_and_round(self) -> None:
        method = Merging(FFALoRA(orthonormal), orthonormal)
        states = [started(method, rounds) for rounds in range(4)]
        site = LAYOUT.sites[0]
        drawn = [array(state, site, Role.A) for state in states]
        for left in range(4):
            torch.testing.assert_close(
                drawn[left] @ drawn[left].mT, torch.eye(3), atol=1e-6, rtol=0
            )
            for right in range(left):
                assert float((drawn[left] - drawn[right]).norm()) > 0.5
        other, _ = run_round(method, method.init(LAYOUT, generator(9)), clients(3, 1000), [1, 2, 3])
        assert float((array(other, site, Role.A) - drawn[1]).norm()) > 0.5
        assert all(torch.equal(state.memory[SEED], states[0].memory[SEED]) for state in states)
        # Of what was released, nothing is in it.
        same, _ = run_round(method, states[0], clients(2, seed=5), [1, 1])
        assert torch.equal(array(same, site, Role.A), drawn[1])

    def test_the_seed_is_never_sent(self) -> None:
        method = Merging(FedSVD(orthonormal), orthonormal)
        assert all(key.role is not Role.SEED for key in method.broadcast(started(method)))

    def test_ordered_directions_are_taken_one_block_after_the_other(self) -> None:
        """The same A again would span what has been trained already."""
        found = {
            site.name: singular_directions(
                torch.randn(site.out_features, site.in_features, generator=generator(4)), 3, 6
            )
            for site in LAYOUT.sites
        }
        subspace = ordered("planted", lambda: found)
        method = Merging(FedSVD(subspace), subspace)
        for site in LAYOUT.sites[::2]:
            rows = found[site.name].rows
            drawn = [array(started(method, rounds), site, Role.A) for rounds in range(3)]
            assert torch.equal(drawn[0], rows[:3])
            assert torch.equal(drawn[1], rows[3:6])
            assert torch.equal(drawn[2], rows[:3])

    def test_a_policy_of_another_shape_is_refused(self) -> None:
        def wide(site: AdapterSite, draws: torch.Generator) -> Tensor:
            return torch.zeros(site.rank, site.in_features + 1)

        bad = Subspace("bad", wide, orthonormal.columns)
        with pytest.raises(ValueError, match=r"block\.0\.query: a"):
            started(Merging(FedSVD(orthonormal), bad))

    def test_the_mean_of_its_states_is_the_mean_of_their_models(self) -> None:
        method = Merging(FedSVD(orthonormal), orthonormal, 2)
        states = [started(method, rounds) for rounds in (1, 2, 3)]
        each = [effective(LAYOUT, state.parts) for state in states]
        mean = {name: torch.stack([e[name] for e in each]).mean(0) for name in each[0]}
        assert_same_weights(effective(LAYOUT, average(states)), mean, tolerance=5e-6)

    def test_the_residual_goes_down_whole_to_every_rank(self) -> None:
        method = Merging(FedSVD(orthonormal), orthonormal)
        state = started(method, 2)
        for key, value in method.broadcast(state, rank=1).items():
            if key.role in (Role.RESIDUAL_A, Role.RESIDUAL_B):
                assert torch.equal(value, state.parts[key])


class TestAlternating:
    @pytest.mark.parametrize("inner", [FedSVD(orthonormal), FFALoRA(kaiming)])
    def test_rounds_train_b_and_a_in_turn_and_the_other_one_rests(
        self, inner: FedSVD | FFALoRA
    ) -> None:
        method = Alternating(inner)
        for rounds, trained in enumerate((Role.B, Role.A, Role.B, Role.A)):
            state = started(method, rounds)
            (phase,) = method.plan(state).phases
            assert phase.train == phase.send == {trained, Role.HEAD}
            assert {Role.A, Role.B} < phase.receive
            # All clients hold the same other factor, the one that was sent.
            _, released = run_round(method, state, clients(3), [1, 1, 1])
            for parts in released.values():
                assert {key.role for key in parts} == phase.send

    @pytest.mark.parametrize("inner", [FedSVD(orthonormal), FFALoRA(kaiming)])
    def test_the_resting_factor_is_orthonormal_and_the_other_ordered(
        self, inner: FedSVD | FFALoRA
    ) -> None:
        method = Alternating(inner)
        for rounds in (1, 2, 3, 4):
            state = started(method, rounds)
            for site in LAYOUT.sites:
                b, a = array(state, site, Role.B), array(state, site, Role.A)
                still, moving = (b.mT, a) if rounds % 2 else (a, b.mT)
                eye = torch.eye(site.rank)
                torch.testing.assert_close(still @ still.mT, eye, atol=1e-5, rtol=0)
                norms = moving.norm(dim=1)
                assert bool((norms[:-1] >= norms[1:]).all())
                cross = moving @ moving.mT - torch.diag(norms.square())
                assert float(cross.abs().max()) < 1e-5 * float(norms[0].square())

    def test_the_row_space_moves_in_a_round_of_a_and_in_no_other(self) -> None:
        method = Alternating(FedSVD(orthonormal))
        rows = [
            [array(started(method, rounds), site, Role.A) for site in LAYOUT.sites]
            for rounds in range(5)
        ]
        for done, (before, after) in enumerate(pairwise(rows)):
            for left, right in zip(before, after, strict=True):
                angle = math.degrees(float(principal_angles(left, right).max()))
                assert angle > 5 if done % 2 else angle < 0.01

    def test_the_switch_before_a_round_of_a_only_turns_the_pair(self) -> None:
        inner = FedSVD(orthonormal)
        alone, method = started(inner), Alternating(inner)
        switched = started(method)
        assert_same_weights(effective(LAYOUT, switched.parts), effective(LAYOUT, alone.parts))
        for site in LAYOUT.sites:
            sigma = array(alone, site, Role.B).norm(dim=0)
            found = array(switched, site, Role.A).norm(dim=1)
            torch.testing.assert_close(found, sigma, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("kept", [0, 1, 2])
    def test_where_b_has_a_lower_rank_u_is_completed(self, kept: int) -> None:
        method = Alternating(FedSVD(orthonormal))
        state = method.init(LAYOUT, generator())
        (phase,) = method.plan(state).phases
        update = clients(1)[0].answer(LAYOUT, phase, method.broadcast(state), {})
        parts = copies(update.parts)
        for key, value in parts.items():
            if key.role is Role.B:
                value[:, kept:] = 0
        after = method.aggregate(state, [replace(update, parts=parts)], [1])
        assert_same_weights(
            effective(LAYOUT, after.parts), effective(LAYOUT, {**state.parts, **parts})
        )
        for site in LAYOUT.sites:
            u, a = array(after, site, Role.B), array(after, site, Role.A)
            torch.testing.assert_close(u.mT @ u, torch.eye(site.rank), atol=1e-5, rtol=0)
            assert float(a[kept:].norm()) < 1e-5
        # And the round of A starts from there: no direction is lost for good.
        moved, _ = run_round(method, after, clients(2), [1, 1])
        weights = effective(LAYOUT, moved.parts)
        assert all(
            int(torch.linalg.matrix_rank(weights[site.name], rtol=1e-4)) == site.rank
            for site in LAYOUT.sites
        )

    def test_it_finds_a_row_space_that_b_alone_cannot(self) -> None:
        """Exact alternating least squares on ‖B·A − T‖ is subspace iteration: it finds T's."""
        site = AdapterSite("q", out_features=8, in_features=10, rank=2, scaling=1.0)
        layout = Layout((site,))
        target = torch.randn(8, 2, generator=generator(1)) @ torch.randn(
            2, 10, generator=generator(2)
        )

        def left(method: Method) -> float:
            state = method.init(layout, generator())
            for _ in range(4):
                (phase,) = method.plan(state).phases
                b, a = array(state, site, Role.B), array(state, site, Role.A)
                if Role.B in phase.train:
                    best = {PartKey("q", Role.B): target @ torch.linalg.pinv(a)}
                else:
                    best = {PartKey("q", Role.A): torch.linalg.pinv(b) @ target}
                state = method.aggregate(state, [ClientUpdate("c", best, 1)], [1])
            return float((effective(layout, state.parts)["q"] - target).norm() / target.norm())

        assert left(Alternating(FedSVD(orthonormal))) < 1e-5
        assert left(FedSVD(orthonormal)) > 0.3

    def test_another_combiner_is_used_in_both_rounds(self) -> None:
        used: list[str] = []

        class Spy:
            name, linear, minimum = "spy", True, 1

            def __call__(self, updates: Any, weights: Any, reference: Any = None) -> Any:
                used.append(min(key.role for key in updates[0].parts if key.role is not Role.HEAD))
                return weighted_mean(updates, weights)

        spy: Combiner = Spy()
        started(Alternating(FFALoRA(orthonormal, spy)), 3)
        assert used == [Role.B, Role.A, Role.B]

"""What `Facts` say of a method is true of its code, and what they do not say is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlr.lowrank.subspace import SUBSPACES
from fedlr.methods import combiners
from fedlr.methods.combine import NO_REFERENCE, weighted_mean
from fedlr.methods.combiners import COMBINERS
from fedlr.methods.method import RESIDUAL_ROLES, ClientUpdate, PartKey, Parts, Role
from fedlr.methods.registry import METHODS
from fedlr.methods.robust import NormBoundedMean
from tests.methods.every import BUILDERS, LINEAR, build, every_shipped, positive, started
from tests.methods.federation import (
    LAYOUT,
    Cohort,
    assert_same_weights,
    clients,
    effective,
    furthest,
    generator,
    mean_of_models,
    run_round,
)

COMPOSING = [name for name, kind in METHODS.items() if kind.facts.combiners]


@every_shipped
class TestFacts:
    """What a method's `Facts` say is true of its code, and what they do not say is not."""

    @pytest.mark.parametrize("rounds", [1, 2])
    def test_exact_is_the_mean_of_the_models(self, name: str, rounds: int) -> None:
        method, weights = build(name, "kaiming"), [0.2, 1.0, 0.7, 0.1]
        state = started(method, rounds)
        new, released = run_round(method, state, clients(4), weights)
        error = furthest(effective(LAYOUT, new.parts), mean_of_models(state, released, weights))
        if method.facts.exact:
            assert error < 2e-6
        else:
            assert error > 0.05

    def test_linear_is_a_function_of_the_weighted_sums(self, name: str) -> None:
        # Two cohorts of one weighted sum: (x, y) and their mean, sent twice.
        method = build(name)
        state, cohort, weights = started(method), clients(2), [1.0, 3.0]

        def merged(updates: list[ClientUpdate], given_weights: list[float]) -> Cohort:
            mean = weighted_mean(updates, given_weights)
            return [replace(update, parts=mean) for update in updates], given_weights

        apart, _ = run_round(method, state, cohort, weights)
        together, _ = run_round(method, state, cohort, weights, merged)
        error = furthest(effective(LAYOUT, together.parts), effective(LAYOUT, apart.parts))
        if method.facts.linear:
            assert error < 2e-6
        else:
            assert error > 5e-3

    def test_mixed_ranks_take_a_truncated_client(self, name: str) -> None:
        method = build(name)
        state = started(method)
        weak, strong = clients(2)
        phase = method.plan(state).phases[0]
        full = strong.answer(LAYOUT, phase, method.broadcast(state), {})
        cut = {Role.A: (slice(0, 1),), Role.B: (slice(None), slice(0, 1))}
        cut[Role.CORE] = (slice(0, 1), slice(0, 1))
        small = replace(
            weak.answer(LAYOUT, phase, method.broadcast(state), {}),
            parts={k: v[cut.get(k.role, ())].contiguous() for k, v in full.parts.items()},
        )
        if method.facts.mixed_ranks:
            new = method.aggregate(state, [small, full], [1, 1])
            assert new.parts[PartKey("block.0.query", Role.B)].shape == (8, 3)
        else:
            with pytest.raises(ValueError, match=r"client-00.*(rank 1|shape)"):
                method.aggregate(state, [small, full], [1, 1])

    def test_trains_is_what_the_rounds_train(self, name: str) -> None:
        method = build(name)
        states = [method.init(LAYOUT, generator()), started(method, 1), started(method, 2)]
        trained = {role for s in states for phase in method.plan(s).phases for role in phase.train}
        assert trained - {Role.HEAD} == method.facts.trains

    def test_every_round_has_one_private_phase(self, name: str) -> None:
        method = build(name)
        for rounds in (0, 1, 2):
            phases = method.plan(started(method, rounds)).phases
            assert [phase.private for phase in phases] == [True] + [False] * (len(phases) - 1)

    def test_folds_is_a_residual_that_goes_down(self, name: str) -> None:
        method = build(name)
        state = started(method, 2)
        grown = any(k.role in RESIDUAL_ROLES and v.numel() for k, v in state.parts.items())
        assert grown is method.facts.folds
        sent = any(key.role in RESIDUAL_ROLES for key in method.broadcast(state))
        assert sent is method.facts.folds

    def test_combiners_says_whether_another_one_changes_anything(self, name: str) -> None:
        other = Heaviest()
        if not METHODS[name].facts.combiners:
            with pytest.raises(ValueError, match=f"heaviest does not compose with {name}"):
                METHODS[name](SUBSPACES["orthonormal"], other)
            return
        method = METHODS[name](SUBSPACES["orthonormal"], other)
        state = started(method)
        both, _ = run_round(method, state, clients(2), [1, 2])
        alone, _ = run_round(method, state, clients(2)[1:], [1])
        assert_same_weights(effective(LAYOUT, both.parts), effective(LAYOUT, alone.parts))

    def test_consensus_says_whether_a_filter_reaches_all_that_the_adapter_learns(
        self, name: str
    ) -> None:
        # Independent noise has an agreement of ½ in every direction: nothing may be learned.
        facts = METHODS[name].facts
        assert facts.consensus <= facts.combiners
        if not facts.combiners or not facts.trains:
            assert not facts.consensus
            return
        method = METHODS[name](
            SUBSPACES["orthonormal"], combiners.build("weighted_mean", consensus=1)
        )
        for rounds in (1, 2):
            state = started(build(name), rounds)
            new, _ = run_round(method, state, clients(2), [1, 1])
            before, after = (effective(state.layout, of.parts) for of in (state, new))
            moved = max(float((after[s.name] - before[s.name]).norm()) for s in LAYOUT.sites)
            assert moved < 1e-5 if facts.consensus else moved > 0.05


@dataclass(frozen=True)
class Heaviest:
    """A combiner that takes the arrays of the client of the largest weight."""

    name = "heaviest"
    linear = False
    minimum = 1

    def __call__(
        self,
        updates: Sequence[ClientUpdate],
        weights: Sequence[float],
        reference: Parts = NO_REFERENCE,
    ) -> dict[PartKey, Tensor]:
        chosen, _ = max(zip(updates, weights, strict=True), key=lambda pair: pair[1])
        return {key: value.clone() for key, value in chosen.parts.items()}


@pytest.mark.parametrize("kind", COMBINERS)
@pytest.mark.parametrize("name", COMPOSING)
def test_a_shipped_combiner_of_equal_clients_gives_that_client(name: str, kind: str) -> None:
    method = METHODS[name](SUBSPACES["orthonormal"], combiners.build(kind))
    equal = [replace(client, seed=5) for client in clients(7)]
    state = method.init(LAYOUT, generator())
    for _ in range(2):
        before = state
        state, released = run_round(method, before, equal, [1] * 7)
        expected = effective(LAYOUT, {**before.parts, **released["client-00"]})
        assert_same_weights(effective(LAYOUT, state.parts), expected, tolerance=1e-5)


@pytest.mark.parametrize("kind", COMBINERS)
@pytest.mark.parametrize("name", COMPOSING)
def test_what_a_combiner_guarantees_holds_of_the_model(name: str, kind: str) -> None:
    # The model of a round is the combination of what was sent, and nothing has been lost on
    # the way to it.
    method = METHODS[name](SUBSPACES["orthonormal"], combiners.build(kind))
    state = started(build(name), rounds=2)
    new, released = run_round(method, state, clients(7), [1] * 7)
    sent = [ClientUpdate(client, parts, steps=1) for client, parts in released.items()]
    start = {key: state.parts[key] for key in sent[0].parts}
    combined = combiners.build(kind)(sent, [1] * 7, start)
    expected = effective(LAYOUT, {**state.parts, **combined})
    assert_same_weights(effective(LAYOUT, new.parts), expected, tolerance=1e-5)


@pytest.mark.parametrize("name", COMPOSING)
def test_a_bound_of_nearly_nothing_leaves_the_model(name: str) -> None:
    # In every phase the combiner bounds changes, from what the clients started with.
    method = METHODS[name](SUBSPACES["orthonormal"], NormBoundedMean(1e-6))
    state = started(build(name), rounds=2)
    new, _ = run_round(method, state, clients(3), [1, 1, 1])
    assert_same_weights(effective(LAYOUT, new.parts), effective(LAYOUT, state.parts), 1e-5)


@pytest.mark.parametrize("name", LINEAR)
@settings(deadline=None, max_examples=10)
@given(weights=st.lists(positive, min_size=2, max_size=7), data=st.data())
def test_chunks_combined_first_give_the_same(
    name: str, weights: list[float], data: st.DataObject
) -> None:
    # Only where the server needs a weighted sum: a mean of factors says nothing of products.
    cuts = data.draw(st.sets(st.integers(1, len(weights) - 1)))
    bounds = list(pairwise([0, *sorted(cuts), len(weights)]))

    def chunked(updates: list[ClientUpdate], given_weights: list[float]) -> Cohort:
        merged = [
            ClientUpdate(
                f"chunk-{low}", weighted_mean(updates[low:high], given_weights[low:high]), 1
            )
            for low, high in bounds
        ]
        return merged, [sum(given_weights[low:high]) for low, high in bounds]

    method = build(name)
    state, cohort = started(method), clients(len(weights))
    plain, _ = run_round(method, state, cohort, weights)
    by_chunk, _ = run_round(method, state, cohort, weights, chunked)
    assert_same_weights(effective(LAYOUT, by_chunk.parts), effective(LAYOUT, plain.parts))


@pytest.mark.parametrize("name", [name for name, kind in BUILDERS.items() if kind.facts.exact])
@settings(deadline=None, max_examples=10)
@given(weights=st.lists(positive, min_size=2, max_size=6))
def test_exact_aggregation_for_any_weights(name: str, weights: list[float]) -> None:
    method = build(name, "kaiming")
    state = started(method)
    new, released = run_round(method, state, clients(len(weights)), weights)
    expected = mean_of_models(state, released, weights)
    assert_same_weights(effective(LAYOUT, new.parts), expected)

"""The laws of every federated method, on the effective weight s·B·A + R_b·R_a."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlr.methods import shared
from fedlr.methods.method import (
    ClientUpdate,
    GlobalState,
    Method,
    PartKey,
    Parts,
    Role,
)
from tests.methods.every import (
    BY_COLUMN,
    build,
    copies,
    every_method,
    every_subspace,
    identical,
    positive,
    started,
)
from tests.methods.federation import (
    LAYOUT,
    Cohort,
    assert_same_weights,
    clients,
    effective,
    generator,
    run_round,
)


def first_updates(method: Method, state: GlobalState, count: int = 3) -> list[ClientUpdate]:
    phase = method.plan(state).phases[0]
    down = method.broadcast(state)
    return [client.answer(state.layout, phase, down, {}) for client in clients(count)]


@every_method
class TestLaws:
    @every_subspace
    def test_round_zero_adds_nothing_to_the_base(self, name: str, subspace: str) -> None:
        method = build(name, subspace)
        state = method.init(LAYOUT, generator())
        assert (state.round, state.phase) == (0, 0)
        for key, value in effective(LAYOUT, state.parts).items():
            assert torch.equal(value, LAYOUT.head.get(key, torch.zeros_like(value)).double())

    def test_init_is_a_function_of_the_generator(self, name: str) -> None:
        first, second, other = (build(name).init(LAYOUT, generator(s)) for s in (1, 1, 2))
        assert identical(first.parts, second.parts)
        assert identical(first.memory, second.memory)
        assert not identical(first.parts, other.parts)

    def test_head_of_the_state_is_a_copy(self, name: str) -> None:
        layout = replace(LAYOUT, head={"head": torch.zeros(2)})
        state = build(name).init(layout, generator())
        layout.head["head"].add_(1)
        assert torch.equal(state.parts[PartKey("head", Role.HEAD)], torch.zeros(2))

    @pytest.mark.parametrize("head", [True, False], ids=["head", "no-head"])
    def test_a_broadcast_holds_exactly_what_the_phase_receives(self, name: str, head: bool) -> None:
        layout = LAYOUT if head else replace(LAYOUT, head={})
        if name == "head_only" and not head:
            with pytest.raises(ValueError, match="trains none"):
                build(name).init(layout, generator())
            return
        method, state = build(name), build(name).init(layout, generator())
        released: dict[str, Parts] = {}
        for phase in method.plan(state).phases:
            assert (Role.HEAD in phase.train) <= head
            down = method.broadcast(state)
            assert set(down) == set(shared.part_keys(layout, phase.receive))
            updates = [c.answer(layout, phase, down, released) for c in clients(2)]
            state = method.aggregate(state, updates, [1, 1])
        assert (state.round, state.phase) == (1, 0)

    @every_subspace
    def test_shapes_and_dtypes_stay_over_three_rounds(self, name: str, subspace: str) -> None:
        method = build(name, subspace)
        first = method.init(LAYOUT, generator())
        last = started(method, rounds=3)
        assert last.round == 3
        assert last.parts.keys() == first.parts.keys()
        for key, value in last.parts.items():
            assert value.dtype == first.parts[key].dtype
            assert value.device == first.parts[key].device
            if key.role in (Role.A, Role.B, Role.HEAD):
                assert value.shape == first.parts[key].shape

    @settings(deadline=None, max_examples=10)
    @given(weights=st.lists(positive, min_size=2, max_size=6), seed=st.integers(0, 1000))
    def test_client_order_does_not_matter(self, name: str, weights: list[float], seed: int) -> None:
        def shuffled(updates: list[ClientUpdate], given_weights: list[float]) -> Cohort:
            order = random.Random(seed).sample(range(len(updates)), len(updates))
            return [updates[i] for i in order], [given_weights[i] for i in order]

        method = build(name)
        state, cohort = started(method), clients(len(weights), seed)
        plain, _ = run_round(method, state, cohort, weights)
        permuted, _ = run_round(method, state, cohort, weights, shuffled)
        assert identical(plain.parts, permuted.parts)

    @every_subspace
    @pytest.mark.parametrize("weight", [1.0, 7.3])
    def test_one_client_comes_back_unchanged(self, name: str, subspace: str, weight: float) -> None:
        method = build(name, subspace)
        state = started(method)
        new, released = run_round(method, state, clients(1), [weight])
        expected = effective(LAYOUT, {**state.parts, **released["client-00"]})
        assert_same_weights(effective(LAYOUT, new.parts), expected)
        # What the method moves must not be zero, or the law would hold for nothing.
        moved = next(iter(LAYOUT.head)) if name == "head_only" else "block.0.query"
        assert float(expected[moved].norm()) > 1

    def test_a_client_of_weight_zero_does_not_count(self, name: str) -> None:
        method = build(name)
        state = started(method)
        both, _ = run_round(method, state, clients(2), [1, 0])
        alone, _ = run_round(method, state, clients(1), [1])
        assert identical(both.parts, alone.parts)

    def test_equal_clients_give_that_client(self, name: str) -> None:
        method = build(name)
        state = started(method)
        equal = [replace(client, seed=5) for client in clients(4)]
        new, released = run_round(method, state, equal, [1, 2, 3, 4])
        expected = effective(LAYOUT, {**state.parts, **released["client-00"]})
        assert_same_weights(effective(LAYOUT, new.parts), expected)

    @settings(deadline=None, max_examples=10)
    @given(weights=st.lists(positive, min_size=1, max_size=5), factor=positive)
    def test_only_the_ratio_of_weights_matters(
        self, name: str, weights: list[float], factor: float
    ) -> None:
        method = build(name)
        state, cohort = started(method), clients(len(weights))
        plain, _ = run_round(method, state, cohort, weights)
        scaled, _ = run_round(method, state, cohort, [factor * weight for weight in weights])
        assert_same_weights(effective(LAYOUT, scaled.parts), effective(LAYOUT, plain.parts))

    def test_inputs_are_not_mutated(self, name: str) -> None:
        method = build(name)
        state = started(method)
        updates, weights = first_updates(method, state), [1.0, 2.0, 3.0]
        before = copies(state.parts), [copies(update.parts) for update in updates]
        method.broadcast(state, rank=1 if method.facts.mixed_ranks else None)
        method.aggregate(state, updates, weights)
        assert identical(state.parts, before[0])
        assert all(identical(u.parts, kept) for u, kept in zip(updates, before[1], strict=True))
        assert weights == [1.0, 2.0, 3.0]

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            ([0, 0, 0], "total weight of 3 clients is 0"),
            ([1, -1, 1], r"weights\[1\] = -1"),
            ([1, 1, float("nan")], r"weights\[2\] = nan"),
            ([1, 1], "3 updates but 2 weights"),
        ],
    )
    def test_bad_weights_are_refused(self, name: str, weights: list[float], message: str) -> None:
        method = build(name)
        state = started(method)
        with pytest.raises(ValueError, match=message):
            method.aggregate(state, first_updates(method, state), weights)

    def test_an_empty_cohort_is_refused(self, name: str) -> None:
        method = build(name)
        with pytest.raises(ValueError, match="empty"):
            method.aggregate(started(method), [], [])

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda p: dict(list(p.items())[1:]), "missing"),
            (lambda p: {**p, PartKey("block.9", Role.B): torch.ones(1, 1)}, "unexpected"),
            (lambda p: {k: v.double() for k, v in p.items()}, "dtype"),
            (lambda p: {k: v[:-1] for k, v in p.items()}, "shape|rank"),
            (lambda p: {k: torch.cat([v, v], dim=-1) for k, v in p.items()}, "shape|rank"),
        ],
        ids=["missing", "unexpected", "dtype", "fewer rows", "higher rank"],
    )
    def test_an_update_that_is_not_the_phase_s_is_refused(
        self, name: str, spoil: Callable[[Parts], Parts], message: str
    ) -> None:
        method = build(name)
        state = started(method)
        updates = first_updates(method, state)
        updates[1] = replace(updates[1], parts=spoil(updates[1].parts))
        with pytest.raises(ValueError, match=f"client-01.*({message})"):
            method.aggregate(state, updates, [1, 1, 1])

    def test_a_phase_that_the_plan_has_not_is_refused(self, name: str) -> None:
        method = build(name)
        state = started(method)
        beyond = replace(state, phase=len(method.plan(state).phases))
        with pytest.raises(ValueError, match=r"state\.phase"):
            method.broadcast(beyond)

    @pytest.mark.parametrize("rank", [1, 2, 3])
    def test_broadcast_cuts_to_the_leading_rank(self, name: str, rank: int) -> None:
        method = build(name)
        state = started(method)
        if not method.facts.mixed_ranks and rank < 3:
            with pytest.raises(ValueError, match=f"rank = {rank} must be None or 3"):
                method.broadcast(state, rank)
            return
        down = method.broadcast(state, rank)
        for key, value in down.items():
            whole = state.parts[key]
            if key.role is Role.B:
                assert torch.equal(value, whole[:, :rank])
            elif key.role is Role.A:
                assert torch.equal(value, whole[:rank])
            else:
                assert torch.equal(value, whole)
            assert value.is_contiguous()

    @pytest.mark.parametrize("rank", [0, -1, 4])
    def test_broadcast_refuses_a_rank_that_no_site_has(self, name: str, rank: int) -> None:
        method = build(name)
        with pytest.raises(ValueError, match=f"rank = {rank}"):
            method.broadcast(started(method), rank)


@pytest.mark.parametrize("name", BY_COLUMN)
class TestTruncatedClients:
    """Clients that were sent the leading k of r columns train only those."""

    @pytest.mark.parametrize("rounds", [1, 2])
    def test_an_untouched_truncated_broadcast_leaves_the_model(
        self, name: str, rounds: int
    ) -> None:
        method = build(name)
        state = started(method, rounds)
        phase = method.plan(state).phases[0]
        down = method.broadcast(state, rank=1)
        parts = {key: down[key] for key in shared.part_keys(LAYOUT, phase.send)}
        new = method.aggregate(state, [ClientUpdate("weak", parts, 1)], [1])
        assert_same_weights(effective(LAYOUT, new.parts), effective(LAYOUT, state.parts))

    @pytest.mark.parametrize("rounds", [1, 2])
    def test_a_column_is_averaged_over_the_clients_that_trained_it(
        self, name: str, rounds: int
    ) -> None:
        method = build(name)
        state = started(method, rounds)
        weak, strong = clients(2)
        phase = method.plan(state).phases[0]
        small = weak.answer(LAYOUT, phase, method.broadcast(state, rank=2), {})
        full = strong.answer(LAYOUT, phase, method.broadcast(state), {})
        completed = copies(full.parts)
        for key, value in small.parts.items():
            index = {Role.B: (slice(None), slice(0, 2)), Role.A: (slice(0, 2),)}.get(key.role, ())
            completed[key][index] = value
        by_hand = replace(small, parts={key: completed[key] for key in small.parts})
        found = method.aggregate(state, [small, full], [1, 3])
        expected = method.aggregate(state, [by_hand, full], [1, 3])
        assert identical(found.parts, expected.parts)


def test_the_folding_toy_grows_its_residual_and_restarts() -> None:
    state = started(build("toy_folding"), rounds=3)
    site = LAYOUT.sites[0]
    assert state.parts[PartKey(site.name, Role.RESIDUAL_A)].shape == (3 * site.rank, 10)
    assert not bool(state.parts[PartKey(site.name, Role.B)].any())


def test_the_two_phase_toy_uses_the_cores() -> None:
    method = build("toy_two_phase")
    state = started(method)
    released: dict[str, Parts] = {}
    trained, project = method.plan(state).phases
    down = method.broadcast(state)
    updates = [client.answer(LAYOUT, trained, down, released) for client in clients(2)]
    middle = method.aggregate(state, updates, [1, 1])
    assert (middle.round, middle.phase) == (state.round, 1)
    down = method.broadcast(middle)
    cores = [client.answer(LAYOUT, project, down, released) for client in clients(2)]
    halved = [
        replace(core, parts={key: value / 2 for key, value in core.parts.items()}) for core in cores
    ]
    whole = effective(LAYOUT, method.aggregate(middle, cores, [1, 1]).parts)
    half = effective(LAYOUT, method.aggregate(middle, halved, [1, 1]).parts)
    assert_same_weights(
        {site.name: half[site.name] for site in LAYOUT.sites},
        {site.name: whole[site.name] / 2 for site in LAYOUT.sites},
    )

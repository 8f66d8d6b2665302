"""FedSVD's own identities; the linear algebra itself is tested in tests/lowrank."""

from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlr.lowrank.rotation import is_orthonormal, rotate
from fedlr.lowrank.subspace import SUBSPACES, kaiming, orthonormal
from fedlr.methods import shared
from fedlr.methods.fedsvd import FedSVD
from fedlr.methods.method import ClientUpdate, GlobalState, PartKey, Role
from tests.methods.federation import (
    LAYOUT,
    Client,
    assert_same_weights,
    clients,
    effective,
    generator,
    run_round,
)

A_KEYS = [PartKey(site.name, Role.A) for site in LAYOUT.sites]
B_KEYS = [PartKey(site.name, Role.B) for site in LAYOUT.sites]


def after(method: FedSVD, rounds: int) -> GlobalState:
    state = method.init(LAYOUT, generator())
    for index in range(rounds):
        state, _ = run_round(method, state, clients(3, seed=10 * index), [1, 2, 3])
    return state


def echo(method: FedSVD, state: GlobalState) -> GlobalState:
    """A round in which the only client changes nothing."""
    phase = method.plan(state).phases[0]
    down = method.broadcast(state)
    parts = {key: down[key] for key in shared.part_keys(LAYOUT, phase.send)}
    return method.aggregate(state, [ClientUpdate("idle", parts, 1)], [1])


@pytest.mark.parametrize("subspace", SUBSPACES)
def test_a_is_orthonormal_and_b_ordered_from_round_one(subspace: str) -> None:
    state = after(FedSVD(SUBSPACES[subspace]), rounds=2)
    for site, a_key, b_key in zip(LAYOUT.sites, A_KEYS, B_KEYS, strict=True):
        a, b = state.parts[a_key], state.parts[b_key]
        torch.testing.assert_close(a @ a.mT, torch.eye(site.rank), atol=1e-6, rtol=0)
        norms = b.norm(dim=0)
        assert bool((norms[:-1] >= norms[1:]).all())
        torch.testing.assert_close(b.mT @ b, (norms**2).diag(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("subspace", SUBSPACES)
def test_the_row_space_of_a_never_changes(subspace: str) -> None:
    method = FedSVD(SUBSPACES[subspace])
    first, last = method.init(LAYOUT, generator()), after(method, rounds=5)
    for key in A_KEYS:
        basis = torch.linalg.qr(first.parts[key].double().mT).Q
        a = last.parts[key].double()
        torch.testing.assert_close(a.mT @ a, basis @ basis.mT, atol=1e-5, rtol=0)
        assert not torch.allclose(a.float(), first.parts[key], atol=1e-2)


def test_a_round_without_training_changes_nothing_once_refactorised() -> None:
    method = FedSVD(orthonormal)
    state = after(method, rounds=2)
    again = echo(method, state)
    for key in A_KEYS + B_KEYS:
        torch.testing.assert_close(again.parts[key], state.parts[key], atol=2e-5, rtol=0)


def test_round_zero_without_training_keeps_b_zero_and_the_row_space() -> None:
    method = FedSVD(kaiming)
    state = method.init(LAYOUT, generator())
    new = echo(method, state)
    for a_key, b_key in zip(A_KEYS, B_KEYS, strict=True):
        assert not bool(new.parts[b_key].any())
        old, a = state.parts[a_key].double(), new.parts[a_key].double()
        torch.testing.assert_close(old @ a.mT @ a, old, atol=1e-6, rtol=0)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), kept=st.integers(0, 2))
def test_rank_deficient_updates_keep_the_product(seed: int, kept: int) -> None:
    method = FedSVD(orthonormal)
    state = method.init(LAYOUT, generator())
    phase = method.plan(state).phases[0]
    update = clients(1, seed)[0].answer(LAYOUT, phase, method.broadcast(state), {})
    parts = {
        key: torch.cat([value[:, :kept], torch.zeros_like(value[:, kept:])], dim=1)
        if key.role is Role.B
        else value
        for key, value in update.parts.items()
    }
    new = method.aggregate(state, [replace(update, parts=parts)], [1])
    assert_same_weights(effective(LAYOUT, new.parts), effective(LAYOUT, {**state.parts, **parts}))
    for b_key in B_KEYS:
        assert float(new.parts[b_key][:, kept:].norm()) <= 1e-12


def test_equals_the_dense_svd_of_the_mean_product() -> None:
    method = FedSVD(kaiming)
    state = after(method, rounds=1)
    weights = [0.2, 0.3, 0.5]
    new, released = run_round(method, state, clients(3, seed=77), weights)
    for site, a_key, b_key in zip(LAYOUT.sites, A_KEYS, B_KEYS, strict=True):
        mean = torch.zeros(site.out_features, site.rank, dtype=torch.float64)
        for p, parts in zip(weights, released.values(), strict=True):
            mean += p * parts[b_key]
        left, sigma, right = torch.linalg.svd(mean @ state.parts[a_key].double())
        kept = sigma[: site.rank]
        assert float((kept[:-1] - kept[1:]).min()) > 0.05  # distinct: unique up to sign
        found_a, found_b = new.parts[a_key].double().abs(), new.parts[b_key].double().abs()
        torch.testing.assert_close(found_a, right[: site.rank].abs(), atol=1e-5, rtol=0)
        dense_b = (left[:, : site.rank] * kept).abs()
        torch.testing.assert_close(found_b, dense_b, atol=1e-5, rtol=0)


def test_truncated_broadcast_is_the_best_of_that_rank() -> None:
    method = FedSVD(orthonormal)
    state = after(method, rounds=2)
    whole = effective(LAYOUT, state.parts)
    for rank in (1, 2):
        cut = effective(LAYOUT, method.broadcast(state, rank))
        for site in LAYOUT.sites:
            tail = torch.linalg.svdvals(whole[site.name])[rank:].norm()
            error = (cut[site.name] - whole[site.name]).norm()
            torch.testing.assert_close(error, tail, atol=1e-5, rtol=1e-5)


SMALL = FedSVD(orthonormal, downlink="rotation")


def defect(a: torch.Tensor) -> float:
    """Largest entry of |A·Aᵀ − I|, in float64."""
    wide = a.double()
    return float((wide @ wide.mT - torch.eye(len(wide), dtype=torch.float64)).abs().max())


def shrinking(count: int, seed: int) -> list[Client]:
    """Clients whose steps are small beside the model, as those of training are."""
    return [Client(f"client-{i}", seed=seed + i, step=0.1) for i in range(count)]


def test_a_thousand_rotations_leave_a_orthonormal_in_the_first_row_space() -> None:
    state = first = SMALL.init(LAYOUT, generator())
    worst = 0.0
    for turn in range(1000):
        state, _ = run_round(SMALL, state, shrinking(2, 2 * turn), [1, 2])
        worst = max(worst, *(defect(state.parts[key]) for key in A_KEYS))
    assert worst <= 1e-5
    for key in A_KEYS:
        base, a = first.memory[key], state.parts[key].double()
        assert torch.equal(state.memory[key], base)
        outside = a - a @ base.double().mT @ base.double()
        assert float(outside.norm()) <= 1e-5
        assert not torch.allclose(a.float(), base, atol=1e-2)


@pytest.mark.parametrize("subspace", ["orthonormal", "kaiming"])
def test_both_downlinks_train_the_same_model_through_random_absences(subspace: str) -> None:
    draws = Random(3)
    full, small = (FedSVD(SUBSPACES[subspace], downlink=kind) for kind in ("full", "rotation"))
    ours, theirs = (method.init(LAYOUT, generator()) for method in (small, full))
    for turn in range(50):
        there = draws.sample(shrinking(5, 10 * turn), draws.randint(1, 5))
        shares = [draws.random() + 0.1 for _ in there]
        ours, _ = run_round(small, ours, there, shares)
        theirs, _ = run_round(full, theirs, there, shares)
    assert_same_weights(effective(LAYOUT, ours.parts), effective(LAYOUT, theirs.parts), 1e-5)
    for key in A_KEYS + B_KEYS:
        size = max(1.0, float(theirs.parts[key].norm()))
        torch.testing.assert_close(ours.parts[key], theirs.parts[key], atol=1e-5 * size, rtol=0)


@pytest.mark.parametrize("rank", [None, 1, 2])
def test_the_rotations_give_the_a_that_is_broadcast_bit_for_bit(rank: int | None) -> None:
    state = after(SMALL, rounds=3)
    compact, down = SMALL.compact(state, rank), SMALL.broadcast(state, rank)
    assert compact is not None
    for site, key in zip(LAYOUT.sites, A_KEYS, strict=True):
        turn = compact.rotations[PartKey(site.name, Role.ROTATION)]
        assert turn.shape == (min(rank or site.rank, site.rank), site.rank)
        assert torch.equal(rotate(turn, compact.basis[key]), down[key])


def test_a_policy_without_orthonormal_rows_gets_its_basis_after_the_first_round() -> None:
    method = FedSVD(kaiming, downlink="rotation")
    state = method.init(LAYOUT, generator())
    assert method.compact(state) is None
    state, _ = run_round(method, state, clients(3), [1, 1, 1])
    compact = method.compact(state)
    assert compact is not None
    for key in A_KEYS:
        assert is_orthonormal(compact.basis[key])
        assert torch.equal(compact.basis[key], state.parts[key])
    later, _ = run_round(method, state, clients(3, seed=7), [1, 1, 1])
    assert all(torch.equal(later.memory[key], compact.basis[key]) for key in A_KEYS)


def test_the_full_downlink_keeps_no_basis_and_takes_no_others_memory_for_one() -> None:
    method = FedSVD(orthonormal)
    state = method.init(LAYOUT, generator())
    assert (state.memory, method.compact(state)) == ({}, None)
    seed = {PartKey("refresh", Role.SEED): torch.tensor([7])}
    state, _ = run_round(method, replace(state, memory=seed), clients(2), [1, 1])
    assert method.compact(state) is None
    assert state.memory == seed

"""FedSVD's own identities; the linear algebra itself is tested in tests/lowrank."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlr.lowrank.subspace import SUBSPACES, kaiming, orthonormal
from fedlr.methods import shared
from fedlr.methods.fedsvd import FedSVD
from fedlr.methods.method import ClientUpdate, GlobalState, PartKey, Role
from tests.methods.federation import (
    LAYOUT,
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

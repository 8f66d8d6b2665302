"""FLoRA: the stacked product is the mean of the products, whatever the ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedlr.lowrank.subspace import Subspace, kaiming, orthonormal
from fedlr.methods.flora import FLoRA
from fedlr.methods.method import ClientUpdate, GlobalState, PartKey, Role
from fedlr.methods.residual import SEED
from tests.methods.federation import LAYOUT, clients, effective, furthest, generator, run_round

A_KEYS = [PartKey(site.name, Role.A) for site in LAYOUT.sites]
B_KEYS = [PartKey(site.name, Role.B) for site in LAYOUT.sites]


def after(rounds: int, subspace: Subspace = orthonormal, seed: int = 0) -> GlobalState:
    method = FLoRA(subspace)
    state = method.init(LAYOUT, generator(seed))
    for index in range(rounds):
        state, _ = run_round(method, state, clients(2, seed=10 * index), [1, 3])
    return state


def of_rank(state: GlobalState, rank: int, index: int) -> ClientUpdate:
    method = FLoRA(orthonormal)
    client, phase = clients(3, seed=40)[index], method.plan(state).phases[0]
    return client.answer(LAYOUT, phase, method.broadcast(state, rank), {})


def test_mixed_ranks_add_the_mean_of_the_products() -> None:
    method, state, weights = FLoRA(orthonormal), after(1), [0.2, 0.3, 0.5]
    updates = [of_rank(state, rank, index) for index, rank in enumerate((1, 2, 3))]
    new = method.aggregate(state, updates, weights)
    before, found = (effective(LAYOUT, s.parts) for s in (state, new))
    for site, a, b in zip(LAYOUT.sites, A_KEYS, B_KEYS, strict=True):
        mean = sum(
            (
                p * u.parts[b].double() @ u.parts[a].double()
                for p, u in zip(weights, updates, strict=True)
            ),
            torch.zeros(()),
        )
        grown = found[site.name] - before[site.name]
        torch.testing.assert_close(grown, site.scaling * mean, atol=2e-6, rtol=0)
        assert float(mean.norm()) > 0.1


def test_a_weak_client_that_trains_nothing_leaves_the_model() -> None:
    method, state = FLoRA(orthonormal), after(2)
    down = method.broadcast(state, rank=1)
    parts = {k: v for k, v in down.items() if k.role in (Role.A, Role.B, Role.HEAD)}
    new = method.aggregate(state, [ClientUpdate("idle", parts, 1)], [1])
    assert furthest(effective(LAYOUT, new.parts), effective(LAYOUT, state.parts)) < 1e-7


def test_every_round_starts_from_zero_and_another_a() -> None:
    states = [after(rounds) for rounds in range(4)]
    for b in B_KEYS:
        assert all(not state.parts[b].any() for state in states)
    for a in A_KEYS:
        for one in range(4):
            for two in range(one):
                assert float((states[one].parts[a] - states[two].parts[a]).norm()) > 0.1
        torch.testing.assert_close(
            states[3].parts[a] @ states[3].parts[a].mT,
            torch.eye(states[3].parts[a].shape[0]),
            atol=1e-6,
            rtol=0,
        )


def test_the_new_a_depends_on_seed_and_round_alone() -> None:
    # A resumed run has the state and no generator; other clients must not change the draw.
    method, state = FLoRA(kaiming), after(1, kaiming)
    one, _ = run_round(method, state, clients(2), [1, 1])
    two, _ = run_round(method, replace(state), clients(3, seed=7), [1, 2, 3])
    assert all(torch.equal(one.parts[a], two.parts[a]) for a in A_KEYS)
    other = after(1, kaiming, seed=1)
    third, _ = run_round(method, other, clients(2), [1, 1])
    assert not any(torch.equal(one.parts[a], third.parts[a]) for a in A_KEYS)


def test_the_seed_is_kept_and_never_sent() -> None:
    state = after(3)
    seed = state.memory[SEED]
    assert (seed.dtype, tuple(seed.shape)) == (torch.int64, (1,))
    assert torch.equal(seed, after(0).memory[SEED])
    assert not any(key.role is Role.SEED for key in FLoRA(orthonormal).broadcast(state))


def test_a_state_without_its_seed_is_refused() -> None:
    method, state = FLoRA(orthonormal), replace(after(1), memory={})
    with pytest.raises(ValueError, match="no seed"):
        run_round(method, state, clients(2), [1, 1])


def test_the_residual_never_exceeds_full_rank() -> None:
    state = after(4)
    for site in LAYOUT.sites:
        rank = state.parts[PartKey(site.name, Role.RESIDUAL_A)].shape[0]
        assert rank == min(4 * 2 * site.rank, site.out_features, site.in_features)

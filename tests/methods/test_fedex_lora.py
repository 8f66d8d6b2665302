"""FedEx-LoRA: product and residual are the mean of the products."""

from __future__ import annotations

import pytest
import torch

from fedlr.lowrank.factors import AdapterSite
from fedlr.lowrank.subspace import kaiming
from fedlr.methods.fedavg_lora import FedAvgLoRA
from fedlr.methods.fedex_lora import FedExLoRA
from fedlr.methods.method import RESIDUAL_ROLES, ClientUpdate, Layout, PartKey, Role
from tests.methods.federation import (
    LAYOUT,
    clients,
    effective,
    furthest,
    generator,
    mean_of_models,
    run_round,
)

SITE = LAYOUT.sites[0]
R_B, R_A = PartKey(SITE.name, Role.RESIDUAL_B), PartKey(SITE.name, Role.RESIDUAL_A)
WEIGHTS = [0.2, 0.3, 0.5]


def test_the_counter_example_of_fedavg_is_exact_here() -> None:
    # Both clients hold B·A = 1, as 1·1 and as (−1)·(−1): the factors average to 0, R to 1.
    layout = Layout((AdapterSite("q", out_features=1, in_features=1, rank=1, scaling=1.0),))
    method = FedExLoRA(kaiming)
    keys = PartKey("q", Role.A), PartKey("q", Role.B)
    updates = [
        ClientUpdate(name, {key: torch.full((1, 1), value) for key in keys}, steps=1)
        for name, value in (("plus", 1.0), ("minus", -1.0))
    ]
    state = method.aggregate(method.init(layout, generator()), updates, [1, 1])
    assert state.parts[keys[0]].item() == state.parts[keys[1]].item() == 0.0
    assert effective(layout, state.parts)["q"].item() == 1.0


def test_product_and_residual_are_the_mean_over_many_rounds() -> None:
    # 7 rounds of 2·3 columns: the residual passes min(m, n) = 8 and is narrowed.
    method = FedExLoRA(kaiming)
    state = method.init(LAYOUT, generator())
    for index in range(7):
        before = state
        state, released = run_round(method, before, clients(3, seed=10 * index), WEIGHTS)
        expected = mean_of_models(before, released, WEIGHTS)
        assert furthest(effective(LAYOUT, state.parts), expected) < 2e-6
    assert state.parts[R_B].shape == (8, 8)
    assert state.parts[R_A].shape == (8, 10)


def test_the_factors_are_those_of_fedavg() -> None:
    ours, theirs = FedExLoRA(kaiming), FedAvgLoRA(kaiming)
    first, _ = run_round(ours, ours.init(LAYOUT, generator()), clients(3), WEIGHTS)
    other, _ = run_round(theirs, theirs.init(LAYOUT, generator()), clients(3), WEIGHTS)
    for key, value in other.parts.items():
        assert torch.equal(first.parts[key], value)


@pytest.mark.parametrize(("count", "rank"), [(1, 0), (2, 3), (3, 6)])
def test_a_round_adds_r_columns_per_client_but_one(count: int, rank: int) -> None:
    # Σ p_k (B_k − B̄) = 0, so K clients leave K − 1 independent terms of rank r = 3.
    method = FedExLoRA(kaiming)
    state, released = run_round(
        method, method.init(LAYOUT, generator()), clients(count), [1] * count
    )
    assert state.parts[R_A].shape == (rank, SITE.in_features)
    keys = PartKey(SITE.name, Role.B), PartKey(SITE.name, Role.A)
    pairs = [(parts[keys[0]].double(), parts[keys[1]].double()) for parts in released.values()]
    b_mean, a_mean = (torch.stack(list(f)).mean(dim=0) for f in zip(*pairs, strict=True))
    error = sum((b @ a for b, a in pairs), torch.zeros(())) / count - b_mean @ a_mean
    assert int(torch.linalg.matrix_rank(error, atol=1e-6)) == rank


def test_without_the_residual_the_law_would_fail() -> None:
    method = FedExLoRA(kaiming)
    before, _ = run_round(method, method.init(LAYOUT, generator()), clients(2, seed=9), [1, 1])
    state, released = run_round(method, before, clients(3), WEIGHTS)
    bare = {key: value for key, value in state.parts.items() if key.role not in RESIDUAL_ROLES}
    assert furthest(effective(LAYOUT, bare), mean_of_models(before, released, WEIGHTS)) > 0.05

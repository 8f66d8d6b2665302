"""FlexLoRA: the best approximation of rank r of the mean product."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedlr.lowrank.factors import AdapterSite
from fedlr.lowrank.subspace import kaiming, orthonormal
from fedlr.methods.flexlora import FlexLoRA
from fedlr.methods.method import ClientUpdate, GlobalState, Layout, PartKey, Role
from tests.methods.federation import (
    LAYOUT,
    clients,
    effective,
    furthest,
    generator,
    mean_of_models,
    run_round,
)

METHOD = FlexLoRA(kaiming)
WEIGHTS = [0.2, 0.3, 0.5]


def started() -> GlobalState:
    state, _ = run_round(METHOD, METHOD.init(LAYOUT, generator()), clients(2, seed=9), [1, 1])
    return state


def mean_product(site: AdapterSite, updates: list[ClientUpdate]) -> Tensor:
    """Σ p_k s·B_k·A_k, m × n and in float64: the slow twin."""
    total = torch.zeros(site.out_features, site.in_features, dtype=torch.float64)
    for weight, update in zip(WEIGHTS, updates, strict=True):
        b, a = (update.parts[PartKey(site.name, role)].double() for role in (Role.B, Role.A))
        total += weight * site.scaling * b @ a
    return total


@pytest.mark.parametrize("ranks", [(3, 3, 3), (1, 2, 3), (1, 1, 1), (2, 1, 1)])
def test_the_error_is_the_tail_of_the_spectrum(ranks: tuple[int, ...]) -> None:
    state = started()
    phase = METHOD.plan(state).phases[0]
    updates = [
        client.answer(LAYOUT, phase, METHOD.broadcast(state, rank), {})
        for client, rank in zip(clients(3), ranks, strict=True)
    ]
    found = effective(LAYOUT, METHOD.aggregate(state, updates, WEIGHTS).parts)
    for site in LAYOUT.sites:
        wanted = mean_product(site, updates)
        tail = float(torch.linalg.svdvals(wanted)[site.rank :].norm())
        error = float((found[site.name] - wanted).norm())
        assert error == pytest.approx(tail, rel=1e-4, abs=1e-5)


def test_the_pair_is_the_dense_svd() -> None:
    state = started()
    new, released = run_round(METHOD, state, clients(3), WEIGHTS)
    updates = [ClientUpdate(name, parts, 1) for name, parts in released.items()]
    for site in LAYOUT.sites:
        _, sigma, right = torch.linalg.svd(mean_product(site, updates) / site.scaling)
        b, a = (new.parts[PartKey(site.name, role)].double() for role in (Role.B, Role.A))
        torch.testing.assert_close(b.norm(dim=0), sigma[: site.rank], atol=1e-5, rtol=0)
        torch.testing.assert_close(a.abs(), right[: site.rank].abs(), atol=1e-4, rtol=0)


def test_full_rank_is_exact() -> None:
    layout = Layout((AdapterSite("q", out_features=4, in_features=6, rank=4, scaling=0.5),))
    state, _ = run_round(METHOD, METHOD.init(layout, generator()), clients(2, seed=9), [1, 1])
    new, released = run_round(METHOD, state, clients(3), WEIGHTS)
    expected = mean_of_models(state, released, WEIGHTS)
    assert furthest(effective(layout, new.parts), expected) < 2e-6


def test_a_truncated_client_counts_with_what_it_was_sent() -> None:
    # The paper's law: what a weak client was not sent is not in its product.
    state = started()
    down = METHOD.broadcast(state, rank=1)
    new = METHOD.aggregate(state, [ClientUpdate("idle", down, 1)], [1])
    assert furthest(effective(LAYOUT, new.parts), effective(LAYOUT, down)) < 2e-6
    assert furthest(effective(LAYOUT, new.parts), effective(LAYOUT, state.parts)) > 0.1


@pytest.mark.parametrize("zero", [True, False], ids=["zero", "rank one"])
def test_directions_that_nobody_trained_can_still_learn(zero: bool) -> None:
    # A zero row of A beside a zero column of B would have no gradient for ever.
    method = FlexLoRA(orthonormal)
    state = method.init(LAYOUT, generator())
    phase = method.plan(state).phases[0]
    update = clients(1)[0].answer(LAYOUT, phase, method.broadcast(state, rank=1), {})
    if zero:
        parts = {k: torch.zeros_like(v) if k.role is Role.B else v for k, v in update.parts.items()}
        update = replace(update, parts=parts)
    new = method.aggregate(state, [update], [1])
    for site in LAYOUT.sites:
        a = new.parts[PartKey(site.name, Role.A)]
        torch.testing.assert_close(a @ a.mT, torch.eye(site.rank), atol=1e-6, rtol=0)

"""FedASK: the two sketches give the exact mean, split evenly between the factors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedlr.lowrank.subspace import kaiming
from fedlr.methods.fedask import FedASK
from fedlr.methods.method import ClientUpdate, GlobalState, PartKey, Parts, Role
from tests.methods.federation import (
    LAYOUT,
    assert_same_weights,
    clients,
    effective,
    generator,
    run_round,
)

METHOD = FedASK(kaiming)
WEIGHTS = [0.2, 0.3, 0.5]


def first() -> GlobalState:
    return METHOD.init(LAYOUT, generator())


def sketched(state: GlobalState, spoil: float = 1.0) -> tuple[GlobalState, list[ClientUpdate]]:
    """The state after the first exchange, and what the clients answer to the second."""
    released: dict[str, Parts] = {}
    trained, project = METHOD.plan(state).phases
    down = METHOD.broadcast(state)
    updates = [client.answer(LAYOUT, trained, down, released) for client in clients(3)]
    middle = METHOD.aggregate(state, updates, WEIGHTS)
    down = METHOD.broadcast(middle)
    cores = [client.answer(LAYOUT, project, down, released) for client in clients(3)]
    scaled = [
        replace(core, parts={key: spoil * value for key, value in core.parts.items()})
        for core in cores
    ]
    return middle, scaled


def test_factors_are_balanced_and_orthogonal() -> None:
    # B = Q·U·Σ^½ and A = Σ^½·Vᵀ: BᵀB = Σ = AAᵀ, with the σ's of the dense mean product.
    state = first()
    new, released = run_round(METHOD, state, clients(3), WEIGHTS)
    for site in LAYOUT.sites:
        b_key, a_key = PartKey(site.name, Role.B), PartKey(site.name, Role.A)
        mean = sum(
            (
                p * parts[b_key].double()
                for p, parts in zip(WEIGHTS, released.values(), strict=True)
            ),
            torch.zeros(()),
        )
        sigma = torch.linalg.svdvals(mean @ state.parts[a_key].double())[: site.rank]
        b, a = new.parts[b_key].double(), new.parts[a_key].double()
        torch.testing.assert_close(b.mT @ b, sigma.diag(), atol=1e-5, rtol=0)
        torch.testing.assert_close(a @ a.mT, sigma.diag(), atol=1e-5, rtol=0)


def test_the_basis_is_orthonormal_and_spans_the_mean() -> None:
    middle, cores = sketched(first())
    released: dict[str, Parts] = {}
    for client in clients(3):
        client.answer(LAYOUT, METHOD.plan(first()).phases[0], METHOD.broadcast(first()), released)
    assert (middle.round, middle.phase) == (0, 1)
    down = METHOD.broadcast(middle)
    assert {key.role for key in down} == {Role.ROTATION}
    for site in LAYOUT.sites:
        basis = down[PartKey(site.name, Role.ROTATION)]
        torch.testing.assert_close(basis.mT @ basis, torch.eye(site.rank), atol=1e-6, rtol=0)
        b, core = PartKey(site.name, Role.B), PartKey(site.name, Role.CORE)
        mean = sum(p * one[b] for p, one in zip(WEIGHTS, released.values(), strict=True))
        told = sum(p * one.parts[core] for p, one in zip(WEIGHTS, cores, strict=True))
        torch.testing.assert_close(basis @ told, mean, atol=1e-6, rtol=0)


def test_a_client_that_fails_between_the_exchanges_leaves_a_projection() -> None:
    state = first()
    middle, cores = sketched(state)
    new = METHOD.aggregate(middle, cores[:2], WEIGHTS[:2])
    for site in LAYOUT.sites:
        basis = middle.parts[PartKey(site.name, Role.ROTATION)]
        key, a = PartKey(site.name, Role.CORE), PartKey(site.name, Role.A)
        mean = 0.4 * cores[0].parts[key] + 0.6 * cores[1].parts[key]
        expected = site.scaling * (basis @ mean @ state.parts[a]).double()
        found = effective(LAYOUT, new.parts)[site.name]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_second_exchange_is_used() -> None:
    half, whole = (METHOD.aggregate(*sketched(first(), spoil), WEIGHTS) for spoil in (0.5, 1.0))
    found, expected = effective(LAYOUT, half.parts), effective(LAYOUT, whole.parts)
    sites = [site.name for site in LAYOUT.sites]
    assert_same_weights({k: found[k] for k in sites}, {k: expected[k] / 2 for k in sites})


def test_cores_that_answer_no_projection_are_refused() -> None:
    middle, cores = sketched(first())
    cores[0] = replace(cores[0], parts={k: v[:1] for k, v in cores[0].parts.items()})
    with pytest.raises(ValueError, match=r"client-00.*shape \(1, 3\), expected \(3, 3\)"):
        METHOD.aggregate(middle, cores, WEIGHTS)


def test_nothing_of_the_projection_stays() -> None:
    state, _ = run_round(METHOD, first(), clients(3), WEIGHTS)
    assert {key.role for key in state.parts} == {Role.A, Role.B, Role.HEAD}


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_direction_without_weight_can_still_learn(kept: int) -> None:
    # B_k of rank `kept`: the other rows of A stay orthonormal, and B's columns are zero.
    state = first()
    released: dict[str, Parts] = {}
    trained, project = METHOD.plan(state).phases
    update = clients(1)[0].answer(LAYOUT, trained, METHOD.broadcast(state), released)
    parts = {
        key: torch.cat([value[:, :kept], torch.zeros_like(value[:, kept:])], dim=1)
        if key.role is Role.B
        else value
        for key, value in update.parts.items()
    }
    released["client-00"] = parts
    middle = METHOD.aggregate(state, [replace(update, parts=parts)], [1])
    core = clients(1)[0].answer(LAYOUT, project, METHOD.broadcast(middle), released)
    new = METHOD.aggregate(middle, [core], [1])
    assert_same_weights(effective(LAYOUT, new.parts), effective(LAYOUT, {**state.parts, **parts}))
    for site in LAYOUT.sites:
        a = new.parts[PartKey(site.name, Role.A)]
        idle = a[kept:]
        torch.testing.assert_close(idle @ idle.mT, torch.eye(len(idle)), atol=1e-6, rtol=0)
        assert float((idle @ a[:kept].mT).norm()) < 1e-5
        assert float(new.parts[PartKey(site.name, Role.B)][:, kept:].norm()) < 1e-6

"""Fed-SB: linear in the core, between factors that never change."""

from __future__ import annotations

import torch

from fedlr.lowrank.subspace import kaiming, orthonormal
from fedlr.methods.fed_sb import FedSB
from fedlr.methods.method import PartKey, Role
from tests.methods.federation import LAYOUT, clients, effective, generator, run_round

METHOD = FedSB(kaiming)


def test_factors_are_bit_identical_and_b_is_orthonormal() -> None:
    first = METHOD.init(LAYOUT, generator())
    state = first
    for index in range(3):
        state, _ = run_round(METHOD, state, clients(3, seed=10 * index), [1, 2, 3])
    for site in LAYOUT.sites:
        for role in (Role.A, Role.B):
            key = PartKey(site.name, role)
            assert torch.equal(state.parts[key], first.parts[key])
        b = state.parts[PartKey(site.name, Role.B)]
        torch.testing.assert_close(b.mT @ b, torch.eye(site.rank), atol=1e-6, rtol=0)
        assert float(state.parts[PartKey(site.name, Role.CORE)].norm()) > 0.1


def test_the_mean_core_is_the_mean_of_the_products() -> None:
    weights = [0.2, 0.3, 0.5]
    state, released = run_round(METHOD, METHOD.init(LAYOUT, generator()), clients(3), weights)
    found = effective(LAYOUT, state.parts)
    for site in LAYOUT.sites:
        b, a = (state.parts[PartKey(site.name, role)].double() for role in (Role.B, Role.A))
        products = sum(
            (
                p * site.scaling * b @ parts[PartKey(site.name, Role.CORE)].double() @ a
                for p, parts in zip(weights, released.values(), strict=True)
            ),
            torch.zeros(()),
        )
        torch.testing.assert_close(found[site.name], products, atol=1e-6, rtol=1e-6)


def test_a_client_sends_r_squared_numbers_a_site() -> None:
    _, released = run_round(METHOD, METHOD.init(LAYOUT, generator()), clients(1), [1])
    sent = {k: v.numel() for k, v in released["client-00"].items() if k.role is not Role.HEAD}
    assert sent == {PartKey(site.name, Role.CORE): site.rank**2 for site in LAYOUT.sites}


def test_a_is_what_every_other_method_starts_from() -> None:
    ours, subspace = FedSB(orthonormal).init(LAYOUT, generator()), generator()
    for site in LAYOUT.sites:
        assert torch.equal(ours.parts[PartKey(site.name, Role.A)], orthonormal(site, subspace))

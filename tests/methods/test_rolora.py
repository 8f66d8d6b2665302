"""RoLoRA: one factor a round, the other bit-identical."""

from __future__ import annotations

import torch

from fedlr.lowrank.subspace import kaiming
from fedlr.methods.method import PartKey, Role
from fedlr.methods.rolora import RoLoRA
from tests.methods.federation import LAYOUT, clients, generator, run_round

METHOD = RoLoRA(kaiming)


def test_rounds_change_b_and_a_in_turn() -> None:
    state = METHOD.init(LAYOUT, generator())
    for index in range(4):
        before = state
        state, _ = run_round(METHOD, before, clients(3, seed=10 * index), [1, 2, 3])
        rests, moves = (Role.A, Role.B) if index % 2 == 0 else (Role.B, Role.A)
        for site in LAYOUT.sites:
            key = PartKey(site.name, rests)
            assert torch.equal(state.parts[key], before.parts[key])
            key = PartKey(site.name, moves)
            assert float((state.parts[key] - before.parts[key]).norm()) > 0.1


def test_each_round_sends_the_factor_that_it_trains_and_no_other() -> None:
    state = METHOD.init(LAYOUT, generator())
    for role in (Role.B, Role.A, Role.B):
        (phase,) = METHOD.plan(state).phases
        assert phase.send == phase.train == {role, Role.HEAD}
        assert phase.receive == {Role.A, Role.B, Role.HEAD}
        state, _ = run_round(METHOD, state, clients(2), [1, 1])


def test_the_row_space_of_a_moves() -> None:
    # What B alone never does (FedSVD, FFA-LoRA): row(A) after two rounds is not the first one.
    first = METHOD.init(LAYOUT, generator())
    state, _ = run_round(METHOD, first, clients(3), [1, 1, 1])
    state, _ = run_round(METHOD, state, clients(3, seed=50), [1, 1, 1])
    for site in LAYOUT.sites:
        key = PartKey(site.name, Role.A)
        basis = torch.linalg.qr(first.parts[key].double().mT).Q
        a = state.parts[key].double()
        assert float((a - a @ basis @ basis.mT).norm()) > 0.1 * float(a.norm())

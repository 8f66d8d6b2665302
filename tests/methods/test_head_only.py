"""Head only: the adapters never move, and the head is the mean of the heads."""

from __future__ import annotations

import torch

from fedlr.lowrank.subspace import orthonormal
from fedlr.methods.head_only import HeadOnly
from fedlr.methods.method import ClientUpdate, PartKey, Role

from .federation import LAYOUT, clients, generator, run_round


def test_adapters_stay_at_zero_bit_for_bit() -> None:
    method = HeadOnly(orthonormal)
    first = method.init(LAYOUT, generator())
    state, _ = run_round(method, first, clients(3), [1, 2, 3])
    for key, value in state.parts.items():
        assert torch.equal(value, first.parts[key]) is (key.role is not Role.HEAD)
    for site in LAYOUT.sites:
        assert not state.parts[PartKey(site.name, Role.B)].any()


def test_head_is_the_weighted_mean() -> None:
    method = HeadOnly(orthonormal)
    state = method.init(LAYOUT, generator())
    keys = [PartKey(name, Role.HEAD) for name in LAYOUT.head]
    updates = [
        ClientUpdate(
            f"client-{index}", {key: torch.full_like(state.parts[key], value) for key in keys}, 1
        )
        for index, value in enumerate((1.0, 5.0))
    ]
    new = method.aggregate(state, updates, [3, 1])
    for key in keys:
        assert torch.equal(new.parts[key], torch.full_like(state.parts[key], 2.0))  # (3·1 + 5) / 4

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
    key = PartKey(next(iter(LAYOUT.head)), Role.HEAD)
    shape = state.parts[key].shape
    updates = [
        ClientUpdate(f"client-{index}", {key: torch.full(shape, value)}, steps=1)
        for index, value in enumerate((1.0, 5.0))
    ]
    new = method.aggregate(state, updates, [3, 1])
    assert torch.equal(new.parts[key], torch.full(shape, 2.0))  # (3·1 + 1·5) / 4

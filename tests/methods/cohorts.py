"""Cohorts of two parts with honest clients and planted attacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fedlr.methods.method import ClientUpdate, PartKey, Parts, Role

B, HEAD = PartKey("q", Role.B), PartKey("head", Role.HEAD)

CENTRE = {
    B: torch.linspace(-1, 1, 35).reshape(7, 5),
    HEAD: torch.linspace(2, 3, 4),
}
"""What honest clients' changes scatter around."""


def honest(count: int, seed: int = 0, spread: float = 0.1) -> list[ClientUpdate]:
    """``count`` clients near `CENTRE`, by numbered names."""
    draws = torch.Generator().manual_seed(seed)
    return [
        ClientUpdate(
            f"c{index}",
            {
                key: value + spread * torch.randn(value.shape, generator=draws)
                for key, value in CENTRE.items()
            },
            steps=1,
        )
        for index in range(count)
    ]


ATTACKS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "times 100": lambda value: 100 * value,
    "flipped": lambda value: -value,
    "flipped times 100": lambda value: -100 * value,
    "huge constant": lambda value: torch.full_like(value, 1e15),
}


def attacked(
    updates: Sequence[ClientUpdate], attackers: int, attack: Callable[[Tensor], Tensor]
) -> list[ClientUpdate]:
    """The cohort with its first ``attackers`` sending ``attack`` of the honest centre."""
    bad = {key: attack(value) for key, value in CENTRE.items()}
    return [
        ClientUpdate(update.client, bad if index < attackers else update.parts, steps=1)
        for index, update in enumerate(updates)
    ]


def mapped(
    updates: Sequence[ClientUpdate], change: Callable[[Tensor], Tensor]
) -> list[ClientUpdate]:
    """Every array of every client under ``change``."""
    return [
        ClientUpdate(u.client, {key: change(v) for key, v in u.parts.items()}, steps=1)
        for u in updates
    ]


def vector(parts: Parts) -> Tensor:
    """All parts as one float64 vector."""
    return torch.cat([parts[key].double().flatten() for key in sorted(parts)])


def vectors(updates: Sequence[ClientUpdate]) -> Tensor:
    """One row per client, float64."""
    return torch.stack([vector(update.parts) for update in updates])

"""A federation without models: clients whose training is a seeded perturbation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlr.lowrank.factors import AdapterSite
from fedlr.methods import shared
from fedlr.methods.method import (
    ClientUpdate,
    GlobalState,
    Layout,
    Method,
    PartKey,
    Parts,
    Phase,
    Role,
)

Cohort = tuple[list[ClientUpdate], list[float]]
Reshape = Callable[[list[ClientUpdate], list[float]], Cohort]
"""What a test does to a cohort before it is aggregated: permute, chunk, scale."""

LAYOUT = Layout(
    sites=(
        AdapterSite("block.0.query", out_features=8, in_features=10, rank=3, scaling=2.0),
        AdapterSite("block.0.value", out_features=6, in_features=10, rank=2, scaling=0.5),
        AdapterSite("block.1.query", out_features=8, in_features=10, rank=3, scaling=1.0),
    ),
    head={"head.weight": torch.ones(2, 8), "head.bias": torch.zeros(2)},
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Client:
    """Adds a Gaussian step of its own seed to whatever it is asked to train."""

    name: str
    seed: int
    step: float = 0.5

    def answer(
        self, layout: Layout, phase: Phase, down: Parts, released: dict[str, Parts]
    ) -> ClientUpdate:
        if phase.private:
            draws = generator(self.seed)
            parts: dict[PartKey, Tensor] = {}
            for key in shared.part_keys(layout, phase.send):
                noise = torch.randn(down[key].shape, generator=draws)
                parts[key] = down[key] + self.step * noise
            released[self.name] = parts
        else:
            parts = {
                PartKey(site.name, Role.CORE): down[PartKey(site.name, Role.ROTATION)].mT
                @ released[self.name][PartKey(site.name, Role.B)]
                for site in layout.sites
            }
        return ClientUpdate(self.name, parts, steps=1)


def clients(count: int, seed: int = 100) -> list[Client]:
    return [Client(f"client-{index:02d}", seed + index) for index in range(count)]


def run_round(
    method: Method,
    state: GlobalState,
    cohort: Sequence[Client],
    weights: Sequence[float],
    reshape: Reshape = lambda updates, weights: (updates, weights),
) -> tuple[GlobalState, dict[str, Parts]]:
    """One whole round; returns the new state and what each client released."""
    released: dict[str, Parts] = {}
    for phase in method.plan(state).phases:
        down = method.broadcast(state)
        updates = [client.answer(state.layout, phase, down, released) for client in cohort]
        state = method.aggregate(state, *reshape(updates, list(weights)))
    return state, released


def mean_of_models(
    state: GlobalState, released: dict[str, Parts], weights: Sequence[float]
) -> dict[str, Tensor]:
    """Σ p_k of what each client's model was after its training, heads included."""
    mean: dict[str, Tensor] = {}
    for parts, weight in zip(released.values(), weights, strict=True):
        for key, value in effective(state.layout, {**state.parts, **parts}).items():
            mean[key] = mean.get(key, torch.zeros_like(value)) + value * (weight / sum(weights))
    return mean


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative Frobenius distance of two models' arrays; absolute from a zero one."""
    distances = {key: float((found[key] - expected[key]).norm()) for key in expected}
    return max(distances[key] / (float(expected[key].norm()) or 1.0) for key in expected)


def effective(layout: Layout, parts: Parts) -> dict[str, Tensor]:
    """s·B·A, or s·B·R·A, + R_b·R_a of every site and every head array, float64."""
    weights = {}
    for site in layout.sites:
        at = {role: parts.get(PartKey(site.name, role)) for role in Role}
        b, a = at[Role.B], at[Role.A]
        assert b is not None
        assert a is not None
        core = at[Role.CORE]
        middle = torch.eye(b.shape[1]).double() if core is None else core.double()
        total = site.scaling * b.double() @ middle @ a.double()
        left, right = at[Role.RESIDUAL_B], at[Role.RESIDUAL_A]
        if left is not None and right is not None:
            total = total + left.double() @ right.double()
        weights[site.name] = total
    for name in layout.head:
        weights[name] = parts[PartKey(name, Role.HEAD)].double()
    return weights


def assert_same_weights(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-6
) -> None:
    """Relative Frobenius distance of every array ≤ tolerance (float32 rounding)."""
    assert found.keys() == expected.keys()
    for name in found:
        distance = float((found[name] - expected[name]).norm())
        assert distance <= tolerance * max(1.0, float(expected[name].norm())), (name, distance)

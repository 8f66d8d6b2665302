"""Every method, shipped or toy, and how a law of all of them starts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from fedlr.lowrank.subspace import SUBSPACES
from fedlr.methods.combine import weighted_mean
from fedlr.methods.method import GlobalState, Layout, Method, PartKey, Parts
from fedlr.methods.registry import METHODS, Builder
from tests.methods.federation import LAYOUT, clients, generator, run_round
from tests.methods.toys import Folding, TwoPhase

BUILDERS: dict[str, Builder] = {**METHODS, "toy_two_phase": TwoPhase, "toy_folding": Folding}
SHIPPED = list(METHODS)
LINEAR = [name for name, kind in BUILDERS.items() if kind.facts.linear]
BY_COLUMN = [name for name, kind in METHODS.items() if kind.facts.mixed_ranks and kind.facts.linear]
"""Methods that average each column over the clients that trained it; `FLoRA`, `FlexLoRA` and
`HetLoRA` have laws of mixed ranks that are their own, and tests of them."""

every_method = pytest.mark.parametrize("name", BUILDERS)
every_shipped = pytest.mark.parametrize("name", SHIPPED)
every_subspace = pytest.mark.parametrize("subspace", SUBSPACES)
positive = st.floats(min_value=0.01, max_value=100.0)


def build(name: str, subspace: str = "orthonormal") -> Method:
    return BUILDERS[name](SUBSPACES[subspace], weighted_mean)


def started(method: Method, rounds: int = 1, layout: Layout = LAYOUT) -> GlobalState:
    """A state after some rounds, so that B ≠ 0 and a residual may exist."""
    state = method.init(layout, generator())
    for index in range(rounds):
        state, _ = run_round(method, state, clients(3, seed=1000 * (index + 1)), [1, 2, 3])
    return state


def copies(parts: Parts) -> dict[PartKey, Tensor]:
    return {key: value.clone() for key, value in parts.items()}


def identical(left: Parts, right: Parts) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)

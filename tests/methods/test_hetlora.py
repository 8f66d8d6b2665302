"""HetLoRA: padding, weights by norm, and pruning from what was released."""

from __future__ import annotations

import math

import pytest
import torch

from fedlr.lowrank.subspace import kaiming
from fedlr.methods.fedavg_lora import FedAvgLoRA
from fedlr.methods.hetlora import HetLoRA
from fedlr.methods.method import ClientUpdate, GlobalState, PartKey, Parts, Role
from tests.methods.federation import LAYOUT, clients, effective, generator, run_round

WEIGHTS = [0.2, 0.3, 0.5]
PLAIN = HetLoRA(kaiming, norm_weighting=False)


def started(rounds: int = 1) -> GlobalState:
    state = PLAIN.init(LAYOUT, generator())
    for index in range(rounds):
        state, _ = run_round(PLAIN, state, clients(2, seed=9 + index), [1, 1])
    return state


def of_rank(state: GlobalState, rank: int, index: int) -> ClientUpdate:
    phase = PLAIN.plan(state).phases[0]
    return clients(4, seed=60)[index].answer(LAYOUT, phase, PLAIN.broadcast(state, rank), {})


def adapter_norm(parts: Parts) -> float:
    """‖s·B·A‖_F over all sites, from the m × n products."""
    weights = effective(LAYOUT, parts)
    return math.sqrt(sum(float(weights[site.name].square().sum()) for site in LAYOUT.sites))


def test_equals_fedavg_at_equal_ranks_with_both_options_off() -> None:
    theirs = FedAvgLoRA(kaiming)
    ours, other = started(3), theirs.init(LAYOUT, generator())
    for index in range(3):
        other, _ = run_round(theirs, other, clients(2, seed=9 + index), [1, 1])
    assert all(torch.equal(ours.parts[key], value) for key, value in other.parts.items())
    assert ours.ranks == {}


def test_factors_are_padded_with_zeros() -> None:
    state = started()
    updates = [of_rank(state, rank, index) for index, rank in enumerate((1, 3, 3))]
    new = PLAIN.aggregate(state, updates, WEIGHTS)
    key = PartKey("block.0.query", Role.B)
    by_hand = sum(
        (p * u.parts[key][:, 1:].double() for p, u in zip(WEIGHTS[1:], updates[1:], strict=True)),
        torch.zeros(()),
    )
    torch.testing.assert_close(new.parts[key][:, 1:].double(), by_hand, atol=1e-7, rtol=0)


def test_weights_are_the_product_of_weight_and_norm_over_all_sites() -> None:
    state = started()
    updates = [of_rank(state, rank, index) for index, rank in enumerate((1, 2, 3))]
    norms = [adapter_norm(update.parts) for update in updates]
    assert max(norms) > 1.2 * min(norms)
    scaled = [weight * norm for weight, norm in zip(WEIGHTS, norms, strict=True)]
    found = HetLoRA(kaiming).aggregate(state, updates, WEIGHTS)
    by_norm = PLAIN.aggregate(state, updates, scaled)
    plain = PLAIN.aggregate(state, updates, WEIGHTS)
    for key, value in found.parts.items():
        expected = (plain if key.role is Role.HEAD else by_norm).parts[key]
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=0)


def test_products_that_are_all_zero_leave_the_plain_weights() -> None:
    state = PLAIN.init(LAYOUT, generator())
    down = PLAIN.broadcast(state)
    updates = [ClientUpdate(name, down, 1) for name in ("a", "b")]
    new = HetLoRA(kaiming).aggregate(state, updates, [1, 2])
    for key, value in state.parts.items():
        torch.testing.assert_close(new.parts[key], value)


def shrunk(down: Parts, low: int, factor: float) -> dict[PartKey, torch.Tensor]:
    """Every column of B beyond the first ``low`` multiplied by ``factor``."""
    parts = {key: value.clone() for key, value in down.items()}
    for key, value in parts.items():
        if key.role is Role.B:
            value[:, low:] *= factor
    return parts


@pytest.mark.parametrize("factor", [0.9, 1.0, 1.1])
def test_a_client_whose_tail_shrinks_is_pruned(factor: float) -> None:
    # ⌈0.5 · 3⌉ = 2: the tail is the third column alone, and equal is not smaller.
    method, state = HetLoRA(kaiming, pruning=0.5), started()
    update = ClientUpdate("one", shrunk(method.broadcast(state), 2, factor), 1)
    other = ClientUpdate("two", shrunk(method.broadcast(state), 2, 2.0), 1)
    new = method.aggregate(state, [update, other], [1, 1])
    assert new.ranks == ({"one": 2} if factor < 1 else {})


def test_what_is_not_in_the_tail_prunes_nobody() -> None:
    method, state = HetLoRA(kaiming, pruning=0.5), started()
    parts = shrunk(method.broadcast(state), 0, 0.5)
    for key, value in parts.items():
        if key.role is Role.B:
            value[:, 2:] *= 2
    assert method.aggregate(state, [ClientUpdate("one", parts, 1)], [1]).ranks == {}


def test_ranks_fall_from_round_to_round_down_to_one() -> None:
    method, state, seen = HetLoRA(kaiming, pruning=0.5), started(), []
    for _ in range(4):
        rank = state.ranks.get("one")
        parts = shrunk(method.broadcast(state, rank), 0, 0.9)
        full = ClientUpdate("two", shrunk(method.broadcast(state), 0, 1.5), 1)
        state = method.aggregate(state, [ClientUpdate("one", parts, 1), full], [1, 1])
        seen.append(state.ranks["one"])
    assert seen == [2, 1, 1, 1]  # ⌈1.5⌉, ⌈1⌉, and a tail of no columns never shrinks
    assert "two" not in state.ranks


@pytest.mark.parametrize("pruning", [0.0, 1.0, -0.5, math.nan])
def test_a_share_outside_the_open_interval_is_refused(pruning: float) -> None:
    with pytest.raises(ValueError, match="pruning = "):
        HetLoRA(kaiming, pruning=pruning)

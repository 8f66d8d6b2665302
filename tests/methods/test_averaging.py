"""The average of states has the mean of their effective weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedlr.lowrank.factors import AdapterSite
from fedlr.lowrank.subspace import kaiming, orthonormal
from fedlr.methods.averaging import average, can_average
from fedlr.methods.fed_sb import FedSB
from fedlr.methods.fedask import FedASK
from fedlr.methods.fedavg_lora import FedAvgLoRA
from fedlr.methods.fedex_lora import FedExLoRA
from fedlr.methods.fedsvd import FedSVD
from fedlr.methods.ffa_lora import FFALoRA
from fedlr.methods.flora import FLoRA
from fedlr.methods.method import RESIDUAL_ROLES, GlobalState, Layout, Method, PartKey, Parts, Role
from fedlr.methods.registry import METHODS
from tests.methods.federation import LAYOUT, clients, effective, generator, run_round
from tests.methods.toys import Folding, TwoPhase

EXACT: list[Method] = [
    *(FedSVD(orthonormal), FedSVD(kaiming), FFALoRA(kaiming), FedASK(kaiming)),
    *(FedSB(kaiming), FedExLoRA(kaiming), FLoRA(orthonormal), Folding(orthonormal)),
]

TALL = Layout(
    sites=(
        AdapterSite("tall", out_features=12, in_features=3, rank=2, scaling=4.0),
        AdapterSite("wide", out_features=3, in_features=12, rank=2, scaling=0.25),
    )
)


def history(method: Method, rounds: int, layout: Layout = LAYOUT) -> list[GlobalState]:
    state, states = method.init(layout, generator(1)), []
    for index in range(rounds):
        state, _ = run_round(method, state, clients(3, seed=50 * (index + 1)), [1, 2, 3])
        states.append(state)
    return states


def mean_weights(states: Sequence[GlobalState]) -> dict[str, Tensor]:
    every = [effective(state.layout, state.parts) for state in states]
    return {name: sum((e[name] for e in every), torch.zeros(())) / len(every) for name in every[0]}


def error(states: Sequence[GlobalState]) -> float:
    """Largest relative Frobenius error of the average over sites and heads."""
    found, wanted = effective(states[-1].layout, average(states)), mean_weights(states)
    return max(float((found[n] - wanted[n]).norm() / wanted[n].norm()) for n in wanted)


@pytest.mark.parametrize("method", EXACT, ids=lambda method: method.name)
@pytest.mark.parametrize("rounds", [2, 7])
@pytest.mark.parametrize("layout", [LAYOUT, TALL], ids=["square", "tall"])
def test_it_is_exact_with_a_shared_row_space_a_residual_or_a_core(
    method: Method, rounds: int, layout: Layout
) -> None:
    # 7 · 3 stacked columns exceed min(m, n) = 6 in one layout and 3 in the other.
    states = history(method, rounds, layout)
    assert error(states) < 1e-5
    for key, value in average(states).items():
        own = states[-1].parts[key]
        assert value.dtype == own.dtype
        if key.role not in RESIDUAL_ROLES:
            assert value.shape == own.shape


def test_the_law_distinguishes_the_mean_from_the_last_state() -> None:
    states = history(FedSVD(orthonormal), 3)
    last, wanted = effective(LAYOUT, states[-1].parts), mean_weights(states)
    assert max(float((last[n] - wanted[n]).norm() / wanted[n].norm()) for n in wanted) > 0.1


def test_averaging_the_factors_separately_would_be_wrong_and_is_not_done() -> None:
    # FedSVD rotates A in every round, so mean(B)·mean(A) ≠ mean(B·A).
    states = history(FedSVD(orthonormal), 3)
    naive = {
        key: torch.stack([state.parts[key].double() for state in states]).mean(0)
        for key in states[0].parts
    }
    found, wanted = effective(LAYOUT, naive), mean_weights(states)
    assert max(float((found[n] - wanted[n]).norm() / wanted[n].norm()) for n in wanted) > 0.05
    assert error(states) < 1e-5


def test_with_moving_row_spaces_it_is_the_best_of_its_rank() -> None:
    states = history(FedAvgLoRA(kaiming), 4)
    found, wanted = effective(LAYOUT, average(states)), mean_weights(states)
    for site in LAYOUT.sites:
        tail = torch.linalg.svdvals(wanted[site.name])[site.rank :].norm()
        assert float(tail) > 1e-2
        assert float((found[site.name] - wanted[site.name]).norm()) == pytest.approx(
            float(tail), rel=1e-4
        )


def test_one_state_comes_back_as_it_is() -> None:
    (state,) = history(FedSVD(orthonormal), 1)
    assert average([state]) is state.parts


def test_inputs_are_not_mutated_and_dtypes_stay() -> None:
    states = history(FedSVD(orthonormal), 2)
    before = [{key: value.clone() for key, value in state.parts.items()} for state in states]
    parts = average(states)
    assert {value.dtype for value in parts.values()} == {torch.float32}
    for state, copy in zip(states, before, strict=True):
        assert all(torch.equal(state.parts[key], copy[key]) for key in copy)


def test_what_cannot_be_averaged_is_refused() -> None:
    states = history(FedSVD(orthonormal), 2)
    with pytest.raises(ValueError, match="empty"):
        average([])
    with pytest.raises(ValueError, match="different layouts"):
        average([*history(FedSVD(orthonormal), 1, TALL), *states])


def test_states_that_fit_nowhere_are_refused() -> None:
    states = history(FedSVD(orthonormal), 2)
    core = PartKey("block.0.query", Role.CORE)
    cored = [replace(state, parts={**state.parts, core: torch.eye(3)}) for state in states]
    with pytest.raises(ValueError, match="different layouts"):
        average([cored[0], states[1]])
    with pytest.raises(ValueError, match="moves around a core"):
        average(cored)
    method = TwoPhase(orthonormal)
    state = method.init(LAYOUT, generator())
    released: dict[str, Parts] = {}
    phase, down = method.plan(state).phases[0], method.broadcast(state)
    updates = [client.answer(LAYOUT, phase, down, released) for client in clients(2)]
    middle = method.aggregate(state, updates, [1, 1])
    assert not can_average(middle)
    with pytest.raises(ValueError, match=r"\['rotation'\] in phase 1 cannot be averaged"):
        average([middle, middle])


@pytest.mark.parametrize("name", METHODS)
def test_every_shipped_method_can_be_averaged_between_rounds(name: str) -> None:
    states = history(METHODS[name](orthonormal), 3)
    assert all(can_average(state) for state in states)
    found = average(states)
    heads = [key for key in found if key.role is Role.HEAD]
    wanted = mean_weights(states)
    assert heads
    for key in heads:
        torch.testing.assert_close(found[key].double(), wanted[key.site], atol=1e-6, rtol=0)


def test_a_residual_holds_all_of_the_mean() -> None:
    for method in (FLoRA(orthonormal), FedExLoRA(orthonormal)):
        found = average(history(method, 3))
        for site in LAYOUT.sites:
            assert not found[PartKey(site.name, Role.B)].any()
            rank = found[PartKey(site.name, Role.RESIDUAL_A)].shape[0]
            assert 0 < rank <= min(site.out_features, site.in_features)


def test_a_residual_that_only_a_later_state_has_is_counted() -> None:
    before, after = history(FedSVD(orthonormal), 2)
    site = LAYOUT.sites[0]
    rest = {
        PartKey(site.name, Role.RESIDUAL_B): torch.ones(site.out_features, 1),
        PartKey(site.name, Role.RESIDUAL_A): torch.ones(1, site.in_features),
    }
    states = [before, replace(after, parts={**after.parts, **rest})]
    assert error(states) < 1e-5


def test_cores_are_averaged_elementwise_between_the_same_factors() -> None:
    states = history(FedSB(orthonormal), 3)
    found = average(states)
    for site in LAYOUT.sites:
        core = PartKey(site.name, Role.CORE)
        mean = torch.stack([state.parts[core] for state in states]).mean(dim=0)
        torch.testing.assert_close(found[core], mean, atol=1e-6, rtol=0)
        for role in (Role.A, Role.B):
            key = PartKey(site.name, role)
            assert torch.equal(found[key], states[0].parts[key])

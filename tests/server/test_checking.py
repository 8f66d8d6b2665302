"""Every way in which an update can be wrong has its code; the right one passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fedlr.errors import BadUpdate
from fedlr.methods.method import ClientUpdate, GlobalState, PartKey, Phase, Role
from fedlr.training.jobs import Abstention, Job
from server.checking import LARGEST_NORM, check_claims, check_update, references
from tests.server.toys import LAYOUT, ToySite, first_state, method, with_parts
from tests.server.toys import PROVENANCE as DIGESTS

SITE = LAYOUT.sites[0]
B_SHAPE = (SITE.out_features, SITE.rank)


def private_phase(name: str = "fedsvd") -> tuple[GlobalState, Phase]:
    state = first_state(name)
    return state, method(name).plan(state).phases[0]


def job_of(state: GlobalState, phase: Phase, name: str = "fedsvd") -> Job:
    parts = method(name).broadcast(state)
    return Job("run", 0, state.phase, "n", phase.train, phase.send, parts, DIGESTS)


def good_update(name: str = "fedsvd") -> ClientUpdate:
    state, phase = private_phase(name)
    update = ToySite("client-00", seed=0).answer(job_of(state, phase, name))
    assert isinstance(update, ClientUpdate)
    return update


def code_of(update: ClientUpdate, bound: float | None = None, name: str = "fedsvd") -> str:
    state, phase = private_phase(name)
    with pytest.raises(BadUpdate) as caught:
        check_update(update, state, phase, bound)
    return caught.value.code


def without(update: ClientUpdate) -> ClientUpdate:
    key = PartKey(SITE.name, Role.B)
    return replace(update, parts={k: v for k, v in update.parts.items() if k != key})


@pytest.mark.parametrize("name", ["fedsvd", "ffa_lora", "fedavg_lora"])
def test_an_honest_update_passes(name: str) -> None:
    state, phase = private_phase(name)
    check_update(good_update(name), state, phase)


SPOILED: list[tuple[str, Callable[[ClientUpdate], ClientUpdate]]] = [
    ("names", without),
    ("names", lambda u: with_parts(u, a=torch.zeros(SITE.rank, SITE.in_features))),
    ("shape", lambda u: with_parts(u, b=torch.zeros(B_SHAPE[0], B_SHAPE[1] - 1))),
    ("shape", lambda u: with_parts(u, b=torch.zeros(B_SHAPE[1], B_SHAPE[0]))),
    ("shape", lambda u: with_parts(u, b=torch.zeros(1, *B_SHAPE))),
    ("dtype", lambda u: with_parts(u, b=torch.zeros(B_SHAPE, dtype=torch.float64))),
    ("not_finite", lambda u: with_parts(u, b=torch.full(B_SHAPE, math.nan))),
    ("not_finite", lambda u: with_parts(u, b=torch.full(B_SHAPE, -math.inf))),
    ("norm", lambda u: with_parts(u, b=torch.full(B_SHAPE, 3e38))),
]


@pytest.mark.parametrize(("code", "spoil"), SPOILED)
def test_a_spoiled_update_is_refused(
    code: str, spoil: Callable[[ClientUpdate], ClientUpdate]
) -> None:
    assert code_of(spoil(good_update())) == code


def test_the_bound_is_on_the_change_of_each_array() -> None:
    state, phase = private_phase()
    key = PartKey(SITE.name, Role.B)
    # A large broadcast value does not count: one entry changes by exactly 3.
    state = replace(state, parts={**state.parts, key: torch.full(B_SHAPE, 100.0)})
    changed = state.parts[key].clone()
    changed[0, 0] += 3.0
    sent = {k: state.parts[k] for k in references(state, phase)}
    update = ClientUpdate("client-00", {**sent, key: changed}, steps=1)
    check_update(update, state, phase, bound=3.0)
    with pytest.raises(BadUpdate, match="changed by 3") as caught:
        check_update(update, state, phase, bound=2.99)
    assert caught.value.code == "norm"


def test_the_largest_norm_keeps_the_aggregate_finite() -> None:
    state, phase = private_phase()
    update = with_parts(good_update(), b=torch.full(B_SHAPE, 0.9 * LARGEST_NORM / math.sqrt(18)))
    check_update(update, state, phase)
    after = method().aggregate(state, [update], [1.0])
    assert all(bool(value.isfinite().all()) for value in after.parts.values())


def projecting() -> tuple[GlobalState, Phase, ClientUpdate]:
    """The second phase of the two-phase toy and an honest answer to it."""
    two, (state, phase) = method("two_phase"), private_phase("two_phase")
    site = ToySite("client-00", seed=0)
    update = site.answer(job_of(state, phase, "two_phase"))
    assert isinstance(update, ClientUpdate)
    state = two.aggregate(state, [update], [1.0])
    phase = two.plan(state).phases[1]
    answer = site.answer(job_of(state, phase, "two_phase"))
    assert isinstance(answer, ClientUpdate)
    return state, phase, answer


def test_a_projected_core_is_checked_though_it_was_never_broadcast() -> None:
    state, phase, answer = projecting()
    core = PartKey(SITE.name, Role.CORE)
    assert references(state, phase)[core].shape == (SITE.rank, SITE.rank)
    # The round began at B = 0, so the allowed norm is the bound alone, and ‖QᵀB_k‖ ≤ ‖B_k‖.
    longest = max(float(value.norm()) for value in answer.parts.values())
    check_update(answer, state, phase, bound=longest * 1.001)
    with pytest.raises(BadUpdate, match="changed by"):
        check_update(answer, state, phase, bound=longest * 0.999)
    for code, wrong in [
        ("shape", torch.zeros(SITE.rank, SITE.rank + 1)),
        ("not_finite", torch.full((SITE.rank, SITE.rank), math.nan)),
        ("norm", torch.full((SITE.rank, SITE.rank), 1e3)),
    ]:
        with pytest.raises(BadUpdate) as caught:
            check_update(with_parts(answer, core=wrong), state, phase, bound=1e3)
        assert caught.value.code == code


def test_a_projected_core_may_be_as_long_as_the_b_it_projects() -> None:
    state, phase, answer = projecting()
    # ‖B‖ = 5 before the round and a bound of 1: B_k, and so its projection, has norm ≤ 6.
    b = torch.zeros(B_SHAPE)
    b[0, 0] = 5.0
    state = replace(state, parts={**state.parts, PartKey(SITE.name, Role.B): b})
    small = {key: torch.zeros_like(value) for key, value in answer.parts.items()}
    core = torch.zeros(SITE.rank, SITE.rank)
    core[0, 0] = 5.99
    check_update(with_parts(replace(answer, parts=small), core=core), state, phase, bound=1.0)
    core[0, 0] = 6.01
    with pytest.raises(BadUpdate, match="changed by"):
        check_update(with_parts(replace(answer, parts=small), core=core), state, phase, bound=1.0)


def test_a_truncated_broadcast_expects_arrays_of_the_lower_rank() -> None:
    state, phase = private_phase()
    phase = replace(phase, rank=1)
    shapes = {key: tuple(value.shape) for key, value in references(state, phase).items()}
    assert shapes[PartKey(SITE.name, Role.B)] == (SITE.out_features, 1)
    with pytest.raises(BadUpdate, match="has shape"):
        check_update(good_update(), state, phase)


def test_a_phase_whose_arrays_the_state_does_not_fix_is_an_error_of_the_method() -> None:
    state, phase = private_phase()
    with pytest.raises(ValueError, match="does not fix"):
        references(state, replace(phase, send=frozenset({Role.CORE})))


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("names", {"client": "client-01"}),
        ("names", {"epsilon": -0.5}),
        ("not_finite", {"epsilon": math.nan}),
    ],
)
def test_a_false_claim_is_refused(code: str, changes: dict[str, str | float]) -> None:
    update = good_update()
    check_claims(replace(update, epsilon=math.inf), "client-00")
    with pytest.raises(BadUpdate) as caught:
        check_claims(replace(update, **changes), "client-00")  # type: ignore[arg-type]
    assert caught.value.code == code


def test_a_proxy_that_reaches_no_agent_may_name_nobody() -> None:
    check_claims(Abstention("", "failed"), "client-00")
    with pytest.raises(BadUpdate, match="announced"):
        check_claims(Abstention("client-01", "failed"), "client-00")
    with pytest.raises(BadUpdate, match="announced"):
        check_claims(ClientUpdate("", {}, 1), "client-00")

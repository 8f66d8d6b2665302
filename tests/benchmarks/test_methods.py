"""What the server does for one round of each method, at RoBERTa-large's size."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fedlr.lowrank.factors import AdapterSite
from fedlr.lowrank.subspace import orthonormal
from fedlr.methods.method import ClientUpdate, GlobalState, Layout, Method, Parts
from fedlr.methods.registry import METHODS
from tests.methods.federation import Client, clients, effective, generator, run_round

from .ratios import most, seconds
from .report import Report, at_most

pytestmark = pytest.mark.bench

SITES, SIDE, RANK, COHORT = 48, 1024, 8, 10
"""Query and value of RoBERTa-large's 24 layers; ten clients a round."""

LAYOUT = Layout(
    tuple(AdapterSite(f"layer.{i // 2}.{i % 2}", SIDE, SIDE, RANK, 1.0) for i in range(SITES))
)
HEAD = Layout((), {"head": torch.zeros(20, SIDE)})


@dataclass(frozen=True)
class Ready:
    """A round whose clients have answered: what the server is timed on."""

    method: Method
    phases: tuple[tuple[GlobalState, list[ClientUpdate]], ...]
    after: GlobalState
    released: dict[str, Parts]

    def serve(self) -> None:
        for state, updates in self.phases:
            self.method.aggregate(state, updates, [1.0] * len(updates))


def ready(name: str, layout: Layout) -> Ready:
    """The second round: B ≠ 0, and there is a residual where the method has one."""
    method = METHODS[name](orthonormal)
    state, _ = run_round(method, method.init(layout, generator()), clients(COHORT, 7), [1] * COHORT)
    cohort: list[Client] = clients(COHORT, 70)
    released: dict[str, Parts] = {}
    phases = []
    for phase in method.plan(state).phases:
        down = method.broadcast(state)
        updates = [client.answer(layout, phase, down, released) for client in cohort]
        phases.append((state, updates))
        state = method.aggregate(state, updates, [1.0] * COHORT)
    return Ready(method, tuple(phases), state, released)


def expected(name: str, round_: Ready, layout: Layout) -> dict[str, Tensor]:
    """The effective weights that the method's law demands, densely, in float64."""
    first = round_.phases[0][0]
    each = [{**first.parts, **parts} for parts in round_.released.values()]
    mean = {
        key: sum((parts[key].double() for parts in each), torch.zeros(())) / len(each)
        for key in each[0]
    }
    if name == "fedavg_lora":
        return effective(layout, mean)
    dense = [effective(layout, parts) for parts in each]
    found = {key: torch.stack([own[key] for own in dense]).mean(0) for key in dense[0]}
    if name == "flexlora":
        for key, value in found.items():
            left, sigma, right = torch.linalg.svd(value)
            found[key] = (left[:, :RANK] * sigma[:RANK]) @ right[:RANK]
    if name == "hetlora":
        norms = [sum(float(w.norm() ** 2) for w in own.values()) ** 0.5 for own in dense]
        shares = [norm / sum(norms) for norm in norms]
        weighted = {
            key: torch.stack(
                [parts[key].double() * share for parts, share in zip(each, shares, strict=True)]
            )
            for key in each[0]
        }
        found = effective(layout, {key: value.sum(0) for key, value in weighted.items()})
    return found


@pytest.mark.parametrize("name", METHODS)
def test_server_time_of_a_round(report: Report, name: str) -> None:
    one = HEAD if name == "head_only" else Layout(LAYOUT.sites[:1])
    small = ready(name, one)
    wanted, found = expected(name, small, one), effective(one, small.after.parts)
    figure = max(float((found[k] - wanted[k]).norm() / wanted[k].norm()) for k in wanted)
    gate = report.parity(
        f"{name}, {SITES} sites {SIDE}², r = {RANK}, {COHORT} clients",
        figure,
        1e-5,
        "effective weight of one site",
    )
    full = ready(name, HEAD if name == "head_only" else LAYOUT)

    def times() -> list[float]:
        full.serve()
        return [1e3 * seconds(full.serve) for _ in range(most(15))]

    goal = at_most(30) if name == "fedsvd" else None
    gate.absolute("time of the server's part of a round", times, "ms", goal)

"""The server's step, exact through two thin QRs, against the dense SVD of the product."""

from __future__ import annotations

import pytest
import torch

from fedlr.lowrank.factors import Factors
from fedlr.lowrank.svd import refactorise, refactorise_many

from .ratios import Side, most, seconds
from .report import Goal, Report, at_least

pytestmark = pytest.mark.bench

SITES = 48
"""Query and value of RoBERTa-large."""


def pair(side: int, rank: int, seed: int = 0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    b, a = (torch.randn(*shape, generator=generator) for shape in ((side, rank), (rank, side)))
    return Factors(b=b, a=a)


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    """Relative Frobenius distance."""
    return float((left - right).norm() / right.norm())


def departure(found: Factors, given: Factors) -> float:
    """How far it is from what the dense SVD gives: the product, orthonormal A, ordered B.

    Together the three are its definition, so that no second dense SVD is needed.
    """
    norms = found.b.norm(dim=0)
    eye = torch.eye(given.rank)
    gram = torch.diag(norms.pow(2))
    return max(
        distance(found.product(), given.product()),
        distance(found.a @ found.a.mT, eye),
        distance(found.b.mT @ found.b, gram),
        float((norms.diff() / norms[0]).clamp_min(0).max()),
    )


@pytest.mark.parametrize(
    ("side", "rank", "pairs", "goal"),
    [(1024, 8, 9, at_least(1000)), (4096, 16, 2, at_least(10_000))],
)
def test_against_the_dense_svd(
    report: Report, side: int, rank: int, pairs: int, goal: Goal
) -> None:
    given = pair(side, rank)
    figure = departure(refactorise(given), given)
    gate = report.parity(f"SVD {side}², r = {rank}", figure, 1e-5, "product, AAᵀ, BᵀB, order")

    def dense() -> object:
        return torch.linalg.svd(given.product(), full_matrices=False)

    ours = Side("refactorise", lambda: refactorise(given), repeats=50)
    gate.ratio(
        Side("dense SVD", dense, warm=pairs < 6),
        ours,
        pairs,
        goal,
        "dense SVD at 4096²: two pairs only, so no interval",
    )


def test_all_sites_of_a_large_model_in_one_call(report: Report) -> None:
    given = {f"site {index}": pair(1024, 8, index) for index in range(SITES)}
    found = refactorise_many(given)
    figure = max(departure(found[name], given[name]) for name in given)
    gate = report.parity(f"SVD {SITES} sites 1024²", figure, 1e-5, "product, AAᵀ, BᵀB, order")

    def times() -> list[float]:
        return [1e3 * seconds(lambda: refactorise_many(given)) for _ in range(most(30))]

    gate.absolute("time of refactorise_many", times, "ms")

"""Effective rank, principal angles and intruders: laws, and NumPy or SciPy as the reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles
from torch import Tensor

from fedlr.lowrank.factors import Factors
from fedlr.lowrank.geometry import (
    affordable,
    effective_rank,
    leading_similarity,
    principal_angles,
)
from fedlr.lowrank.svd import refactorise

POSITIVE = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None)
@given(POSITIVE, st.floats(1e-6, 1e6))
def test_effective_rank_counts_directions_whatever_the_scale(values: list[float], c: float) -> None:
    sigma = torch.tensor(values, dtype=torch.float64)
    found = effective_rank(sigma).item()
    assert 1 - 1e-9 <= found <= len(values) + 1e-9
    assert effective_rank(c * sigma).item() == pytest.approx(found, rel=1e-9)
    with_zeros = torch.cat([sigma, torch.zeros(3)])
    assert effective_rank(with_zeros).item() == pytest.approx(found, rel=1e-12)
    # exp of an entropy: two copies of a spectrum have twice its rank.
    assert effective_rank(sigma.repeat(2)).item() == pytest.approx(2 * found, rel=1e-9)


def test_effective_rank_by_hand() -> None:
    # p = (3/4, 1/4): exp(-(3/4) ln(3/4) - (1/4) ln(1/4)) = 4 / 3**(3/4).
    assert effective_rank(torch.tensor([3.0, 1.0])).item() == pytest.approx(4 / 3**0.75)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_effective_rank_refuses_what_is_no_singular_value(bad: float) -> None:
    with pytest.raises(ValueError, match="negative, NaN or infinite"):
        effective_rank(torch.tensor([1.0, bad]))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 3))
def test_angles_are_those_of_scipy(seed: int, rank: int, more: int) -> None:
    a, other = normal(seed, rank, 12), normal(seed + 1, rank + more, 12)
    expected = subspace_angles(a.mT.numpy(), other.mT.numpy())[::-1].copy()
    torch.testing.assert_close(
        principal_angles(a, other), torch.from_numpy(expected), atol=1e-12, rtol=1e-9
    )


@pytest.mark.parametrize("angle", [1e-12, 1e-9, 1e-4, 0.7, 1.5])
def test_an_angle_is_exact_where_a_cosine_has_lost_it(angle: float) -> None:
    a = torch.zeros(2, 5, dtype=torch.float64)
    a[0, 0], a[1, 1] = 1.0, 1.0
    turned = a.clone()
    turned[1, 1], turned[1, 4] = math.cos(angle), math.sin(angle)
    assert principal_angles(a, turned)[-1].item() == pytest.approx(angle, rel=1e-6)
    assert principal_angles(a, turned)[0].item() < 1e-14


def test_angles_see_the_space_and_not_its_basis() -> None:
    a, other, mix = normal(0, 3, 9), normal(1, 3, 9), normal(2, 3, 3)
    torch.testing.assert_close(principal_angles(mix @ a, other), principal_angles(a, other))
    batch = principal_angles(torch.stack([a, other]), torch.stack([other, other]))
    torch.testing.assert_close(batch[0], principal_angles(a, other))
    assert batch[1].max().item() < 1e-7


def test_refactorising_keeps_the_row_space() -> None:
    pair = Factors(normal(0, 7, 3).float(), normal(1, 3, 9).float())
    assert principal_angles(refactorise(pair).a, pair.a).max().item() < 1e-6


def test_angles_refuse_spaces_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="a no more rows than other"):
        principal_angles(torch.ones(2, 4), torch.ones(1, 4))
    with pytest.raises(ValueError, match="other holds NaN"):
        principal_angles(torch.eye(2), torch.full((2, 2), math.nan))


@pytest.mark.parametrize(("m", "n"), [(9, 6), (6, 9), (7, 7)])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_similarity_is_that_of_two_full_decompositions(m: int, n: int, scale: float) -> None:
    weight, pair = normal(m, m, n), Factors(normal(1, m, 2), normal(2, 2, n), scaling=scale)
    known = np.linalg.svd(weight.numpy(), full_matrices=False)[0]
    tuned = np.linalg.svd((weight + pair.product()).numpy(), full_matrices=False)[0]
    expected = np.abs(known.T @ tuned).max(axis=0)[:5]
    found = leading_similarity(weight, pair, 5)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)


def test_without_an_update_there_is_no_intruder_and_a_planted_one_is_found() -> None:
    n = 64
    weight = normal(0, n, n)
    nothing = Factors(torch.zeros(n, 1), torch.ones(1, n))
    assert leading_similarity(weight.bfloat16(), nothing).min().item() > 1 - 1e-9
    # A direction that is spread evenly over all those of W, and stronger than any of them.
    left, sigma, right = torch.linalg.svd(weight)
    spread = torch.full((n, 1), 1 / math.sqrt(n), dtype=torch.float64)
    strong = Factors(50 * sigma[0] * left @ spread, (right.mT @ spread).mT)
    found = leading_similarity(weight, strong)
    assert found[0].item() < 0.2
    assert found[1:].min().item() > 0.5


def test_similarity_refuses_what_is_not_finite_or_does_not_fit() -> None:
    pair = Factors(torch.ones(3, 1), torch.ones(1, 4))
    with pytest.raises(ValueError, match="weight has shape"):
        leading_similarity(torch.ones(4, 3), pair)
    with pytest.raises(ValueError, match="NaN or infinite"):
        leading_similarity(torch.full((3, 4), math.inf), pair)


def test_the_choice_of_sites_fits_the_work_and_reaches_over_the_model() -> None:
    shapes = [(10, 10)] * 12
    assert affordable(shapes, 4000) == [0, 3, 6, 9]
    assert affordable([]) == []

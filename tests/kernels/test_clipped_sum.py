"""δᵀz, norms, clip factors and the clipped sum, on numbers small enough to do by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlr.kernels.clipped_sum.naive import (
    clip_factors,
    clipped_sum,
    squared_norms,
    sum_rows,
    unit_gradients,
)


def test_a_unit_gets_the_sum_over_its_rows_and_tokens() -> None:
    delta = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 0.0]], [[0.0, 3.0]] * 2])
    z = torch.tensor([[[1.0], [10.0]], [[5.0], [7.0]], [[1.0], [2.0]]])
    found = unit_gradients(delta, z, torch.tensor([1, 1, 0]), 3)
    # Row 0: (1·1, 1·10); row 1: (2·5, 0); row 2: (0, 3·1 + 3·2). Unit 1 = rows 0 + 1.
    assert found.tolist() == [[[0.0], [9.0]], [[11.0], [10.0]], [[0.0], [0.0]]]


@pytest.mark.parametrize("units", [0, 2])
def test_no_rows_give_zeros(units: int) -> None:
    found = unit_gradients(
        torch.zeros(0, 3, 4), torch.zeros(0, 3, 2), torch.zeros(0, dtype=torch.int64), units
    )
    assert torch.equal(found, torch.zeros(units, 4, 2))


@given(st.integers(0, 6), st.integers(1, 4), st.integers(0, 2**31 - 1))
def test_it_is_autograd_of_the_linear_map(rows: int, tokens: int, seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    delta = torch.randn(rows, tokens, 3, generator=draws, dtype=torch.float64)
    z = torch.randn(rows, tokens, 2, generator=draws, dtype=torch.float64)
    index = torch.randint(0, 4, (rows,), generator=draws)
    found = unit_gradients(delta, z, index, 4)
    for unit in range(4):
        b = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
        loss = (delta[index == unit] * (z[index == unit] @ b.T)).sum()
        (expected,) = torch.autograd.grad(loss, b)
        assert torch.allclose(found[unit], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("delta", "z", "index"),
    [((2, 3), (2, 3, 1), (2,)), ((2, 3, 1), (2, 4, 1), (2,)), ((2, 3, 1), (2, 3, 1), (3,))],
)
def test_shapes_that_disagree_are_refused(
    delta: tuple[int, ...], z: tuple[int, ...], index: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"dimensions|shape"):
        unit_gradients(torch.zeros(delta), torch.zeros(z), torch.zeros(index, dtype=torch.int64), 2)


def test_rows_that_are_their_own_units_are_not_copied() -> None:
    rows = torch.ones(3, 2)
    assert sum_rows(rows, torch.arange(3), 3) is rows
    assert sum_rows(rows, torch.tensor([0, 2, 1]), 3) is not rows


@given(
    st.lists(st.floats(0, 2.0**60, width=32), min_size=1, max_size=8),
    st.floats(2.0**-20, 2.0**20, width=32),
)
def test_clipped_norms_are_the_smaller_of_norm_and_bound(norms: list[float], bound: float) -> None:
    gradients = torch.tensor(norms).unsqueeze(1)
    factors = clip_factors(squared_norms(gradients), bound)
    clipped = factors * gradients.flatten()
    # Three float32 roundings: the root, the quotient, the product.
    assert (clipped <= bound * (1 + 4 * torch.finfo(torch.float32).eps)).all()
    small = gradients.flatten() < bound * (1 - 1e-6)
    assert torch.equal(clipped[small], gradients.flatten()[small])
    large = gradients.flatten() > bound
    assert torch.allclose(clipped[large], torch.tensor(bound), rtol=1e-6, atol=0)


BAD = [math.nan, math.inf, -math.inf, 3e38]


@pytest.mark.parametrize("bad", BAD)
def test_a_norm_that_is_no_number_counts_for_nothing(bad: float) -> None:
    gradients = torch.tensor([[3.0, 4.0], [bad, 1.0], [0.0, 0.0]])
    factors = clip_factors(squared_norms(gradients), 1.0)
    assert factors.tolist() == pytest.approx([0.2, 0.0, 1.0])
    assert clipped_sum(gradients, factors).tolist() == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, math.inf])
def test_a_bound_must_be_a_positive_number(bound: float) -> None:
    with pytest.raises(ValueError, match="bound"):
        clip_factors(torch.ones(1), bound)


def test_no_units_sum_to_zeros() -> None:
    assert torch.equal(clipped_sum(torch.zeros(0, 2, 3), torch.zeros(0)), torch.zeros(2, 3))


def test_the_sum_is_no_matrix_product_that_may_be_rounded() -> None:
    """bfloat16 and TensorFloat-32 products keep 8 to 11 bits; 1 + 2⁻²⁰ needs 21."""
    value = 1 + 2.0**-20
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = clipped_sum(torch.full((64, 8), value), torch.ones(64))
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found, torch.full((8,), 64 * value))

"""The two passes against their twin, on shapes that fit no tile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlr.kernels.clipped_sum import naive
from tests.kernels.execution import Machine
from tests.kernels.parity import Rows, rows

SHAPES = [  # (N, T, m, r), U
    ((1, 1, 1, 1), 1),
    ((5, 7, 70, 3), 4),
    ((3, 1, 5, 17), 2),
    ((6, 33, 65, 8), 20),
    ((4, 40, 3, 16), 4),
    ((0, 4, 3, 2), 3),
    ((0, 4, 3, 2), 0),
    ((2, 0, 3, 2), 2),
]
CASES = pytest.mark.parametrize(("shape", "units"), SHAPES, ids=str)


@CASES
def test_both_passes_agree_with_the_twin(
    machine: Machine, dtype: torch.dtype, shape: tuple[int, int, int, int], units: int
) -> None:
    case = rows(shape, units, dtype)
    norms = machine.run("norms", case.delta, case.z, case.unit_index, units)
    total = machine.run("sums", case.delta, case.z, case.unit_index, case.factors)
    assert norms.dtype == total.dtype == torch.float32
    case.check_norms(norms)
    case.check_sum(total)


@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_twin_keeps_its_own_bounds(
    dtype: torch.dtype, shape: tuple[int, int, int, int], units: int
) -> None:
    case = rows(shape, units, dtype)
    case.check_norms(naive.unit_squared_norms(case.delta, case.z, case.unit_index, units))
    case.check_sum(naive.weighted_sum(case.delta, case.z, case.unit_index, case.factors))


@given(
    st.tuples(st.integers(1, 6), st.integers(1, 40), st.integers(1, 70), st.integers(1, 20)),
    st.integers(1, 19),
    st.integers(0, 2**31 - 1),
)
@settings(derandomize=True, max_examples=15, deadline=None)
def test_any_shape_and_assignment(
    machine: Machine, shape: tuple[int, int, int, int], units: int, seed: int
) -> None:
    case = rows(shape, units, torch.float32, seed)
    case.check_norms(machine.run("norms", case.delta, case.z, case.unit_index, units))
    case.check_sum(machine.run("sums", case.delta, case.z, case.unit_index, case.factors))


def test_delta_and_z_may_have_two_dtypes(machine: Machine) -> None:
    case = rows((3, 9, 20, 4), 2, torch.float16)
    case = replace(case, z=case.z.float() * (1 + 2.0**-15))
    case.check_norms(machine.run("norms", case.delta, case.z, case.unit_index, 2))
    case.check_sum(machine.run("sums", case.delta, case.z, case.unit_index, case.factors))


def test_other_strides_are_read_correctly(machine: Machine) -> None:
    case = rows((4, 5, 6, 3), 3, torch.float32)
    case.check_norms(machine.run("transposed", case.delta, case.z, case.unit_index, 3))


def test_what_cancels_is_clipped_by_what_was_measured(machine: Machine) -> None:
    """G_u is 1e-7 of its terms: only if both passes round alike does the bound hold."""
    draws = torch.Generator().manual_seed(1)
    half = torch.randn(1, 40, 33, generator=draws), torch.randn(1, 40, 5, generator=draws)
    delta = torch.cat([half[0], -half[0] * (1 + 2.0**-22)], 1)
    z = torch.cat([half[1], half[1]], 1)
    index = torch.zeros(1, dtype=torch.int64)
    squared = machine.run("norms", delta, z, index, 1)
    terms = torch.linalg.vector_norm(delta) * torch.linalg.vector_norm(z)
    assert 0 < float(squared.sqrt()) < 1e-5 * terms
    bound = float(squared.sqrt()) / 3
    clipped = machine.run("sums", delta, z, index, naive.clip_factors(squared, bound))
    # Root, quotient and product round once each, the norm as in `Rows.check_norms`.
    assert float(clipped.double().norm()) == pytest.approx(bound, rel=1e-5)


def test_float32_products_keep_float32_bits(machine: Machine) -> None:
    """TensorFloat-32 has 10 bits behind the point; 1 + 2⁻¹¹ needs 11, its square 22."""
    value = torch.full((1, 1, 1), 1 + 2.0**-11)
    index, one = torch.zeros(1, dtype=torch.int64), torch.ones(1)
    assert machine.run("norms", value, torch.ones(1, 1, 1), index, 1).item() == (1 + 2.0**-11) ** 2
    assert machine.run("sums", value, torch.ones(1, 1, 1), index, one).item() == 1 + 2.0**-11


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["delta", "z"])
def test_a_unit_that_is_no_number_is_left_out(machine: Machine, bad: float, where: str) -> None:
    case = rows((4, 3, 66, 2), 4, torch.float32)
    delta, z, index = case.delta.clone(), case.z.clone(), torch.tensor([0, 1, 2, 1])
    {"delta": delta, "z": z}[where][3, 1, -1] = bad
    squared = machine.run("norms", delta, z, index, 4)
    assert torch.isfinite(squared).tolist() == [True, False, True, True]
    factors = naive.clip_factors(squared, 1.0)
    found = machine.run("sums", delta, z, index, factors)
    without = Rows(case.delta[[0, 2]], case.z[[0, 2]], index[[0, 2]], factors)
    without.check_sum(found)


def test_shapes_that_disagree_are_refused(machine: Machine) -> None:
    case = rows((2, 3, 4, 1), 2, torch.float32)
    with pytest.raises(ValueError, match=r"z \(rows, tokens\) has shape"):
        machine.run("norms", case.delta, case.z[:, :2], case.unit_index, 2)
    with pytest.raises(ValueError, match="unit_index has shape"):
        machine.run("sums", case.delta, case.z, case.unit_index[:1], case.factors)


def test_memory_is_poisoned(machine: Machine) -> None:
    """Else no test here notices an element that is never written."""
    assert machine.run("uninitialised", 3).isnan().all()


Pass = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def twin(delta: Tensor, z: Tensor, index: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    norms = naive.unit_squared_norms(delta, z, index, factors.shape[0])
    return norms, naive.weighted_sum(delta, z, index, factors)


def without_last(dimension: int, of_z: bool = False) -> Pass:
    def wrong(delta: Tensor, z: Tensor, index: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        delta, z = delta.clone(), z.clone()
        (z if of_z else delta).select(dimension, -1).zero_()
        return twin(delta, z, index, factors)

    return wrong


def rounded_products(
    delta: Tensor, z: Tensor, index: Tensor, factors: Tensor
) -> tuple[Tensor, Tensor]:
    """As TensorFloat-32: 10 bits behind the point of each factor."""

    def rounded(array: Tensor) -> Tensor:
        scale = 2.0 ** (10 - torch.frexp(array).exponent)
        return torch.where(array == 0, array, (array * scale).round() / scale)

    return twin(rounded(delta), rounded(z), index, factors)


def rows_one_by_one(
    delta: Tensor, z: Tensor, index: Tensor, factors: Tensor
) -> tuple[Tensor, Tensor]:
    """Measures the rows of a unit apart, and forgets that they add up."""
    own = torch.arange(delta.shape[0])
    each = naive.unit_squared_norms(delta, z, own, delta.shape[0])
    return torch.zeros_like(factors).index_add_(0, index, each), twin(delta, z, index, factors)[1]


def neighbours_factor(
    delta: Tensor, z: Tensor, index: Tensor, factors: Tensor
) -> tuple[Tensor, Tensor]:
    return twin(delta, z, index, factors)[0], twin(delta, z, index, factors.roll(1))[1]


@pytest.mark.parametrize("shape", [(5, 7, 70, 3), (6, 33, 65, 17)], ids=str)
@pytest.mark.parametrize(
    ("wrong", "caught"),
    [
        (without_last(0), "ns"),
        (without_last(1), "ns"),
        (without_last(2), "ns"),
        (without_last(2, of_z=True), "ns"),
        (rounded_products, "s"),  # in a norm such errors average out
        (rows_one_by_one, "n"),
        (neighbours_factor, "s"),
    ],
    ids=["row", "token", "feature", "rank", "rounded", "rows apart", "factors"],
)
def test_the_bounds_reject_a_wrong_kernel(
    shape: tuple[int, int, int, int], wrong: Pass, caught: str
) -> None:
    case = rows(shape, 3, torch.float32)
    norms, total = wrong(case.delta, case.z, case.unit_index, case.factors)
    if "n" in caught:
        with pytest.raises(AssertionError, match="norms"):
            case.check_norms(norms)
    if "s" in caught:
        with pytest.raises(AssertionError, match="sum"):
            case.check_sum(total)

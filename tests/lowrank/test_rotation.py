"""A = Q·A₀ to the last bit, against plain Python, and the refactorisation in its coordinates."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlr.lowrank.factors import Factors
from fedlr.lowrank.rotation import is_orthonormal, refactorise_rotated, rotate
from fedlr.lowrank.svd import refactorise

TINIEST = 2.0**-149


def to_float32(value: float) -> float:
    """Round to the nearest float32, ties to even."""
    found: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return found


def by_hand(rotation: Sequence[Sequence[float]], base: Sequence[Sequence[float]]) -> bytes:
    """Σ_j Q_ij·A_jn in Python's own floats, j from the first on; little-endian float32."""
    found = []
    for weights in rotation:
        for column in range(len(base[0])):
            total = 0.0
            for weight, row in zip(weights, base, strict=True):
                total = total + weight * row[column]
            found.append(to_float32(total))
    return struct.pack(f"<{len(found)}f", *found)


def bits(value: Tensor) -> bytes:
    return value.contiguous().numpy().astype("<f4").tobytes()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthonormal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(draw(columns, rows, seed=seed).double()).Q.mT.float()


numbers = st.floats(width=32, allow_nan=False, min_value=-(2.0**60), max_value=2.0**60)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), rank=st.integers(1, 4), kept=st.integers(1, 4), width=st.integers(1, 9))
def test_every_bit_is_that_of_plain_python(
    data: st.DataObject, rank: int, kept: int, width: int
) -> None:
    def matrix(rows: int, columns: int) -> list[list[float]]:
        row = st.lists(numbers, min_size=columns, max_size=columns)
        return data.draw(st.lists(row, min_size=rows, max_size=rows))

    rotation, base = matrix(min(kept, rank), rank), matrix(rank, width)
    assert bits(rotate(torch.tensor(rotation), torch.tensor(base))) == by_hand(rotation, base)


@pytest.mark.parametrize("width", [1, 7, 64, 1000])
def test_every_bit_of_a_rotation_is_that_of_plain_python(width: int) -> None:
    rotation, base = orthonormal(8, 8), draw(8, width, seed=1)
    assert bits(rotate(rotation, base)) == by_hand(rotation.tolist(), base.tolist())


def test_the_comparison_of_bits_tells_a_matrix_product_apart() -> None:
    rotation, base = orthonormal(8, 8), draw(8, 1000, seed=1)
    assert bits(rotation @ base) != by_hand(rotation.tolist(), base.tolist())


def test_subnormal_numbers_and_ties_are_rounded_as_ieee_754_says() -> None:
    rotation = torch.tensor([[0.5, 0.0], [0.5, 0.5], [1.5, 0.0]])
    base = torch.tensor([[TINIEST, 3 * TINIEST], [TINIEST, 0.0]])
    assert bits(rotate(rotation, base)) == by_hand(rotation.tolist(), base.tolist())
    # ½ and 3/2 of the tiniest number lie in the middle and go to the even one.
    assert rotate(rotation, base)[:, 0].tolist() == [0.0, TINIEST, 2 * TINIEST]


def test_leading_rows_and_columns_do_not_depend_on_the_rest() -> None:
    rotation, base = orthonormal(6, 6), draw(6, 33, seed=2)
    whole = rotate(rotation, base)
    assert bits(rotate(rotation[:2].contiguous(), base)) == bits(whole[:2])
    assert bits(rotate(rotation, base[:, 5:20])) == bits(whole[:, 5:20])


@pytest.mark.parametrize(
    ("rotation", "base", "says"),
    [
        (torch.eye(2).double(), torch.ones(2, 3), "rotation has dtype torch.float64"),
        (torch.eye(2), torch.ones(2, 3).half(), "base has dtype torch.float16"),
        (torch.ones(2), torch.ones(2, 3), "rotation has dtype .* and shape"),
        (torch.ones(2, 3), torch.ones(2, 3), "base: rows has shape"),
    ],
)
def test_what_cannot_be_rotated_is_named(rotation: Tensor, base: Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        rotate(rotation, base)


@pytest.mark.parametrize("rank", [1, 4])
def test_refactorising_in_the_coordinates_of_the_basis_is_refactorising(rank: int) -> None:
    base, rotation, b = orthonormal(rank, 9, 3), orthonormal(rank, rank, 4), draw(7, rank, seed=5)
    found, turned = refactorise_rotated({"x": Factors(b=b, a=rotation)}, {"x": base})["x"]
    wanted = refactorise(Factors(b=b, a=rotate(rotation, base)))
    torch.testing.assert_close(found.b, wanted.b, atol=2e-6, rtol=0)
    torch.testing.assert_close(found.a, wanted.a, atol=2e-6, rtol=0)
    assert bits(found.a) == bits(rotate(turned, base))
    torch.testing.assert_close(found.product(), b @ rotate(rotation, base), atol=4e-6, rtol=0)


def test_nothing_trained_is_refactorised_to_a_rotation_and_zeros() -> None:
    base = orthonormal(3, 9)
    pair = Factors(b=torch.zeros(7, 3), a=torch.eye(3))
    found, turned = refactorise_rotated({"x": pair}, {"x": base})["x"]
    assert not bool(found.b.any())
    assert is_orthonormal(turned)
    assert is_orthonormal(found.a)


def test_orthonormal_is_told_from_nearly_orthonormal() -> None:
    assert is_orthonormal(orthonormal(5, 40))
    assert is_orthonormal(torch.zeros(0, 4))
    assert not is_orthonormal(orthonormal(5, 40) * (1 + 1e-6))
    assert not is_orthonormal(torch.ones(2, 2))

"""The flag aggregator against its definition on the vectors themselves."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlr.methods.flag import PERTURBATION, Flag, explained_subspace
from fedlr.methods.method import ClientUpdate
from fedlr.methods.robust import NormBoundedMean
from tests.methods.cohorts import B


def directions(count: int, size: int, seed: int) -> Tensor:
    """``count`` random columns of length 1."""
    draws = torch.Generator().manual_seed(seed)
    found = torch.randn(size, count, generator=draws, dtype=torch.float64)
    unit: Tensor = found / found.norm(dim=0)
    return unit


def objective(columns: Tensor, basis: Tensor) -> float:
    """Σ √(1 − ‖Yᵀ g_k‖² + ε)."""
    lost = (1 - (basis.mT @ columns).square().sum(dim=0)).clamp(min=0.0) + PERTURBATION
    return float(lost.sqrt().sum())


def slow_subspace(columns: Tensor, dimension: int, steps: int) -> list[Tensor]:
    """The subspaces of reweighted singular value decompositions of the d × K matrix."""
    weight = torch.ones(columns.shape[1], dtype=torch.float64)
    found = []
    for _ in range(steps):
        basis = torch.linalg.svd(columns * weight, full_matrices=False).U[:, :dimension]
        found.append(basis)
        lost = (1 - (basis.mT @ columns).square().sum(dim=0)).clamp(min=0.0) + PERTURBATION
        weight = lost ** (-0.25)
    return found


def sent(rows: Tensor) -> list[ClientUpdate]:
    return [ClientUpdate(f"c{i}", {B: row}, 1) for i, row in enumerate(rows)]


class TestSubspace:
    @settings(deadline=None, max_examples=20)
    @given(seed=st.integers(0, 1000), count=st.integers(3, 8))
    def test_orthonormal_and_no_worse_than_singular_vectors(self, seed: int, count: int) -> None:
        columns, dimension = directions(count, 12, seed), (count + 2) // 2
        basis = columns @ explained_subspace(columns.mT @ columns, dimension)
        eye = torch.eye(basis.shape[1], dtype=torch.float64)
        torch.testing.assert_close(basis.mT @ basis, eye, rtol=0, atol=1e-9)
        plain = torch.linalg.svd(columns, full_matrices=False).U[:, :dimension]
        assert objective(columns, basis) <= objective(columns, plain) + 1e-9

    def test_agrees_with_the_definition_on_the_vectors(self) -> None:
        columns = directions(7, 20, seed=4)
        columns[:, :4] = columns[:, :1] + 0.2 * columns[:, :4]
        columns /= columns.norm(dim=0)
        slow = slow_subspace(columns, 2, 100)
        values = [objective(columns, basis) for basis in slow]
        assert all(later <= earlier + 1e-9 for earlier, later in pairwise(values))
        assert values[-1] < values[0] - 1e-3
        basis = columns @ explained_subspace(columns.mT @ columns, 2)
        assert objective(columns, basis) == pytest.approx(values[-1], abs=1e-6)
        torch.testing.assert_close(basis @ basis.mT, slow[-1] @ slow[-1].mT, rtol=0, atol=1e-3)

    def test_all_zero_and_rank_one(self) -> None:
        assert explained_subspace(torch.zeros(4, 4, dtype=torch.float64), 3).shape == (4, 0)
        assert explained_subspace(torch.ones(4, 4, dtype=torch.float64), 3).shape == (4, 1)


def test_the_result_is_the_projected_mean_of_the_bounded_changes() -> None:
    rows = directions(5, 9, seed=1).mT * torch.tensor([1.0, 2, 3, 4, 100])[:, None]
    start = torch.arange(9, dtype=torch.float64)
    found = Flag()(sent(rows + start), [1.0] * 5, {B: start})[B]
    basis = slow_subspace(directions(5, 9, seed=1), 3, 100)[-1]
    bounded = rows * torch.tensor([1.0, 1, 1, 3 / 4, 3 / 100])[:, None]
    torch.testing.assert_close(
        found - start, basis @ (basis.mT @ bounded.mean(dim=0)), rtol=0, atol=1e-3
    )
    # Projecting the mean as it was sent would let the long one through.
    far = basis @ (basis.mT @ rows.mean(dim=0))
    assert float((found - start - far).norm()) > 1


def test_what_one_client_alone_has_is_left_out_where_the_others_fill_the_subspace() -> None:
    # K = 7 gives m = 4. Six honest directions are a tight frame of four dimensions, with
    # squared singular values 6/4 each; the liar's, across them, is 1.
    turns = torch.arange(6, dtype=torch.float64)[:, None] * torch.pi / 3
    frame = torch.cat([turns.cos(), turns.sin(), (2 * turns).cos(), (2 * turns).sin()], dim=1)
    space = torch.linalg.qr(directions(5, 30, seed=2)).Q
    across = space[:, 4]
    rows = torch.cat([frame @ space[:, :4].mT / 2**0.5, across[None]])
    start = {B: torch.zeros(30, dtype=torch.float64)}
    assert abs(float(across @ Flag()(sent(rows), [1.0] * 7, start)[B])) < 1e-6
    bounded = NormBoundedMean()(sent(rows), [1.0] * 7, start)[B]
    assert float(across @ bounded) == pytest.approx(1 / 7, abs=1e-9)
    # Honest ones that are all alike leave dimensions to the liar: no such claim then.
    alike = torch.cat([space[:, 0].repeat(6, 1), across[None]])
    assert float(across @ Flag()(sent(alike), [1.0] * 7, start)[B]) == pytest.approx(1 / 7)


def test_without_any_change_the_reference_stays() -> None:
    start = torch.arange(4, dtype=torch.float32)
    assert torch.equal(Flag()(sent(start.repeat(3, 1)), [1.0] * 3, {B: start})[B], start)

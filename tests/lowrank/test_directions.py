"""Directions of weights, inputs and gradients: what was planted is found, and in its order."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fedlr.lowrank.factors import AdapterSite
from fedlr.lowrank.geometry import principal_angles
from fedlr.lowrank.subspace import (
    SUBSPACES,
    Directions,
    Moments,
    Subspace,
    ordered,
    principal_directions,
    singular_directions,
)

M, N, R = 9, 14, 3
SPECTRUM = torch.tensor([9.0, 7.0, 5.0, 3.0, 2.0, 1.0, 0.5, 0.2, 0.1], dtype=torch.float64)


def basis(size: int, rank: int, seed: int) -> Tensor:
    """Orthonormal columns, shape (size, rank), float64."""
    draws = torch.Generator().manual_seed(seed)
    found: Tensor = torch.linalg.qr(torch.randn(size, rank, generator=draws, dtype=torch.float64)).Q
    return found


LEFT, RIGHT = basis(M, M, 1), basis(N, M, 2)
PLANTED = (LEFT * SPECTRUM) @ RIGHT.mT


def moments(x: Tensor) -> Moments:
    """Of the rows of ``x``, shape (N, n)."""
    x = x.double()
    return Moments(len(x), x.sum(0), x.mT @ x)


def assert_planted(found: Directions, order: list[int], matrix: Tensor = PLANTED) -> None:
    """Rows and columns are ± the planted ones, both with the same sign, and the rows positive."""
    cosines = (found.rows.double() @ RIGHT[:, order]).diagonal()
    assert torch.allclose(cosines.abs(), torch.ones(len(order)).double(), atol=1e-5)
    largest = found.rows.gather(1, found.rows.abs().argmax(1, keepdim=True))
    assert bool((largest > 0).all())
    assert found.columns is not None
    core = found.columns.double().mT @ matrix @ found.rows.double().mT
    assert torch.allclose(core, SPECTRUM[order].diag(), atol=1e-5)  # not −σ: signs belong together


@pytest.mark.parametrize("flip", [False, True], ids=["wide", "tall"])
def test_planted_singular_directions_are_found_in_order(flip: bool) -> None:
    matrix = PLANTED.mT if flip else PLANTED
    top, minor = (singular_directions(matrix, R, R, minor=low) for low in (False, True))
    if flip:  # the sides change places, and the sign is fixed on the other one
        for found, order in ((top, [0, 1, 2]), (minor, [8, 7, 6])):
            assert found.columns is not None
            assert found.rows.shape == (R, M)
            cosines = (found.columns.double().mT @ RIGHT[:, order]).diagonal().abs()
            assert torch.allclose(cosines, torch.ones(R).double(), atol=1e-5)
        return
    assert_planted(top, [0, 1, 2])
    assert_planted(minor, [8, 7, 6])


def test_rows_and_columns_are_orthonormal_and_float32() -> None:
    for minor in (False, True):
        found = singular_directions(PLANTED.float(), R, 6, minor)
        assert found.rows.shape == (6, N)
        assert found.columns is not None
        assert found.columns.shape == (M, 6)
        for rows in (found.rows, found.columns.mT):
            assert rows.dtype is torch.float32
            torch.testing.assert_close(rows @ rows.mT, torch.eye(6), atol=1e-6, rtol=0)


def test_keep_is_cut_to_what_there_is() -> None:
    matrix = (LEFT[:, :4] * SPECTRUM[:4]) @ RIGHT[:, :4].mT
    assert len(singular_directions(matrix, R, 99).rows) == 4
    assert len(singular_directions(matrix, R, 99, minor=True).rows) == M


def test_a_direction_that_is_only_rounding_is_not_given_out() -> None:
    matrix = ((LEFT[:, :2] * SPECTRUM[:2]) @ RIGHT[:, :2].mT).float()
    with pytest.raises(ValueError, match="rank = 3 must be ≤ 2"):
        singular_directions(matrix, R, R)
    with pytest.raises(ValueError, match="rank = 1 must be ≤ 0"):
        singular_directions(torch.zeros(M, N), 1, 1)
    with pytest.raises(ValueError, match=f"rank = {M + 1} must be ≤ {M}"):
        singular_directions(PLANTED, M + 1, M + 1, minor=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_entries_that_are_not_finite_are_refused(bad: float) -> None:
    matrix = PLANTED.clone()
    matrix[1, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        singular_directions(matrix, R, R)
    with pytest.raises(ValueError, match="NaN or infinite"):
        principal_directions(Moments(3, torch.zeros(N), matrix.new_full((N, N), bad)), R, R)


def test_the_row_space_is_the_best_one_of_its_rank() -> None:
    """Eckart and Young: no other A keeps more of the matrix than its top right directions."""
    generator = torch.Generator().manual_seed(5)
    matrix = torch.randn(M, N, generator=generator)

    def kept(rows: Tensor) -> float:
        return float((matrix @ rows.mT).norm())

    best = kept(singular_directions(matrix, R, R).rows)
    assert best == pytest.approx(float(torch.linalg.svdvals(matrix)[:R].norm()), rel=1e-5)
    assert best > kept(singular_directions(matrix, R, R, minor=True).rows)
    for _ in range(20):
        random = torch.linalg.qr(torch.randn(N, R, generator=generator)).Q.mT
        assert kept(random) < best


def test_principal_directions_of_a_planted_low_rank_input() -> None:
    draws = torch.Generator().manual_seed(3)
    scores = torch.randn(400, R, generator=draws, dtype=torch.float64) * torch.tensor([5.0, 2, 1])
    found = principal_directions(moments(scores @ RIGHT[:, :R].mT), R, R)
    assert float(principal_angles(found.rows, RIGHT[:, :R].mT).max()) < 1e-5
    # The first one varies most, but a sample's covariance is not exactly diagonal.
    assert abs(float(found.rows[0].double() @ RIGHT[:, 0])) > 0.99
    assert found.columns is None
    spread = (scores @ RIGHT[:, :R].mT @ found.rows.double().mT).std(0)
    assert bool((spread[:-1] > spread[1:]).all())


def test_what_all_inputs_share_is_no_direction() -> None:
    draws = torch.Generator().manual_seed(4)
    offset = 100 * RIGHT[:, R]
    x = torch.randn(300, R, generator=draws, dtype=torch.float64) @ RIGHT[:, :R].mT + offset
    found = principal_directions(moments(x), R, 99)
    assert float(principal_angles(found.rows, RIGHT[:, :R].mT).max()) < 1e-4
    # The uncentred ones begin with it.
    uncentred = singular_directions(moments(x).squares, R, R)
    assert abs(float(uncentred.rows[0].double() @ RIGHT[:, R])) > 0.99


def test_principal_directions_equal_those_of_the_centred_data_matrix() -> None:
    draws = torch.Generator().manual_seed(6)
    x = torch.randn(40, N, generator=draws, dtype=torch.float64) + 3
    slow = singular_directions(x - x.mean(0), R, R).rows
    found = principal_directions(moments(x), R, R).rows
    torch.testing.assert_close(found, slow, atol=1e-5, rtol=0)


@pytest.mark.parametrize("count", [0, 1, R])
def test_too_few_vectors_have_too_few_directions(count: int) -> None:
    x = torch.randn(count, N, generator=torch.Generator().manual_seed(7))
    with pytest.raises(ValueError, match=f"rank = {R} must be ≤ {max(count - 1, 0)}"):
        principal_directions(moments(x), R, R)
    more = torch.randn(R + 1, N, generator=torch.Generator().manual_seed(7))
    assert len(principal_directions(moments(more), R, 99).rows) == R


SITE = AdapterSite("q", out_features=M, in_features=N, rank=R, scaling=1.0)


def policy(keep: int = 8, columns: bool = True) -> Subspace:
    found = singular_directions(PLANTED, R, keep)
    if not columns:
        found = Directions(found.rows)
    return ordered("planted", lambda: {"q": found})


def test_each_turn_takes_the_next_directions_and_begins_again() -> None:
    generator = torch.Generator()
    subspace, rows = policy(), singular_directions(PLANTED, R, 8).rows
    turns = [subspace.redraw(SITE, generator, turn) for turn in range(4)]
    assert torch.equal(turns[0], rows[:3])
    assert torch.equal(turns[1], rows[3:6])
    assert torch.equal(turns[2], rows[:3])  # two of eight are left, too few for a third block
    assert torch.equal(turns[3], rows[3:6])
    assert float(principal_angles(turns[0], turns[1]).min()) == pytest.approx(math.pi / 2)
    assert torch.equal(subspace(SITE, generator), rows[:3])


def test_what_a_turn_returns_is_a_copy() -> None:
    subspace = policy()
    subspace(SITE, torch.Generator()).zero_()
    assert float(subspace(SITE, torch.Generator()).norm()) == pytest.approx(math.sqrt(R))


def test_columns_are_those_of_the_rows_or_drawn() -> None:
    given = singular_directions(PLANTED, R, R).columns
    assert given is not None
    assert torch.equal(policy().columns(SITE, torch.Generator()), given)
    generator = torch.Generator().manual_seed(0)
    first, second = (policy(columns=False).columns(SITE, generator) for _ in range(2))
    torch.testing.assert_close(first.mT @ first, torch.eye(R), atol=1e-6, rtol=0)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", SUBSPACES)
def test_a_drawn_policy_draws_anew_in_every_turn(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (SUBSPACES[name].redraw(SITE, generator, turn) for turn in (0, 0))
    assert not torch.equal(first, second)


def test_nothing_is_computed_before_the_first_draw() -> None:
    calls = []

    def found() -> dict[str, Directions]:
        calls.append(1)
        return {"q": singular_directions(PLANTED, R, R)}

    subspace = ordered("late", found)
    assert calls == []
    subspace(SITE, torch.Generator())
    assert calls == [1]


@pytest.mark.parametrize(("rank", "turn"), [(0, 0), (5, 0), (1, -1)])
def test_a_block_that_cannot_be_is_refused(rank: int, turn: int) -> None:
    with pytest.raises(ValueError, match=r"rank|turn"):
        Directions(torch.eye(4)).block(rank, turn)

"""Canaries: their directions, their coins, and the units that carry them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedlr.audit.canaries import ORDINARY, CanaryUnits, Directions, toss
from fedlr.methods.method import PartKey, Role
from tests.models import units_of

SHAPES = {
    PartKey("x", Role.B): torch.Size([40, 3]),
    PartKey("y", Role.B): torch.Size([25, 4]),
    PartKey("head.bias", Role.HEAD): torch.Size([30]),
}


def matrix(directions: Directions) -> torch.Tensor:
    """Every direction as one row."""
    everyone = torch.arange(directions.count)
    return torch.cat([directions.gradients(key, everyone).flatten(1) for key in SHAPES], dim=1)


@pytest.mark.parametrize("count", [1, 7, 100, 250])
def test_the_directions_are_orthonormal_and_use_every_coordinate(count: int) -> None:
    rows = matrix(Directions.draw(SHAPES, count))
    assert rows.shape == (count, 250)
    torch.testing.assert_close(rows @ rows.T, torch.eye(count))
    assert (rows != 0).sum(0).eq(1).all()


def test_a_direction_is_spread_over_all_arrays() -> None:
    directions = Directions.draw(SHAPES, 5)
    for key in SHAPES:
        assert (directions.gradients(key, torch.arange(5)).flatten(1).norm(dim=1) > 0.1).all()


def test_projecting_a_direction_finds_its_canary_alone() -> None:
    directions = Directions.draw(SHAPES, 20)
    parts = {key: 3.0 * directions.gradients(key, torch.tensor([4]))[0] for key in SHAPES}
    expected = torch.zeros(20, dtype=torch.float64)
    expected[4] = 3.0
    torch.testing.assert_close(directions.project(parts), expected, atol=1e-6, rtol=0)


def test_more_canaries_than_coordinates_are_refused() -> None:
    with pytest.raises(ValueError, match=r"canaries = 251 must be ≤ 250"):
        Directions.draw(SHAPES, 251)


def test_the_coins_are_fair_and_not_repeated() -> None:
    coins = toss(100_000)
    assert abs(coins.mean() - 0.5) < 6 * 0.5 / 100_000**0.5
    assert (coins != toss(100_000)).any()


def test_canaries_follow_the_sites_own_units() -> None:
    own = units_of([1, 2, 1], first=5)
    coins = np.array([False, True, False, True, True])
    joined = CanaryUnits.join(own, coins, row=9)
    assert joined.count == 6
    rows, unit_index = joined.rows_of(np.array([1, 3, 5]))
    assert rows.tolist() == [6, 7, 9, 9]
    assert unit_index.tolist() == [0, 0, 1, 2]
    assert joined.drawn[-1].tolist() == [ORDINARY, 1, 4]
    assert joined.rows_of(np.array([], dtype=np.int64))[0].tolist() == []
    assert joined.drawn[-1].tolist() == []
    alone, position = own.rows_of(np.array([2, 0]))
    same, same_position = joined.rows_of(np.array([2, 0]))
    assert (alone.tolist(), position.tolist()) == (same.tolist(), same_position.tolist())


def test_a_site_without_an_included_canary_is_itself() -> None:
    own = units_of([1, 2])
    joined = CanaryUnits.join(own, np.zeros(4, dtype=np.bool_), row=0)
    assert joined.rows.tolist() == own.rows.tolist()
    assert joined.offsets.tolist() == own.offsets.tolist()
    joined.rows_of(np.array([0, 1]))
    assert joined.drawn[-1].tolist() == [ORDINARY, ORDINARY]

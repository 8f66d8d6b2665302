"""Gradients in one matrix are the same gradients, and are clipped and summed to the same."""

from __future__ import annotations

import pytest
import torch

from fedlr.methods.method import PartKey, Role
from fedlr.privacy.columns import Columns, UnitMatrix
from fedlr.privacy.dpsgd import ClippedSum, Mechanism, clip_groups

B, A, HEAD = PartKey("q", Role.B), PartKey("q", Role.A), PartKey("head.bias", Role.HEAD)
SHAPES = {HEAD: torch.Size([3]), B: torch.Size([5, 2]), A: torch.Size([2, 4])}
CPU = torch.device("cpu")


def filled(narrow_first: bool) -> UnitMatrix:
    columns = Columns(SHAPES, narrow_first)
    draws = torch.Generator().manual_seed(0)
    return UnitMatrix(torch.randn(6, columns.width, generator=draws), columns)


@pytest.mark.parametrize("narrow_first", [True, False])
def test_views_have_the_shape_of_their_array_and_share_every_entry(narrow_first: bool) -> None:
    found = filled(narrow_first)
    assert {key: value.shape[1:] for key, value in found.items()} == SHAPES
    for number, key in enumerate(found):
        found[key][:] = number
    counts = torch.bincount(found.matrix[0].long()).tolist()
    assert counts == [SHAPES[key].numel() for key in found]


def test_head_and_the_rest_are_neighbours_and_others_need_not_be() -> None:
    columns = filled(True).columns
    assert columns.of([A, B]) == slice(0, 18)
    assert columns.of([HEAD]) == slice(18, 21)
    assert columns.of([*sorted([A, B])[:1], HEAD]) is None


@pytest.mark.parametrize("share", [None, 0.3])
@pytest.mark.parametrize("narrow_first", [True, False])
def test_a_matrix_is_clipped_and_summed_as_its_arrays(
    narrow_first: bool, share: float | None
) -> None:
    """Also where a unit comes in two parts, and where another is not finite."""
    mechanism = Mechanism(1.5, clip_groups(list(SHAPES), 1.5, share), 0.0, 4)
    found = filled(narrow_first)
    found[B][1, 0, 0] = torch.nan
    sums = [ClippedSum(mechanism, SHAPES, CPU) for _ in range(2)]
    for total, gradients in zip(sums, (found, dict(found)), strict=True):
        total.add(gradients, range(6), [True] * 6)
        total.add(gradients, range(6, 12), [False] + [True] * 5)
        total.add(gradients, [6, *range(12, 17)], [True] * 6)
    one, other = (total.result() for total in sums)
    for key in SHAPES:
        torch.testing.assert_close(one[key], other[key])
        assert one[key].is_contiguous()
        assert float(one[key].norm()) > 0.1

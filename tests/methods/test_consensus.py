"""The consensus filter: what clients share stays, what they do not is dropped."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlr.methods.combine import Combiner, weighted_mean
from fedlr.methods.consensus import Consensus, agreement
from fedlr.methods.method import ClientUpdate, PartKey, Role
from fedlr.methods.nearness import GeometricMedian
from fedlr.methods.robust import CoordinateMedian

A, B, HEAD = PartKey("q", Role.A), PartKey("q", Role.B), PartKey("head", Role.HEAD)
ROWS, RANK = 400, 6


def sent(*values: Tensor) -> list[ClientUpdate]:
    """One client per B, with its transpose as A and a head of its own."""
    return [
        ClientUpdate(f"c{i}", {A: value.mT.clone(), B: value, HEAD: torch.full((2,), float(i))}, 1)
        for i, value in enumerate(values)
    ]


def planted(count: int, size: float, seed: int = 0) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Changes s·u·vᵀ + noise of variance 1, and their common part, u and v."""
    draws = torch.Generator().manual_seed(seed)
    u = torch.randn(ROWS, generator=draws, dtype=torch.float64)
    v = torch.randn(RANK, generator=draws, dtype=torch.float64)
    u, v = u / u.norm(), v / v.norm()
    common = size * torch.outer(u, v)
    noise = torch.randn(count, ROWS, RANK, generator=draws, dtype=torch.float64)
    return list(common + noise), common, u, v


@pytest.mark.parametrize("inner", [weighted_mean, CoordinateMedian(), GeometricMedian()])
@settings(deadline=None, max_examples=10)
@given(threshold=st.floats(0, 1), seed=st.integers(0, 100))
def test_equal_clients_lose_nothing_at_any_threshold(
    inner: Combiner, threshold: float, seed: int
) -> None:
    draws = torch.Generator().manual_seed(seed)
    same = torch.randn(9, 4, generator=draws)
    start = {B: torch.randn(9, 4, generator=draws)}
    updates = sent(*[same] * 5)
    plain = inner(updates, [1.0] * 5, start)
    found = Consensus(inner, threshold)(updates, [1.0] * 5, start)
    assert all(torch.equal(found[key], plain[key]) for key in plain)


@pytest.mark.parametrize("inner", [weighted_mean, CoordinateMedian()])
def test_threshold_zero_is_the_inner_combiner_bit_for_bit(inner: Combiner) -> None:
    updates = sent(
        *(torch.randn(9, 4, generator=torch.Generator().manual_seed(k)) for k in range(5))
    )
    plain = inner(updates, [1.0] * 5)
    found = Consensus(inner, 0.0)(updates, [1.0] * 5)
    assert all(torch.equal(found[key], plain[key]) for key in plain)


def test_orthogonal_and_opposed_clients_are_dropped() -> None:
    def unit(row: int, column: int) -> Tensor:
        value = torch.zeros(5, 3)
        value[row, column] = 1.0
        return value

    # Agreement ½ = Σ p_k² for two orthogonal clients, whether in u or in v.
    for values in ((unit(0, 0), unit(1, 1)), (unit(0, 0), unit(1, 0))):
        for threshold, kept in ((0.49, True), (0.51, False)):
            found = Consensus(weighted_mean, threshold)(sent(*values), [1, 1])[B]
            expected = sum(values) / 2 if kept else torch.zeros(5, 3)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    # 1 and −0.5, cut to their median norm ½: they cancel, and what is left of the mean is
    # nobody's.
    found = Consensus(weighted_mean, 0.01)(sent(unit(0, 0), -0.5 * unit(0, 0)), [1, 1])[B]
    assert torch.equal(found, torch.zeros(5, 3))


def test_only_the_direction_that_is_not_shared_is_dropped() -> None:
    shared = torch.zeros(5, 3)
    shared[:, 0] = torch.tensor([1.0, 2, 3, 4, 5])
    own = torch.zeros(3, 5, 3)
    own[0, 0, 1] = own[1, 1, 1] = own[2, 2, 2] = 3.0
    updates = sent(*(shared + mine for mine in own))
    found = Consensus(weighted_mean, 0.9)(updates, [1.0] * 3)
    # Near to it: the directions of the mean are a little off, for the own parts are not
    # orthogonal to the shared one.
    assert float((found[B] - shared).norm()) < 0.6 * float((shared.norm() ** 2 + 3) ** 0.5)
    assert float((found[B] - shared).norm()) < float((own.mean(dim=0)).norm())
    torch.testing.assert_close(found[A], found[B].mT, rtol=0, atol=1e-5)
    assert torch.equal(found[HEAD], torch.ones(2))


@pytest.mark.parametrize("count", [3, 6, 12])
def test_agreement_of_signal_and_noise_is_what_the_docstring_derives(count: int) -> None:
    # E‖X_k v‖² = s² + σ²m and E‖mean·v‖² = s² + σ²m/K, with σ = 1.
    size = 30.0
    values, _, _, v = planted(count, size)
    shares = [1 / count] * count
    signal = agreement(torch.stack(values), shares, v[:, None])
    expected = 1 / count + (1 - 1 / count) * size**2 / (size**2 + ROWS)
    assert float(signal) == pytest.approx(expected, abs=0.04)
    noise = torch.stack(values)
    basis = torch.linalg.svd(noise.mean(dim=0), full_matrices=False).Vh.mT[:, 1:]
    # The directions were chosen on the same noise: √(r/m) is what that can add.
    slack = 2.5 * (RANK / ROWS) ** 0.5 / count + 0.02
    found = agreement(noise, shares, basis)
    assert bool(((found - 1 / count).abs() <= slack).all())


def test_measured_along_the_long_side_noise_would_agree() -> None:
    values, *_ = planted(6, 0.0)
    shares = [1 / 6] * 6
    noise = torch.stack(values)
    left, _, right = torch.linalg.svd(noise.mean(dim=0), full_matrices=False)
    long_side = agreement(noise.mT, shares, left)
    # m / (m + r·(K − 1)) = 400 / 430.
    assert float(long_side.mean()) == pytest.approx(400 / 430, abs=0.02)
    assert float(agreement(noise, shares, right.mT).max()) < 0.25


@pytest.mark.parametrize("seed", range(5))
def test_a_common_direction_is_kept_and_noise_is_reduced(seed: int) -> None:
    count, size = 6, 30.0
    values, common, u, v = planted(count, size, seed)
    updates = [ClientUpdate(f"c{i}", {B: value}, 1) for i, value in enumerate(values)]
    mean = weighted_mean(updates, [1.0] * count)[B]
    found = Consensus(weighted_mean, 0.4)(updates, [1.0] * count)[B]
    assert float(u @ found @ v) == pytest.approx(size, rel=0.1)
    # The mean's noise is r·m/K; of it only the kept direction's m/K remains, with what the
    # tilt of that direction costs.
    before, after = float((mean - common).square().sum()), float((found - common).square().sum())
    assert before == pytest.approx(ROWS * RANK / count, rel=0.15)
    assert after < 2 * ROWS / count + RANK
    assert after < before / 2


def test_without_a_common_direction_everything_is_dropped() -> None:
    values, *_ = planted(6, 0.0)
    updates = [ClientUpdate(f"c{i}", {B: value}, 1) for i, value in enumerate(values)]
    start = {B: torch.full((ROWS, RANK), 0.5, dtype=torch.float64)}
    moved = [ClientUpdate(u.client, {B: u.parts[B] + start[B]}, 1) for u in updates]
    assert torch.equal(Consensus(weighted_mean, 0.4)(moved, [1.0] * 6, start)[B], start[B])


def test_one_long_client_cannot_outvote_the_others() -> None:
    values, common, *_ = planted(6, 60.0)
    values[0] = -100 * values[0]
    updates = [ClientUpdate(f"c{i}", {B: value}, 1) for i, value in enumerate(values)]
    found = Consensus(GeometricMedian(), 0.3)(updates, [1.0] * 6)[B]
    assert float((found - common).norm()) < 0.5 * float(common.norm())
    # As sent, its weight in the agreement would be 10⁴ times that of the others: 5 / 36 at most
    # is what a single one among six can have.
    raw = torch.stack(values)
    v = torch.linalg.svd(common).Vh[0]
    along = raw @ v
    share = along.mean(dim=0).square().sum() / along.square().sum(dim=1).mean()
    assert float(share) < 0.2


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), count=st.integers(1, 6))
def test_agreement_is_a_share_and_filtering_never_lengthens(seed: int, count: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    values = torch.randn(count, 8, 3, generator=draws, dtype=torch.float64)
    shares = torch.rand(count, generator=draws, dtype=torch.float64) + 0.01
    shares = shares / shares.sum()
    found = agreement(values, shares.tolist(), torch.eye(3, dtype=torch.float64))
    assert bool((found >= 0).all())
    assert bool((found <= 1 + 1e-12).all())
    updates = [ClientUpdate(f"c{i}", {B: value}, 1) for i, value in enumerate(values)]
    mean = weighted_mean(updates, shares.tolist())[B]
    previous = float(mean.norm()) + 1e-12
    for threshold in (0.2, 0.5, 0.8, 1.0):
        now = float(Consensus(weighted_mean, threshold)(updates, shares.tolist())[B].norm())
        assert now <= previous
        previous = now + 1e-12


def test_a_direction_without_any_change_agrees() -> None:
    nothing = torch.zeros(3, 4, 2, dtype=torch.float64)
    assert agreement(nothing, [0.2, 0.3, 0.5], torch.eye(2, dtype=torch.float64)).tolist() == [1, 1]


def test_what_the_wrapper_says_of_itself() -> None:
    wrapped = Consensus(CoordinateMedian(), 0.5)
    assert (wrapped.name, wrapped.linear, wrapped.minimum) == (
        "coordinate_median+consensus",
        False,
        3,
    )
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="consensus = "):
            Consensus(weighted_mean, bad)

"""Laws of the robust combiners; f is what each is built to bear."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlr.methods.combine import Combiner, weighted_mean
from fedlr.methods.flag import Flag
from fedlr.methods.method import ClientUpdate, Parts
from fedlr.methods.nearness import GeometricMedian, Krum, MultiKrum, weiszfeld
from fedlr.methods.robust import CoordinateMedian, NormBoundedMean, TrimmedMean
from tests.methods.cohorts import (
    ATTACKS,
    CENTRE,
    B,
    attacked,
    honest,
    mapped,
    vector,
    vectors,
)

ALL: Mapping[str, Combiner] = {
    "coordinate_median": CoordinateMedian(),
    "trimmed_mean": TrimmedMean(1),
    "trimmed_most": TrimmedMean(),
    "norm_bounded_mean": NormBoundedMean(),
    "norm_bounded_0.5": NormBoundedMean(0.5),
    "krum": Krum(),
    "multi_krum": MultiKrum(1),
    "geometric_median": GeometricMedian(),
    "flag": Flag(),
}
ALIKE = ("coordinate_median", "trimmed_mean", "trimmed_most", "krum", "flag")
EQUIVARIANT = (
    *("coordinate_median", "trimmed_mean", "trimmed_most"),
    *("krum", "multi_krum", "geometric_median"),
)
every = pytest.mark.parametrize("name", ALL)


def weights_for(name: str, count: int) -> list[float]:
    """Unequal weights where the combiner uses them."""
    return [1.0] * count if name in ALIKE else [1.0 + 0.1 * index for index in range(count)]


def identical(left: Parts, right: Parts) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@every
class TestLaws:
    @settings(deadline=None, max_examples=10)
    @given(seed=st.integers(0, 1000), count=st.integers(5, 9))
    def test_bit_identical_under_permutation(self, name: str, seed: int, count: int) -> None:
        updates, weights = honest(count, seed, spread=1.0), weights_for(name, count)
        order = random.Random(seed).sample(range(count), count)
        expected = ALL[name](updates, weights, CENTRE)
        found = ALL[name]([updates[i] for i in order], [weights[i] for i in order], CENTRE)
        assert identical(found, expected)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
    def test_equal_clients_are_the_weighted_mean(self, name: str, dtype: torch.dtype) -> None:
        parts = {key: value.to(dtype) for key, value in honest(1)[0].parts.items()}
        updates = [ClientUpdate(str(i), parts, 1) for i in range(6)]
        # A reference within 0.5 of them, so that no bound of its own applies.
        near = {key: value.to(dtype) for key, value in parts.items()}
        found = ALL[name](updates, weights_for(name, 6), near)
        mean = weighted_mean(updates, weights_for(name, 6))
        for key, value in parts.items():
            assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape)
            torch.testing.assert_close(found[key], value, rtol=1e-15, atol=0)
            torch.testing.assert_close(mean[key], value, rtol=1e-15, atol=0)

    def test_equal_clients_without_a_reference(self, name: str) -> None:
        updates = [ClientUpdate(str(i), dict(CENTRE), 1) for i in range(6)]
        # A bound of its own is shorter than the whole update, which counts from zero.
        factor = 0.5 / float(vector(CENTRE).norm()) if name == "norm_bounded_0.5" else 1.0
        for key, value in ALL[name](updates, [1.0] * 6).items():
            torch.testing.assert_close(value, factor * CENTRE[key], rtol=5e-7, atol=0)

    def test_inputs_are_not_mutated_nor_aliased(self, name: str) -> None:
        updates = honest(6)
        before = mapped(updates, torch.clone)
        kept = {key: value.clone() for key, value in CENTRE.items()}
        found = ALL[name](updates, [1.0] * 6, CENTRE)
        for value in found.values():
            value.fill_(7)
        assert all(identical(a.parts, b.parts) for a, b in zip(updates, before, strict=True))
        assert identical(CENTRE, kept)

    @pytest.mark.parametrize("position", [0, 3, 6])
    def test_a_client_of_weight_zero_does_not_count(self, name: str, position: int) -> None:
        updates = honest(7)
        spoilt = [
            ClientUpdate(u.client, {k: torch.full_like(v, math.nan) for k, v in u.parts.items()}, 1)
            if index == position
            else u
            for index, u in enumerate(updates)
        ]
        weights = [0.0 if index == position else 1.0 for index in range(7)]
        without = [u for index, u in enumerate(updates) if index != position]
        assert identical(ALL[name](spoilt, weights, CENTRE), ALL[name](without, [1] * 6, CENTRE))

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_an_update_that_is_not_finite_is_refused_by_name(self, name: str, bad: float) -> None:
        updates = honest(6)
        updates[2].parts[B][1, 1] = bad
        with pytest.raises(ValueError, match=r"c2: q/b holds NaN, infinite"):
            ALL[name](updates, [1.0] * 6, CENTRE)

    def test_too_few_clients_are_refused(self, name: str) -> None:
        least = ALL[name].minimum
        ALL[name](honest(least), [1.0] * least)
        if least == 1:
            return
        with pytest.raises(ValueError, match=rf"K = {least} clients .* K = {least - 1}; take more"):
            ALL[name](honest(least - 1), [1.0] * (least - 1))
        # A client of weight zero does not make the cohort larger.
        with pytest.raises(ValueError, match="K = "):
            ALL[name](honest(least), [0.0] + [1.0] * (least - 1))

    def test_unequal_weights_are_used_or_refused(self, name: str) -> None:
        updates = honest(6, spread=1.0)
        unequal, equal = [1.0, 2, 3, 4, 5, 6], [3.0] * 6
        if name in ALIKE:
            with pytest.raises(ValueError, match=r"set method\.weights=uniform"):
                ALL[name](updates, unequal)
            assert identical(ALL[name](updates, equal), ALL[name](updates, [1.0] * 6))
        else:
            assert not identical(ALL[name](updates, unequal), ALL[name](updates, equal))

    def test_no_update_is_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match="empty"):
            ALL[name]([], [])


@pytest.mark.parametrize("name", EQUIVARIANT)
@pytest.mark.parametrize("referred", [True, False], ids=["reference", "none"])
def test_translation_equivariance(name: str, referred: bool) -> None:
    # Multiples of 2⁻¹⁰ below 2³, moved by 2⁵: sums of such numbers are exact in float32.
    updates = mapped(honest(7, spread=1.0), lambda v: (v * 1024).round() / 1024)
    start = {key: (value * 1024).round() / 1024 for key, value in CENTRE.items()}
    moved = mapped(updates, lambda v: v + 32.0)
    plain = ALL[name](updates, [1.0] * 7, start if referred else {})
    found = ALL[name](moved, [1.0] * 7, {k: v + 32 for k, v in start.items()} if referred else {})
    for key, value in plain.items():
        # One rounding of numbers below 64: 2⁻¹⁹.
        torch.testing.assert_close(found[key], value + 32.0, rtol=0, atol=2**-18)


@pytest.mark.parametrize("name", ["coordinate_median", "trimmed_mean", "trimmed_most"])
@pytest.mark.parametrize("cut", [1, 3, 6])
def test_coordinate_rules_do_not_depend_on_how_arrays_are_cut(name: str, cut: int) -> None:
    updates = honest(6, spread=1.0)
    whole = ALL[name](updates, [1.0] * 6)[B]
    pieces = [
        ALL[name]([ClientUpdate(u.client, {B: u.parts[B][rows]}, 1) for u in updates], [1.0] * 6)[B]
        for rows in (slice(None, cut), slice(cut, None))
    ]
    assert torch.equal(torch.cat(pieces), whole)


def test_whole_update_rules_look_at_all_parts_together() -> None:
    # c0 is honest in B and lies in the head alone: nothing of it may be taken for B either.
    updates = honest(5)
    updates[0] = ClientUpdate("c0", {**CENTRE, list(CENTRE)[1]: torch.full((4,), 1e6)}, 1)
    chosen = Krum()(updates, [1.0] * 5)
    assert any(identical(chosen, update.parts) for update in updates[1:])
    bounded = NormBoundedMean()(updates, [1.0] * 5, CENTRE)
    # Of B alone, c0 has no change at all: without the norm of its head it would enter whole.
    alone = [u.parts[B].double() - CENTRE[B] for u in updates]
    norms = [float((vector(u.parts) - vector(CENTRE)).norm()) for u in updates]
    scale = [min(1.0, sorted(norms)[2] / norm) for norm in norms]
    by_hand = CENTRE[B] + sum(s * a for s, a in zip(scale, alone, strict=True)) / 5
    torch.testing.assert_close(bounded[B], by_hand.float(), rtol=1e-6, atol=1e-6)


def test_median_and_trimmed_mean_by_hand() -> None:
    def of(*values: float) -> list[ClientUpdate]:
        return [
            ClientUpdate(str(i), {B: torch.tensor([float(v)])}, 1) for i, v in enumerate(values)
        ]

    assert CoordinateMedian()(of(5, 1, 100), [1] * 3)[B].item() == 5
    assert CoordinateMedian()(of(5, 1, 100, 7), [1] * 4)[B].item() == 6
    # Without 1 and 100: (5 + 7 + 9) / 3 = 7.
    assert TrimmedMean(1)(of(5, 1, 100, 7, 9), [1] * 5)[B].item() == 7
    assert TrimmedMean()(of(5, 1, 100, 7, 9), [1] * 5)[B].item() == 7
    assert TrimmedMean()(of(5, 1, 100, 7), [1] * 4)[B].item() == 6


HONEST_RANGE = ("coordinate_median", "trimmed_most", "trimmed_mean")


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
class TestBreakdown:
    @pytest.mark.parametrize("name", HONEST_RANGE)
    def test_entries_stay_in_the_honest_range(
        self, name: str, attack: Callable[[Tensor], Tensor]
    ) -> None:
        bears = 1 if name == "trimmed_mean" else 3
        updates = attacked(honest(7), bears, attack)
        found = vector(ALL[name](updates, [1.0] * 7))
        kept = vectors(updates[bears:])
        slack = 1e-6
        assert bool((found >= kept.amin(dim=0) - slack).all())
        assert bool((found <= kept.amax(dim=0) + slack).all())
        outside = vector(ALL[name](attacked(updates, bears + 1, attack), [1.0] * 7))
        later = vectors(updates[bears + 1 :])
        beyond = (outside < later.amin(dim=0) - slack) | (outside > later.amax(dim=0) + slack)
        assert bool(beyond.any())

    @pytest.mark.parametrize("rule", [Krum, MultiKrum])
    def test_krum_stays_near_an_honest_update(
        self, rule: type[Krum] | type[MultiKrum], attack: Callable[[Tensor], Tensor]
    ) -> None:
        clients, bears = 9, 3
        updates = attacked(honest(clients), bears, attack)
        kept = vectors(updates[bears:])
        widest = torch.cdist(kept, kept).max()
        found = vector(rule(bears)(updates, [1.0] * clients))
        radius = math.sqrt(clients - bears - 2) * widest
        assert float((kept - found).norm(dim=1).min()) <= radius
        # K − f − 1 equal attackers have all of their K − f − 2 neighbours at distance zero.
        many = attacked(honest(clients), clients - bears - 1, attack)
        moved = vector(rule(bears)(many, [1.0] * clients))
        torch.testing.assert_close(moved, vector(many[0].parts), rtol=1e-6, atol=1e-6)

    def test_geometric_median_stays_within_its_bound(
        self, attack: Callable[[Tensor], Tensor]
    ) -> None:
        updates = attacked(honest(7), 3, attack)
        centre = vector(CENTRE)
        radius = (vectors(updates[3:]) - centre).norm(dim=1).max()
        share = 3 / 7
        bound = 2 * (1 - share) / (1 - 2 * share) * radius
        found = vector(GeometricMedian()(updates, [1.0] * 7))
        assert float((found - centre).norm()) <= bound
        # Four equal clients of seven are the median themselves.
        many = attacked(honest(7), 4, attack)
        moved = vector(GeometricMedian()(many, [1.0] * 7))
        torch.testing.assert_close(moved, vector(many[0].parts), rtol=1e-5, atol=1e-5)
        # And three of seven are, with more than half of the weight.
        heavy = vector(GeometricMedian()(updates, [4.0 / 3] * 3 + [0.75] * 4))
        torch.testing.assert_close(heavy, vector(updates[0].parts), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("rule", [NormBoundedMean(), Flag()], ids=["norm", "flag"])
    def test_the_length_stays_an_honest_one(
        self, rule: Combiner, attack: Callable[[Tensor], Tensor]
    ) -> None:
        start = {key: torch.zeros_like(value) for key, value in CENTRE.items()}
        updates = attacked(honest(7), 3, attack)
        longest = vectors(updates[3:]).norm(dim=1).max()
        found = vector(rule(updates, [1.0] * 7, start))
        assert float(found.norm()) <= longest * (1 + 1e-6)
        many = vector(rule(attacked(honest(7), 4, attack), [1.0] * 7, start))
        bad = attack(torch.ones(1)).abs().item()
        if bad > 1:
            assert float(many.norm()) > 10 * longest

    def test_a_bound_of_its_own_holds_for_any_number(
        self, attack: Callable[[Tensor], Tensor]
    ) -> None:
        found = NormBoundedMean(0.5)(attacked(honest(7), 6, attack), [1.0] * 7, CENTRE)
        assert float((vector(found) - vector(CENTRE)).norm()) <= 0.5 * (1 + 1e-6)

    def test_the_mean_has_no_such_bound(self, attack: Callable[[Tensor], Tensor]) -> None:
        kept = vectors(honest(7))
        found = vector(weighted_mean(attacked(honest(7), 1, attack), [1.0] * 7))
        radius = torch.cdist(kept, kept).max()
        distance = float((kept - found).norm(dim=1).min())
        assert distance > radius or distance > 0.2 * float(vector(CENTRE).norm())


def test_updates_within_the_bound_are_the_weighted_mean_bit_for_bit() -> None:
    updates, weights = honest(6), [0.3, 1.7, 0.11, 5.0, 2.9, 1.0]
    found = NormBoundedMean(1e6)(updates, weights, CENTRE)
    assert identical(found, weighted_mean(updates, weights))


def test_a_cut_update_has_the_norm_of_the_bound_and_its_direction() -> None:
    (only,) = honest(1, spread=3.0)
    change = vector(only.parts) - vector(CENTRE)
    found = vector(NormBoundedMean(0.25)([only], [1.0], CENTRE)) - vector(CENTRE)
    expected = 0.25 * change / change.norm()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [TrimmedMean, Krum, MultiKrum])
@pytest.mark.parametrize("bad", [0, -1, True])
def test_a_number_of_malicious_below_one_is_refused(kind: Any, bad: int) -> None:
    with pytest.raises(ValueError, match="malicious = "):
        kind(bad)


@pytest.mark.parametrize(("f", "trimmed", "krum"), [(1, 3, 5), (2, 5, 7), (4, 9, 11)])
def test_the_minimum_follows_from_the_breakdown_point(f: int, trimmed: int, krum: int) -> None:
    assert TrimmedMean(f).minimum == trimmed
    assert Krum(f).minimum == MultiKrum(f).minimum == krum


class TestGeometricMedian:
    def test_three_points_meet_at_120_degrees(self) -> None:
        # The Fermat point of a triangle whose angles are below 120°: the unit vectors
        # towards the corners sum to zero.
        corners = torch.tensor([[0.0, 0.0], [4.0, 0.0], [1.0, 3.0]], dtype=torch.float64)
        updates = [ClientUpdate(str(i), {B: row}, 1) for i, row in enumerate(corners)]
        found = GeometricMedian()(updates, [1.0] * 3)[B]
        towards = corners - found
        total = (towards / towards.norm(dim=1, keepdim=True)).sum(dim=0)
        assert float(total.norm()) <= 1e-7

    def test_on_a_line_it_is_the_median(self) -> None:
        values = [0.0, 1.0, 2.0, 50.0, 1e9]
        updates = [
            ClientUpdate(str(i), {B: torch.tensor([v], dtype=torch.float64)}, 1)
            for i, v in enumerate(values)
        ]
        # 10⁻⁶ of the typical distance, which is 2: the smoothing.
        assert GeometricMedian()(updates, [1.0] * 5)[B].item() == pytest.approx(2.0, abs=1e-5)

    @settings(deadline=None, max_examples=15)
    @given(seed=st.integers(0, 1000), count=st.integers(3, 8))
    def test_no_other_point_is_nearer(self, seed: int, count: int) -> None:
        draws = torch.Generator().manual_seed(seed)
        points = torch.randn(count, 6, generator=draws, dtype=torch.float64)
        weights = torch.rand(count, generator=draws, dtype=torch.float64) + 0.1
        updates = [ClientUpdate(str(i), {B: row}, 1) for i, row in enumerate(points)]
        found = GeometricMedian()(updates, weights.tolist())[B]

        def total(point: Tensor) -> float:
            return float(weights @ (points - point).norm(dim=1))

        # ν = 10⁻⁶ of a distance of order 3: the excess it may cost is of that order.
        best = total(found) - 1e-4
        for size in (1e-3, 1e-1, 1.0):
            for _ in range(10):
                step = torch.randn(6, generator=draws, dtype=torch.float64)
                assert total(found + size * step / step.norm()) >= best

    def test_agrees_with_steps_on_the_points_themselves(self) -> None:
        draws = torch.Generator().manual_seed(3)
        points = torch.randn(6, 9, generator=draws, dtype=torch.float64)
        shares = torch.full((6,), 1 / 6, dtype=torch.float64)
        slow = points.mean(dim=0)
        for _ in range(2000):
            pull = shares / (points - slow).norm(dim=1)
            slow = pull @ points / pull.sum()
        found = weiszfeld(points @ points.T, shares) @ points
        torch.testing.assert_close(found, slow, rtol=0, atol=1e-7)

    def test_it_is_precise_beside_a_huge_liar(self) -> None:
        clean = honest(5)
        kept = vectors(clean)
        for size in (1e6, 1e12, 1e17):
            liar = {key: torch.full_like(value, size) for key, value in CENTRE.items()}
            # First and last in the order of clients: neither may serve as the origin.
            for name in ("a", "z"):
                found = GeometricMedian()([*clean, ClientUpdate(name, liar, 1)], [1.0] * 6)
                spread = (kept - vector(found)).norm(dim=1)
                assert float(spread.max()) <= 2 * float(torch.cdist(kept, kept).max())


@pytest.mark.parametrize(("names", "winner"), [("abcdef", -3.0), ("fedcba", 3.0)])
def test_krum_takes_the_first_identifier_of_equal_scores(names: str, winner: float) -> None:
    # K = 6, f = 1: three neighbours. −3, −1, 1 and 3 all score 4 + 4 + 16.
    values = (-5.0, -3.0, -1.0, 1.0, 3.0, 5.0)
    updates = [
        ClientUpdate(k, {B: torch.tensor([v])}, 1) for k, v in zip(names, values, strict=True)
    ]
    assert Krum(1)(updates, [1.0] * 6)[B].item() == winner


def test_krum_scores_by_hand() -> None:
    # K = 5, f = 1: two neighbours. Scores of 0, 1, 3, 7, 50: 1 + 9, 1 + 4, 4 + 9, 16 + 36, …
    values = (0.0, 1.0, 3.0, 7.0, 50.0)
    updates = [ClientUpdate(str(i), {B: torch.tensor([v])}, 1) for i, v in enumerate(values)]
    assert Krum(1)(updates, [1.0] * 5)[B].item() == 1.0
    # Multi-Krum: the two lowest scores are those of 1 and 0, here with weights 1 and 3.
    assert MultiKrum(1)(updates, [3.0, 1, 1, 1, 1])[B].item() == 0.25

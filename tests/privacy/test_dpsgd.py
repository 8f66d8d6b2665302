"""The private step: shares of the clip, whole units, and noise of exactly σC/L."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import Tensor

from fedlr.kernels.clipped_sum.naive import SMALLEST_BOUND
from fedlr.methods.method import PartKey, Role
from fedlr.privacy.dpsgd import (
    ClipGroup,
    ClippedSum,
    Mechanism,
    clip_groups,
    private_gradient,
)
from fedlr.privacy.noise import public_stream, secret_stream

B, C, HEAD = PartKey("query", Role.B), PartKey("value", Role.B), PartKey("weight", Role.HEAD)
KEYS = [B, C, HEAD]
CPU = torch.device("cpu")


def mechanism(
    keys: Sequence[PartKey] = KEYS,
    clip_norm: float = 1.0,
    share: float | None = None,
    sigma: float = 0.0,
    batch: int = 1,
) -> Mechanism:
    return Mechanism(clip_norm, clip_groups(keys, clip_norm, share), sigma, batch)


def total(one: Mechanism, gradients: dict[PartKey, Tensor]) -> dict[PartKey, Tensor]:
    shapes = {key: value.shape[1:] for key, value in gradients.items()}
    count = len(next(iter(gradients.values())))
    whole = ClippedSum(one, shapes, CPU)
    whole.add(gradients, range(count), [True] * count)
    return whole.result()


@given(st.floats(0.01, 100.0), st.floats(0.001, 0.999))
def test_shares_partition_the_square_of_the_clip(clip_norm: float, share: float) -> None:
    adapters, head = clip_groups(KEYS, clip_norm, share)
    assert adapters.keys == {B, C}
    assert head.keys == {HEAD}
    assert adapters.bound**2 + head.bound**2 == pytest.approx(clip_norm**2, rel=1e-12)
    assert head.bound**2 / clip_norm**2 == pytest.approx(share, rel=1e-9)
    assert mechanism(clip_norm=clip_norm, share=share).keys == set(KEYS)


@pytest.mark.parametrize(("keys", "share"), [(KEYS, None), ([B, C], 0.5), ([HEAD], 0.5)])
def test_one_group_keeps_the_whole_clip(keys: list[PartKey], share: float | None) -> None:
    assert clip_groups(keys, 2.0, share) == (ClipGroup(frozenset(keys), 2.0),)


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_is_a_fraction(share: float) -> None:
    with pytest.raises(ValueError, match="head_share"):
        clip_groups(KEYS, 1.0, share)


BAD: list[tuple[dict[str, object], str]] = [
    ({"clip_norm": 0.0}, "clip_norm"),
    ({"clip_norm": math.nan}, "clip_norm"),
    ({"noise_multiplier": -1.0}, "noise_multiplier"),
    ({"noise_multiplier": math.inf}, "noise_multiplier"),
    ({"noise_multiplier": math.nan}, "noise_multiplier"),
    ({"expected_batch": 0}, "expected_batch"),
    ({"expected_batch": 1.5}, "expected_batch"),
    ({"groups": (ClipGroup(frozenset({B}), 0.0),)}, "bound"),
    ({"groups": (ClipGroup(frozenset({B}), 0.9e-8),)}, "bound"),
    ({"clip_norm": 1e-29, "groups": (ClipGroup(frozenset({B}), 1e-29),)}, "bound"),
    ({"groups": (ClipGroup(frozenset({B}), 1.01),)}, "clip_norm"),
    ({"groups": (ClipGroup(frozenset({B}), 0.8), ClipGroup(frozenset({C}), 0.8))}, "add up"),
    ({"groups": (ClipGroup(frozenset({B}), 0.6), ClipGroup(frozenset({B}), 0.6))}, "two clip"),
]


@pytest.mark.parametrize(("change", "name"), BAD)
def test_a_mechanism_without_a_bound_is_refused(change: dict[str, object], name: str) -> None:
    values: dict[str, object] = {
        "clip_norm": 1.0,
        "groups": clip_groups([B], 1.0, None),
        "noise_multiplier": 1.0,
        "expected_batch": 4,
    }
    Mechanism(**values)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=name):
        Mechanism(**(values | change))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [10.0**-power for power in range(0, 45, 3)])
@pytest.mark.parametrize("clip_norm", [SMALLEST_BOUND, 1e-6, 1.0])
def test_gradients_whose_squares_vanish_are_clipped_all_the_same(
    clip_norm: float, size: float
) -> None:
    # A server may send an A so small that gradients lie below what float32 can square.
    gradients = {B: torch.full((1, 100_000), size)}
    released = float(total(mechanism([B], clip_norm=clip_norm), gradients)[B].double().norm())
    assert released <= clip_norm * (1 + 1e-5)


def test_the_clip_is_over_all_arrays_of_a_unit() -> None:
    gradients = {B: torch.tensor([[3.0]]), C: torch.tensor([[0.0]]), HEAD: torch.tensor([[4.0]])}
    joint = total(mechanism(), gradients)  # ‖(3, 0, 4)‖ = 5 → a fifth
    assert [float(joint[key]) for key in KEYS] == pytest.approx([0.6, 0.0, 0.8])
    apart = total(mechanism(share=0.36), gradients)  # 3 → √0.64, 4 → √0.36
    assert [float(apart[key]) for key in KEYS] == pytest.approx([0.8, 0.0, 0.6])


def test_a_unit_that_comes_in_pieces_is_clipped_once() -> None:
    """Unit 7 is (3, 0) + (0, 4): whole 5, clipped to a fifth; piecewise (1, 1)."""
    shapes = {B: torch.Size([2])}
    summed = ClippedSum(mechanism([B]), shapes, CPU)
    first, second = torch.tensor([[3.0, 0.0], [0.3, 0.0]]), torch.tensor([[0.0, 4.0]])
    summed.add({B: first}, [7, 2], [False, True])
    summed.add({B: second}, [7], [True])
    assert summed.result()[B].tolist() == pytest.approx([0.9, 0.8])
    assert first.tolist() == torch.tensor([[3.0, 0.0], [0.3, 0.0]]).tolist()


def test_a_unit_whose_end_never_comes_is_refused() -> None:
    summed = ClippedSum(mechanism([B]), {B: torch.Size([1])}, CPU)
    summed.add({B: torch.ones(1, 1)}, [0], [False])
    with pytest.raises(ValueError, match="incomplete"):
        summed.result()


@given(
    st.lists(st.lists(st.integers(0, 4), max_size=6), max_size=5),
    st.integers(0, 2**31 - 1),
    st.sampled_from([None, 0.3]),
)
def test_any_cut_gives_the_sum_of_whole_clipped_units(
    pieces: list[list[int]], seed: int, share: float | None
) -> None:
    """Against one sum over units, each added up and clipped by hand in float64."""
    draws = torch.Generator().manual_seed(seed)
    whole: dict[int, dict[PartKey, Tensor]] = {}
    summed = ClippedSum(mechanism(share=share), {key: torch.Size([3]) for key in KEYS}, CPU)
    for index, piece in enumerate(pieces):
        units = sorted(set(piece))
        later = {unit for rest in pieces[index + 1 :] for unit in rest}
        part = {key: torch.randn(len(units), 3, generator=draws) for key in KEYS}
        for position, unit in enumerate(units):
            sums = whole.setdefault(
                unit, {key: torch.zeros(3, dtype=torch.float64) for key in KEYS}
            )
            for key in KEYS:
                sums[key] += part[key][position]
        summed.add(part, units, [unit not in later for unit in units])
    expected = {key: torch.zeros(3, dtype=torch.float64) for key in KEYS}
    for sums in whole.values():
        for group in mechanism(share=share).groups:
            norm = math.sqrt(sum(float(sums[key].pow(2).sum()) for key in group.keys))
            for key in group.keys:
                expected[key] += sums[key] * min(1.0, group.bound / norm)
    for key, value in summed.result().items():
        assert torch.allclose(value.double(), expected[key], rtol=0, atol=1e-5)


SIGMA, CLIP, BATCH = 1.5, 0.4, 8
EXACT = SIGMA * CLIP / BATCH


@pytest.mark.parametrize("share", [None, 0.2])
def test_an_empty_batch_is_noise_of_deviation_sigma_c_over_l(share: float | None) -> None:
    """Every coordinate of every group alike: the noise follows C, not the group's share.

    Kolmogorov-Smirnov at 60,000 draws: accepts the law, rejects 9/10 and 10/9 of it.
    """
    one = mechanism(clip_norm=CLIP, share=share, sigma=SIGMA, batch=BATCH)
    shapes = {key: torch.Size([300, 200]) for key in KEYS}
    empty = ClippedSum(one, shapes, CPU)
    empty.add({key: torch.zeros(0, *shape) for key, shape in shapes.items()}, [], [])
    released = private_gradient(empty.result(), one, secret_stream())
    for key in KEYS:
        values = released[key].flatten().numpy()
        assert kstest(values, "norm", args=(0, EXACT)).pvalue > 1e-6
        for wrong in (0.9, 10 / 9):
            assert kstest(values, "norm", args=(0, wrong * EXACT)).pvalue < 1e-6
    # Independent between arrays: the correlation of 60,000 pairs has deviation 1/√60,000.
    pairs = torch.corrcoef(torch.stack([released[key].flatten() for key in KEYS]))
    assert (pairs - torch.eye(3)).abs().max() < 6 / math.sqrt(60_000)


@pytest.mark.parametrize("drawn", [1, 5, 40])
def test_the_divisor_is_the_expected_batch_not_the_drawn_one(drawn: int) -> None:
    one = mechanism([B], clip_norm=1.0, batch=5)
    released = private_gradient(
        total(one, {B: torch.full((drawn, 1), 0.5)}), one, public_stream("t")
    )
    assert float(released[B]) == pytest.approx(0.5 * drawn / 5)


def test_noise_from_a_public_stream_is_refused() -> None:
    private, dry = mechanism([B], sigma=0.1), mechanism([B], sigma=0.0)
    with pytest.raises(ValueError, match="secret_stream"):
        private_gradient({B: torch.zeros(1)}, private, public_stream("t"))
    assert float(private_gradient({B: torch.ones(1)}, dry, public_stream("t"))[B]) == 1.0


def test_no_two_steps_share_noise() -> None:
    one, stream = mechanism([B], sigma=1.0), secret_stream()
    drawn = [private_gradient({B: torch.zeros(4)}, one, stream)[B] for _ in range(3)]
    drawn.append(private_gradient({B: torch.zeros(4)}, one, secret_stream())[B])
    assert len({tuple(value.tolist()) for value in drawn}) == 4

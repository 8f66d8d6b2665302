import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlr.methods.combine import normalised, weighted_mean
from fedlr.methods.method import ClientUpdate, PartKey, Role

KEY = PartKey("q", Role.B)
positive = st.floats(min_value=1e-6, max_value=1e6)


def update(client: str, value: Tensor, key: PartKey = KEY) -> ClientUpdate:
    return ClientUpdate(client, {key: value}, steps=1)


def random_updates(
    count: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[ClientUpdate]:
    generator = torch.Generator().manual_seed(seed)
    # Magnitudes from 1e-4 to 1e4 make the sum depend on its order.
    scales = 10.0 ** torch.linspace(-4, 4, count)
    return [
        update(f"c{i}", (scales[i] * torch.randn(7, 5, generator=generator)).to(dtype))
        for i in range(count)
    ]


def test_mean_by_hand() -> None:
    # (1·1 + 1·2 + 2·6) / 4 = 3.75 and (1·0 + 1·4 + 2·(−2)) / 4 = 0.
    values = [torch.tensor([1.0, 0.0]), torch.tensor([2.0, 4.0]), torch.tensor([6.0, -2.0])]
    mean = weighted_mean([update(str(i), v) for i, v in enumerate(values)], [1, 1, 2])
    assert mean[KEY].tolist() == [3.75, 0.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bit_identical_under_every_permutation(dtype: torch.dtype) -> None:
    updates, weights = random_updates(5, dtype=dtype), [0.3, 1.7, 0.11, 5.0, 2.9]
    expected = weighted_mean(updates, weights)[KEY]
    assert expected.dtype == dtype
    for order in permutations(range(5)):
        found = weighted_mean([updates[i] for i in order], [weights[i] for i in order])[KEY]
        assert torch.equal(found, expected)


def test_a_sum_in_the_given_order_would_not_be_bit_identical() -> None:
    shares = normalised([0.3, 1.7, 0.11, 5.0, 2.9])
    terms = [p * u.parts[KEY].double() for p, u in zip(shares, random_updates(5), strict=True)]
    sums = set()
    for order in permutations(range(5)):
        total = torch.zeros(7, 5, dtype=torch.float64)
        for index in order:
            total = total + terms[index]
        sums.add(tuple(total.flatten().tolist()))
    assert len(sums) > 1


def test_accumulation_is_in_double() -> None:
    # 2²⁴ + 1 + 1 in float32 stays 2²⁴; the exact mean (2²⁴ + 2) / 3 rounds to 5592406.
    values = [torch.tensor(2.0**24), torch.tensor(1.0), torch.tensor(1.0)]
    mean = weighted_mean([update(str(i), v) for i, v in enumerate(values)], [1, 1, 1])[KEY]
    assert mean.item() == 5592406.0
    assert (values[0] + values[1] + values[2]).item() / 3 != 5592406.0


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), cut=st.integers(1, 6))
def test_pieces_of_an_array_give_the_same_bits(seed: int, cut: int) -> None:
    updates, weights = random_updates(4, seed), [0.3, 1.7, 0.11, 5.0]
    whole = weighted_mean(updates, weights)[KEY]
    pieces = [
        weighted_mean([update(u.client, u.parts[KEY][rows]) for u in updates], weights)[KEY]
        for rows in (slice(None, cut), slice(cut, None))
    ]
    assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_one_client_is_bit_identical_and_not_aliased(dtype: torch.dtype) -> None:
    only = random_updates(1, dtype=dtype)[0]
    mean = weighted_mean([only], [0.37])[KEY]
    assert torch.equal(mean, only.parts[KEY])
    assert mean.data_ptr() != only.parts[KEY].data_ptr()


@settings(deadline=None, max_examples=30)
@given(weights=st.lists(positive, min_size=1, max_size=6))
def test_the_mean_lies_between_the_extremes(weights: list[float]) -> None:
    updates = random_updates(len(weights))
    stacked = torch.stack([u.parts[KEY] for u in updates])
    mean = weighted_mean(updates, weights)[KEY]
    slack = 1e-6 * stacked.abs().amax(dim=0)
    assert bool((mean <= stacked.amax(dim=0) + slack).all())
    assert bool((mean >= stacked.amin(dim=0) - slack).all())


@settings(max_examples=100)
@given(weights=st.lists(positive, min_size=1, max_size=20))
def test_shares_sum_to_one_and_do_not_depend_on_order(weights: list[float]) -> None:
    shares = normalised(weights)
    assert math.fsum(shares) == pytest.approx(1.0, abs=1e-15 * len(weights))
    assert normalised(weights[::-1]) == shares[::-1]


@settings(max_examples=50)
@given(weights=st.lists(positive, min_size=1, max_size=8), power=st.integers(-20, 20))
def test_scaling_by_a_power_of_two_changes_no_bit(weights: list[float], power: int) -> None:
    assert normalised([math.ldexp(w, power) for w in weights]) == normalised(weights)


def test_extreme_weights_do_not_overflow() -> None:
    assert normalised([1e308, 1e308, 1e308, 1e308]) == [0.25] * 4
    assert normalised([5e-324, 5e-324]) == [0.5, 0.5]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], "weights is empty"),
        ([0.0, 0], "total weight of 2 clients is 0"),
        ([1, -0.5], r"weights\[1\] = -0\.5 must be ≥ 0"),
        ([math.nan, 1], r"weights\[0\] = nan must be a finite number"),
        ([1, math.inf], r"weights\[1\] = inf must be a finite number"),
    ],
)
def test_bad_weights_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normalised(weights)
    with pytest.raises(ValueError, match=message):
        weighted_mean(random_updates(len(weights)), weights)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (update("b", torch.ones(2), PartKey("v", Role.B)), "different parts"),
        (ClientUpdate("b", {}, 1), "different parts"),
        (update("b", torch.ones(3)), r"shape \(3,\), expected \(2,\)"),
        (update("b", torch.ones(2).double()), "dtype torch.float64"),
        (update("a", torch.ones(2)), r"\['a'\] appear more than once"),
    ],
    ids=["other key", "no key", "shape", "dtype", "same client"],
)
def test_mismatching_updates_are_refused(second: ClientUpdate, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weighted_mean([update("a", torch.ones(2)), second], [1, 1])


def test_integer_arrays_and_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="floating"):
        weighted_mean([update("a", torch.ones(2, dtype=torch.int64))], [1])
    with pytest.raises(ValueError, match="1 updates but 2 weights"):
        weighted_mean([update("a", torch.ones(2))], [1, 1])

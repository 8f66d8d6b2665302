"""The front, by brute force."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlr.report.pareto import Offer, front

offers = st.lists(
    st.builds(
        Offer,
        st.sampled_from([0.5, 0.6, 0.7]),
        st.sampled_from([1.0, 8.0, math.inf]),
        st.sampled_from([0.0, 10.0, 20.0]),
    ),
    max_size=9,
)


@given(offers)
def test_the_front_is_what_nothing_beats(given_offers: list[Offer]) -> None:
    found = front(given_offers)
    for place, one in enumerate(given_offers):
        beaten = False
        for other in given_offers:
            no_worse = (
                other.accuracy >= one.accuracy
                and other.epsilon <= one.epsilon
                and other.traffic <= one.traffic
            )
            beaten |= no_worse and other != one
        assert (place in found) == (not beaten)
    assert found == sorted(set(found))


@given(offers, st.randoms())
def test_the_order_does_not_matter(given_offers: list[Offer], random: object) -> None:
    shuffled = list(given_offers)
    random.shuffle(shuffled)  # type: ignore[attr-defined]

    def kept(these: list[Offer]) -> list[tuple[float, float, float]]:
        return sorted((these[i].accuracy, these[i].epsilon, these[i].traffic) for i in front(these))

    assert kept(shuffled) == kept(given_offers)


def test_no_offer_has_no_front_and_one_is_its_own() -> None:
    assert front([]) == []
    assert front([Offer(0.5, math.inf, 0)]) == [0]


def test_privacy_switched_off_is_beaten_only_by_what_is_as_accurate() -> None:
    open_run, private = Offer(0.8, math.inf, 10), Offer(0.7, 1.0, 10)
    assert front([open_run, private]) == [0, 1]
    assert front([open_run, Offer(0.8, 1.0, 10)]) == [1]


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="epsilon = nan"):
        Offer(0.5, math.nan, 1.0)

"""Release events: exact round trips, refusal of the unknown, canonical merging."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlr.errors import LedgerError
from fedlr.privacy.events import UNITS, Release, merge

EVENT = Release(1.25, 0.1, 7, "example")

releases = st.builds(
    Release,
    noise_multiplier=st.floats(0, 1e6),
    sample_rate=st.floats(0, 1, exclude_min=True),
    steps=st.integers(0, 10**12),
    unit=st.sampled_from(UNITS),
)


@given(releases)
def test_json_round_trip_is_exact(event: Release) -> None:
    assert Release.from_json(event.to_json()) == event


def test_equal_events_have_equal_json() -> None:
    assert Release(1, 1, 1, "user").to_json() == Release(1.0, 1.0, 1, "user").to_json()
    assert Release(-0.0, 1.0, 1, "user").to_json() == Release(0.0, 1.0, 1, "user").to_json()


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"version": True},
        {"version": None},
        {"mechanism": "laplace"},
        {"unit": "site"},
        {"extra": 1},
        {"steps": 1.0},
        {"steps": True},
        {"steps": -1},
        {"sample_rate": 0},
        {"sample_rate": "0.1"},
        {"noise_multiplier": True},
        {"noise_multiplier": [1]},
        {"noise_multiplier": 10**400},
    ],
)
def test_unknown_events_are_refused(change: dict[str, object]) -> None:
    record = json.loads(EVENT.to_json()) | change
    with pytest.raises(LedgerError):
        Release.from_json(json.dumps(record))


def test_a_missing_field_is_refused() -> None:
    for name in json.loads(EVENT.to_json()):
        record = json.loads(EVENT.to_json())
        del record[name]
        with pytest.raises(LedgerError):
            Release.from_json(json.dumps(record))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        EVENT.to_json()[:-1],
        EVENT.to_json().replace("1.25", "NaN"),
        EVENT.to_json().replace("1.25", "1e999"),
        EVENT.to_json().replace('"steps":7', '"steps":7,"steps":1'),
    ],
)
def test_text_that_is_not_one_event_is_refused(text: str) -> None:
    with pytest.raises(LedgerError):
        Release.from_json(text)


@pytest.mark.parametrize(
    ("sigma", "rate", "steps"),
    [(-1.0, 0.1, 1), (float("nan"), 0.1, 1), (1.0, 0.0, 1), (1.0, 1.1, 1), (1.0, 0.1, -1)],
)
def test_values_out_of_range_are_refused(sigma: float, rate: float, steps: int) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        Release(sigma, rate, steps, "example")


@given(st.lists(releases, max_size=6), st.randoms())
def test_merge_is_canonical_and_keeps_the_steps(events: list[Release], random: object) -> None:
    doubled = events + events
    shuffled = sorted(doubled, key=lambda _: random.random())  # type: ignore[attr-defined]
    merged = merge(shuffled)
    assert merged == merge(doubled) == merge(merge(doubled))
    assert sum(event.steps for event in merged) == 2 * sum(event.steps for event in events)
    assert all(event.steps > 0 for event in merged)


def test_merge_keeps_different_mechanisms_apart() -> None:
    parts = [EVENT, Release(1.25, 0.1, 7, "user"), Release(1.5, 0.1, 7, "example")]
    assert set(merge(parts)) == set(parts)

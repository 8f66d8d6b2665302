"""Records between ClientApp and agent come back as they were, and nothing else is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.wire import (
    LONGEST_NAME,
    LONGEST_TEXT,
    MOST_ARRAYS,
    MOST_FIELDS,
    PIECE_BYTES,
    ArraySpec,
    Header,
    Piece,
    Record,
    Value,
    WireError,
    arrays_of,
    fields_of,
    opening,
    pieces,
    values_of,
)

LIMIT = 10_000_000

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
values = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=50),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
)


def back(record: Record) -> Record:
    stream = iter(list(pieces(record)))
    announced = opening(stream, LIMIT)
    return Record(announced.fields, arrays_of(announced, stream), announced.order)


@given(st.dictionaries(names, values, max_size=5), st.dictionaries(names, shapes, max_size=5))
@settings(max_examples=100, deadline=None)
def test_a_record_comes_back_as_it_was(fields: dict[str, Any], sizes: dict[str, Any]) -> None:
    draws = np.random.default_rng(0)
    arrays = {
        name: draws.standard_normal(shape).astype(np.float32) for name, shape in sizes.items()
    }
    found = back(Record(fields, arrays, "an order"))
    assert found.order == "an order"
    assert {k: (type(v), repr(v)) for k, v in found.fields.items()} == {
        k: (type(v), repr(v)) for k, v in fields.items()
    }
    assert list(found.arrays) == list(arrays)
    for name, array in arrays.items():
        assert found.arrays[name].dtype == np.float32
        assert found.arrays[name].shape == array.shape
        assert found.arrays[name].tobytes() == array.tobytes()


def test_pieces_are_of_one_mebibyte_at_most_and_arrays_may_share_none() -> None:
    array = np.arange(PIECE_BYTES // 4 + 3, dtype=np.float32)
    sent = list(pieces(Record({}, {"one": array, "two": array[:3]})))
    assert [len(piece.data) for piece in sent] == [0, PIECE_BYTES, 12, 12]
    assert np.array_equal(back(Record({}, {"one": array})).arrays["one"], array)


def test_a_slice_that_is_not_in_order_in_memory_travels_in_order() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4).T
    assert np.array_equal(back(Record({}, {"a": array})).arrays["a"], array)


@pytest.mark.parametrize("value", [None, True, 2**63, b"x", [1], 1j])
def test_a_field_that_is_no_flat_value_is_refused(value: Any) -> None:
    with pytest.raises(WireError, match="the field a"):
        values_of({"a": value})


def test_an_array_of_another_type_is_refused() -> None:
    with pytest.raises(WireError, match="float64"):
        list(pieces(Record({}, {"a": np.zeros(2)})))  # type: ignore[dict-item]


def announcing(**changes: Any) -> Iterator[Piece]:
    return iter([Piece(header=Header(**changes))])


def test_the_limit_is_on_the_sum_and_is_met_exactly() -> None:
    specs = [ArraySpec(name=name, shape=[25, 10]) for name in "ab"]
    assert opening(announcing(arrays=specs), 2_000).size == 2_000
    with pytest.raises(WireError, match="2000 bytes of arrays, at most 1999"):
        opening(announcing(arrays=specs), 1_999)


BAD_HEADERS: dict[str, dict[str, Any]] = {
    "too many arrays": {
        "arrays": [ArraySpec(name=str(i), shape=[0]) for i in range(MOST_ARRAYS + 1)]
    },
    "no name": {"arrays": [ArraySpec(shape=[1])]},
    "a long name": {"arrays": [ArraySpec(name="x" * (LONGEST_NAME + 1), shape=[1])]},
    "one name twice": {"arrays": [ArraySpec(name="a", shape=[1])] * 2},
    "too many axes": {"arrays": [ArraySpec(name="a", shape=[1] * 5)]},
    "a product beyond any integer": {"arrays": [ArraySpec(name="a", shape=[2**31] * 4)]},
    "an axis that no array has": {"arrays": [ArraySpec(name="a", shape=[0, 2**31 + 1])]},
    "too many fields": {"fields": {str(i): Value(whole=i) for i in range(MOST_FIELDS + 1)}},
    "a field without a value": {"fields": {"a": Value()}},
    "a long text": {"fields": {"a": Value(text="x" * (LONGEST_TEXT + 1))}},
    "a long key": {"fields": {"x" * (LONGEST_NAME + 1): Value(whole=1)}},
}


@pytest.mark.parametrize("changes", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_a_header_beyond_the_limits_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        opening(announcing(**changes), LIMIT)


@pytest.mark.parametrize("sent", [[], [Piece()], [Piece(data=b"abcd")]])
def test_without_a_header_there_is_no_record(sent: list[Piece]) -> None:
    with pytest.raises(WireError, match="no header"):
        opening(iter(sent), LIMIT)


@pytest.mark.parametrize(
    "data",
    [
        [],
        [Piece(data=b"1234567")],
        [Piece(data=b"12345678"), Piece(data=b"9")],
        [Piece(data=b"123456789")],
        [Piece(data=b"")],
        [Piece(header=Header())],
        [Piece(data=b"x" * (PIECE_BYTES + 1))],
    ],
    ids=["none", "too few", "one too many", "too many", "empty", "a header", "a long piece"],
)
def test_bytes_that_were_not_announced_are_refused(data: list[Piece]) -> None:
    announced = opening(announcing(arrays=[ArraySpec(name="a", shape=[2])]), LIMIT)
    with pytest.raises(WireError):
        arrays_of(announced, iter(data))


def test_fields_are_what_was_sent() -> None:
    sent = {"text": "å", "whole": -1, "real": 0.5, "empty": "", "zero": 0}
    assert fields_of(values_of(sent)) == sent

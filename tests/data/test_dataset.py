from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fedlr.data.dataset import LoadedData, TextDataset, shorten, split_validation
from fedlr.errors import DataError
from tests.data.helpers import dataset


def loaded(**changes: object) -> LoadedData:
    values: dict[str, object] = {
        "train": dataset([0, 1, 0], "aab"),
        "validation": dataset([1]),
        "label_names": ("no", "yes"),
        "declared_public": True,
    }
    return LoadedData(**(values | changes))  # type: ignore[arg-type]


def test_select_keeps_columns_aligned() -> None:
    data = TextDataset(("p", "q", "r"), ("P", "Q", "R"), np.array([0, 1, 2]), ("x", "y", "z"))
    chosen = data.select(np.array([2, 0]))
    assert (chosen.texts, chosen.pairs, chosen.users) == (("r", "p"), ("R", "P"), ("z", "x"))
    assert chosen.labels.tolist() == [2, 0]
    assert len(data.select(np.array([], dtype=np.int64))) == 0


def test_labels_are_copied_and_read_only() -> None:
    source = np.array([0, 1])
    data = TextDataset(("p", "q"), None, source, None)
    source[0] = 5
    assert data.labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match="read-only"):
        data.labels[0] = 1


@pytest.mark.parametrize(
    ("labels", "pairs", "users", "message"),
    [
        ([0], None, None, "labels has 1 rows, expected 2"),
        ([0, 1], ("p",), None, "pairs has 1 rows, expected 2"),
        ([0, 1], None, ("u",), "users has 1 rows, expected 2"),
        ([0, -1], None, None, "must be ≥ 0"),
        ([0.0, 1.0], None, None, "float64"),
        ([[0, 1]], None, None, "shape"),
    ],
)
def test_columns_that_do_not_fit_are_refused(
    labels: list[float],
    pairs: tuple[str, ...] | None,
    users: tuple[str, ...] | None,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        TextDataset(("p", "q"), pairs, np.array(labels), users)


@pytest.mark.parametrize(
    "names", [(), ("only",), ("twice", "twice")], ids=["empty", "one", "repeated"]
)
def test_label_list_needs_two_different_names(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="at least two names"):
        loaded(label_names=names)


def test_label_outside_the_list_is_refused() -> None:
    with pytest.raises(ValueError, match="validation has label 2, must be < 2"):
        loaded(validation=dataset([2]))


def test_fingerprint_is_a_function_of_content_only() -> None:
    assert loaded().sha256 == loaded().sha256
    assert loaded(notices=("said",), declared_public=False).sha256 == loaded().sha256
    assert len(loaded().sha256) == 64


@pytest.mark.parametrize(
    "changes",
    [
        {"label_names": ("yes", "no")},
        {"train": dataset([0, 1, 1], "aab")},
        {"train": dataset([0, 1, 0], "abb")},
        {"train": dataset([0, 1, 0])},
        {"train": dataset([0, 1], "aa"), "validation": dataset([0, 1], "bb")},
        {"train": dataset([1]), "validation": dataset([0, 1, 0], "aab")},
    ],
    ids=["label order", "a label", "a user", "no users", "row moved", "parts swapped"],
)
def test_fingerprint_detects_change(changes: dict[str, object]) -> None:
    assert loaded(**changes).sha256 != loaded().sha256


def test_fingerprint_separates_columns() -> None:
    one = TextDataset(("ab",), ("c",), np.array([0]), None)
    other = TextDataset(("a",), ("bc",), np.array([0]), None)
    assert loaded(train=one).sha256 != loaded(train=other).sha256


def test_fingerprint_follows_replace() -> None:
    changed = replace(loaded(), train=dataset([1]))
    assert changed.sha256 == loaded(train=dataset([1])).sha256


@given(st.integers(2, 60), st.floats(0.001, 0.999), st.integers(0, 2**32))
def test_split_is_a_partition_of_the_rows(count: int, fraction: float, seed: int) -> None:
    data = dataset([0] * count)
    train, validation = split_validation(data, fraction, seed)
    assert len(validation) == min(max(round(fraction * count), 1), count - 1)
    assert set(train.texts).isdisjoint(validation.texts)
    assert set(train.texts) | set(validation.texts) == set(data.texts)
    again = split_validation(data, fraction, seed)
    assert again[1].texts == validation.texts


@given(st.lists(st.integers(0, 5), min_size=2, max_size=40), st.floats(0.01, 0.99))
def test_a_split_by_user_leaves_nobody_in_both_parts(owners: list[int], fraction: float) -> None:
    users = tuple(map(str, owners))
    assume(len(set(users)) > 1)
    data = dataset([0] * len(users), users)
    train, validation = split_validation(data, fraction, 3, by_user=True)
    left, right = set(train.users or ()), set(validation.users or ())
    assert left.isdisjoint(right)
    assert left | right == set(users)
    total = len(set(users))
    assert len(right) == min(max(round(fraction * total), 1), total - 1)
    assert sorted(train.texts + validation.texts) == sorted(data.texts)


def test_a_split_by_user_needs_two_users() -> None:
    with pytest.raises(DataError, match="the data have none"):
        split_validation(dataset([0, 1]), 0.5, 0, by_user=True)
    with pytest.raises(DataError, match=r"the data have 1 users; .* at least 2"):
        split_validation(dataset([0, 1], ("ann", "ann")), 0.5, 0, by_user=True)


def test_split_depends_on_the_seed_and_keeps_order() -> None:
    data = dataset([0] * 100)
    first, second = (split_validation(data, 0.1, seed)[1].texts for seed in (0, 1))
    assert first != second
    assert list(first) == sorted(first, key=lambda text: int(text.split()[1]))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_split_refuses_fractions_outside_the_open_interval(fraction: float) -> None:
    with pytest.raises(ValueError, match="validation_fraction"):
        split_validation(dataset([0, 1]), fraction, 0)


def test_split_needs_two_rows() -> None:
    with pytest.raises(DataError, match="at least 2"):
        split_validation(dataset([0]), 0.5, 0)


def test_shorten_draws_rows_and_leaves_short_data_alone() -> None:
    data = dataset(list(range(50)))
    assert shorten(data, 50, 0) is data
    short = shorten(data, 10, 0)
    assert len(set(short.labels.tolist())) == 10
    assert short.labels.tolist() == sorted(short.labels.tolist())
    assert short.labels.tolist() != list(range(10))
    with pytest.raises(ValueError, match="max_examples"):
        shorten(data, 0, 0)


@pytest.mark.parametrize("public", [True, False])
def test_published_digest_sees_training_rows_only_where_they_are_public(public: bool) -> None:
    """Add/remove one training row: the digest that leaves must not move for private data."""
    validation = TextDataset(("v",), None, np.array([0]), None)
    whole = TextDataset(("a", "b"), None, np.array([0, 1]), None)
    digests = [
        LoadedData(train, validation, ("x", "y"), public).publishable_sha256
        for train in (whole, whole.select(np.array([0])))
    ]
    assert (digests[0] == digests[1]) is not public

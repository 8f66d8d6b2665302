from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlr.data.dataset import TextDataset
from fedlr.data.partition import _unit_labels, partition
from fedlr.errors import ConfigError, DataError
from tests.data.helpers import dataset

pytest.importorskip("flwr_datasets")

KINDS: tuple[Any, ...] = ("iid", "dirichlet", "natural")
UNITS: tuple[Any, ...] = ("example", "user")


def random_dataset(rows: int, users: int, classes: int, seed: int = 0) -> TextDataset:
    """Every user has at least one row, the other rows are dealt at random."""
    rng = np.random.default_rng(seed)
    owners = np.concatenate([np.arange(users), rng.integers(users, size=rows - users)])
    labels = rng.integers(classes, size=rows)
    return dataset(labels.tolist(), [f"user {owner}" for owner in rng.permutation(owners)])


def is_partition(parts: list[np.ndarray[Any, Any]], count: int) -> bool:
    joined = np.concatenate(parts)
    ascending = all(bool((np.diff(part) > 0).all()) for part in parts)
    return ascending and np.array_equal(np.sort(joined), np.arange(count))


def users_of(data: TextDataset, rows: np.ndarray[Any, Any]) -> set[str]:
    assert data.users is not None
    return {data.users[row] for row in rows}


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(UNITS),
    st.integers(1, 12),
    st.integers(0, 60),
    st.integers(1, 5),
    st.floats(0.01, 100),
    st.integers(0, 2**31),
)
def test_every_partition_is_disjoint_complete_and_repeatable(
    kind: Any, unit: Any, clients: int, more: int, classes: int, alpha: float, seed: int
) -> None:
    data = random_dataset(clients + 2 + more, clients + 2, classes, seed % 7)
    parts = partition(data, kind, clients, seed, alpha, unit)
    assert len(parts) == clients
    assert all(part.dtype == np.int64 for part in parts)
    assert is_partition(parts, len(data))
    again = partition(data, kind, clients, seed, alpha, unit)
    assert all(np.array_equal(one, two) for one, two in zip(parts, again, strict=True))


@pytest.mark.parametrize(
    ("kind", "unit"), [("iid", "user"), ("dirichlet", "user"), ("natural", "example")]
)
def test_a_user_is_never_split(kind: Any, unit: Any) -> None:
    data = random_dataset(500, 40, 3)
    parts = partition(data, kind, 7, 0, 0.5, unit)
    owners = [users_of(data, part) for part in parts]
    assert sum(len(names) for names in owners) == 40
    assert len(set.union(*owners)) == 40


def test_iid_over_examples_does_split_users() -> None:
    """The check above can fail: dealing rows breaks users up."""
    data = random_dataset(500, 40, 3)
    owners = [users_of(data, part) for part in partition(data, "iid", 7, 0)]
    assert sum(len(names) for names in owners) > 40


@pytest.mark.parametrize("kind", ["iid", "natural"])
def test_units_are_dealt_evenly(kind: Any) -> None:
    data = random_dataset(300, 44, 3)
    by_user = partition(data, kind, 10, 0, unit="user")
    assert sorted(len(users_of(data, part)) for part in by_user) == [4] * 6 + [5] * 4
    if kind == "iid":
        assert sorted(map(len, partition(data, kind, 7, 0))) == [42] + [43] * 6  # 300 = 42 + 6·43


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_is_another_partition(kind: Any) -> None:
    data = random_dataset(300, 44, 3)
    one, two = (partition(data, kind, 5, seed, 0.5) for seed in (0, 1))
    assert any(not np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def test_iid_is_not_the_order_of_the_file() -> None:
    """flwr-datasets cuts contiguous shards; of rows sorted by label that gives one class each."""
    data = dataset([0] * 500 + [1] * 500)
    for part in partition(data, "iid", 2, 0):
        # Hypergeometric with standard deviation √(500·¼·500/999) ≈ 7.9: ± 5 of them.
        assert abs(int(data.labels[part].sum()) - 250) < 40


def test_dirichlet_follows_its_law() -> None:
    """A share of Dirichlet(α, …, α) over K clients has variance (1/K)(1 - 1/K)/(Kα + 1)."""
    clients, alpha, rows, classes = 10, 0.5, 400, 200
    data = dataset(np.repeat(np.arange(classes), rows).tolist())
    shares = np.array(
        [
            np.bincount(data.labels[part], minlength=classes) / rows
            for part in partition(data, "dirichlet", clients, 0, alpha)
        ]
    )

    def variance(concentration: float) -> float:
        return (1 / clients) * (1 - 1 / clients) / (clients * concentration + 1)

    measured = float(shares.var())
    assert measured == pytest.approx(variance(alpha), rel=0.1)
    assert measured != pytest.approx(variance(2 * alpha), rel=0.3)
    assert measured != pytest.approx(variance(alpha / 2), rel=0.3)


def test_a_hundred_clients_with_small_alpha() -> None:
    """41 classes leave most clients with little; nobody is redrawn and nothing is lost."""
    data = random_dataset(5_000, 150, 5)
    parts = partition(data, "dirichlet", 100, 0, 0.01)
    sizes = [len(part) for part in parts]
    assert is_partition(parts, 5_000)
    assert min(sizes) == 0
    assert any(len(set(data.labels[part].tolist())) == 1 for part in parts)


def test_large_alpha_is_nearly_even() -> None:
    parts = partition(random_dataset(5_000, 10, 5), "dirichlet", 10, 0, 1e6)
    assert max(abs(len(part) - 500) for part in parts) <= 10


def test_a_users_label_is_what_sets_it_apart() -> None:
    """Class 0 is everyone's most frequent label, and yet three kinds of users are told apart.

    Shares in the whole: 300/420 ≈ 0.71, 60/420 ≈ 0.14, 0.14. A user of kind 1 has 4/7 ≈ 0.57 of
    class 0 (below) and 3/7 ≈ 0.43 of class 1 (above by 0.29).
    """
    rows = [(user, label) for user in range(60) for label in [0] * 4 + [user % 3] * 3]
    data = dataset([label for _, label in rows])
    unit_of_row = np.array([user for user, _ in rows])
    assert _unit_labels(data, unit_of_row, 60).tolist() == [user % 3 for user in range(60)]


def test_one_row_per_user_is_the_example_partition() -> None:
    labels = np.random.default_rng(0).integers(4, size=80)
    data = dataset(labels.tolist(), [f"u{row:02d}" for row in range(80)])
    for kind in ("iid", "dirichlet"):
        by_example = partition(data, kind, 6, 3, 0.5, "example")
        by_user = partition(data, kind, 6, 3, 0.5, "user")
        for one, two in zip(by_example, by_user, strict=True):
            assert np.array_equal(one, two)


def test_one_client_gets_everything() -> None:
    data = random_dataset(30, 5, 2)
    for kind in KINDS:
        assert partition(data, kind, 1, 0, 0.5)[0].tolist() == list(range(30))


def test_as_many_clients_as_users() -> None:
    data = random_dataset(60, 9, 2)
    parts = partition(data, "natural", 9, 0)
    assert all(len(users_of(data, part)) == 1 for part in parts)


@pytest.mark.parametrize(
    ("kind", "unit", "clients", "bound"),
    [
        ("natural", "example", 10, 9),
        ("iid", "user", 10, 9),
        ("iid", "example", 61, 60),
        ("dirichlet", "example", 61, 60),
        ("iid", "example", 0, 60),
    ],
)
def test_too_many_clients_names_the_bound(kind: Any, unit: Any, clients: int, bound: int) -> None:
    data = random_dataset(60, 9, 2)
    with pytest.raises(
        ConfigError, match=rf"^federation\.clients = {clients} must be ≥ 1 and ≤ {bound}"
    ):
        partition(data, kind, clients, 0, 0.5, unit)


def test_natural_ids_are_required() -> None:
    data = dataset([0, 1, 0])
    with pytest.raises(DataError, match="partition=natural needs a natural id"):
        partition(data, "natural", 2, 0)
    with pytest.raises(DataError, match=r"privacy\.unit=user needs a natural id"):
        partition(data, "iid", 2, 0, unit="user")


@pytest.mark.parametrize("alpha", [None, 0.0, -1.0, float("nan"), float("inf")])
def test_alpha_must_be_positive(alpha: float | None) -> None:
    with pytest.raises(ConfigError, match=r"partition\.alpha"):
        partition(dataset([0, 1, 0]), "dirichlet", 2, 0, alpha)


def test_other_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="kind = 'shard'"):
        partition(dataset([0, 1]), "shard", 2, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unit = 'row'"):
        partition(dataset([0, 1]), "iid", 2, 0, unit="row")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^seed = -1"):
        partition(dataset([0, 1]), "iid", 2, -1)


def test_a_partitioner_that_loses_rows_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr_datasets.partitioner import IidPartitioner

    whole = IidPartitioner.load_partition
    monkeypatch.setattr(
        IidPartitioner, "load_partition", lambda self, number: whole(self, number).select([0])
    )
    with pytest.raises(RuntimeError, match="assigned 2 of 6 units"):
        partition(dataset([0] * 6), "iid", 2, 0)

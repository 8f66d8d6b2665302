"""Who holds which row: iid, Dirichlet by label, or by natural id.

Needed where one data set stands for many sites (simulation); on a real node
the partition is the identity. The draws are those of flwr-datasets, which this
module feeds and checks:

* its iid partitioner cuts contiguous shards, so rows are permuted first;
* its Dirichlet partitioner redraws until no client is small; with the least
  size 0 it never does, and empty clients are allowed;
* it groups natural ids by a fixed group size, from which a number of clients
  does not follow, so ids are dealt to the clients first.

A unit of privacy is never split: with ``unit="user"`` users are partitioned
and their rows follow.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from fedlr import checks
from fedlr.data.dataset import Rows, TextDataset
from fedlr.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

Integers = npt.NDArray[np.int64]


def partition(
    dataset: TextDataset,
    kind: Literal["iid", "dirichlet", "natural"],
    clients: int,
    seed: int,
    alpha: float | None = None,
    unit: Literal["example", "user"] = "example",
) -> list[Rows]:
    """Deal the rows of ``dataset`` to ``clients`` clients with a public seed.

    Args:
        dataset: N rows.
        kind: ``iid``: equal numbers of units (±1), at random. ``dirichlet``:
            for every label, shares drawn from Dirichlet(α, …, α)
            (arXiv 1905.12022); clients may get one class, or nothing.
            ``natural``: users are dealt in equal numbers (±1), at random, and
            bring all their rows.
        clients: 1 ≤ clients ≤ number of units (of users, for ``natural``).
        seed: Public seed, ≥ 0.
        alpha: α > 0 of ``dirichlet``; small is uneven.
        unit: Unit of privacy. With ``user``, ``iid`` and ``dirichlet`` deal
            whole users; for ``dirichlet`` a user has the label that it shows
            most above the label's share in the whole data set.

    Returns:
        One int64 array of ascending row indices per client: disjoint, together
        all rows, equal for equal arguments.

    Raises:
        ConfigError: ``alpha`` is missing or not positive, ``clients`` is out of
            bounds, or ``seed`` is negative.
        DataError: Users are needed and the data have none.
    """
    checks.one_of("kind", kind, ("iid", "dirichlet", "natural"))
    checks.one_of("unit", unit, ("example", "user"))
    if seed < 0:
        raise ConfigError([f"seed = {seed} must be ≥ 0; choose another."])
    whole_users = unit == "user" or kind == "natural"
    unit_of_row = _users_as_integers(dataset, kind) if whole_users else np.arange(len(dataset))
    count = int(unit_of_row.max()) + 1 if len(dataset) else 0
    if not 1 <= clients <= count:
        raise ConfigError(
            [
                f"federation.clients = {clients} must be ≥ 1 and ≤ {count}, the number of "
                f"{'users' if whole_users else 'examples'} in the training data; change it."
            ]
        )
    if kind == "iid":
        client_of_unit = _iid(count, clients, seed)
    elif kind == "dirichlet":
        labels = _unit_labels(dataset, unit_of_row, count) if whole_users else dataset.labels
        client_of_unit = _dirichlet(labels, clients, seed, _checked_alpha(alpha))
    else:
        client_of_unit = _natural(count, clients, seed)
    client_of_row = client_of_unit[unit_of_row]
    ends = np.cumsum(np.bincount(client_of_row, minlength=clients))
    rows: list[Rows] = np.split(np.argsort(client_of_row, kind="stable"), ends[:-1])
    return rows


def _checked_alpha(alpha: float | None) -> float:
    """Return ``alpha`` if it is a positive finite number; ConfigError otherwise."""
    if alpha is None or not math.isfinite(alpha) or alpha <= 0:
        raise ConfigError(
            [f"partition.alpha = {alpha} must be a finite number > 0 for kind=dirichlet; set it."]
        )
    return float(alpha)


def _users_as_integers(dataset: TextDataset, kind: str) -> Integers:
    """Return the user of each row as its index in the sorted users, shape (N,)."""
    if dataset.users is None:
        wanted = "partition=natural" if kind == "natural" else "privacy.unit=user"
        raise DataError(
            f"{wanted} needs a natural id per row and the data have none. Set data.user_column, "
            "or use another partition and privacy.unit=example."
        )
    index = {user: number for number, user in enumerate(sorted(set(dataset.users)))}
    return np.array([index[user] for user in dataset.users], dtype=np.int64)


def _unit_labels(dataset: TextDataset, unit_of_row: Integers, count: int) -> Integers:
    """Return each unit's most over-represented label, ties to the lower, shape (count,).

    Its most frequent label would be the same for nearly everyone where one
    class dominates, and the draw by label then has nothing to act on.
    """
    classes = int(dataset.labels.max()) + 1
    table = np.bincount(unit_of_row * classes + dataset.labels, minlength=count * classes)
    counts = table.reshape(count, classes)  # count x K
    shares = counts / counts.sum(axis=1, keepdims=True)
    labels: Integers = np.argmax(shares - counts.sum(axis=0) / len(dataset), axis=1)
    return labels


def _iid(count: int, clients: int, seed: int) -> Integers:
    """Return the client of each unit: contiguous shards of a random permutation."""
    from flwr_datasets.partitioner import IidPartitioner

    units = np.random.default_rng(seed).permutation(count)
    return _assignment(IidPartitioner(num_partitions=clients), {"unit": units}, clients)


def _dirichlet(labels: Integers, clients: int, seed: int, alpha: float) -> Integers:
    """Return the client of each unit from label-wise Dirichlet shares."""
    from flwr_datasets.partitioner import DirichletPartitioner

    partitioner = DirichletPartitioner(
        num_partitions=clients,
        partition_by="label",
        alpha=alpha,
        min_partition_size=0,
        self_balancing=False,
        shuffle=False,
        seed=seed,
    )
    # Within a label flwr-datasets cuts in row order: neighbours would stay together.
    units = np.random.default_rng(seed).permutation(len(labels))
    return _assignment(partitioner, {"unit": units, "label": labels[units]}, clients)


def _natural(count: int, clients: int, seed: int) -> Integers:
    """Return the client of each user: users dealt at random in groups of equal size ±1."""
    from flwr_datasets.partitioner import GroupedNaturalIdPartitioner

    users = np.random.default_rng(seed).permutation(count)
    groups = np.empty(count, dtype=np.int64)
    for client, members in enumerate(np.array_split(users, clients)):
        groups[members] = client
    partitioner = GroupedNaturalIdPartitioner("group", group_size=1, sort_unique_ids=True)
    return _assignment(partitioner, {"unit": np.arange(count), "group": groups}, clients)


def _assignment(partitioner: Any, columns: dict[str, Integers], clients: int) -> Integers:
    """Run a flwr-datasets partitioner on a table of units; its client per unit."""
    from datasets import Dataset

    partitioner.dataset = Dataset.from_dict(columns)
    client_of_unit = np.full(len(columns["unit"]), -1, dtype=np.int64)
    assigned = 0
    for client in range(clients):
        units: Sequence[int] = partitioner.load_partition(client)["unit"][:]
        client_of_unit[np.asarray(units, dtype=np.int64)] = client
        assigned += len(units)
    if assigned != len(client_of_unit) or client_of_unit.min() < 0:
        raise RuntimeError(
            f"flwr-datasets assigned {assigned} of {len(client_of_unit)} units or one of them "
            "twice: this version of it cannot be used"
        )
    return client_of_unit

"""Labelled text in memory: the frozen types that every data source returns.

Rows are addressed by their position. A data set is never changed: selecting
rows makes a new one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fedlr import checks
from fedlr.errors import DataError

Labels = npt.NDArray[np.int64]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TextDataset:
    """N labelled texts, or pairs of texts.

    Attributes:
        texts: N texts.
        pairs: N second texts (a hypothesis, an answer), or None.
        labels: Class index of each row, shape (N,), int64, read-only; ≥ 0.
        users: Natural id of each row (its author, its module), or None.

    Raises:
        ValueError: The columns differ in length, or the labels are not one
            dimension of non-negative integers.

    Example:
        >>> data = TextDataset(("good", "bad"), None, np.array([1, 0]), ("ann", "bob"))
        >>> len(data), data.select(np.array([1])).users
        (2, ('bob',))
    """

    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    labels: Labels
    users: tuple[str, ...] | None

    def __post_init__(self) -> None:
        given = np.asarray(self.labels)
        if given.ndim != 1 or (given.size and not np.issubdtype(given.dtype, np.integer)):
            raise ValueError(
                f"labels has dtype {given.dtype} and shape {given.shape}; expected one "
                "dimension of integers"
            )
        labels = given.astype(np.int64)
        if labels.size and labels.min() < 0:
            raise ValueError(f"labels has a value {labels.min()}; every label must be ≥ 0")
        labels.setflags(write=False)
        object.__setattr__(self, "labels", labels)
        for name, column in (("pairs", self.pairs), ("users", self.users), ("labels", labels)):
            if column is not None and len(column) != len(self.texts):
                raise ValueError(
                    f"{name} has {len(column)} rows, expected {len(self.texts)} as in texts"
                )

    def __len__(self) -> int:
        """N, the number of rows."""
        return len(self.texts)

    @property
    def majority(self) -> float:
        """Share of the largest class, [0, 1]; 0 where there is no row."""
        counts = np.bincount(self.labels, minlength=1)
        return float(counts.max() / max(1, len(self)))

    def select(self, rows: Rows) -> TextDataset:
        """Return the data set of ``rows`` (positions, int64, any order, may be empty)."""
        chosen = [int(row) for row in rows]
        return TextDataset(
            texts=tuple(self.texts[row] for row in chosen),
            pairs=None if self.pairs is None else tuple(self.pairs[row] for row in chosen),
            labels=self.labels[np.asarray(chosen, dtype=np.int64)],
            users=None if self.users is None else tuple(self.users[row] for row in chosen),
        )


@dataclass(frozen=True, eq=False)
class LoadedData:
    """What a data source hands over.

    Attributes:
        train: The rows that clients share among themselves.
        validation: Public rows that no client sees.
        label_names: K ≥ 2 class names in index order, from a configuration or
            from public metadata, never from the rows.
        declared_public: Whether the rows are declared public, which is what
            allows ``privacy.mode=dry``.
        notices: Sentences the user must see (a class dropped, a split cut).
        sha256: Hex digest over train, validation and label list in a canonical
            form; it detects change and nothing else.

    Raises:
        ValueError: Fewer than two label names, a repeated one, or a label
            outside the list.
    """

    train: TextDataset
    validation: TextDataset
    label_names: tuple[str, ...]
    declared_public: bool
    notices: tuple[str, ...] = ()
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        check_label_names(self.label_names)
        for name, part in (("train", self.train), ("validation", self.validation)):
            if len(part) and part.labels.max() >= len(self.label_names):
                raise ValueError(
                    f"{name} has label {part.labels.max()}, must be < {len(self.label_names)}, "
                    "the number of label names"
                )
        object.__setattr__(
            self, "sha256", _fingerprint(self.label_names, (self.train, self.validation))
        )

    @property
    def publishable_sha256(self) -> str:
        """The digest that may leave the site.

        `sha256` for data declared public. Otherwise that of the public validation
        split and the label list: a digest of private rows would confirm one row
        to whoever knows all the others, which is the adversary of the guarantee.
        """
        if self.declared_public:
            return self.sha256
        return _fingerprint(self.label_names, (self.validation,))

    def rows_sha256(self, rows: Rows) -> str:
        """Return a digest of some training rows, whatever their order. Private: for a ledger."""
        return _fingerprint(self.label_names, (self.train.select(np.sort(rows)),))


def check_label_names(names: tuple[str, ...]) -> None:
    """Raise ValueError unless ``names`` are at least two different names."""
    if len(names) < 2 or len(set(names)) != len(names):
        raise ValueError(f"label_names = {names} must be at least two names, each once")


def split_validation(
    dataset: TextDataset, fraction: float, seed: int, by_user: bool = False
) -> tuple[TextDataset, TextDataset]:
    """Cut a validation set off by a seeded public permutation of the rows, or of the users.

    Args:
        dataset: N ≥ 2 rows; of two or more users, if ``by_user``.
        fraction: Part of the rows (of the users) that goes to validation, in
            (0, 1); rounded to at least one, and at least one stays.
        seed: Public seed, ≥ 0.
        by_user: Move whole users: an ε per user would be false for one whose
            rows are in both parts, because validation rows are not protected.

    Returns:
        (train, validation): disjoint, together every row, each in the order of
        ``dataset``.

    Raises:
        DataError: Fewer than two rows or users, or no users with ``by_user``.
        ValueError: ``fraction`` is not inside (0, 1).

    Example:
        >>> data = TextDataset(("a", "b", "c"), None, np.zeros(3, int), ("ann", "bob", "ann"))
        >>> [part.users for part in split_validation(data, 0.5, 0, by_user=True)]
        [('bob',), ('ann', 'ann')]
    """
    if not 0.0 < checks.finite("validation_fraction", fraction) < 1.0:
        raise ValueError(f"validation_fraction = {fraction} must be > 0 and < 1")
    owners = _user_of_row(dataset) if by_user else np.arange(len(dataset))
    total = int(owners.max(initial=-1)) + 1
    if total < 2:
        raise DataError(
            f"the data have {total} {'users' if by_user else 'rows'}; cutting a validation set off "
            "needs at least 2. Add some or give a validation split."
        )
    order = np.random.default_rng(seed).permutation(total)
    moved = np.zeros(total, dtype=np.bool_)
    moved[order[: min(max(round(fraction * total), 1), total - 1)]] = True
    chosen = moved[owners]
    return dataset.select(np.flatnonzero(~chosen)), dataset.select(np.flatnonzero(chosen))


def _user_of_row(dataset: TextDataset) -> Rows:
    """Return the user of each row as its index in the sorted users, shape (N,)."""
    if dataset.users is None:
        raise DataError(
            "privacy.unit=user cuts a validation set off by user and the data have none. Set "
            "data.user_column, give a validation split, or use privacy.unit=example."
        )
    number = {user: index for index, user in enumerate(sorted(set(dataset.users)))}
    return np.array([number[user] for user in dataset.users], dtype=np.int64)


def shorten(dataset: TextDataset, max_examples: int, seed: int) -> TextDataset:
    """Return at most ``max_examples`` ≥ 1 rows, drawn with a public seed, order kept."""
    checks.at_least("max_examples", max_examples, 1)
    if len(dataset) <= max_examples:
        return dataset
    order = np.random.default_rng(seed).permutation(len(dataset))
    return dataset.select(np.sort(order[:max_examples]))


def _fingerprint(label_names: tuple[str, ...], parts: Iterable[TextDataset]) -> str:
    """Hash one JSON array per row; a header per part makes the concatenation unambiguous."""
    digest = hashlib.sha256(json.dumps(list(label_names)).encode())
    for part in parts:
        digest.update(f"\n{len(part)}".encode())
        pairs = part.pairs if part.pairs is not None else (None,) * len(part)
        users = part.users if part.users is not None else (None,) * len(part)
        for row in zip(part.texts, pairs, part.labels.tolist(), users, strict=True):
            digest.update(b"\n" + json.dumps(row).encode())
    return digest.hexdigest()

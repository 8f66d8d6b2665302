"""From the raw rows of a file or a hub to checked data sets.

Messages name rows and values: they are for the console of the data's owner
and must never leave a site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from fedlr.data.dataset import LoadedData, TextDataset, check_label_names, split_validation
from fedlr.data.spec import SourceSpec
from fedlr.errors import DataError

VALIDATION_SPLITS = ("validation", "valid", "dev", "test")
"""Splits that serve as validation when none is configured, most wanted first."""

NumberedRows = Iterable[tuple[int, Mapping[str, object]]]
"""Row number (from 1, for messages) and the row's values by column."""


def build_dataset(
    source: str, rows: NumberedRows, spec: SourceSpec, label_names: tuple[str, ...]
) -> TextDataset:
    """Check rows against the declared columns and label list.

    Args:
        source: What the rows were read from, for messages.
        rows: Numbered rows; more columns than needed are ignored.
        spec: Columns to read. Natural ids are turned into strings.
        label_names: K class names in index order. A label is an index in
            [0, K), or a name of the list; a string of digits is an index
            unless names of the list are themselves numbers.

    Raises:
        DataError: No row, a missing column, a text that is not valid Unicode
            text, a missing natural id, or a label that is not in the list.
    """
    encode = label_encoder(label_names)
    labels: list[int] = []
    columns: list[list[str]] = [[] for _ in spec.text_columns]
    users: list[str] = []
    for number, row in rows:
        require_columns(f"{source}, row {number}", spec.columns, row)
        for column, name in zip(columns, spec.text_columns, strict=True):
            column.append(_text(source, number, name, row[name]))
        label = encode(row[spec.label_column])
        if label is None:
            raise DataError(_bad_label(source, number, row[spec.label_column], label_names))
        labels.append(label)
        if spec.user_column is not None:
            users.append(_user(source, number, spec.user_column, row[spec.user_column]))
    if not labels:
        raise DataError(f"{source} has no rows. Give a file with at least one example.")
    return TextDataset(
        texts=tuple(columns[0]),
        pairs=tuple(columns[1]) if len(columns) == 2 else None,
        labels=np.array(labels, dtype=np.int64),
        users=tuple(users) if spec.user_column is not None else None,
    )


def assemble(
    spec: SourceSpec,
    train: TextDataset,
    validation: TextDataset | None,
    label_names: tuple[str, ...],
    notices: Sequence[str] = (),
) -> LoadedData:
    """Return the loaded data, cutting a validation set off ``train`` if there is none."""
    notes = list(notices)
    if validation is None:
        train, validation = split_validation(
            train, spec.validation_fraction, spec.seed, spec.split_by_user
        )
        # Notices are published with the results: the number of private rows is not for them.
        amount = f"{len(validation)} rows" if spec.public else "some rows"
        unprotected = "" if spec.public else ", and no privacy guarantee covers them"
        whose = " with all rows of their users" if spec.split_by_user else ""
        notes.append(
            f"There is no validation split: {amount} were cut off the training rows{whose}. "
            f"They count as public: no client trains on them{unprotected}."
        )
    return LoadedData(train, validation, label_names, spec.public, tuple(notes))


def assemble_one(
    spec: SourceSpec,
    rows: TextDataset,
    label_names: tuple[str, ...],
    notices: Sequence[str] = (),
) -> LoadedData:
    """Return loaded data of the one side that ``spec.only`` names, with nothing on the other."""
    none = rows.select(np.array([], dtype=np.int64))
    train, validation = (rows, none) if spec.only == "train" else (none, rows)
    return LoadedData(train, validation, label_names, spec.public, tuple(notices))


def needed_validation(
    found: Iterable[str], spec: SourceSpec, where: str
) -> tuple[str, tuple[str, ...]]:
    """Pick the validation split as `choose_validation`; DataError where there is none."""
    names = list(found)
    chosen, notices = choose_validation(names, spec, where)
    if chosen is None:
        raise DataError(
            f"{where} has no validation split (it has {', '.join(sorted(names)) or 'none'}), and a "
            f"server of real sites has no other rows; add one of {', '.join(VALIDATION_SPLITS)}, "
            "or set data.validation_split"
        )
    return chosen, notices


def choose_validation(
    found: Iterable[str], spec: SourceSpec, where: str
) -> tuple[str | None, tuple[str, ...]]:
    """Pick the validation split among those found.

    Returns:
        (its name or None, notices: a test split used as validation is said).

    Raises:
        DataError: The configured split is not there.
    """
    names = sorted(set(found))
    if spec.validation_split is not None:
        if spec.validation_split not in names:
            raise DataError(
                f"data.validation_split = {spec.validation_split!r} is not in {where}, which has "
                f"{', '.join(names) or 'none'}. Name one of these, or null to cut one off train."
            )
        return spec.validation_split, ()
    for name in VALIDATION_SPLITS:
        if name in names and name != spec.train_split:
            notice = f"The {name} split of {where} serves as validation: settings chosen on it "
            return name, (notice + "make its score optimistic.",) if name == "test" else ()
    return None, ()


def require_columns(source: str, wanted: Iterable[str], found: Iterable[str]) -> None:
    """Raise DataError, listing the columns found, unless every wanted one is among them."""
    present = list(found)
    missing = [name for name in wanted if name not in present]
    if missing:
        raise DataError(
            f"{source} has no column {', '.join(map(repr, missing))}; it has "
            f"{', '.join(map(repr, present)) or 'none'}. Set data.text_columns, "
            "data.label_column and data.user_column to its names."
        )


def check_declared_labels(source: str, names: Sequence[object]) -> tuple[str, ...]:
    """Return a declared label list as strings; DataError unless two or more, each once."""
    if not all(isinstance(name, str) for name in names):
        raise DataError(f"the label list of {source} is {list(names)}; every name must be a string")
    labels = tuple(str(name) for name in names)
    try:
        check_label_names(labels)
    except ValueError as error:
        raise DataError(f"the label list of {source} does not do: {error}.") from error
    return labels


def label_encoder(label_names: tuple[str, ...]) -> Callable[[object], int | None]:
    """Return a function from a raw label to its index, or None where it has none.

    An integer that is also, as text, the name of another index has none: with
    the list ("1", "2") nobody can tell which class an integer 1 is.

    Example:
        >>> encode = label_encoder(("negative", "positive"))
        >>> [encode(label) for label in ("positive", 0, "1", 2, True, None)]
        [1, 0, 1, None, None, None]
    """
    by_name = {name: index for index, name in enumerate(label_names)}
    names_are_numbers = any(_is_number(name) for name in label_names)

    def encode(value: object) -> int | None:
        if isinstance(value, str):
            if value in by_name:
                return by_name[value]
            if names_are_numbers or not _is_number(value):
                return None
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            return None
        if not 0 <= value < len(label_names) or by_name.get(str(value), value) != value:
            return None
        return value

    return encode


def _is_number(text: str) -> bool:
    """Whether ``text`` is a short run of ASCII digits."""
    return text.isascii() and text.isdecimal() and len(text) <= 9


def _text(source: str, number: int, column: str, value: object) -> str:
    """Return ``value`` if it is text that has a UTF-8 form."""
    if not isinstance(value, str):
        raise DataError(
            f"{source}, row {number}: {column} = {value!r} must be text. Remove or repair the row."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{source}, row {number}: {column} is not valid Unicode ({error.reason}). "
            "Remove or repair the row."
        ) from error
    return value


def _user(source: str, number: int, column: str, value: object) -> str:
    """Return a natural id as text; an empty one would join strangers into one unit."""
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise DataError(
            f"{source}, row {number}: {column} = {value!r} must be a non-empty text or an "
            "integer. Repair the row or unset data.user_column."
        )
    return str(value)


def _bad_label(source: str, number: int, value: object, names: tuple[str, ...]) -> str:
    """Say which label is not in the list."""
    listed = ", ".join(repr(name) for name in names[:50])
    more = "" if len(names) <= 50 else f" and {len(names) - 50} more"
    numbers = (
        " Names of the list are numbers, so labels must be written as strings."
        if any(_is_number(name) for name in names)
        else ""
    )
    return (
        f"{source}, row {number}: label {value!r} is not in the label list: an index from 0 to "
        f"{len(names) - 1}, or one of {listed}{more}.{numbers} Correct the row or the list."
    )

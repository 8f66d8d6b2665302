"""A table of a page: what a reader sees, and the raw value that it is sorted by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from fedlr.report import units


@dataclass(frozen=True)
class Cell:
    """One value.

    Attributes:
        text: As it is read.
        value: As it is sorted; None where there is none, which comes last either way.
    """

    text: str
    value: float | str | None = None

    @property
    def raw(self) -> str | None:
        """The value as the page holds it (``data-value``): ``inf`` for ∞, None for none."""
        if self.value is None or (isinstance(self.value, float) and math.isnan(self.value)):
            return None
        return units.printable(self.value) if isinstance(self.value, str) else repr(self.value)


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        heading: Its name.
        numeric: Whether values are numbers: set to the right, sorted as numbers.
    """

    heading: str
    numeric: bool = False


@dataclass(frozen=True)
class Table:
    """A block of a section: rows under headings; the first cell of a row names it.

    Attributes:
        caption: What it shows.
        columns: At least one.
        rows: Each as long as ``columns``.
        sortable: Whether a reader can sort it by a column.

    Raises:
        ValueError: No column, or a row of another length.
    """

    kind: ClassVar[str] = "table"

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    sortable: bool = True

    def __post_init__(self) -> None:
        if not self.columns:
            raise ValueError(f"table {self.caption!r} has no columns; it needs at least one")
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.caption!r}: row {number} has {len(row)} cells, expected "
                    f"{len(self.columns)}"
                )


def word(text: str) -> Cell:
    """Return a name, control characters taken out."""
    plain = units.printable(text)
    return Cell(plain, plain)


def number(value: float | None, digits: int = 3) -> Cell:
    """Return a number to ``digits`` significant places; a dash for None.

    Example:
        >>> number(0.81251).text, number(12_345).text, number(None).text
        ('0.813', '12,345', '—')
    """
    if value is None:
        return Cell("—")
    if isinstance(value, int):
        return Cell(f"{value:,}", value)
    return Cell("∞" if math.isinf(value) else f"{value:.{digits}g}", value)


def share(value: float | None) -> Cell:
    """Return a share in [0, 1] as per cent."""
    return Cell(units.percent(value), value)


def epsilon(value: float | None) -> Cell:
    """Return ε, rounded up."""
    return Cell(units.privacy_loss(value), value)


def size(value: int | float | None) -> Cell:
    """Return bytes."""
    return Cell("—") if value is None else Cell(units.data_size(value), value)


def seconds(value: float | None) -> Cell:
    """Return a duration."""
    return Cell("—") if value is None else Cell(units.duration(value), value)


def milliseconds(value: float | None) -> Cell:
    """Return a short duration, given in seconds, in milliseconds.

    Example:
        >>> milliseconds(0.01234).text, milliseconds(None).text
        ('12.3 ms', '—')
    """
    return Cell("—") if value is None else Cell(f"{1000 * value:.3g} ms", value)

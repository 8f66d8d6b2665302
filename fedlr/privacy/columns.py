"""Per-unit gradients of several arrays side by side in one matrix: one norm and one sum for all."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from fedlr.methods.method import PartKey, Role


class Columns:
    """Which columns each array has in a matrix with a row per unit.

    Args:
        shapes: Shape of each array, of one or two dimensions.
        narrow_first: Whether a tall array is kept transposed, as BLAS on a CPU is twice to
            four times faster to form it.

    Attributes:
        width: d, columns in all.
    """

    def __init__(self, shapes: Mapping[PartKey, torch.Size], narrow_first: bool) -> None:
        self._places: dict[PartKey, tuple[slice, torch.Size, bool]] = {}
        self.width = 0
        # Arrays that may be clipped together are neighbours: the head is last.
        for key in sorted(shapes, key=lambda key: (key.role is Role.HEAD, key)):
            shape = shapes[key]
            turned = narrow_first and len(shape) == 2 and shape[0] > shape[1]
            end = self.width + prod(shape)
            self._places[key] = (slice(self.width, end), shape, turned)
            self.width = end

    @property
    def keys(self) -> Collection[PartKey]:
        """The arrays."""
        return self._places.keys()

    def of(self, keys: Collection[PartKey]) -> slice | None:
        """Return the columns of some arrays; None where others are in between."""
        places = [self._places[key][0] for key in keys]
        start, end = min(p.start for p in places), max(p.stop for p in places)
        return slice(start, end) if sum(p.stop - p.start for p in places) == end - start else None

    def view(self, array: Tensor, key: PartKey) -> Tensor:
        """Return the part of ``array``, shape (…, d), that is one array's: (…, *shape), a view."""
        place, shape, turned = self._places[key]
        strides = [array.stride(-1) * step for step in _strides(shape, turned)]
        return torch.as_strided(  # one call where slicing and reshaping take four
            array,
            (*array.shape[:-1], *shape),
            (*array.stride()[:-1], *strides),
            array.storage_offset() + place.start * array.stride(-1),
        )


def _strides(shape: torch.Size, turned: bool) -> tuple[int, ...]:
    """Columns from one entry to the next of an array, along each of its dimensions."""
    if len(shape) == 1:
        return (1,)
    return (1, shape[0]) if turned else (shape[1], 1)


@dataclass(frozen=True, eq=False)
class UnitMatrix(Mapping[PartKey, Tensor]):
    """Gradients as `fedlr.privacy.gradients.UnitGradients` returns them, in one matrix.

    Attributes:
        matrix: Shape (U, d), float32. Every value of the mapping is a view of it: what is
            written into one is in the other.
        columns: Of each array.
    """

    matrix: Tensor
    columns: Columns

    def __getitem__(self, key: PartKey) -> Tensor:
        """Return the gradients of one array, shape (U, *array shape)."""
        if key not in self.columns.keys:
            raise KeyError(key)
        return self.columns.view(self.matrix, key)

    def __iter__(self) -> Iterator[PartKey]:
        """Iterate over the arrays."""
        return iter(self.columns.keys)

    def __len__(self) -> int:
        """Return the number of arrays."""
        return len(self.columns.keys)

    def chosen(self, units: Tensor) -> UnitMatrix:
        """Return the gradients of some units, (K,) int64: copies."""
        return UnitMatrix(self.matrix[units], self.columns)

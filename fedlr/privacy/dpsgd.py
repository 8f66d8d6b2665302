"""The private step: where clipping, noise and the divisor meet.

One logical step of DP-SGD (Abadi et al. 2016, arXiv 1607.00133, algorithm 1, with
Poisson sampling and add/remove neighbours) releases

    (Σ_u clip(G_u) + σ·C·N(0, I)) / L

for the units u of one Poisson draw at rate q = L/N. The clip is over all trained
arrays of one unit jointly, or over groups with bounds C_g, Σ C_g² ≤ C²; either way
one unit changes the sum by at most C in Euclidean norm, so that the step is the
mechanism that `fedlr.privacy.events.Release` records. L is public and fixed: the
size of the batch that was drawn is used for nothing.

The bound C holds up to float32 rounding: a row computed in another batch differs in
its last bits. `fedlr.training.sizes` refuses arrays large enough to amplify that, those
of a broadcast and those of every later step; below float32 see `fedlr.training.precision`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlr import checks
from fedlr.kernels.clipped_sum import naive
from fedlr.methods.method import PartKey, Role

from .columns import Columns, UnitMatrix
from .factored import Factored, dense
from .noise import Stream


@dataclass(frozen=True)
class ClipGroup:
    """Arrays that are clipped together.

    Attributes:
        keys: The arrays.
        bound: C_g, largest Euclidean norm of one unit's gradient over the group, ≥
            `fedlr.kernels.clipped_sum.naive.SMALLEST_BOUND`.
    """

    keys: frozenset[PartKey]
    bound: float


@dataclass(frozen=True)
class Mechanism:
    """The public parameters of every private step of one site and round.

    Attributes:
        clip_norm: C, sensitivity of the clipped sum to one unit (add/remove).
        groups: A partition of the trained arrays, Σ C_g² ≤ C²(1 + 1e-9).
        noise_multiplier: σ ≥ 0; the noise has standard deviation σ·C.
        expected_batch: L, the divisor.

    Raises:
        ValueError: A bad number, an array in two groups, or shares above C².
    """

    clip_norm: float
    groups: tuple[ClipGroup, ...]
    noise_multiplier: float
    expected_batch: int

    def __post_init__(self) -> None:
        checks.positive("clip_norm", self.clip_norm)
        checks.non_negative("noise_multiplier", self.noise_multiplier)
        checks.at_least("expected_batch", self.expected_batch, 1)
        for group in self.groups:
            naive.check_bound(group.bound)
        total = sum(group.bound**2 for group in self.groups)
        if total > self.clip_norm**2 * (1 + 1e-9):
            raise ValueError(
                f"the squared clip shares add up to {total}, above clip_norm² = {self.clip_norm**2}"
            )
        if sum(len(group.keys) for group in self.groups) != len(self.keys):
            raise ValueError("an array is in two clip groups")

    @property
    def keys(self) -> frozenset[PartKey]:
        """Every trained array."""
        return frozenset().union(*(group.keys for group in self.groups))


def clip_groups(
    keys: Sequence[PartKey], clip_norm: float, head_share: float | None
) -> tuple[ClipGroup, ...]:
    """Return one joint group, or head and adapters with shares of C².

    Args:
        keys: The trained arrays.
        clip_norm: C.
        head_share: Share of C² for the ``HEAD`` arrays, in (0, 1); None clips all
            arrays jointly. Without head arrays, or with nothing else, the one
            group there is keeps all of C.

    Example:
        >>> b, w = PartKey("query", Role.B), PartKey("weight", Role.HEAD)
        >>> sorted(round(group.bound, 2) for group in clip_groups([b, w], 1.0, 0.36))
        [0.6, 0.8]
    """
    head = frozenset(key for key in keys if key.role is Role.HEAD)
    rest = frozenset(keys) - head
    if head_share is None or not head or not rest:
        return (ClipGroup(frozenset(keys), clip_norm),)
    checks.in_range("head_share", head_share, 0.0, 1.0)
    return (
        ClipGroup(rest, clip_norm * math.sqrt(1.0 - head_share)),
        ClipGroup(head, clip_norm * math.sqrt(head_share)),
    )


class ClippedSum:
    """Adds up the clipped gradients of the units of one logical batch.

    A unit whose rows fall into several physical batches is held back until its
    last row has come, so that it is clipped once, as a whole.

    Args:
        mechanism: Bounds of the clip groups.
        shapes: Shape of every trained array.
        device: Where gradients live.
    """

    def __init__(
        self, mechanism: Mechanism, shapes: Mapping[PartKey, torch.Size], device: torch.device
    ) -> None:
        self._mechanism = mechanism
        self._sum = {key: torch.zeros(shape, device=device) for key, shape in shapes.items()}
        self._held: dict[int, dict[PartKey, Tensor]] = {}
        self._columns: Columns | None = None
        self._row = torch.zeros(0)  # of the sum of matrices, laid out by ``columns``

    def add(
        self,
        gradients: Mapping[PartKey, Tensor | Factored],
        units: Sequence[int],
        last: Sequence[bool],
    ) -> None:
        """Take the gradients of one physical batch.

        Args:
            gradients: Per array this batch's part of each unit's gradient: shape
                (U, *array shape), or its factors.
            units: The U units' identities within the logical batch.
            last: Whether a unit has no rows in later physical batches.
        """
        keep = [position for position, done in enumerate(last) if done]
        touched = [p for p in range(len(units)) if not last[p] or units[p] in self._held]
        if isinstance(gradients, UnitMatrix) and not touched and self._add_matrix(gradients):
            return
        ready: dict[PartKey, Tensor | Factored] = dict(gradients)
        if touched:
            whole = {key: value.clone() for key, value in dense(ready).items()}
            for position in touched:
                held = self._held.pop(units[position], None)
                for key, value in whole.items():
                    if held is not None:
                        value[position] += held[key]
                if not last[position]:
                    self._held[units[position]] = {k: v[position].clone() for k, v in whole.items()}
            ready = {key: value[keep] for key, value in whole.items()}
        for group in self._mechanism.groups:
            squared = sum(
                (_squared_norms(ready[key]) for key in sorted(group.keys)),
                start=torch.zeros(len(keep), device=next(iter(self._sum.values())).device),
            )
            factors = naive.clip_factors(squared, group.bound)
            for key in group.keys:
                self._sum[key] += _clipped_sum(ready[key], factors)

    def _add_matrix(self, gradients: UnitMatrix) -> bool:
        """Clip and add whole units, all arrays of a group at once; False where none can be."""
        if self._columns is None:
            self._columns = gradients.columns
            self._row = gradients.matrix.new_zeros(self._columns.width)
        places = [self._columns.of(group.keys) for group in self._mechanism.groups]
        if gradients.columns is not self._columns or None in places:
            return False
        for place, group in zip(places, self._mechanism.groups, strict=True):
            part = gradients.matrix[:, place]
            factors = naive.clip_factors(naive.squared_norms(part), group.bound)
            self._row[place] += naive.clipped_sum(part, factors)
        return True

    def result(self) -> dict[PartKey, Tensor]:
        """Return Σ_u clip(G_u), each array float32; zeros for an empty batch.

        Raises:
            ValueError: A held unit never got its last rows.
        """
        if self._held:
            raise ValueError(f"{len(self._held)} units are incomplete; their last rows never came")
        if self._columns is None:
            return self._sum
        return {key: v + self._columns.view(self._row, key) for key, v in self._sum.items()}


def _squared_norms(gradients: Tensor | Factored) -> Tensor:
    if isinstance(gradients, Factored):
        return gradients.squared_norms()
    return naive.squared_norms(gradients)


def _clipped_sum(gradients: Tensor | Factored, factors: Tensor) -> Tensor:
    if isinstance(gradients, Factored):
        return gradients.clipped_sum(factors)
    return naive.clipped_sum(gradients, factors)


def private_gradient(
    clipped: Mapping[PartKey, Tensor], mechanism: Mechanism, noise: Stream
) -> dict[PartKey, Tensor]:
    """Return (clipped + σ·C·N(0, I)) / L: the only thing a step may use.

    Args:
        clipped: `ClippedSum.result`; sensitivity ≤ C.
        mechanism: σ, C and L.
        noise: Source of the noise; where σ > 0 it must be secret.

    Raises:
        ValueError: σ > 0 with a public stream, which would void the guarantee.
    """
    if mechanism.noise_multiplier > 0 and not noise.secret:
        raise ValueError("privacy noise was asked from a public stream; use secret_stream()")
    scale = mechanism.noise_multiplier * mechanism.clip_norm
    released = {}
    for key in sorted(clipped):
        value = clipped[key]
        if scale > 0:
            value = value + noise.gaussian(tuple(value.shape), scale).to(value.device)
        released[key] = value / mechanism.expected_batch
    return released

"""Local training in which the gradients of drawn canaries are those that the auditor chose.

The one place where the audit reaches into production code: everything before and after
the per-unit gradient (draw, batches, clip, sum, noise, optimiser) is `LocalTrainer`'s own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from fedlr.audit.canaries import CanaryUnits, Directions
from fedlr.data.batching import Integers, UnitIndex
from fedlr.methods.method import PartKey
from fedlr.privacy.dpsgd import Mechanism
from fedlr.privacy.gradients import LossOfRows, UnitGradients
from fedlr.training.local import LocalTask, LocalTrainer


class CanaryTrainer(LocalTrainer):
    """A `LocalTrainer` for units among which there are canaries.

    Args:
        trainer: The trainer to audit; its model, data and settings are shared.

    Attributes:
        directions: Direction of each canary; set before `train`.
        scale: What the directions are multiplied by; 0 silences the canaries.
    """

    def __init__(self, trainer: LocalTrainer) -> None:
        vars(self).update(vars(trainer))
        self.directions: Directions | None = None
        self.scale = 0.0
        self._canary_units: CanaryUnits | None = None
        self._sums = 0

    @property
    def shortest_row(self) -> int:
        """The row that costs least to run: the row of every canary."""
        return int(np.argmin(self._lengths))

    def train(self, task: LocalTask, units: UnitIndex) -> dict[PartKey, Tensor]:
        """See `LocalTrainer.train`; ``units`` must be `CanaryUnits`.

        Raises:
            RuntimeError: A step did not pass through this class, so that the audit
                would have attacked nothing.
        """
        if not isinstance(units, CanaryUnits) or self.directions is None:
            raise ValueError("an audit needs CanaryUnits and directions before it trains")
        self._canary_units, self._sums = units, 0
        trained = super().train(task, units)
        if self._sums != self.settings.steps:
            raise RuntimeError(f"{self._sums} of {self.settings.steps} steps planted canaries")
        return trained

    def _clipped_sum(
        self,
        gradients: UnitGradients,
        trained: Mapping[PartKey, nn.Parameter],
        mechanism: Mechanism,
        rows: np.ndarray,
        unit_index: np.ndarray,
    ) -> dict[PartKey, Tensor]:
        if self._canary_units is None or self.directions is None:
            raise ValueError("a clipped sum was asked for outside of train")
        canaries = self._canary_units.drawn[-1][unit_index]
        pieces = [canaries[piece] for piece in self.pieces(rows)]
        planted = _Planted(gradients, self.directions, self.scale, pieces)
        total = super()._clipped_sum(planted, trained, mechanism, rows, unit_index)
        planted.check_complete()
        self._sums += 1
        return total


class _Planted:
    """`UnitGradients` that replaces the gradients of canaries.

    Args:
        real: What computes all gradients, the replaced ones too.
        directions: Gradient of each canary, times ``scale``.
        scale: See ``directions``.
        pieces: Canary of each row, for every physical batch in the order of the calls.
    """

    def __init__(
        self,
        real: UnitGradients,
        directions: Directions,
        scale: float,
        pieces: list[Integers],
    ) -> None:
        self._real, self._directions, self._scale = real, directions, scale
        self._pieces: Iterator[Integers] = iter(pieces)

    def __call__(self, losses: LossOfRows, unit_index: Tensor, units: int) -> dict[PartKey, Tensor]:
        """See `UnitGradients`."""
        found = self._real(losses, unit_index, units)
        rows = next(self._pieces, None)
        if rows is None or len(rows) != unit_index.shape[0]:
            raise RuntimeError("the physical batches are not those that the audit foresaw")
        canaries = torch.from_numpy(rows).to(unit_index.device)
        positions = unit_index[canaries >= 0]
        for key, value in found.items():
            planted = self._directions.gradients(key, canaries[canaries >= 0])
            value[positions] = self._scale * planted
        return found

    def check_complete(self) -> None:
        """Raise RuntimeError if a physical batch was never asked for."""
        if next(self._pieces, None) is not None:
            raise RuntimeError("the physical batches are not those that the audit foresaw")

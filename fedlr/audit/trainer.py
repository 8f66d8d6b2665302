"""Local training in which the gradients of drawn canaries are those that the auditor chose.

The one place where the audit reaches into production code: everything before and after
the per-unit gradient (draw, batches, clip, sum, noise, optimiser) is `LocalTrainer`'s own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedlr.audit.canaries import CanaryUnits, Directions
from fedlr.data.batching import Batch, Integers, UnitIndex
from fedlr.methods.method import PartKey
from fedlr.privacy.columns import UnitMatrix
from fedlr.privacy.factored import Factored, dense
from fedlr.privacy.gradients import UnitGradients
from fedlr.training.local import LocalTask, LocalTrainer, RowArrays
from fedlr.training.task import Drawn, Member


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
        self._canaries: Integers = np.zeros(0, dtype=np.int64)  # of each row of the step
        self._seen = 0
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
        if not isinstance(units, CanaryUnits):
            raise ValueError(f"units = {type(units).__name__}; an audit trains on CanaryUnits")
        if self.directions is None:
            raise ValueError("directions = None; set directions before train")
        self._canary_units, self._sums = units, 0
        trained = super().train(task, units)
        if self._sums != self.settings.steps:
            raise RuntimeError(f"{self._sums} of {self.settings.steps} steps planted canaries")
        return trained

    def _clipped_sums(
        self,
        members: Sequence[Member],
        gradients: UnitGradients,
        drawn: Drawn,
        arrays: RowArrays,
    ) -> list[dict[PartKey, Tensor]]:
        if self._canary_units is None:
            raise ValueError("a clipped sum was asked for outside of train; call train instead")
        self._canaries = self._canary_units.drawn[-1][drawn.unit_index]
        self._seen = 0
        sums = super()._clipped_sums(members, gradients, drawn, arrays)
        if self._seen != len(drawn.rows):
            raise RuntimeError(f"{self._seen} of {len(drawn.rows)} drawn rows passed the audit")
        self._sums += 1
        return sums

    def _differentiate(
        self,
        gradients: UnitGradients,
        batch: Batch,
        positions: Integers,
        local: Integers,
        units: int,
    ) -> Mapping[PartKey, Tensor | Factored]:
        """Compute all gradients, the canaries' too, and then put the chosen ones in their place."""
        if self.directions is None:
            raise ValueError("directions = None; set directions before train")
        found = super()._differentiate(gradients, batch, positions, local, units)
        if not isinstance(found, UnitMatrix):
            found = dense(found)
        canary = self._canaries[positions]
        for key, value in found.items():
            chosen = torch.from_numpy(canary[canary >= 0]).to(value.device)
            place = torch.from_numpy(local[canary >= 0]).to(value.device)
            value[place] = self.scale * self.directions.gradients(key, chosen)
        self._seen += len(positions)
        return found

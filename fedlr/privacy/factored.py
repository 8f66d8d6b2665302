"""Per-unit gradients that are kept as their two factors and never formed.

The gradient of a linear layer's weight for one unit is G_u = Σ δᵢᵀzᵢ over the rows i of
the unit. Where δ and z are smaller than all G_u together (a trained head over many
classes; sequences shorter than the rank), norm and clipped sum are computed straight from
them by `fedlr.kernels.clipped_sum`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedlr.kernels.clipped_sum.naive import sum_rows, unit_gradients
from fedlr.kernels.dispatch import ClippedSum
from fedlr.methods.method import PartKey

from .gradients import CapturedGradients, LossOfRows


@dataclass(frozen=True)
class Factored:
    """The gradients of one weight, for the units of one physical batch.

    Attributes:
        delta: δ, shape (N, T, m), floating.
        z: Inputs of the layer, shape (N, T, r), floating.
        unit_index: Unit of each row, shape (N,), int64, in [0, units).
        units: U.
        kernel: What computes with them.
    """

    delta: Tensor
    z: Tensor
    unit_index: Tensor
    units: int
    kernel: ClippedSum

    def squared_norms(self) -> Tensor:
        """Return ‖G_u‖², shape (U,), float32."""
        return self.kernel.unit_squared_norms(self.delta, self.z, self.unit_index, self.units)

    def clipped_sum(self, factors: Tensor) -> Tensor:
        """Return Σ_u factor_u·G_u, shape (m, r), float32."""
        return self.kernel.weighted_sum(self.delta, self.z, self.unit_index, factors)

    def dense(self) -> Tensor:
        """Return G_u, shape (U, m, r), float32."""
        return unit_gradients(self.delta.float(), self.z.float(), self.unit_index, self.units)

    def with_call(self, delta: Tensor, z: Tensor) -> Factored:
        """Return the gradients with another call of the same layer: tokens side by side."""
        return replace(
            self,
            delta=torch.cat([self.delta, delta], dim=1),
            z=torch.cat([self.z, z], dim=1),
        )


class FactoredGradients(CapturedGradients):
    """As `CapturedGradients`, but weights come as `Factored`; biases as they are.

    Args:
        model: The module whose layers own ``trained``.
        trained: Weights or biases of ``nn.Linear`` layers.
        kernel: Computes norms and sums.

    Raises:
        ModelError: A trained array is not owned by a linear layer.
    """

    def __init__(
        self, model: nn.Module, trained: Mapping[PartKey, nn.Parameter], kernel: ClippedSum
    ) -> None:
        super().__init__(model, trained)
        self._kernel = kernel

    def factored(
        self, losses: LossOfRows, unit_index: Tensor, units: int
    ) -> dict[PartKey, Tensor | Factored]:
        """Differentiate one physical batch; arguments as `UnitGradients.__call__`."""
        found: dict[PartKey, Tensor | Factored] = {}
        rows = unit_index.shape[0]

        def add(layer: int, inputs: Tensor, delta: Tensor) -> None:
            _, weight, bias = self._layers[layer]
            tokens = delta.reshape(rows, -1, delta.shape[-1])
            if weight is not None:
                z = inputs.reshape(rows, -1, inputs.shape[-1])
                before = found.get(weight)
                found[weight] = (
                    before.with_call(tokens, z)
                    if isinstance(before, Factored)
                    else Factored(tokens, z, unit_index, units, self._kernel)
                )
            if bias is not None:
                each = sum_rows(tokens.float().sum(1), unit_index, units)
                before = found.get(bias)
                found[bias] = before + each if isinstance(before, Tensor) else each

        self._differentiate(losses, unit_index, add)
        return {**self._zeros({*self._trained} - found.keys(), units), **found}


def dense(gradients: Mapping[PartKey, Tensor | Factored]) -> dict[PartKey, Tensor]:
    """Return every gradient as an array, shape (U, *array shape)."""
    return {
        key: value.dense() if isinstance(value, Factored) else value
        for key, value in gradients.items()
    }

"""Gradients of one unit of privacy at a time: three ways behind one interface.

`CapturedGradients` multiplies what it captures at the trained linear layers;
`OpacusGradients` uses Opacus' hooks; `AutogradGradients` differentiates one unit
after the other and is the obviously correct, slow twin of both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedlr import checks
from fedlr.errors import ModelError
from fedlr.kernels.clipped_sum.naive import sum_rows
from fedlr.methods.method import PartKey

from .columns import Columns, UnitMatrix

Trained = Mapping[PartKey, nn.Parameter]
"""The parameters that train, by their wire address."""

LossOfRows = Callable[[Tensor], Tensor]
"""Row positions (K,) int64 of one physical batch → their losses (K,), in nats."""


class UnitGradients(Protocol):
    """Computes the gradient of every unit's summed loss with respect to each trained array."""

    def __call__(
        self, losses: LossOfRows, unit_index: Tensor, units: int
    ) -> Mapping[PartKey, Tensor]:
        """Differentiate one physical batch.

        Args:
            losses: Runs the model on some rows of the batch; no row's loss may
                depend on another row.
            unit_index: Unit of each row, shape (N,), int64, in [0, units). N = 0
                runs no model.
            units: U ≥ 0, number of units in the batch.

        Returns:
            Per trained array its per-unit gradients, shape (U, *array shape),
            float32. ``parameter.grad`` is left untouched.
        """
        ...


class CapturedGradients:
    """Per-unit gradients as δᵀz at the trained linear layers (`fedlr.kernels.clipped_sum`).

    One forward and one backward pass; the backward pass forms no parameter
    gradient, and δ of a layer is used and dropped as soon as it is known. A layer
    called several times in one pass (shared layers, ALBERT) contributes the sum over
    its calls. Where layers are checkpointed (`fedlr.adapters.inject.inject`), z is
    dropped and computed again with them, and a call still counts once: what is added
    up is the backward pass of the call, and a recomputation has none of its own.

    Args:
        model: The module whose layers own ``trained``.
        trained: Weights or biases of ``nn.Linear`` layers.

    Raises:
        ModelError: A trained array is not owned by a linear layer.
    """

    def __init__(self, model: nn.Module, trained: Trained) -> None:
        self._trained = dict(trained)
        self._layers = owning_layers(model, trained)
        owned = {key for _, *keys in self._layers for key in keys}
        if missing := sorted(set(self._trained) - owned):
            raise ModelError(
                f"{missing[0].site}/{missing[0].role.value} is not the weight of a linear layer; "
                "set kernels.gradients=autograd for such a head"
            )
        shapes = {key: value.shape for key, value in self._trained.items()}
        on_cpu = all(value.device.type == "cpu" for value in self._trained.values())
        self._columns = Columns(shapes, narrow_first=on_cpu)

    def __call__(
        self, losses: LossOfRows, unit_index: Tensor, units: int
    ) -> Mapping[PartKey, Tensor]:
        """See `UnitGradients`."""
        rows, device = unit_index.shape[0], unit_index.device
        found = UnitMatrix(torch.empty(units, self._columns.width, device=device), self._columns)
        one_each = rows == units and torch.equal(unit_index, torch.arange(units, device=device))
        index = None if one_each else unit_index
        written: set[PartKey] = set()

        def add(layer: int, inputs: Tensor, delta: Tensor) -> None:
            _, weight, bias = self._layers[layer]
            tokens = delta.reshape(rows, -1, delta.shape[-1]).float()
            if weight is not None:
                z = inputs.reshape(rows, -1, inputs.shape[-1]).float()
                put_products(found[weight], (tokens, z), index, weight in written)
                written.add(weight)
            if bias is not None:
                _put(found[bias], tokens.sum(1), index, bias in written)
                written.add(bias)

        self._differentiate(losses, unit_index, add)
        for key in found.keys() - written:
            found[key].zero_()
        return found

    def _differentiate(
        self, losses: LossOfRows, unit_index: Tensor, add: Callable[[int, Tensor, Tensor], None]
    ) -> None:
        """Run the model forward and back, and call ``add(layer, z, δ)`` for every call."""
        rows = unit_index.shape[0]
        if rows == 0:
            return
        # Open until the backward pass is over: a recomputation must meet the same hooks.
        with self._tapped(rows, add) as anchor:
            loss = losses(torch.arange(rows, device=unit_index.device)).sum()
            torch.autograd.grad(loss, [anchor], allow_unused=True)

    def _zeros(self, keys: Collection[PartKey], units: int) -> dict[PartKey, Tensor]:
        return _zeros({key: self._trained[key] for key in keys}, units)

    @contextmanager
    def _tapped(self, rows: int, add: Callable[[int, Tensor, Tensor], None]) -> Iterator[Tensor]:
        """Call ``add(layer, z, δ)`` in the backward pass of every call of a trained layer.

        Yields:
            A scalar that every tap leads to: a backward pass to it runs them all.
        """
        anchor = torch.zeros((), requires_grad=True)

        def tap(layer: int) -> Callable[..., Tensor]:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
                if inputs[0].shape[0] != rows:
                    raise ModelError(
                        f"a trained layer saw {inputs[0].shape[0]} rows in a batch of {rows}: "
                        "this model mixes rows, so no per-unit gradient exists; use another "
                        "base model"
                    )
                function: Any = _Tap
                tapped: Tensor = function.apply(
                    output, inputs[0].detach(), anchor, partial(add, layer)
                )
                return tapped

            return hook

        handles = [
            layer.register_forward_hook(tap(index))
            for index, (layer, _, _) in enumerate(self._layers)
        ]
        try:
            yield anchor
        finally:
            for handle in handles:
                handle.remove()


class _Tap(torch.autograd.Function):
    """The identity on a layer's output; its backward pass calls ``take(z, δ)``."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, z: Tensor, _anchor: Tensor, take: Callable[..., None]
    ) -> Tensor:
        ctx.save_for_backward(z)  # and not an attribute, which checkpointing would keep
        ctx.take = take
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor | None, ...]:
        (z,), (delta,) = ctx.saved_tensors, deltas
        ctx.take(z, delta)
        return delta, None, None, None


def owning_layers(
    model: nn.Module, trained: Trained
) -> list[tuple[nn.Linear, PartKey | None, PartKey | None]]:
    """Return the linear layers that own trained arrays, each with its weight's and bias' key."""
    keys = {id(parameter): key for key, parameter in trained.items()}
    found = []
    for module in model.modules():
        if not isinstance(module, nn.Linear):
            continue
        owners = {name: id(value) for name, value in module.named_parameters(recurse=False)}
        weight, bias = (keys.get(owners.get(name, -1)) for name in ("weight", "bias"))
        if weight is not None or bias is not None:
            found.append((module, weight, bias))
    return found


class OpacusGradients:
    """Per-unit gradients from Opacus' hooks, without wrapping the model (Opacus ≥ 1.6).

    Args:
        model: The module to hook; only its layers with trained arrays are.
        trained: The trained arrays.
    """

    def __init__(self, model: nn.Module, trained: Trained) -> None:
        self._model, self._trained = model, dict(trained)
        mine = {id(parameter) for parameter in trained.values()}
        self._layers = [
            module
            for module in model.modules()
            if any(id(value) in mine for value in module.parameters(recurse=False))
        ]

    def __call__(self, losses: LossOfRows, unit_index: Tensor, units: int) -> dict[PartKey, Tensor]:
        """See `UnitGradients`."""
        from opacus.grad_sample.grad_sample_module import GradSampleHooks

        totals = _zeros(self._trained, units)
        rows = unit_index.shape[0]
        if rows == 0:
            return totals
        hooks: Any = GradSampleHooks(self._model, loss_reduction="sum", strict=False)
        for layer in self._layers:  # Opacus records nothing at layers in evaluation mode
            layer.training = True
        try:
            total: Any = losses(torch.arange(rows, device=unit_index.device)).sum()
            for layer in self._layers:  # what checkpointing computes again is no second call
                layer.training = False
            total.backward()
            for key, parameter in self._trained.items():
                sample = getattr(parameter, "grad_sample", None)
                if sample is not None:
                    totals[key] = sum_rows(sample.float(), unit_index, units)
        finally:
            hooks.cleanup()
            for layer in self._layers:
                layer.training = False
            for parameter in self._trained.values():
                parameter.grad = None
        return totals


class AutogradGradients:
    """One backward pass per unit: slow, obviously correct; works for any architecture."""

    def __init__(self, model: nn.Module, trained: Trained) -> None:
        del model
        self._trained = dict(trained)

    def __call__(self, losses: LossOfRows, unit_index: Tensor, units: int) -> dict[PartKey, Tensor]:
        """See `UnitGradients`."""
        totals = _zeros(self._trained, units)
        for unit in range(units):
            rows = (unit_index == unit).nonzero().flatten()
            if rows.shape[0] == 0:
                continue
            found = torch.autograd.grad(
                losses(rows).sum(), list(self._trained.values()), allow_unused=True
            )
            for key, gradient in zip(self._trained, found, strict=True):
                if gradient is not None:
                    totals[key][unit] = gradient.float()
        return totals


GRADIENTS: Mapping[str, Callable[[nn.Module, Trained], UnitGradients]] = {
    "captured": CapturedGradients,
    "opacus": OpacusGradients,
    "autograd": AutogradGradients,
}
"""Implementations by the name of ``kernels.gradients``."""


def _zeros(trained: Trained, units: int) -> dict[PartKey, Tensor]:
    return {
        key: torch.zeros((units, *value.shape), dtype=torch.float32, device=value.device)
        for key, value in trained.items()
    }


def put_products(
    place: Tensor, factors: tuple[Tensor, Tensor], unit_index: Tensor | None, add: bool
) -> None:
    """Write, or add, the gradient of a weight for every unit: G_u = Σ_{rows i of u} δᵢᵀzᵢ.

    Args:
        place: Where they go, shape (U, m, n), float32; may be kept transposed.
        factors: δ, shape (N, T, m), and z, shape (N, T, n), float32.
        unit_index: Unit of each row, shape (N,), int64; None where row i is unit i.
        add: Whether to add to what is in ``place``.
    """
    delta, z = factors
    checks.same_shape("z (rows, tokens)", z.shape[:2], delta.shape[:2])
    left, right, out = delta, z, place
    if place.stride(-1) != 1:  # kept transposed, see `Columns`
        left, right, out = z, delta, place.mT
    if unit_index is None and not add:
        torch.bmm(left.mT, right, out=out)
    else:
        _put(out, torch.bmm(left.mT, right), unit_index, add)


def _put(place: Tensor, rows: Tensor, unit_index: Tensor | None, add: bool) -> None:
    if unit_index is None:
        place.add_(rows) if add else place.copy_(rows)
        return
    if not add:
        place.zero_()
    place.index_add_(0, unit_index, rows)

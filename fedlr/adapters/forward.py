"""The forward pass of adapted layers by one kernel instead of PEFT's three products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from fedlr.kernels.dispatch import LoraLinear
from fedlr.lowrank.factors import AdapterSite

from .inject import ADAPTER


def use_kernel(encoder: nn.Module, sites: Sequence[AdapterSite], kernel: LoraLinear) -> None:
    """Make the adapted layers of ``encoder`` compute x·Wᵀ + s·(x·Aᵀ)·Bᵀ by ``kernel``, in place.

    Args:
        encoder: What `fedlr.adapters.inject.inject` returned.
        sites: Its sites.
        kernel: See `fedlr.kernels.lora_linear`. While A trains, or B is one of each row's
            own (`fedlr.training.fused`), PEFT's products are taken.

    Guarantees:
        The module that holds B is called as before, with s·x·Aᵀ, and returns the layer's
        output: its hooks see the z and the δ whose product is the gradient of B.
    """
    for site in sites:
        layer: Any = encoder.get_submodule(f"base_model.model.{site.name}")
        layer.forward = partial(_forward, layer, layer.forward, site.scaling, kernel)


def _forward(
    layer: Any, ordinary: Callable[..., Tensor], scaling: float, kernel: LoraLinear, x: Tensor
) -> Tensor:
    base, a, b = layer.get_base_layer(), layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    if a.weight.requires_grad or "forward" in vars(b):  # B differs from row to row
        return ordinary(x)
    # A hooked B is differentiated unit by unit, from what its hooks see.
    weight = b.weight.detach() if b._forward_hooks else b.weight
    y, z = kernel.lora_linear(x, base.weight, base.bias, a.weight, weight, scaling)
    vars(b)["forward"] = lambda _: y
    try:
        output: Tensor = b(z * scaling)
    finally:
        del vars(b)["forward"]
    return output

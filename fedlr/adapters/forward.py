"""The forward pass of adapted layers by one operation instead of PEFT's three products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from fedlr.kernels.dispatch import LoraLinear
from fedlr.lowrank.factors import AdapterSite

from .core import has_core
from .inject import ADAPTER
from .quantised import is_quantised

Operation = Callable[..., tuple[Tensor, Tensor]]
"""(x, W, bias, A, B, s) → (y, z), see `fedlr.kernels.lora_linear`."""


def use_kernel(encoder: nn.Module, sites: Sequence[AdapterSite], kernel: LoraLinear) -> None:
    """Make the adapted layers of ``encoder`` compute x·Wᵀ + s·(x·Aᵀ)·Bᵀ by ``kernel``, in place.

    Args:
        encoder: What `fedlr.adapters.inject.inject` returned.
        sites: Its sites.
        kernel: See `fedlr.kernels.lora_linear`.

    Guarantees:
        The module that holds B is called with s·x·Aᵀ and returns the layer's output: its
        hooks see the z and the δ whose product is the gradient of B. A hook there means
        that gradients are captured, and B itself gets none. PEFT's
        own products are taken while A trains, while each row has a B of its own
        (`fedlr.training.fused`), and where another adapter, or none, is active.

    Raises:
        ValueError: A base weight is stored in 4 bits, which no kernel reads; or a site has
            a core, whose product no kernel forms: its z is x·Aᵀ, and B needs x·Aᵀ·Rᵀ.
    """
    for site in sites:
        layer: Any = encoder.get_submodule(f"base_model.model.{site.name}")
        if is_quantised(layer.get_base_layer()):
            raise ValueError(f"{site.name} is stored in 4 bits, and the kernels read float weights")
        if has_core(layer):
            raise ValueError(f"{site.name} has a core, and the kernels multiply by A and B alone")
        layer.forward = partial(_forward, layer, layer.forward, site.scaling, kernel.lora_linear)


def _forward(
    layer: Any, ordinary: Callable[..., Tensor], scaling: float, operation: Operation, x: Tensor
) -> Tensor:
    a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    ours = layer.active_adapters == [ADAPTER] and not (layer.disable_adapters or layer.merged)
    if not ours or a.weight.requires_grad or "forward" in vars(b):
        return ordinary(x)
    base = layer.get_base_layer()
    # A hooked B is differentiated unit by unit, from what its hooks see.
    weight = b.weight.detach() if b._forward_hooks else b.weight
    y, z = operation(x, base.weight, base.bias, a.weight, weight, scaling)
    vars(b)["forward"] = lambda _: y
    try:
        output: Tensor = b(z * scaling)
    finally:
        del vars(b)["forward"]
    return output

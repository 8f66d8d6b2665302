"""x·Wᵀ + bias + s·(x·Aᵀ)·Bᵀ as one product with W + s·B·A, for float32.

One pass over x and over y instead of three, which is what a LoRA layer costs on a CPU. The
merged weight lives for one product at a time, forward and again backward: forming it takes
1/tokens of a product, and keeping it would be a copy of every adapted layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .naive import check_shapes


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return y = x·(W + s·B·A)ᵀ + bias and z = x·Aᵀ; see `.naive.lora_linear`, its twin.

    Args:
        x: Shape (..., n), float32.
        weight: W, shape (m, n), float32, without gradient.
        bias: Shape (m,), float32, or None; without gradient.
        a: A, shape (r, n), float32, without gradient.
        b: B, shape (m, r), float32.
        scaling: s.

    Guarantees:
        Gradients for x and B. Equal to the twin up to float32 rounding.

    Raises:
        ValueError: Shapes disagree, an array is not float32, or W, bias or A requires a
            gradient.
    """
    check_shapes(x, weight, a, b)
    fixed = {"weight": weight, "a": a} | ({} if bias is None else {"bias": bias})
    for name, value in {"x": x, "b": b, **fixed}.items():
        if value.dtype is not torch.float32:
            raise ValueError(f"{name} has dtype {value.dtype}; the merged product is for float32")
    for name, value in fixed.items():
        if value.requires_grad:
            raise ValueError(f"{name} requires a gradient, and the merged product has none for it")
    function: Any = _Merged
    y, z = function.apply(x, weight, bias, a, b * scaling)
    return y, z


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor
    ) -> tuple[Tensor, Tensor]:
        z = F.linear(x, a)
        y = F.linear(x, torch.addmm(weight, b, a), bias)
        ctx.save_for_backward(weight, a, b, z)
        ctx.mark_non_differentiable(z)
        return y, z

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        weight, a, b, z = ctx.saved_tensors
        delta, dx, db = cotangents[0], None, None
        if ctx.needs_input_grad[0]:
            dx = delta @ torch.addmm(weight, b, a)
        if ctx.needs_input_grad[4]:
            # The narrow side first: a CPU takes a quarter of the time for it.
            db = (z.flatten(0, -2).T @ delta.flatten(0, -2)).T
        return dx, None, None, None, db

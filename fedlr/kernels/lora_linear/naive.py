"""x·Wᵀ + bias + s·(x·Aᵀ)·Bᵀ in plain torch (Hu et al. 2021, arXiv 2106.09685).

This is the torch twin of the kernel and its run-time fall-back; autograd
differentiates it with respect to every argument.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fedlr import checks


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return y = x·Wᵀ + bias + s·z·Bᵀ and z = x·Aᵀ.

    Args:
        x: Shape (..., n), float32, float16 or bfloat16.
        weight: W, shape (m, n), dtype of ``x``.
        bias: Shape (m,), dtype of ``x``, or None.
        a: A, shape (r, n), floating; its dtype may be wider than ``x``'s.
        b: B, shape (m, r), likewise.
        scaling: s.

    Returns:
        (y, z): y of shape (..., m) and dtype of ``x``; z of shape (..., r), float32,
        without gradient: with δ = ∂loss/∂y, the gradient of B is s·Σ δᵀz, which is
        what `fedlr.kernels.clipped_sum` takes per unit.

    Guarantees:
        The low-rank term is formed in float32 and rounded once, with the sum.

    Raises:
        ValueError: Shapes disagree.

    Example:
        >>> one = torch.ones(1, 1)
        >>> [float(v) for v in lora_linear(3 * one, one, None, 2 * one, one, 0.5)]
        [6.0, 6.0]
    """
    check_shapes(x, weight, a, b)
    wide = torch.promote_types(x.dtype, torch.float32)
    z = F.linear(x.to(wide), a.to(wide))
    y = F.linear(x, weight, bias).to(wide) + scaling * F.linear(z, b.to(wide))
    return y.to(x.dtype), z.detach()


def check_shapes(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> None:
    """Raise ValueError unless x (..., n), W (m, n), A (r, n) and B (m, r) fit."""
    if x.ndim == 0 or weight.ndim != 2 or a.ndim != 2:
        raise ValueError(
            f"x has {x.ndim}, weight {weight.ndim} and a {a.ndim} dimensions; "
            "they need at least 1, 2 and 2"
        )
    checks.same_shape("x (last dimension)", x.shape[-1:], weight.shape[1:])
    checks.same_shape("a", a.shape, (a.shape[0], weight.shape[1]))
    checks.same_shape("b", b.shape, (weight.shape[0], a.shape[0]))

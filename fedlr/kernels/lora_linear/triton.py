"""The low-rank half of a LoRA layer on a GPU; the base product stays with cuBLAS.

The twin, with the meaning of every argument, is `fedlr.kernels.lora_linear.naive`.
Backward uses the same two kernels, since h = g·B has the form of x·Aᵀ, and
∂loss/∂x = g·W + s·h·A that of y.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from fedlr.kernels.clipped_sum.triton import LAUNCH, on_device_of, padded, weighted_sum
from fedlr.kernels.lora_linear.naive import check_shapes

BLOCK_TOKENS = 32
BLOCK_FEATURES = 64


@triton.jit  # type: ignore[untyped-decorator]
def _project_kernel(
    x: tl.tensor,
    a: tl.tensor,
    z: tl.tensor,
    tokens: tl.tensor,
    features: tl.tensor,
    rank: tl.tensor,
    stride_r: tl.tensor,
    stride_n: tl.tensor,
    block_t: tl.constexpr,
    block_n: tl.constexpr,
    block_r: tl.constexpr,
) -> None:
    """z = x·Aᵀ for block_t tokens; element (i, j) of A lies at i·stride_r + j·stride_n."""
    o_t = tl.program_id(0).to(tl.int64) * block_t + tl.arange(0, block_t)
    o_r = tl.arange(0, block_r)
    m_t = (o_t < tokens)[:, None]
    m_r = (o_r < rank)[None, :]
    b_z = tl.zeros((block_t, block_r), dtype=tl.float32)
    for i_n in range(0, features, block_n):
        o_n = i_n + tl.arange(0, block_n)
        m_n = o_n < features
        b_x = tl.load(
            x + o_t[:, None] * features + o_n[None, :], mask=m_t & m_n[None, :], other=0.0
        )  # [BT, BN]
        b_a = tl.load(
            a + o_n[:, None].to(tl.int64) * stride_n + o_r[None, :].to(tl.int64) * stride_r,
            mask=m_n[:, None] & m_r,
            other=0.0,
        )  # [BN, BR]
        if b_x.dtype != b_a.dtype:
            b_x = b_x.to(tl.float32)
            b_a = b_a.to(tl.float32)
        b_z = tl.dot(b_x, b_a, b_z, input_precision="ieee")
    tl.store(z + o_t[:, None] * rank + o_r[None, :], b_z, mask=m_t & m_r)


@triton.jit  # type: ignore[untyped-decorator]
def _add_kernel(
    y: tl.tensor,
    z: tl.tensor,
    b: tl.tensor,
    scaling: tl.tensor,
    tokens: tl.tensor,
    features: tl.tensor,
    rank: tl.tensor,
    stride_m: tl.tensor,
    stride_r: tl.tensor,
    block_t: tl.constexpr,
    block_m: tl.constexpr,
    block_r: tl.constexpr,
) -> None:
    """y += s·z·Bᵀ in place, summed in float32 and rounded once."""
    o_t = tl.program_id(0).to(tl.int64) * block_t + tl.arange(0, block_t)
    o_m = tl.program_id(1) * block_m + tl.arange(0, block_m)
    o_r = tl.arange(0, block_r)
    m_t = (o_t < tokens)[:, None]
    m_m = o_m < features
    m_r = o_r < rank
    b_z = tl.load(z + o_t[:, None] * rank + o_r[None, :], mask=m_t & m_r[None, :], other=0.0)
    b_b = tl.load(
        b + o_r[:, None].to(tl.int64) * stride_r + o_m[None, :].to(tl.int64) * stride_m,
        mask=m_r[:, None] & m_m[None, :],
        other=0.0,
    ).to(tl.float32)  # [BR, BM]
    b_low = tl.dot(b_z, b_b, input_precision="ieee")
    p_y = y + o_t[:, None] * features + o_m[None, :]
    inside = m_t & m_m[None, :]
    b_y = tl.load(p_y, mask=inside, other=0.0).to(tl.float32) + scaling * b_low
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=inside)


def project(x: Tensor, a: Tensor) -> Tensor:
    """Return x·Aᵀ, shape (tokens, r), float32, from x (tokens, n) and A (r, n) of any strides."""
    tokens, features = x.shape
    rank = a.shape[0]
    if x.numel() == 0 or rank == 0:
        return torch.zeros((tokens, rank), dtype=torch.float32, device=x.device)
    z = torch.empty((tokens, rank), dtype=torch.float32, device=x.device)
    with on_device_of(x):
        _project_kernel[(triton.cdiv(tokens, BLOCK_TOKENS),)](
            *(x.contiguous(), a, z, tokens, features, rank, *a.stride()),
            block_t=BLOCK_TOKENS,
            block_n=BLOCK_FEATURES,
            block_r=padded(rank),
            **LAUNCH,
        )
    return z


def add_low_rank_(y: Tensor, z: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Add s·z·Bᵀ to y (tokens, m) in place and return y.

    Args:
        y: Contiguous.
        z: Shape (tokens, r), float32, contiguous.
        b: B, shape (m, r), any strides.
        scaling: s.
    """
    (tokens, features), rank = y.shape, z.shape[1]
    if y.numel() and rank:
        blocks = (triton.cdiv(tokens, BLOCK_TOKENS), triton.cdiv(features, BLOCK_FEATURES))
        with on_device_of(y):
            _add_kernel[blocks](
                *(y, z, b, float(scaling), tokens, features, rank, *b.stride()),
                block_t=BLOCK_TOKENS,
                block_m=BLOCK_FEATURES,
                block_r=padded(rank),
                **LAUNCH,
            )
    return y


class _LoraLinear(torch.autograd.Function):
    """Saves z and references to W, A, B; the gradients of W, bias and A are none."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor]:
        z = project(_flat(x), a)
        y = F.linear(x, weight, bias).contiguous()
        add_low_rank_(_flat(y), z, b, scaling)
        return y, z.view(*x.shape[:-1], a.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, weight, _, a, b, ctx.scaling = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1], weight, a, b)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        g, gradient_x, gradient_b = gradients[0], None, None
        if g is None:
            return (None,) * 6
        z, weight, a, b = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            gradient_x = torch.matmul(g, weight).contiguous()
            add_low_rank_(_flat(gradient_x), project(_flat(g), b.T), a.T, ctx.scaling)
        if ctx.needs_input_grad[4]:
            gradient_b = (ctx.scaling * _outer_sum(g, z)).to(b.dtype)
        return gradient_x, None, None, None, gradient_b, None


def _flat(array: Tensor) -> Tensor:
    """Return (tokens, features) of (..., features)."""
    return array.reshape(math.prod(array.shape[:-1]), array.shape[-1])


def _outer_sum(g: Tensor, z: Tensor) -> Tensor:
    """Return Σ gᵀz over every token, shape (m, r), float32: the sum of all units, unclipped."""
    tokens = g.shape[-2] if g.ndim > 1 else 1
    rows = math.prod(g.shape[:-2])
    g, z = (array.reshape(rows, tokens, array.shape[-1]) for array in (g, z))
    units = torch.arange(rows, device=g.device)
    return weighted_sum(g, z, units, torch.ones(rows, device=g.device))


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """See the twin; differentiates for ``x`` and ``b`` only.

    Raises:
        ValueError: Shapes disagree, or another argument requires a gradient.
    """
    check_shapes(x, weight, a, b)
    others = {"weight": weight, "bias": bias, "a": a}
    wanted = [name for name, v in others.items() if v is not None and v.requires_grad]
    if wanted and torch.is_grad_enabled():
        raise ValueError(
            f"{', '.join(wanted)} requires a gradient; the kernel has one for x and b only: "
            "use the twin"
        )
    function: Any = _LoraLinear  # apply has no annotations
    result: tuple[Tensor, Tensor] = function.apply(x, weight, bias, a, b, scaling)
    return result

"""The two passes of the clipped sum on a GPU, without an array of per-unit gradients.

The twin, with what each function promises, is `fedlr.kernels.clipped_sum.naive`. A
tile of G_u is formed in registers by `_unit_gradient`, which both passes call with
the same tiles: the G_u that is clipped is, bit for bit, the one that was measured.
That is why tile shapes are constants and nothing here is autotuned.

Whether kernels are interpreted (``TRITON_INTERPRET=1``) is decided when triton is
first imported.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedlr import checks
from fedlr.kernels.clipped_sum.naive import check_shapes

BLOCK_TOKENS = 32
BLOCK_FEATURES = 64
SPLITS = 16
"""Most partial sums of the second pass: memory of SPLITS · m · r numbers, whatever U."""

LAUNCH = {"num_warps": 4, "enable_fp_fusion": True}
"""Given at every launch, so that neither a default nor a measurement changes a rounding."""


def padded(rank: int) -> int:
    """Return the tile width of ``rank``: a power of two ≥ 16, as a tensor core needs."""
    width: int = triton.next_power_of_2(rank)
    return max(16, width)


def on_device_of(array: Tensor) -> AbstractContextManager[object]:
    """Return a context in which kernels start on ``array``'s GPU, not on the current one."""
    return torch.cuda.device(array.device) if array.is_cuda else nullcontext()


@triton.jit  # type: ignore[untyped-decorator]
def _unit_gradient(
    delta: tl.tensor,
    z: tl.tensor,
    order: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    tokens: tl.tensor,
    features: tl.tensor,
    rank: tl.tensor,
    o_m: tl.tensor,
    o_r: tl.tensor,
    block_t: tl.constexpr,
    block_m: tl.constexpr,
    block_r: tl.constexpr,
) -> tl.tensor:
    """Return the tile (o_m, o_r) of Σ δᵀz over the rows order[begin:end], float32."""
    b_g = tl.zeros((block_m, block_r), dtype=tl.float32)
    for i in range(begin, end):
        i_row = tl.load(order + i)  # int64, and so is every address below
        for i_t in range(0, tokens, block_t):
            o_t = i_t + tl.arange(0, block_t)
            m_t = o_t < tokens
            line = i_row * tokens + o_t
            b_d = tl.load(
                delta + line[:, None] * features + o_m[None, :],
                mask=m_t[:, None] & (o_m < features)[None, :],
                other=0.0,
            )  # [BT, BM]
            b_z = tl.load(
                z + line[:, None] * rank + o_r[None, :],
                mask=m_t[:, None] & (o_r < rank)[None, :],
                other=0.0,
            )  # [BT, BR]
            if b_d.dtype != b_z.dtype:
                b_d = b_d.to(tl.float32)
                b_z = b_z.to(tl.float32)
            # "ieee": TensorFloat-32 would round the products to 11 bits.
            b_g = tl.dot(tl.trans(b_d), b_z, b_g, input_precision="ieee")
    return b_g


@triton.jit  # type: ignore[untyped-decorator]
def _norms_kernel(
    delta: tl.tensor,
    z: tl.tensor,
    order: tl.tensor,
    offsets: tl.tensor,
    partial: tl.tensor,
    tokens: tl.tensor,
    features: tl.tensor,
    rank: tl.tensor,
    block_t: tl.constexpr,
    block_m: tl.constexpr,
    block_r: tl.constexpr,
) -> None:
    """partial[u, i] = squared norm of rows [i·block_m, (i+1)·block_m) of G_u."""
    i_u = tl.program_id(0).to(tl.int64)
    i_m = tl.program_id(1)
    o_m = i_m * block_m + tl.arange(0, block_m)
    o_r = tl.arange(0, block_r)
    begin = tl.load(offsets + i_u)
    end = tl.load(offsets + i_u + 1)
    b_g = _unit_gradient(
        delta,
        z,
        order,
        begin,
        end,
        tokens,
        features,
        rank,
        o_m,
        o_r,
        block_t=block_t,
        block_m=block_m,
        block_r=block_r,
    )
    tl.store(partial + i_u * tl.num_programs(1) + i_m, tl.sum(tl.sum(b_g * b_g, 1), 0))


@triton.jit  # type: ignore[untyped-decorator]
def _sum_kernel(
    delta: tl.tensor,
    z: tl.tensor,
    order: tl.tensor,
    offsets: tl.tensor,
    factors: tl.tensor,
    partial: tl.tensor,
    units: tl.tensor,
    tokens: tl.tensor,
    features: tl.tensor,
    rank: tl.tensor,
    block_t: tl.constexpr,
    block_m: tl.constexpr,
    block_r: tl.constexpr,
) -> None:
    """partial[s] = Σ factor_u · G_u over the s-th run of consecutive units."""
    i_m = tl.program_id(0)
    i_s = tl.program_id(1).to(tl.int64)
    o_m = i_m * block_m + tl.arange(0, block_m)
    o_r = tl.arange(0, block_r)
    share = tl.cdiv(units, tl.num_programs(1))
    b_sum = tl.zeros((block_m, block_r), dtype=tl.float32)
    for i_u in range(i_s * share, tl.minimum((i_s + 1) * share, units)):
        factor = tl.load(factors + i_u)
        if factor > 0:  # a unit that is left out may hold NaN, and 0·NaN is NaN
            begin = tl.load(offsets + i_u)
            end = tl.load(offsets + i_u + 1)
            b_g = _unit_gradient(
                delta,
                z,
                order,
                begin,
                end,
                tokens,
                features,
                rank,
                o_m,
                o_r,
                block_t=block_t,
                block_m=block_m,
                block_r=block_r,
            )
            b_sum += factor * b_g
    line = i_s * features + o_m
    tl.store(
        partial + line[:, None] * rank + o_r[None, :],
        b_sum,
        mask=(o_m < features)[:, None] & (o_r < rank)[None, :],
    )


INTERPRETED = not isinstance(_norms_kernel, triton.JITFunction)
"""Whether these kernels run in triton's interpreter, on the CPU."""


def unit_squared_norms(delta: Tensor, z: Tensor, unit_index: Tensor, units: int) -> Tensor:
    """See the twin. Rows with an index outside [0, units) are dropped by both passes."""
    order, offsets = _rows_by_unit(delta, z, unit_index, units)
    tokens, features, rank = delta.shape[1], delta.shape[2], z.shape[2]
    if units == 0 or delta.numel() == 0 or z.numel() == 0:
        return torch.zeros(units, dtype=torch.float32, device=delta.device)
    tiles = triton.cdiv(features, BLOCK_FEATURES)
    partial = torch.empty((units, tiles), dtype=torch.float32, device=delta.device)
    with on_device_of(delta):
        _norms_kernel[(units, tiles)](
            *(delta.contiguous(), z.contiguous(), order, offsets, partial),
            *(tokens, features, rank),
            block_t=BLOCK_TOKENS,
            block_m=BLOCK_FEATURES,
            block_r=padded(rank),
            **LAUNCH,
        )
    return partial.sum(1)


def weighted_sum(delta: Tensor, z: Tensor, unit_index: Tensor, factors: Tensor) -> Tensor:
    """See the twin."""
    units, tokens, features, rank = factors.shape[0], *delta.shape[1:], z.shape[-1]
    order, offsets = _rows_by_unit(delta, z, unit_index, units)
    if units == 0 or delta.numel() == 0 or z.numel() == 0:
        return torch.zeros((features, rank), dtype=torch.float32, device=delta.device)
    splits = min(units, SPLITS)
    partial = torch.empty((splits, features, rank), dtype=torch.float32, device=delta.device)
    with on_device_of(delta):
        _sum_kernel[(triton.cdiv(features, BLOCK_FEATURES), splits)](
            *(delta.contiguous(), z.contiguous(), order, offsets),
            *(factors.to(torch.float32).contiguous(), partial),
            *(units, tokens, features, rank),
            block_t=BLOCK_TOKENS,
            block_m=BLOCK_FEATURES,
            block_r=padded(rank),
            **LAUNCH,
        )
    return partial.sum(0)


def _rows_by_unit(
    delta: Tensor, z: Tensor, unit_index: Tensor, units: int
) -> tuple[Tensor, Tensor]:
    """Return (rows sorted by unit (N,), where each unit's run begins (U + 1,)), int64."""
    check_shapes(delta, z, unit_index)
    checks.at_least("units", units, 0)
    index, order = torch.sort(unit_index, stable=True)
    bounds = torch.arange(units + 1, device=index.device, dtype=index.dtype)
    return order, torch.searchsorted(index, bounds)

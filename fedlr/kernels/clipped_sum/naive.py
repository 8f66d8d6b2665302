"""Per-unit gradients of a linear map's weight, their norms, and the clipped sum.

For y = z·Bᵀ and δ = ∂loss/∂y, the gradient of one row's loss with respect to B
is δᵀz, summed over tokens (Goodfellow 2015, arXiv 1510.01799; Li et al. 2022,
arXiv 2110.05679, section 4). No array of the size of the base weight is formed.
This is the torch twin of the kernel and its run-time fall-back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedlr import checks

SMALLEST_BOUND = 1e-8
"""Least clip norm. Squares of entries below 2.6e-23 vanish in float32: a norm of up to √d·2.6e-23
is taken for zero, and its unit is not clipped. With d ≤ 10⁹ entries that is 1e-18, which is 1e-10
of this bound; with a bound as small as those norms the clip would be none."""


def unit_gradients(delta: Tensor, z: Tensor, unit_index: Tensor, units: int) -> Tensor:
    """Return the gradient of B of every unit: G_u = Σ_{rows i of u} δ_iᵀ z_i.

    Args:
        delta: δ, shape (N, T, m), floating; ∂(sum of row losses)/∂(z·Bᵀ).
        z: Inputs of B, shape (N, T, r), same dtype and device.
        unit_index: Unit of each row, shape (N,), int64, values in [0, units).
        units: U ≥ 0, number of units; a unit without rows gets zeros.

    Returns:
        Shape (U, m, r), dtype of ``delta``. N = 0 gives zeros.

    Raises:
        ValueError: Shapes disagree.

    Example:
        >>> d, z = torch.ones(2, 1, 1), torch.tensor([[[2.0]], [[3.0]]])
        >>> unit_gradients(d, z, torch.tensor([0, 0]), 1).tolist()
        [[[5.0]]]
    """
    check_shapes(delta, z, unit_index)
    if delta.device.type == "cpu":  # BLAS is twice to four times faster with the narrow side first
        rows = torch.bmm(z.transpose(1, 2), delta).transpose(1, 2).contiguous()
    else:
        rows = torch.bmm(delta.transpose(1, 2), z)
    return sum_rows(rows, unit_index, units)  # of (N, m, r)


def check_shapes(delta: Tensor, z: Tensor, unit_index: Tensor) -> None:
    """Raise ValueError unless delta (N, T, m), z (N, T, r) and unit_index (N,) fit."""
    if delta.ndim != 3 or z.ndim != 3:
        raise ValueError(f"delta has {delta.ndim} and z has {z.ndim} dimensions; both need 3")
    checks.same_shape("z (rows, tokens)", z.shape[:2], delta.shape[:2])
    checks.same_shape("unit_index", unit_index.shape, delta.shape[:1])


def sum_rows(rows: Tensor, unit_index: Tensor, units: int) -> Tensor:
    """Add the rows of each unit: shape (N, ...) → (U, ...). The identity costs no copy."""
    if rows.shape[0] == units and torch.equal(
        unit_index, torch.arange(units, device=unit_index.device)
    ):
        return rows
    total = rows.new_zeros((units, *rows.shape[1:]))
    return total.index_add_(0, unit_index, rows)


def squared_norms(gradients: Tensor) -> Tensor:
    """Return ‖G_u‖² of every unit, shape (U,), float32, from gradients (U, ...)."""
    return gradients.flatten(1).float().pow(2).sum(1)


def clip_factors(squared: Tensor, bound: float) -> Tensor:
    """Return min(1, bound / ‖G_u‖) per unit, shape (U,).

    Args:
        squared: ‖G_u‖², shape (U,), float32, ≥ 0; summed over all clipped arrays.
        bound: Clip norm, ≥ `SMALLEST_BOUND`.

    Guarantees:
        factor·‖G‖ ≤ bound up to float32 rounding; a zero gradient keeps factor 1;
        a unit whose norm is NaN or infinite gets factor 0, so that it cannot
        poison the sum (its sensitivity is then 0 ≤ bound).

    Raises:
        ValueError: A smaller bound, or NaN.

    Example:
        >>> clip_factors(torch.tensor([0.0, 4.0, float("nan")]), 1.0).tolist()
        [1.0, 0.5, 0.0]
    """
    check_bound(bound)
    factors = (bound / squared.sqrt().clamp_min(1e-30)).clamp_max(1.0)
    return torch.where(torch.isfinite(squared), factors, torch.zeros_like(factors))


def check_bound(bound: float) -> float:
    """Return a clip norm; ValueError below `SMALLEST_BOUND`."""
    if checks.finite("bound", bound) < SMALLEST_BOUND:
        raise ValueError(
            f"bound = {bound} must be ≥ {SMALLEST_BOUND}: smaller norms are lost in float32"
        )
    return bound


def clipped_sum(gradients: Tensor, factors: Tensor) -> Tensor:
    """Return Σ_u factor_u · G_u, shape of one gradient; zeros for no unit.

    A unit with factor 0 contributes exactly zero even where its gradient is not
    finite. Multiplies in the full precision of ``gradients``: a matrix product may be
    rounded to TensorFloat-32 or bfloat16, which would lift a clipped norm above its
    bound, and is taken only where it is not.
    """
    flat = gradients.flatten(1)
    if _multiplies_exactly(flat) and bool((factors > 0).all()):
        return torch.mv(flat.T, factors.to(flat.dtype)).reshape(gradients.shape[1:])
    scale = factors.to(flat.dtype).unsqueeze(1)
    clipped = torch.where(scale > 0, flat, 0.0).mul_(scale)
    return clipped.sum(0).reshape(gradients.shape[1:])


def _multiplies_exactly(array: Tensor) -> bool:
    """Return whether a matrix product of ``array`` keeps float32's bits, as no GPU promises."""
    return array.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"


def unit_squared_norms(delta: Tensor, z: Tensor, unit_index: Tensor, units: int) -> Tensor:
    """Return ‖G_u‖² of every unit, shape (U,), float32: the first pass over (delta, z).

    The norm that clips is taken over all trained arrays: add this up over the sites,
    then ask `clip_factors` once.

    Args:
        delta: δ, shape (N, T, m), float32, float16 or bfloat16.
        z: Inputs of B, shape (N, T, r), of those dtypes, not necessarily ``delta``'s.
        unit_index: Unit of each row, shape (N,), int64, values in [0, units).
        units: U ≥ 0; a unit without rows has norm 0.

    Returns:
        Products and sums in float32 whatever the inputs; rows of a unit are added
        before the norm is taken.

    Raises:
        ValueError: Shapes disagree.

    Example:
        >>> d, z = torch.ones(2, 1, 1), torch.tensor([[[3.0]], [[4.0]]])
        >>> unit_squared_norms(d, z, torch.tensor([0, 0]), 1).tolist()
        [49.0]
    """
    return squared_norms(unit_gradients(_wide(delta), _wide(z), unit_index, units))


def weighted_sum(delta: Tensor, z: Tensor, unit_index: Tensor, factors: Tensor) -> Tensor:
    """Return Σ_u factor_u · G_u, shape (m, r), float32: the second pass over (delta, z).

    Args:
        delta: As given to `unit_squared_norms`.
        z: Likewise.
        unit_index: Likewise.
        factors: c_u, shape (U,), float32, finite and ≥ 0.

    Guarantees:
        A unit with factor 0 contributes exactly zero, finite or not. With c_u from
        `clip_factors` each term has norm ≤ bound up to float32 rounding, however
        much the terms of G_u cancel: both passes form the same G_u, bit for bit.

    Raises:
        ValueError: Shapes disagree.

    Example:
        >>> d, z = torch.ones(2, 1, 1), torch.tensor([[[3.0]], [[4.0]]])
        >>> weighted_sum(d, z, torch.tensor([0, 1]), torch.tensor([1.0, 0.5])).tolist()
        [[5.0]]
    """
    gradients = unit_gradients(_wide(delta), _wide(z), unit_index, factors.shape[0])
    return clipped_sum(gradients, factors)


def _wide(array: Tensor) -> Tensor:
    return array.to(torch.promote_types(array.dtype, torch.float32))

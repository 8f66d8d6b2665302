"""A = Q·A₀: the rows of an adapter as a rotation of a fixed basis, to the last bit.

Methods that train B alone never leave row(A). With a basis A₀ of that space, orthonormal
rows and known to both ends, an A is an r × r rotation Q: r² numbers go over the wire in
the place of r·n. Both ends compute A from Q and A₀, and compare digests, so the product is
formed in a way that no library, number of threads or vector width can change.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedlr import checks
from fedlr.lowrank.factors import Factors
from fedlr.lowrank.svd import refactorise_many, sign_of_largest

LARGEST_DEFECT = 1e-6
"""Largest entry of |A·Aᵀ − I| at which rows of float32 count as orthonormal."""


def rotate(rotation: Tensor, base: Tensor) -> Tensor:
    """Return Q·A₀, the same bits on every machine.

    Row i is Σ_j Q_ij·(A₀)_j with j = 1 … r in this order: products and sums in float64,
    rounded once to float32. A product of two float32 numbers has at most 48 significant
    bits and is exact in float64, so a fused multiply-add rounds as two operations do.

    Args:
        rotation: Q of shape (k, r), float32; k < r are the leading rows alone.
        base: A₀ of shape (r, n), float32.

    Returns:
        Shape (k, n), float32.

    Raises:
        ValueError: Another dtype, or shapes that do not fit.

    Guarantees:
        Bit-identical wherever float64 is IEEE 754 and subnormal numbers are not flushed
        to zero, torch's default on a CPU: a test compares it with plain Python. O(k·r·n)
        elementwise, no matrix product.

    Example:
        >>> swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> rotate(swap, torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])).tolist()
        [[4.0, 5.0, 6.0], [1.0, 2.0, 3.0]]
    """
    for name, value in (("rotation", rotation), ("base", base)):
        if value.dtype != torch.float32 or value.ndim != 2:
            raise ValueError(
                f"{name} has dtype {value.dtype} and shape {tuple(value.shape)}, expected a "
                "float32 matrix"
            )
    checks.same_shape("base: rows", base.shape[:1], rotation.shape[1:])
    total = torch.zeros(rotation.shape[0], base.shape[1], dtype=torch.float64)
    for column, row in zip(rotation.double().unbind(dim=1), base.double(), strict=True):
        total = total + column[:, None] * row
    return total.float()


def is_orthonormal(a: Tensor) -> bool:
    """Return whether A·Aᵀ is the unit matrix up to `LARGEST_DEFECT`; ``a`` is (r, n)."""
    wide = a.detach().double()
    gram = wide @ wide.mT
    defect = gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return bool(defect.abs().max() <= LARGEST_DEFECT) if defect.numel() else True


def refactorise_rotated(
    pairs: dict[str, Factors], bases: dict[str, Tensor]
) -> dict[str, tuple[Factors, Tensor]]:
    """Refactorise B·Q·A₀ of every site without looking at A₀.

    With B·Q = U Σ Pᵀ (m × r) the new B is U Σ and the new rotation Pᵀ: since A₀ has
    orthonormal rows, U Σ (Pᵀ A₀) is the singular value decomposition of B·A. Pᵀ is a fresh
    factor of each call, so its distance from orthogonality is one rounding to float32,
    whatever the number of calls before; and row(A) is that of A₀ for ever.

    Args:
        pairs: B (m, r) and the rotation Q (r, r) in the place of A, float32, by site.
        bases: A₀ (r, n) by site, float32, orthonormal rows.

    Returns:
        By site the pair (B', A') that `fedlr.lowrank.svd.refactorise` would give for
        (B, Q·A₀), and the rotation Q' with A' = `rotate` (Q', A₀) bit for bit.

    Raises:
        ValueError: As `fedlr.lowrank.svd.refactorise_many`; r > m among it.

    Guarantees:
        The entry of largest magnitude in each row of A' is positive, as in
        `fedlr.lowrank.svd.refactorise`. Inputs are not mutated.
    """
    found = {}
    for site, pair in refactorise_many(pairs).items():
        a = rotate(pair.a, bases[site])
        sign = sign_of_largest(a)  # (r,); a product with ±1 is exact
        rotation = pair.a * sign[:, None]
        # Anew, and not a·±1: a zero has a sign of its own, which its digest would tell.
        found[site] = replace(pair, b=pair.b * sign, a=rotate(rotation, bases[site])), rotation
    return found

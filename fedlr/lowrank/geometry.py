"""Where an update points: effective rank, angles between row spaces, intruder dimensions.

Every function reads factors or weights that a server has anyway, and returns numbers for
a report: nothing here changes a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedlr import checks
from fedlr.lowrank.factors import Factors

LEADING, THRESHOLD = 10, 0.5
"""Singular vectors of the tuned weight that are looked at, and the cosine below which one of
them is an intruder."""

WORK = 4e9
"""Largest Σ m·n·min(m, n) over the sites that `affordable` chooses; some seconds on one core."""


def effective_rank(singular_values: Tensor) -> Tensor:
    """Return exp(−Σ p_i ln p_i) with p = σ / Σσ: how many directions carry the update.

    Args:
        singular_values: σ of shape (..., k), non-negative and finite, any order.

    Returns:
        Shape (...), float64, in [1, number of positive σ's]: 1 for one direction, k for k
        equal ones; 0 where all σ are 0, for which the definition says nothing.

    Raises:
        ValueError: An entry is negative, NaN or infinite.

    Example:
        >>> sigma = torch.tensor([[2.0, 2.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> effective_rank(sigma).tolist()
        [2.0, 1.0, 0.0]

    Reference:
        Roy and Vetterli, The effective rank: a measure of effective dimensionality,
        EUSIPCO 2007, definition 1.
    """
    sigma = singular_values.detach().double()
    if not bool((torch.isfinite(sigma) & (sigma >= 0)).all()):
        raise ValueError("singular_values holds a negative, NaN or infinite entry")
    total = sigma.sum(dim=-1, keepdim=True)
    shares = sigma / total.clamp_min(torch.finfo(torch.float64).tiny)
    entropy = -torch.special.xlogy(shares, shares).sum(dim=-1)
    rank: Tensor = torch.where(total.squeeze(-1) > 0, entropy.exp(), 0.0)
    return rank


def principal_angles(a: Tensor, other: Tensor) -> Tensor:
    """Return the principal angles between the row spaces of two matrices.

    With orthonormal bases P and Q of the two spaces, the singular values of QᵀP are the
    cosines, and those of (I − QQᵀ)P the sines. An arc cosine loses half of the digits of a
    small angle, so each angle is taken from the smaller of the two.

    Args:
        a: Shape (..., r, n), rows linearly independent, finite, r ≤ n.
        other: Shape (..., q, n), likewise, q ≥ r.

    Returns:
        Shape (..., r), float64, radians in [0, π/2], smallest first; the last one is the
        largest principal angle. Zero where the spaces are equal, up to the rounding of
        the inputs (about 1e-7 for float32).

    Raises:
        ValueError: r > q, other numbers of columns, or an entry is not finite.

    Example:
        >>> one, two = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0]])
        >>> round(math.degrees(principal_angles(one, two).item()), 6)
        45.0

    Reference:
        Björck and Golub, Numerical methods for computing angles between linear subspaces,
        Mathematics of Computation 27 (1973), section 3.
    """
    if a.shape[-2] > other.shape[-2] or a.shape[-1] != other.shape[-1]:
        raise ValueError(
            f"a has shape {tuple(a.shape)} and other {tuple(other.shape)}; both need as many "
            "columns, and a no more rows than other"
        )
    bases = []
    for name, rows in (("a", a), ("other", other)):
        if not bool(torch.isfinite(rows).all()):
            raise ValueError(f"{name} holds NaN or infinite entries; every entry must be finite")
        bases.append(torch.linalg.qr(rows.detach().double().mT).Q)
    basis, reference = bases  # (..., n, r), (..., n, q)
    core = reference.mT @ basis
    cosines = torch.linalg.svdvals(core).clamp(max=1.0)  # largest first
    sines = torch.linalg.svdvals(basis - reference @ core).clamp(max=1.0).flip(-1)
    angles: Tensor = torch.where(cosines.square() > 0.5, sines.arcsin(), cosines.arccos())
    return angles


def leading_similarity(weight: Tensor, update: Factors, leading: int = LEADING) -> Tensor:
    """Return how well W knows each leading left singular vector of W + s·B·A.

    For the i-th left singular vector u_i of the tuned weight, the result is
    max_j |cos(u_i, w_j)| over all left singular vectors w_j of W. Near 1: the direction was
    there before training. Below a threshold (`THRESHOLD`): an intruder dimension, which
    adapters put among the leading ones and full fine-tuning does not.

    Args:
        weight: W of shape (m, n), finite, any floating dtype.
        update: B of shape (m, r) and A of shape (r, n), on any device.
        leading: Vectors looked at, ≥ 1; at most min(m, n) exist.

    Returns:
        Shape (min(``leading``, m, n),), float64, in [0, 1], the direction with the largest
        singular value first. Both decompositions are of Gram matrices in float64, at
        O(m·n·min(m, n)); directions of W below 1e-8 of its largest singular value are
        known by their span alone.

    Raises:
        ValueError: Shapes that do not fit, or entries that are not finite.

    Example:
        >>> w = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> b, a = torch.tensor([[0.0], [3.0], [3.0]]), torch.tensor([[0.0, 1.0, 1.0]])
        >>> [round(x, 2) for x in leading_similarity(w, Factors(b, a), 2).tolist()]
        [0.76, 1.0]

    Reference:
        Shuttleworth et al., LoRA vs full fine-tuning: an illusion of equivalence, arXiv
        2410.21228, section 3 and algorithm 1. The number of vectors and the threshold are
        parameters there too.
    """
    checks.at_least("leading", leading, 1)
    base = weight.detach().double()
    checks.same_shape("weight", base.shape, (update.b.shape[-2], update.a.shape[-1]))
    b, a = (factor.detach().to(base) for factor in (update.b, update.a))
    tuned = torch.addmm(base, b, a, alpha=update.scaling)
    if not math.isfinite(float(tuned.sum()) + float(base.sum())):
        raise ValueError("weight or update holds NaN or infinite entries")
    known, found = _left_vectors(base), _left_vectors(tuned)[:, : min(leading, *base.shape)]
    cosines: Tensor = (known.mT @ found).abs().amax(dim=0).clamp(max=1.0)
    return cosines


def affordable(shapes: Sequence[tuple[int, int]], work: float = WORK) -> list[int]:
    """Return which sites `leading_similarity` may be computed for, evenly spread.

    Args:
        shapes: (m, n) of every site, in model order.
        work: Largest sum of m·n·min(m, n) over the chosen ones.

    Returns:
        Indices in rising order: all where the sum allows it, else every k-th with the
        smallest k for which it does; empty where a single site exceeds ``work``.

    Example:
        >>> affordable([(10, 10)] * 4), affordable([(10, 10)] * 4, 2000), affordable([(10, 10)], 1)
        ([0, 1, 2, 3], [0, 2], [])
    """
    costs = [float(m) * n * min(m, n) for m, n in shapes]
    for stride in range(1, len(costs) + 1):
        if sum(costs[::stride]) <= work:
            return list(range(0, len(costs), stride))
    return []


def _left_vectors(matrix: Tensor) -> Tensor:
    """Left singular vectors as columns, shape (m, min(m, n)), largest singular value first."""
    rows, columns = matrix.shape
    if rows <= columns:
        left: Tensor = torch.linalg.eigh(matrix @ matrix.mT).eigenvectors.flip(-1)
        return left
    right: Tensor = torch.linalg.eigh(matrix.mT @ matrix).eigenvectors.flip(-1)
    # W·V = U·Σ; the QR makes directions of no weight orthonormal too.
    basis: Tensor = torch.linalg.qr(matrix @ right).Q
    return basis

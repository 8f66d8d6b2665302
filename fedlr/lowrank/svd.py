"""Exact refactorisation of B·A, and its spectrum, without the m × n product.

B = Q_b R_b and Aᵀ = Q_a R_a (thin QR) give B·A = Q_b (R_b R_aᵀ) Q_aᵀ, so the
singular values of the r × r core are those of B·A: O((m + n) r²) instead of
O(m n min(m, n)). Derivation in the package README; QR-based SVD of a product
as in Golub and Van Loan, Matrix Computations (4th ed.), section 5.2 and 8.6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedlr import checks
from fedlr.lowrank.factors import Factors

_BATCH = 2**26
"""Most numbers of the factors that one batched decomposition takes: 512 MiB in float64."""


def refactorise(factors: Factors) -> Factors:
    """Return the pair with the same product, orthonormal A and ordered B.

    With B·A = U Σ Vᵀ the result is B' = U Σ, A' = Vᵀ: FedSVD's server step
    (arXiv 2505.12805), here through two thin QRs and an r × r SVD.

    Args:
        factors: B of shape (..., m, r) and A of shape (..., r, n), r ≤
            min(m, n), finite, floating; leading dimensions are independent sites.

    Returns:
        A new pair of the same shapes, dtype, device and scaling. Columns of B'
        are orthogonal, their norms σ_1 ≥ … ≥ σ_r are the singular values of
        B·A; the rows of A' are orthonormal.

    Raises:
        ValueError: r > min(m, n), or an entry is NaN or infinite.

    Guarantees:
        Computed in float64 and rounded once to the input's dtype: B'A' = BA and
        A'A'ᵀ = I up to that rounding. Deterministic on one machine; the entry
        of largest magnitude in each row of A' is positive, so distinct singular
        values fix the result. Inputs are not mutated, no graph is kept.

    Edge cases:
        ===================  ====================================================
        B = 0                B' = 0, A' an orthonormal basis of row(A)
        B rank-deficient     trailing columns of B' are 0 up to rounding, the rows of
                             A' beside them any orthonormal completion of row(A)
        A rank-deficient     A'A'ᵀ = I; row(A') contains row(A)
        A of full row rank   row(A') = row(A), whatever B
        equal σ's            any rotation inside their block is valid
        ===================  ====================================================

    Example:
        >>> pair = Factors(b=torch.tensor([[3.0], [4.0]]), a=torch.tensor([[0.0, -2.0]]))
        >>> new = refactorise(pair)
        >>> [round(x, 4) for x in new.b.flatten().tolist()], new.a.tolist()
        ([-6.0, -8.0], [[0.0, 1.0]])
    """
    b, a = _in_double(factors)
    rows, columns = b.shape[-2], a.shape[-1]
    if factors.rank > min(rows, columns):
        raise ValueError(
            f"rank = {factors.rank} must be ≤ min(m, n) = {min(rows, columns)} for A to have "
            "orthonormal rows; lower the rank"
        )
    basis_b, triangle_b = torch.linalg.qr(b)  # (..., m, r), (..., r, r)
    basis_a, triangle_a = torch.linalg.qr(a.mT)  # (..., n, r), (..., r, r)
    left, sigma, right = torch.linalg.svd(triangle_b @ triangle_a.mT)
    new_a = (right @ basis_a.mT).to(factors.a.dtype)  # (..., r, n)
    new_b = (basis_b @ (left * sigma.unsqueeze(-2))).to(factors.b.dtype)
    sign = sign_of_largest(new_a)  # (..., r); a product with ±1 is exact
    return replace(factors, b=new_b * sign.unsqueeze(-2), a=new_a * sign.unsqueeze(-1))


def refactorise_many(pairs: Mapping[str, Factors]) -> dict[str, Factors]:
    """Refactorise every site, sites of equal shape, dtype and device in one call.

    Args:
        pairs: Factor pair of each site by its name; empty gives empty.

    Returns:
        `refactorise` of each pair under the same name and in the same order,
        with storage of its own; equal to one call per site up to rounding.

    Raises:
        ValueError: As `refactorise`; the message names the sites of the group.
    """
    ranks = {name: pair.rank for name, pair in pairs.items()}
    return _batched(pairs, ranks, lambda batch, _: refactorise(batch))


def narrow(factors: Factors) -> Factors:
    """Return the same product with an inner dimension of at most min(m, n).

    A wider pair is larger than the m × n product, so it becomes that product beside an
    identity: one matrix multiplication, and every later one adds to it without rounding
    what is there.

    Args:
        factors: B of shape (..., m, k) and A of shape (..., k, n), any k ≥ 0.

    Returns:
        ``factors`` itself where k ≤ min(m, n); else (B·A, I) for n ≤ m and (I, B·A)
        for n > m, of the same dtype, device and scaling.

    Example:
        >>> wide = Factors(b=torch.ones(3, 4), a=torch.ones(4, 2))
        >>> narrow(wide).rank, bool((narrow(wide).product() == wide.product()).all())
        (2, True)
    """
    rows, columns = factors.b.shape[-2], factors.a.shape[-1]
    size = min(rows, columns)
    if factors.rank <= size:
        return factors
    product = factors.b @ factors.a
    identity = torch.eye(size, dtype=product.dtype, device=product.device)
    identity = identity.expand(*product.shape[:-2], size, size)
    if columns <= rows:
        return replace(factors, b=product, a=identity)
    return replace(factors, b=identity, a=product)


def best_of_rank(factors: Factors, rank: int) -> Factors:
    """Return the best approximation of s·B·A of a given rank.

    `refactorise` and `Factors.truncate`; by Eckart and Young (1936) no matrix of that
    rank is nearer in Frobenius norm. For stacked pairs (`fedlr.lowrank.factors.stack`)
    it is the best approximation of their sum, at O((m + n) k²) for k stacked columns.

    Args:
        factors: B of shape (..., m, k) and A of shape (..., k, n), any k; leading
            dimensions are independent sites.
        rank: In [1, min(m, n, k)].

    Returns:
        A pair of ``rank`` with the dtype, device and scaling of ``factors``, columns of
        B by decreasing norm and orthonormal rows of A. Its squared error is
        `tail_energy`; exact, up to the rounding, where s·B·A has no larger rank.

    Raises:
        ValueError: ``rank`` is out of range, or an entry is NaN or infinite.

    Guarantees:
        As `refactorise`.

    Example:
        >>> pair = Factors(b=torch.diag(torch.tensor([1.0, 3.0])), a=torch.eye(2))
        >>> best_of_rank(pair, 1).product().tolist()
        [[0.0, 0.0], [0.0, 3.0]]
    """
    rows, columns = factors.b.shape[-2], factors.a.shape[-1]
    checks.in_range("rank", rank, 1, min(rows, columns, factors.rank))
    wide = replace(factors, b=factors.b.double(), a=factors.a.double())
    best = refactorise(narrow(wide)).truncate(rank)
    return replace(best, b=best.b.to(factors.b.dtype), a=best.a.to(factors.a.dtype))


def best_of_rank_many(pairs: Mapping[str, Factors], ranks: Mapping[str, int]) -> dict[str, Factors]:
    """Return `best_of_rank` of every site, sites of equal shape in one call.

    Args:
        pairs: Factor pair of each site by its name; empty gives empty.
        ranks: The rank of each site, by the same names.

    Returns:
        The approximation of each pair under the same name and in the same order, with
        storage of its own; equal to one call per site up to rounding.

    Raises:
        ValueError: As `best_of_rank`; the message names the sites of the group.
    """
    return _batched(pairs, ranks, best_of_rank)


def singular_values(factors: Factors) -> Tensor:
    """Return the singular values of s·B·A, largest first.

    Args:
        factors: B of shape (..., m, r) and A of shape (..., r, n), any r.

    Returns:
        Shape (..., min(m, r, n)), float64, non-negative; every further singular
        value of s·B·A is 0.

    Raises:
        ValueError: An entry is NaN or infinite.

    Example:
        >>> pair = Factors(b=torch.tensor([[3.0], [4.0]]), a=torch.tensor([[0.0, 2.0]]))
        >>> singular_values(pair.scale(0.5)).tolist()
        [5.0]
    """
    b, a = _in_double(factors)
    triangle_b = torch.linalg.qr(b, mode="r").R
    triangle_a = torch.linalg.qr(a.mT, mode="r").R
    sigma: Tensor = torch.linalg.svdvals(triangle_b @ triangle_a.mT)
    return sigma * factors.scaling


def tail_energy(factors: Factors, rank: int) -> Tensor:
    """Return Σ_{i > rank} σ_i² of s·B·A, the cost of truncating it to ``rank``.

    By Eckart and Young (1936) this is the least squared Frobenius error of any
    approximation of that rank, and what `Factors.truncate` after `refactorise`
    attains.

    Args:
        factors: B of shape (..., m, r) and A of shape (..., r, n).
        rank: Kept singular values, in [0, r].

    Returns:
        Shape (...), float64; 0 where nothing is cut off.

    Raises:
        ValueError: ``rank`` is outside [0, r], or an entry is not finite.
    """
    checks.in_range("rank", rank, 0, factors.rank)
    return singular_values(factors)[..., rank:].square().sum(dim=-1)


def _batched(
    pairs: Mapping[str, Factors],
    ranks: Mapping[str, int],
    work: Callable[[Factors, int], Factors],
) -> dict[str, Factors]:
    """``work`` on every pair, those of equal shape, dtype, device and rank stacked."""
    groups: dict[object, list[list[str]]] = {}
    for name, pair in pairs.items():
        key = (pair.b.shape, pair.a.shape, pair.b.dtype, pair.b.device, ranks[name])
        most = max(1, _BATCH // max(1, pair.b.numel() + pair.a.numel()))
        batches = groups.setdefault(key, [[]])
        if len(batches[-1]) == most:
            batches.append([])
        batches[-1].append(name)
    done: dict[str, Factors] = {}
    for names in (batch for batches in groups.values() for batch in batches):
        stacked = Factors(
            b=torch.stack([pairs[name].b for name in names]),
            a=torch.stack([pairs[name].a for name in names]),
        )
        try:
            result = work(stacked, ranks[names[0]])
        except ValueError as error:
            raise ValueError(f"sites {', '.join(names)}: {error}") from error
        for index, name in enumerate(names):
            # A view would keep the whole batch alive and share its storage.
            done[name] = replace(pairs[name], b=result.b[index].clone(), a=result.a[index].clone())
    return {name: done[name] for name in pairs}


def _in_double(factors: Factors) -> tuple[Tensor, Tensor]:
    """B and A as detached float64; ValueError where an entry is not finite."""
    b, a = factors.b.detach().double(), factors.a.detach().double()
    # NaN and infinity survive a sum; looking at every entry takes longer than a QR.
    if not math.isfinite(float(b.sum() + a.sum())):
        for name, value in (("b", b), ("a", a)):
            if not bool(torch.isfinite(value).all()):
                raise ValueError(
                    f"{name} holds NaN or infinite entries; every entry must be finite"
                )
    return b, a


def sign_of_largest(rows: Tensor) -> Tensor:
    """Return ±1 for each row, (..., r, n) → (..., r): the sign of its largest entry."""
    index = rows.abs().argmax(dim=-1, keepdim=True)
    return torch.where(rows.gather(-1, index).squeeze(-1) < 0, -1.0, 1.0).to(rows.dtype)

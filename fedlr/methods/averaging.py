"""The mean of the models of the last rounds, as one adapter of the same rank.

Averaging the iterates removes part of the noise of the last round; it reads
only released states, so it costs no ε (post-processing).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedlr.lowrank.factors import Factors, stack
from fedlr.lowrank.svd import refactorise
from fedlr.methods.method import MODEL_ROLES, GlobalState, PartKey, Parts, Role
from fedlr.methods.shared import factor_pairs


def can_average(state: GlobalState) -> bool:
    """Return whether `average` is defined for states with the parts of ``state``."""
    return all(key.role in MODEL_ROLES for key in state.parts)


def average(states: Sequence[GlobalState]) -> Parts:
    """Return parts whose effective weights are the mean of those of ``states``.

    s·B·A = (1/n) Σ s·B_i·A_i, from the stacked factors [B_1 … B_n] / n and
    [A_1; …; A_n], refactorised and truncated to the site's rank; heads are
    averaged elementwise.

    Args:
        states: n ≥ 1 states of one layout with A, B and heads only.

    Returns:
        A (r, n), B (m, r) and heads in the dtype of the last state. One state:
        its parts, unchanged.

    Raises:
        ValueError: No state, different layouts, or a part with another role.

    Guarantees:
        Exact up to rounding where all A_i share a row space (methods that train
        B alone: FedSVD, FFA-LoRA), because the sum then has rank ≤ r. Otherwise
        the best approximation of rank r of the sum (Eckart and Young). Rows of
        A are orthonormal. Computed in float64, rounded once; no input is mutated.

    Reference:
        Polyak and Juditsky, Acceleration of stochastic approximation by
        averaging, SIAM J. Control Optim. 30 (1992).
    """
    if not states:
        raise ValueError("states is empty; the average needs at least one state")
    last = states[-1]
    if len(states) == 1:
        return last.parts
    for state in states:
        if state.layout.sites != last.layout.sites or state.parts.keys() != last.parts.keys():
            raise ValueError("states have different layouts; average states of one run")
        if not can_average(state):
            roles = sorted({key.role.value for key in state.parts} - {r.value for r in MODEL_ROLES})
            raise ValueError(f"parts {roles} cannot be averaged; average 1 round")
    parts = dict(last.parts)
    pairs = [factor_pairs(state.layout, state.parts) for state in states]
    for site in last.layout.sites:
        mean = _mean([by_site[site.name] for by_site in pairs], site.rank)
        dtype = last.parts[PartKey(site.name, Role.B)].dtype
        parts[PartKey(site.name, Role.B)] = (mean.b / site.scaling).to(dtype)
        parts[PartKey(site.name, Role.A)] = mean.a.to(dtype)
    for key, value in last.parts.items():
        if key.role is Role.HEAD:
            heads = torch.stack([state.parts[key].double() for state in states])
            parts[key] = heads.mean(dim=0).to(value.dtype)
    return parts


def _mean(pairs: Sequence[Factors], rank: int) -> Factors:
    """The mean product as a float64 pair of ``rank`` and scaling 1."""
    wide = [Factors(b=p.b.double(), a=p.a.double(), scaling=p.scaling) for p in pairs]
    stacked = stack([pair.scale(1 / len(pairs)) for pair in wide])
    return refactorise(_narrowed(stacked)).truncate(rank)


def _narrowed(pair: Factors) -> Factors:
    """The same product with an inner dimension ≤ min(m, n), which `refactorise` needs."""
    b, a = pair.b, pair.a
    if a.shape[0] > a.shape[1]:
        basis, triangle = torch.linalg.qr(a.mT)  # (n, n), (n, n·r)
        b, a = b @ triangle.mT, basis.mT
    if b.shape[1] > b.shape[0]:
        basis, triangle = torch.linalg.qr(b)  # (m, m), (m, k)
        b, a = basis, triangle @ a
    return Factors(b=b, a=a)

"""The mean of the models of the last rounds, as one adapter of the same rank.

Averaging the iterates removes part of the noise of the last round; it reads
only released states, so it costs no ε (post-processing).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedlr.lowrank.factors import Factors, stack
from fedlr.lowrank.svd import best_of_rank_many, narrow
from fedlr.methods.effective import update_of
from fedlr.methods.method import (
    MODEL_ROLES,
    RESIDUAL_ROLES,
    GlobalState,
    PartKey,
    Parts,
    Role,
)
from fedlr.methods.shared import factor_pairs


def can_average(state: GlobalState) -> bool:
    """Return whether `average` is defined for states such as ``state``.

    True for every shipped method between two rounds; False inside a round.
    """
    return state.phase == 0 and all(key.role in MODEL_ROLES | RESIDUAL_ROLES for key in state.parts)


def average(states: Sequence[GlobalState]) -> Parts:
    """Return parts whose effective weights are the mean of those of ``states``.

    Where the mean of the updates goes, the first that fits:

    - a state has a residual: all of it into the residual, with B = 0 (or R = 0);
    - a core R between a B and an A that all states share: into R, the mean of the cores;
    - else into B and A: (1/n) Σ s·B_i·A_i, from the stacked factors [B_1 … B_n] / n and
      [A_1; …; A_n], refactorised and truncated to the site's rank.

    Heads are averaged elementwise.

    Args:
        states: n ≥ 1 states of one run, between two rounds.

    Returns:
        The parts of the last state, with their dtypes, and a residual where an earlier
        state alone has one. One state: its parts, unchanged.

    Raises:
        ValueError: No state, different layouts, a part with another role, or cores
            between factors that differ.

    Guarantees:
        Exact up to rounding with a residual or a core, and where all A_i share a row
        space (methods that train B alone), because the sum then has rank ≤ r. Otherwise
        the best approximation of rank r of the sum (Eckart and Young). What is
        refactorised has orthonormal rows of A and is computed in float64, rounded once;
        no input is mutated.

    Reference:
        Polyak and Juditsky, Acceleration of stochastic approximation by
        averaging, SIAM J. Control Optim. 30 (1992).
    """
    if not states:
        raise ValueError("states is empty; the average needs at least one state")
    last = states[-1]
    if len(states) == 1:
        return last.parts
    _check(states)
    parts = dict(last.parts)
    parts |= _means(states, Role.HEAD)
    if any(key.role in RESIDUAL_ROLES for state in states for key in state.parts):
        return parts | _folded(states)
    if any(key.role is Role.CORE for key in last.parts):
        return parts | _means(states, Role.CORE)
    return parts | _truncated(states)


def _check(states: Sequence[GlobalState]) -> None:
    """ValueError where the states do not belong together or cannot be averaged."""
    last = states[-1]
    own = {key for key in last.parts if key.role not in RESIDUAL_ROLES}
    for state in states:
        found = {key for key in state.parts if key.role not in RESIDUAL_ROLES}
        if state.layout.sites != last.layout.sites or found != own:
            raise ValueError("states have different layouts; average states of one run")
        if not can_average(state):
            able = MODEL_ROLES | RESIDUAL_ROLES
            roles = sorted({key.role.value for key in state.parts if key.role not in able})
            raise ValueError(
                f"parts {roles} in phase {state.phase} cannot be averaged; average 1 round"
            )
        for key in (key for key in own if key.role is Role.CORE):
            for factor in (PartKey(key.site, Role.A), PartKey(key.site, Role.B)):
                if not torch.equal(state.parts[factor], last.parts[factor]):
                    raise ValueError(f"{factor} moves around a core; average 1 round")


def _means(states: Sequence[GlobalState], role: Role) -> dict[PartKey, torch.Tensor]:
    """The elementwise mean of every array of ``role``."""
    return {
        key: torch.stack([state.parts[key].double() for state in states]).mean(dim=0).to(value)
        for key, value in states[-1].parts.items()
        if key.role is role
    }


def _folded(states: Sequence[GlobalState]) -> dict[PartKey, torch.Tensor]:
    """The mean of the whole updates as the residual of every site."""
    last, found = states[-1], {}
    for site in last.layout.sites:
        pairs = [update_of(site, state.parts) for state in states]
        whole = narrow(stack([pair.scale(1 / len(pairs)) for pair in pairs if pair is not None]))
        b = PartKey(site.name, Role.B)
        idle = core if (core := PartKey(site.name, Role.CORE)) in last.parts else b
        found[idle] = torch.zeros_like(last.parts[idle])
        found[PartKey(site.name, Role.RESIDUAL_B)] = whole.b.to(last.parts[b]).contiguous()
        found[PartKey(site.name, Role.RESIDUAL_A)] = whole.a.to(last.parts[b]).contiguous()
    return found


def _truncated(states: Sequence[GlobalState]) -> dict[PartKey, torch.Tensor]:
    """The best A and B of each site's rank for the mean product."""
    last, sums = states[-1], {}
    every = [factor_pairs(state.layout, state.parts) for state in states]
    for site in last.layout.sites:
        pairs = [by_site[site.name] for by_site in every]
        wide = [Factors(b=p.b.double() / len(pairs), a=p.a.double()) for p in pairs]
        sums[site.name] = stack(wide)
    found = {}
    ranks = {site.name: site.rank for site in last.layout.sites}
    for name, pair in best_of_rank_many(sums, ranks).items():
        for role, array in ((Role.B, pair.b), (Role.A, pair.a)):
            key = PartKey(name, role)
            found[key] = array.to(last.parts[key])
    return found

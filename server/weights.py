"""The public weights of the clients of a round."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal

from fedlr.errors import RunError
from server.membership import Member

Weights = Literal["uniform", "declared", "inverse_variance"]


def weights_of(members: Sequence[Member], kind: Weights) -> list[float]:
    """Return the weight of each client; only ratios count.

    Args:
        members: Clients of one round.
        kind: ``uniform``; ``declared``: by declared size; ``inverse_variance``: by 1/σ_k².
            What client k adds to a mean gradient has the standard deviation σ_k·C/L; C and
            L are the run's and no policy of a site changes them, so that the weighted mean
            with 1/σ_k² has the least variance of all (a weighted mean of independent
            estimates, by the inequality of Cauchy and Schwarz).

    Returns:
        A finite number ≥ 0 per client, in order; all 1 where no client adds noise. By
        ``inverse_variance`` it is > 0, however small a σ another client announces: only a
        client of weight 0 does not count as one that took part.

    Note:
        σ and size are what the sites announce: one that understates its σ, or overstates
        its size, gains weight. Where sites are not trusted, keep to ``uniform``.
    """
    if kind == "declared":
        return [float(member.status.declared_size) for member in members]
    sigmas = [member.status.noise_multiplier for member in members]
    least = min(sigmas, default=0.0)
    if kind == "uniform" or least == 0:
        return [1.0] * len(members)
    # Relative to the least, because 1/σ² of a tiny σ is not finite.
    return [max((least / sigma) ** 2, sys.float_info.min) for sigma in sigmas]


def check_weights(members: Sequence[Member], kind: Weights) -> None:
    """Raise RunError where clients without noise would outweigh all others infinitely."""
    silent = [member.client for member in members if member.status.noise_multiplier == 0]
    if kind == "inverse_variance" and 0 < len(silent) < len(members):
        told = ", ".join(silent[:3]) + (f" and {len(silent) - 3} more" if len(silent) > 3 else "")
        raise RunError(
            f"method.weights = inverse_variance but {told} announce σ = 0 and the others do not: "
            "1/σ² would give them all the weight; set method.weights=uniform or declared, or let "
            "all clients add noise"
        )

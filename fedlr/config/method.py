"""The sections that choose the method: adapters, method, combiner and subspace."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal


def top_layers(text: str) -> tuple[int, ...] | None:
    """Return the layer indices that ``top:k`` means; None where ``text`` is nothing such.

    Example:
        >>> top_layers("top:2"), top_layers("top:0")
        ((-2, -1), None)
    """
    found = re.fullmatch(r"top:([1-9][0-9]?)", text)
    return tuple(range(-int(found.group(1)), 0)) if found else None


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Where low-rank adapters go.

    Attributes:
        rank: r of every site.
        alpha: α; the scaling is α / r.
        modules: Suffixes of linear layer names, e.g. ``query``, ``output.dense``.
        layers: Layer indices, negative ones counted from the top, or ``top:k`` for the
            k top layers (read as -k, …, -1); null is all. What lies below is frozen and
            computed once, see `KernelsConfig.prefix_cache_mb`.
        rank_by_client: Rank of each simulated client, in [1, ``rank``]: it gets, trains and
            sends the leading columns of B (rows of A) alone. null: all of them.
    """

    rank: int = 8
    alpha: float = 8.0
    modules: tuple[str, ...] = ("query", "value", "dense")
    layers: tuple[int, ...] | None = field(
        default=(-2, -1), metadata={"spelling": top_layers, "spelt": "top:k (1 ≤ k ≤ 99)"}
    )
    rank_by_client: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """The federated method and the weights of its clients.

    Attributes:
        name: Name in `fedlr.methods.registry`.
        weights: ``uniform``; ``declared``, by the sites' declared sizes; or
            ``inverse_variance``, by 1/σ² of the noise that the sites announce.
        update_norm_bound: Largest accepted Frobenius norm of one array's change
            in one round; null checks only names, shapes and finiteness.
        downlink: ``full`` sends A and B; ``rotation`` sends A once, then B and an r × r
            rotation (``fedsvd``).
        norm_weighting: Weigh clients by the norm of their update (``hetlora``).
        pruning: γ in (0, 1), share of its rank that a client keeps where the rest of its
            update shrinks (``hetlora``); null prunes nobody.
    """

    name: str = "fedsvd"
    weights: Literal["uniform", "declared", "inverse_variance"] = "uniform"
    update_norm_bound: float | None = None
    downlink: Literal["full", "rotation"] = "full"
    norm_weighting: bool = True
    pruning: float | None = None


@dataclass(frozen=True, kw_only=True)
class CombineConfig:
    """How the clients' arrays become one; see `fedlr.methods.combine`.

    Attributes:
        kind: Name in `fedlr.methods.combiners`.
        malicious: Clients of a round that may send anything; what a robust combiner is
            built to bear. null: the most that the cohort allows.
        bound: Largest Frobenius norm of one client's whole change
            (``norm_bounded_mean``), with mixed ranks of each block of columns that the same
            clients trained; null takes the median of the clients' norms.
        consensus: Agreement in [0, 1] below which a direction of the combined change is
            dropped (`fedlr.methods.consensus`); null drops none.
    """

    kind: Literal[
        "weighted_mean",
        "coordinate_median",
        "trimmed_mean",
        "norm_bounded_mean",
        "krum",
        "multi_krum",
        "geometric_median",
        "flag",
    ] = "weighted_mean"
    malicious: int | None = None
    bound: float | None = None
    consensus: float | None = None


@dataclass(frozen=True, kw_only=True)
class SubspaceConfig:
    """Where A comes from and how it moves; see `fedlr.lowrank.subspace`.

    Attributes:
        kind: ``kaiming``, ``orthonormal``; ``principal`` or ``minor`` singular vectors of
            the base weights; ``activations`` or ``gradient`` of the model on public text.
        refresh: ``none``; ``merge`` folds B·A into the base weights and draws a new A;
            ``alternate`` trains A in every second round (`fedlr.methods.refresh`).
        refresh_every: Rounds between two merges, ≥ 1.
        public: Public text for ``activations`` and ``gradient``: a file or folder with the
            columns of the run's data, or ``stdlib``. Declares it public. null: none.
    """

    kind: Literal["kaiming", "orthonormal", "principal", "minor", "activations", "gradient"] = (
        "orthonormal"
    )
    refresh: Literal["none", "merge", "alternate"] = "none"
    refresh_every: int = 1
    public: str | None = None

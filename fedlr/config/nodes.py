"""A configuration for as many clients as there are nodes."""

from __future__ import annotations

from dataclasses import replace

from fedlr import checks
from fedlr.config.schema import RunConfig


def for_nodes(config: RunConfig, nodes: int) -> RunConfig:
    """Return ``config`` with one client per node.

    Args:
        config: A checked configuration.
        nodes: Number of nodes, ≥ 1; becomes ``federation.clients``. A larger cohort
            or quorum is lowered to it.

    Example:
        >>> for_nodes(RunConfig(), 4).federation.clients_per_round
        4
    """
    checks.at_least("nodes", nodes, 1)
    federation = config.federation
    per_round = min(federation.clients_per_round, nodes)
    fitted = replace(
        federation,
        clients=nodes,
        clients_per_round=per_round,
        min_clients=min(federation.min_clients, per_round),
    )
    return replace(config, federation=fitted)

"""A configuration fitted to a number of nodes stays a valid one."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlr.config import RunConfig, from_mapping
from fedlr.config.nodes import for_nodes


@given(st.integers(1, 50), st.data())
def test_cohort_and_quorum_shrink_with_the_nodes_and_never_grow(
    nodes: int, data: st.DataObject
) -> None:
    clients = data.draw(st.integers(1, 50))
    per_round = data.draw(st.integers(1, clients))
    quorum = data.draw(st.integers(1, per_round))
    sizes = {"clients": clients, "clients_per_round": per_round, "min_clients": quorum}
    config = from_mapping({"seed": 3, "federation": {**sizes, "rounds": 5}})
    fitted = for_nodes(config, nodes)
    found = fitted.federation
    assert found.clients == nodes
    assert found.clients_per_round == min(per_round, nodes)
    assert found.min_clients == min(quorum, nodes)
    assert (fitted.seed, found.rounds) == (3, 5)
    assert from_mapping(asdict(fitted)) == fitted


def test_as_many_nodes_as_clients_change_nothing() -> None:
    assert for_nodes(RunConfig(), RunConfig().federation.clients) == RunConfig()


def test_no_node_is_refused() -> None:
    with pytest.raises(ValueError, match="nodes = 0"):
        for_nodes(RunConfig(), 0)

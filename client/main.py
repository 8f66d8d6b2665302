"""The ClientApp of ``flwr run``: a simulated site, built from the order of the ServerApp."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from client.app import make_client_app
from client.simulation import NodeContext, site_in_actor
from client.site import Site
from fedlr.config import from_json
from fedlr.orders import order_file, read_order


class RunContext(NodeContext, Protocol):
    """What is read of Flower's Context of a node in a run."""

    @property
    def run_id(self) -> int:
        """Flower's id of the run."""
        ...

    @property
    def run_config(self) -> Mapping[str, Any]:
        """``cfg``, the canonical JSON of the configuration."""
        ...


def site_of(context: RunContext) -> Site:
    """Return the site of a node.

    Raises:
        RunError: This machine does not see the order of the run.
        ConfigError: ``cfg`` is not a configuration.
    """
    output = from_json(str(context.run_config["cfg"])).output
    return site_in_actor(read_order(order_file(output, context.run_id)), context)


app = make_client_app(site_of)

"""The ClientApp of ``flwr run``: at a real site the agent's proxy, else a simulated site.

A node whose config names an ``agent`` is a real site. Only the other kind loads what a simulated
site is built from, by the order that the ServerApp leaves.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client import proxy

if TYPE_CHECKING:
    from client.site import Site


class RunContext(Protocol):
    """What is read of Flower's Context of a node in a run."""

    @property
    def node_config(self) -> Mapping[str, Any]:
        """``partition-id`` and ``num-partitions``."""
        ...

    @property
    def run_id(self) -> int:
        """Flower's id of the run."""
        ...

    @property
    def run_config(self) -> Mapping[str, Any]:
        """``cfg``, the canonical JSON of the configuration."""
        ...


def site_of(context: RunContext) -> Site:
    """Return the simulated site of a node.

    Raises:
        RunError: This machine does not see the order of the run.
        ConfigError: ``cfg`` is not a configuration.
    """
    from client.simulation import site_in_actor
    from fedlr.config import from_json
    from fedlr.orders import order_file, read_order

    output = from_json(str(context.run_config["cfg"])).output
    return site_in_actor(read_order(order_file(output, context.run_id)), context)


@cache
def _simulated() -> ClientApp:
    from client.app import make_client_app

    return make_client_app(site_of)


app = ClientApp()


@app.query("status")
def status(message: Message, context: Context) -> Message:
    """Say what the site is."""
    if proxy.AGENT in context.node_config:
        return proxy.status(message, context)
    return _simulated()(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer a job."""
    if proxy.AGENT in context.node_config:
        return proxy.train(message, context)
    return _simulated()(message, context)

"""The ServerApp of ``flwr run``: real sites where there is an order, else one simulated client
for every node of the federation.
"""

from __future__ import annotations

import sys
import time

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlr.build import build, check_data
from fedlr.config import RunConfig, from_json
from fedlr.config.nodes import for_nodes
from fedlr.errors import ConfigError, RunError
from fedlr.orders import order_file, write_order
from fedlr.report.folder import check_output, output_folder
from fedlr.report.live import say
from fedlr.report.tables import show_closing
from server.deployment import over_a_network, run_deployed
from server.session import Session, begin, strategy_config

SETTLED_S = 2.0
"""Nodes register one after the other: their number counts once it has stood this long."""

POLL_S = 0.2
"""Seconds between two counts."""

ORDER = "order"
"""Key of the run config with a signed order, as in `client.proxy`."""


def count_nodes(grid: Grid, timeout_s: float) -> int:
    """Return the number of nodes, once it has not changed for `SETTLED_S`.

    Args:
        grid: Connects to the nodes.
        timeout_s: Seconds to wait; the number that is found then counts.

    Raises:
        RunError: There is none.
    """
    began = changed = time.monotonic()
    count = 0
    while (now := time.monotonic()) - began < timeout_s:
        found = len(list(grid.get_node_ids()))
        if found != count:
            count, changed = found, now
        if count and now - changed >= SETTLED_S:
            return count
        time.sleep(POLL_S)
    if not count:
        raise RunError(
            f"no node is connected after {timeout_s:g} s; start SuperNodes, or name their number "
            'with --federation-config "num-supernodes=<N>"'
        )
    return count


def run(grid: Grid, context: Context) -> None:
    """Run the federation of ``context.run_config`` on the nodes of ``grid``.

    Raises:
        FedlrError: The run cannot be built or started, or completed no round. Flower
            then shows the run as failed.
    """
    if order := str(context.run_config.get(ORDER, "")):
        run_deployed(grid, order)
        return
    config = from_json(str(context.run_config["cfg"]))
    if config.federation.engine == "deploy":
        raise ConfigError(["federation.engine = deploy needs a signed order; use `fedlr submit`"])
    check_output(output_folder(config.output), config.name)
    count = count_nodes(grid, config.federation.start_timeout_s)
    session = _begin(for_nodes(config, count), context.run_id)
    try:
        settings = over_a_network(strategy_config(session.config, session.facts.run))
        outcome = session.strategy(settings).run(grid)
        summary = session.finish(outcome)
    finally:
        order_file(config.output, context.run_id).unlink(missing_ok=True)
        session.close()
    show_closing(summary, outcome.records, sys.stdout)
    say(f"the run is in {session.folder.absolute()}")
    session.check_progress(summary, outcome)


def _begin(config: RunConfig, flower_run: int) -> Session:
    """Make the run folder and its ledgers, and leave the order for the nodes."""
    began = time.monotonic()
    check_data(config)
    workbench = build(config, say)
    session = begin(workbench, began, say)
    try:
        write_order(order_file(config.output, flower_run), session.simulated)
    except BaseException:
        session.close()
        raise
    return session


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Called by Flower."""
    run(grid, context)

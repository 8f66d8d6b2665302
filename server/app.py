"""The ServerApp: the same on every engine; only the Grid it is given differs."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, RecordDict, UserConfig
from flwr.serverapp import Grid, ServerApp

from server.environment import quiet_flower
from server.outcome import Outcome
from server.strategy import FederatedStrategy

SERVER_NODE = 1
"""Flower's id of the server's own node."""


def make_server_app(
    strategy_factory: Callable[[Context], FederatedStrategy],
    on_finished: Callable[[Outcome], None],
) -> ServerApp:
    """Return the ServerApp whose main builds a strategy and runs it on the grid.

    Args:
        strategy_factory: Context of the server → the strategy of one run. A
            deployment reads its configuration from ``context.run_config``.
        on_finished: Gets the result: Flower's own calls return nothing.

    Returns:
        An app whose exceptions (a `RunError` above all) pass to the engine.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        on_finished(strategy_factory(context).run(grid))

    return app


def run_in_process(server_app: ServerApp, grid: Grid, run_config: UserConfig | None = None) -> None:
    """Call the main of ``server_app`` in this process: the engine ``local``.

    Flower's own log lines below a warning are dropped meanwhile; the display of
    the run is `fedlr.report.live`.

    Args:
        server_app: As `make_server_app` returns it.
        grid: A `server.grid.InProcessGrid`.
        run_config: The run config in the Context of ``server_app``.

    Raises:
        RunError: As `FederatedStrategy.run`.
    """
    context = Context(
        run_id=grid.run.run_id,
        node_id=SERVER_NODE,
        node_config={},
        state=RecordDict(),
        run_config=dict(run_config or {}),
    )
    with quiet_flower():
        server_app(grid, context)

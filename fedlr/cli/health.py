"""``fedlr health``: does a running program serve? For health checks of containers."""

from __future__ import annotations

from collections.abc import Sequence

from fedlr.cli.arguments import Parser

_ABOUT = """\
Ask a running program whether it serves, by the standard gRPC health service.

  fedlr health unix:/srv/fedlr-site/door/agent.sock   the agent of a site
  fedlr health 127.0.0.1:8001                         one of Flower's programs, at what its
                                                      --health-server-address says

An agent serves from when its data, model and ledger are loaded. Flower's programs say that they
run, not that they reach one another. The exit status is 0 if it serves."""


def run(words: Sequence[str]) -> int:
    """Run the verb.

    Args:
        words: An address, options, or ``--help``.

    Returns:
        0 if the program serves; errors are raised as `fedlr.errors.FedlrError`.
    """
    parser = Parser("health", _ABOUT)
    parser.add_argument("address", help="unix:/path/of/the/socket, or host:port")
    parser.add_argument("--seconds", type=float, default=5.0, help="to wait for the answer")
    given = parser.parse(words)
    if given is None:
        return 0
    from client.health import check

    check(given.address, given.seconds)
    print(f"{given.address} serves")
    return 0

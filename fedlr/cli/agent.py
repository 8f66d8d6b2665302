"""``fedlr agent``: the long-lived process of a real site, run by its operator."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from pathlib import Path

from fedlr.cli.arguments import Parser
from fedlr.report.live import say

_STOPS = (signal.SIGTERM, signal.SIGINT)

_ABOUT = """\
Serve one real site until SIGTERM or Ctrl-C.

The agent holds the site's rows, ledger, policy and base model, and answers the jobs that
the SuperNode's apps bring to its Unix socket. What it refuses, and why, is said here and
nowhere else. A job in training when it is told to stop is finished first: it is paid for."""


def run(words: Sequence[str]) -> int:
    """Run the verb.

    Args:
        words: A policy file, or ``--help``.

    Returns:
        0 once it was told to stop. Errors are raised as `fedlr.errors.FedlrError`.
    """
    parser = Parser("agent", _ABOUT)
    parser.add_argument("policy", type=Path, help="the operator's file, e.g. site.toml")
    parsed = parser.parse(words)
    if parsed is None:
        return 0
    # Before any thread starts: threads inherit it, and the signals wait for the main one.
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    from client.agent import serve
    from client.declaration import read_declaration

    logging.basicConfig(format="fedlr: %(levelname)s: %(message)s", level=logging.WARNING)
    try:
        serve(read_declaration(parsed.policy), say, lambda: signal.sigwait(_STOPS))
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
    return 0

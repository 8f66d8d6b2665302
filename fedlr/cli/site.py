"""``fedlr site``: what the operator of a real site does beside running its agent."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from fedlr.cli.arguments import Parser
from fedlr.errors import ConfigError
from fedlr.report.units import printable

if TYPE_CHECKING:
    from client.orderbook import Asked, OrderBook

_ABOUT = """\
Bring up a real site, look at the runs that have asked there, and approve them.

  init      make the folder of a new site (see `fedlr site init --help`)
  check     check data, model, device, private step and disk of a site
  orders    every run that has asked: what it is, and whether it was approved
  approve   let one of them train here; what was approved cannot be changed later, and
            costs no more than the budgets of the policy

The last two read what the agent has noted beside the ledger; the agent may be running. A policy
with allow.approve = false lets every run pass that a trusted coordinator has signed."""


def run(words: Sequence[str]) -> int:
    """Run the verb.

    Args:
        words: An action, a policy file, a run, or ``--help``.

    Returns:
        0; errors are raised as `fedlr.errors.FedlrError`.
    """
    if words and words[0] in ("init", "check"):
        from fedlr.cli import site_init

        return (site_init.init if words[0] == "init" else site_init.check)(words[1:])
    parser = Parser("site", _ABOUT)
    parser.add_argument("action", choices=("init", "check", "orders", "approve"))
    parser.add_argument("policy", type=Path, help="the operator's file, e.g. site.toml")
    parser.add_argument("run", nargs="?", help="approve: the run's name")
    parser.add_argument("--json", action="store_true", help="orders as one JSON object a line")
    given = parser.parse(words)
    if given is None:
        return 0
    if (given.run is None) is (given.action == "approve"):
        raise ConfigError(["fedlr site approve takes a run, orders takes none; see --help"])
    book = _book(given)
    for asked in book.all() if given.action == "orders" else [book.approve(given.run)]:
        print(json.dumps(_record(asked)) if given.json else _text(asked))
    return 0


def _book(given: argparse.Namespace) -> OrderBook:
    from client.declaration import read_declaration
    from client.orderbook import OrderBook, orders_folder

    return OrderBook(orders_folder(read_declaration(given.policy).ledger))


def _record(asked: Asked) -> dict[str, object]:
    return {
        "run": asked.order.run,
        "approved": asked.approved,
        "first_seen": asked.first_seen,
        "expires": asked.order.expires,
        "config": json.loads(asked.order.config),
    }


def _text(asked: Asked) -> str:
    """Say what a run asks for, in the words of the configuration."""
    from fedlr.config import from_json

    config = from_json(asked.order.config)
    privacy, optimizer, federation = config.privacy, config.optimizer, config.federation
    delta = "min(1e-5, 1/(10·N))" if privacy.delta is None else f"{privacy.delta:g}"
    promise = f"ε ≤ {privacy.epsilon:g} at δ = {delta} of one {privacy.unit} in the whole run"
    if privacy.mode != "dp":
        promise = f"NO NOISE: privacy.mode = {privacy.mode}"
    state = "approved" if asked.approved else "not approved"
    lines = [
        f"run        {asked.order.run}, {state}",
        f"asked      {_time(asked.first_seen)}, good until {_time(asked.order.expires)}",
        f"privacy    {promise}; clip at {privacy.clip_norm:g}",
        f"method     {config.method.name}, {federation.rounds} rounds of {optimizer.steps} steps"
        f"{'' if privacy.max_joins is None else f', {privacy.max_joins} of them at most'}, "
        f"{optimizer.expected_batch} {privacy.unit}s expected in each",
        f"adapter    rank {config.adapter.rank} on {', '.join(config.adapter.modules)}; "
        f"head {config.model.head.kind}{', trained' if config.model.head.trained else ''}",
    ]
    return "\n".join(map(printable, lines)) + "\n"


def _time(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"

"""``fedlr ledger``: what a data source has released, for the operator who owns it."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedlr import checks
from fedlr.cli.arguments import Parser
from fedlr.errors import ConfigError, LedgerError

if TYPE_CHECKING:
    from fedlr.privacy.events import Release
    from fedlr.privacy.ledger import SqliteLedger

_ABOUT = """\
Look at the privacy ledger of one data source, or mend it.

  show      ε of everything in it, and of each run
  verify    whether it is sound, and no older than what has left the site
  export    every entry, one JSON object a line
  recover   book what a ledger that was restored from a backup lacks
  new       an empty ledger for data of which no row was ever in another one

A ledger is never deleted by fedlr, and rows that were in one keep their history when
the data change: the same ledger goes on. Deleting it makes every ε too small."""


def run(words: Sequence[str]) -> int:
    """Run the verb.

    Args:
        words: An action, a file, and its options, or ``--help``.

    Returns:
        0; errors are raised as `fedlr.errors.FedlrError`.
    """
    parser = Parser("ledger", _ABOUT)
    parser.add_argument("action", choices=_ACTIONS)
    parser.add_argument("file", type=Path, help="the ledger, e.g. <run>/ledgers/client-000.sqlite")
    parser.add_argument("--delta", type=float, default=1e-5, help="δ of ε in show; default 1e-5")
    parser.add_argument("--json", action="store_true", help="show as one JSON object")
    parser.add_argument("--source-id", help="new: identifier of the data source")
    parser.add_argument("--disjoint", metavar="<reason>", help="new: why no row has a history")
    given = parser.parse(words)
    if given is not None:
        _ACTIONS[given.action](given)
    return 0


def _open(path: Path) -> SqliteLedger:
    """Open an existing ledger; none is ever made by looking at it."""
    from fedlr.privacy.ledger import SqliteLedger

    if not path.exists() and not path.with_name(f"{path.name}.witness").exists():
        raise LedgerError(f"ledger {path} does not exist; give the path of a ledger file")
    return SqliteLedger(path)


def _show(given: argparse.Namespace) -> None:
    from fedlr.privacy.accounting import epsilon
    from fedlr.report.units import printable, privacy_loss

    try:
        delta = checks.in_range("--delta", given.delta, 1e-15, 0.5)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    ledger = _open(given.file)
    history = ledger.history()
    events = history.events()
    spent = epsilon(events, delta)
    runs = dict.fromkeys(entry.run for entry in history.entries)
    by_run = {run: epsilon(history.events(run=run), delta) for run in runs}
    if given.json:
        found = {
            "source_id": ledger.source_id,
            "head": history.head,
            "joins": ledger.joins(),
            "delta": delta,
            "epsilon": spent,
            "epsilon_by_run": by_run,
            "events": [json.loads(event.to_json()) for event in events],
        }
        print(_json(found))
        return
    print(f"data source  {printable(ledger.source_id)}")
    print(f"entries      {ledger.joins()}, head {history.head}")
    print(f"ε            {privacy_loss(spent)} at δ = {delta:g}, in all")
    for run, loss in by_run.items():
        print(f"  {privacy_loss(loss):>8}  run {printable(run)}")
    for event in events:
        print(f"  {_words(event)}")


def _verify(given: argparse.Namespace) -> None:
    ledger = _open(given.file)
    history = ledger.history()
    print(
        f"{given.file} is sound: {ledger.joins()} entries, head {history.head}, source "
        f"{ledger.source_id!r}"
    )
    if given.file.with_name(f"{given.file.name}.witness").exists():
        print("it is as new as what has left the site, by the witness beside it")
    else:
        print("no witness lies beside it: whether it was restored from a backup cannot be told")


def _export(given: argparse.Namespace) -> None:
    for entry in _open(given.file).entries():
        print(_json(entry))


def _recover(given: argparse.Namespace) -> None:
    missing = _open(given.file).recover()
    if not missing:
        print(f"{given.file} lacks nothing")
    for event in missing:
        print(f"booked {_words(event)}")


def _new(given: argparse.Namespace) -> None:
    from fedlr.privacy.ledger import SqliteLedger

    problems = []
    if given.file.exists():
        problems.append(f"ledger {given.file} exists; rows that it knows keep their history there")
    if not given.disjoint:
        problems.append(
            "--disjoint <reason> is missing: a new ledger forgets every release, so it is only for "
            "data of which no row was ever in another one; say why that is so"
        )
    if problems:
        raise ConfigError(problems)
    ledger = SqliteLedger(given.file, given.source_id)
    ledger.declare_disjoint(given.disjoint)
    print(f"{given.file} is new, for the data source {ledger.source_id!r}")


def _words(event: Release) -> str:
    return (
        f"{event.steps} steps of σ = {event.noise_multiplier:.4g}, q = {event.sample_rate:.4g}, "
        f"unit {event.unit}"
    )


def _json(content: dict[str, object]) -> str:
    """Return one line of JSON; ε = ∞ is the text ``inf``."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return "inf" if isinstance(value, float) and math.isinf(value) else value

    return json.dumps(plain(content), ensure_ascii=False, allow_nan=False)


_ACTIONS: dict[str, Callable[[argparse.Namespace], None]] = {
    "show": _show,
    "verify": _verify,
    "export": _export,
    "recover": _recover,
    "new": _new,
}

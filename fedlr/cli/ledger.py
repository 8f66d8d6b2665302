"""``fedlr ledger``: what a data source has released, for the operator who owns it."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlr import checks
from fedlr.cli.arguments import Parser
from fedlr.errors import ConfigError, LedgerError

if TYPE_CHECKING:
    from fedlr.privacy.booking import Declaration
    from fedlr.privacy.events import Release
    from fedlr.privacy.ledger import SqliteLedger

_ABOUT = """\
Look at the privacy ledger of one data source, or mend it.

  show      ε of everything in it, and of each run
  verify    whether it is sound, and no older than what has left the site
  export    every entry, one JSON object a line
  recover   book what a ledger that was restored from a backup lacks; where its
            witness is lost, --declare-loss <reason> answers for it and makes another
  new       an empty ledger for data of which no row was ever in another one

Beside a ledger lies its witness, <file>.witness: how far it stood when something last
left the site. Back both up. A ledger is never deleted by fedlr, and rows that were in
one keep their history when the data change: the same ledger goes on. Deleting it makes
every ε too small."""

_DELTA = 1e-5
"""δ of show where none is given: the ledger knows no declared size, so not the δ of its runs."""


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
    parser.add_argument("--delta", type=float, help=f"show: δ at which ε holds; default {_DELTA:g}")
    parser.add_argument("--json", action="store_true", help="show as one JSON object")
    parser.add_argument("--source-id", help="new: identifier of the data source")
    parser.add_argument("--disjoint", metavar="<reason>", help="new: why no row has a history")
    parser.add_argument(
        "--declare-loss",
        metavar="<reason>",
        help="recover: how the witness was lost, and why this is the newest ledger",
    )
    given = parser.parse(words)
    if given is not None:
        _check_options(given)
        _ACTIONS[given.action](given)
    return 0


def _check_options(given: argparse.Namespace) -> None:
    """Raise ConfigError with every option that the action does not take."""
    problems = [
        f"--{name.replace('_', '-')} is an option of {action}, not of {given.action}; leave it out"
        for name, action in _OPTIONS.items()
        if getattr(given, name) not in (None, False) and given.action != action
    ]
    if problems:
        raise ConfigError(problems)


@contextmanager
def _open(path: Path) -> Iterator[SqliteLedger]:
    """Open an existing ledger for the block; none is ever made by looking at it."""
    from fedlr.privacy.ledger import SqliteLedger

    if not path.exists() and not path.with_name(f"{path.name}.witness").exists():
        raise LedgerError(f"ledger {path} does not exist; give the path of a ledger file")
    with closing(SqliteLedger(path)) as ledger:
        yield ledger


def _show(given: argparse.Namespace) -> None:
    from fedlr.privacy.accounting import epsilon

    try:
        chosen = _DELTA if given.delta is None else given.delta
        delta = checks.in_range("--delta", chosen, 1e-15, 0.5)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    with _open(given.file) as ledger:
        history, joins, declared = ledger.history(), ledger.joins(), ledger.declarations()
    events = history.events()
    runs = dict.fromkeys(entry.run for entry in history.entries)
    found = {
        "source_id": ledger.source_id,
        "head": history.head,
        "joins": joins,
        "delta": delta,
        "delta_is_default": given.delta is None,
        "epsilon": epsilon(events, delta),
        "epsilon_by_run": {run: epsilon(history.events(run=run), delta) for run in runs},
        "events": [json.loads(event.to_json()) for event in events],
        "declarations": [asdict(each) for each in declared],
    }
    print(_json(found) if given.json else _table(found, events, declared))


def _table(
    found: dict[str, Any], events: Sequence[Release], declared: Sequence[Declaration]
) -> str:
    """Return what `_show` found, for people."""
    from fedlr.report.units import printable, privacy_loss

    default = " (the default; a site's own δ is in its policy)" if found["delta_is_default"] else ""
    spent = f"{privacy_loss(found['epsilon'])} at δ = {found['delta']:g}{default}, in all"
    return "\n".join(
        [
            f"data source  {printable(found['source_id'])}",
            f"entries      {found['joins']}, head {found['head']}",
            *(f"declared     {_declared(each)}" for each in declared),
            f"ε            {spent}",
            *(
                f"  {privacy_loss(loss):>8}  run {printable(run)}"
                for run, loss in found["epsilon_by_run"].items()
            ),
            *(f"  {_words(event)}" for event in events),
        ]
    )


def _verify(given: argparse.Namespace) -> None:
    with _open(given.file) as ledger:
        head, joins, declared = ledger.history().head, ledger.joins(), ledger.declarations()
        print(f"{given.file} is sound: {joins} entries, head {head}, source {ledger.source_id!r}")
        if given.file.with_name(f"{given.file.name}.witness").exists():
            print("it is past what has left the site, by the witness beside it")
        else:
            print("no witness lies beside it: whether it was restored from a backup cannot be told")
    for each in declared:
        print(f"declared by its operator: {_declared(each)}")


def _export(given: argparse.Namespace) -> None:
    with _open(given.file) as ledger:
        for entry in ledger.entries():
            print(_json(entry))


def _recover(given: argparse.Namespace) -> None:
    with _open(given.file) as ledger:
        if given.declare_loss is not None:
            ledger.declare_loss(given.declare_loss)
            print(f"{given.file}: the loss is noted, and a new witness lies beside it")
            return
        lack = ledger.recover()
    if not lack.joins:
        print(f"{given.file} lacks nothing")
        return
    for event in lack.events:
        print(f"booked {_words(event)}")
    print(f"{lack.joins} entries were added, and count in every run")
    if lack.doubled:
        print("which of them it had already cannot be told: some count twice")


def _new(given: argparse.Namespace) -> None:
    from fedlr.privacy.ledger import SqliteLedger

    problems = []
    if given.file.exists():
        problems.append(f"ledger {given.file} exists; rows that it knows keep their history there")
    if not (given.disjoint or "").strip():
        problems.append(
            "--disjoint <reason> is missing: a new ledger forgets every release, so it is only for "
            "data of which no row was ever in another one; say why that is so"
        )
    if problems:
        raise ConfigError(problems)
    with closing(SqliteLedger(given.file, given.source_id, disjoint=given.disjoint)) as ledger:
        print(f"{given.file} is new, for the data source {ledger.source_id!r}")


def _declared(each: Declaration) -> str:
    from fedlr.report.units import printable

    day = (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(days=each.day)).date()
    when = f"on {day}, at head {each.head}" if each.day else "on a day that is not known"
    return f"{each.kind}, {when}: {printable(each.reason)}"


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


_OPTIONS = {
    "delta": "show",
    "json": "show",
    "source_id": "new",
    "disjoint": "new",
    "declare_loss": "recover",
}

_ACTIONS: dict[str, Callable[[argparse.Namespace], None]] = {
    "show": _show,
    "verify": _verify,
    "export": _export,
    "recover": _recover,
    "new": _new,
}

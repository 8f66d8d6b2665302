"""What a ledger had booked when something last left the process, kept beside it.

A backup of the ledger that is put back forgets releases; whoever restores it need not
notice. The witness does: it is written after the ledger's commit and before the release,
and it says where on its running hash (`fedlr.privacy.chain`) the ledger stood. It is no
defence against someone who takes both back.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from fedlr.errors import LedgerError
from fedlr.privacy.chain import Point
from fedlr.privacy.database import synchronise
from fedlr.privacy.events import Release, merge


@dataclass(frozen=True)
class Seen:
    """The content of a witness.

    Attributes:
        point: Where the ledger stood; without a digest if an older version wrote it.
        joins: Keys it held; 0 if an older version wrote it.
        events: Everything it had booked, merged.
        path: Points that it had passed (`fedlr.privacy.chain.path`).
    """

    point: Point
    joins: int
    events: tuple[Release, ...]
    path: str


@dataclass(frozen=True)
class Lack:
    """What a restored ledger must book to cover its witness.

    Attributes:
        events: Merged.
        joins: Number of keys, at least one for each event.
        doubled: Whether the ledger is not known to be an earlier state of the witness's:
            all that the witness knows is then lacking, on top of what is booked, and
            what both know counts twice.
    """

    events: tuple[Release, ...] = ()
    joins: int = 0
    doubled: bool = False


def beside(ledger: Path) -> Path:
    """Return the path of a ledger's witness."""
    return ledger.with_name(f"{ledger.name}.witness")


def write(path: Path, source_id: str, now: Seen) -> None:
    """Replace the witness, unless it is ahead; a new one outlives a power failure.

    Of two that write at one moment either may win, and of a replaced one the older may
    be found after a power failure: a witness may be older than the last release, and is
    never newer than the ledger.
    """
    seen = read(path, source_id)
    if seen is not None and seen.point.head >= now.point.head:
        return
    content = {
        "source_id": source_id,
        "head": now.point.head,
        "digest": now.point.digest,
        "joins": now.joins,
        "events": [event.to_json() for event in now.events],
        "path": now.path,
    }
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        draft.touch(0o600)
        with draft.open("w", encoding="utf-8") as file:
            file.write(json.dumps(content) + "\n")
            file.flush()
            os.fsync(file.fileno())  # or the rename may outlive what it names
        draft.replace(path)
        if seen is None:
            synchronise(path.parent)  # a ledger that has released something needs one
    except OSError as error:
        draft.unlink(missing_ok=True)  # or every try on a full disk would leave one more
        raise LedgerError(
            f"{path} cannot be written ({error.strerror or error}); make the ledger's folder "
            "writable, nothing leaves without it"
        ) from error


def read(path: Path, source_id: str) -> Seen | None:
    """Return what the witness says; None where there is none.

    Raises:
        LedgerError: It is damaged, or of another source.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        seen = Seen(
            point=Point(int(content["head"]), str(content.get("digest", ""))),
            joins=int(content.get("joins", 0)),
            events=tuple(Release.from_json(text) for text in content["events"]),
            path=str(content.get("path", "")),
        )
        owner = content["source_id"]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LedgerError(f"{path} cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LedgerError(
            f"{path} is damaged ({error}); bring back the newest copy of it and of its ledger, or "
            f"treat it as lost: move it away, then {_declare(path.with_suffix(''))}"
        ) from error
    if owner != source_id:
        raise LedgerError(
            f"{path} is of the data source {owner!r}, not of {source_id!r}; the ledger beside it "
            "was replaced by another one, bring back its own"
        )
    return seen


def lack(seen: Seen, booked: Iterable[Release], joins: int, at: Point) -> Lack:
    """Return what a ledger that is not past its witness must book to cover it.

    Args:
        seen: The witness.
        booked: The ledger's events.
        joins: Its keys.
        at: Where it stands. A point that the witness has passed, or one that only an
            older version can have seen, is an earlier state: the difference is lacking.
    """
    if seen.point.digest and at.short() not in seen.path.split():
        return Lack(seen.events, max(seen.joins, len(seen.events)), doubled=True)
    events = missing(seen.events, booked)
    return Lack(events, max(seen.joins - joins, len(events)))


def missing(seen: Iterable[Release], booked: Iterable[Release]) -> tuple[Release, ...]:
    """Return what must be added to ``booked`` for it to cover ``seen``, mechanism by mechanism."""
    have = {replace(event, steps=0): event.steps for event in booked}
    lacking = (
        replace(event, steps=event.steps - have.get(replace(event, steps=0), 0)) for event in seen
    )
    return merge(event for event in lacking if event.steps > 0)


def restored(ledger: Path, at: Point, seen: Seen) -> str:
    """Return the message for a ledger that is not past its witness."""
    why = (
        f"but stood at {seen.point.head} when this site last released something: it was restored "
        "from a backup"
    )
    if at.head >= seen.point.head:
        why = (
            f"but not by the bookings that stood at {seen.point.head} when this site last released "
            "something: another history, it was restored from a backup and went on"
        )
    return (
        f"ledger {ledger} stands at {at.head}, {why}. `fedlr ledger recover {ledger}` books what "
        "it lacks"
    )


def absent(ledger: Path) -> str:
    """Return the message for a ledger that has released something and has no witness."""
    return (
        f"ledger {ledger} has released something, but {beside(ledger).name}, which tells how far "
        "it stood then, is not beside it: it may be an old backup. Bring back both; where the "
        f"witness is lost, make sure that this is the newest ledger, then {_declare(ledger)}"
    )


def gone(ledger: Path) -> str:
    """Return the message for a witness without its ledger."""
    return (
        f"ledger {ledger} is gone, but {beside(ledger).name} tells of what it had booked; "
        "bring back the newest backup, then run `fedlr ledger recover`"
    )


def _declare(ledger: Path) -> str:
    return f'run `fedlr ledger recover {ledger} --declare-loss "<reason>"`'

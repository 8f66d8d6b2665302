"""What a ledger had booked when something last left the process, kept beside it.

A backup of the ledger that is put back forgets releases; whoever restores it need not
notice. The witness does: it is written after the ledger's commit and before the release,
and it says how far the ledger stood. It is no defence against someone who takes both back.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from fedlr.errors import LedgerError
from fedlr.privacy.events import Release, merge


@dataclass(frozen=True)
class Seen:
    """The content of a witness.

    Attributes:
        head: Where the ledger stood.
        events: Everything it had booked, merged.
    """

    head: int
    events: tuple[Release, ...]


def beside(ledger: Path) -> Path:
    """Return the path of a ledger's witness."""
    return ledger.with_name(f"{ledger.name}.witness")


def write(path: Path, source_id: str, head: int, events: Iterable[Release]) -> None:
    """Replace the witness, unless it is ahead.

    Its folder is not synchronised, and of two that write at one moment either may win:
    what is found later may be older than the last release, and is never newer than the
    ledger.
    """
    seen = read(path, source_id)
    if seen is not None and seen.head >= head:
        return
    content = {
        "source_id": source_id,
        "head": head,
        "events": [event.to_json() for event in events],
    }
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        draft.touch(0o600)
        with draft.open("w", encoding="utf-8") as file:
            file.write(json.dumps(content) + "\n")
            file.flush()
            os.fsync(file.fileno())  # or the rename may outlive what it names
        draft.replace(path)
    except OSError as error:
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
        events = tuple(Release.from_json(text) for text in content["events"])
        seen, owner = Seen(int(content["head"]), events), content["source_id"]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LedgerError(f"{path} cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise LedgerError(
            f"{path} is damaged ({error}); if the ledger beside it was never restored from a "
            "backup, remove it"
        ) from error
    if owner != source_id:
        raise LedgerError(
            f"{path} is of the data source {owner!r}, not of {source_id!r}; the ledger beside it "
            "was replaced by another one, bring back its own"
        )
    return seen


def missing(seen: Iterable[Release], booked: Iterable[Release]) -> tuple[Release, ...]:
    """Return what must be added to ``booked`` for it to cover ``seen``, mechanism by mechanism."""
    have = {replace(event, steps=0): event.steps for event in booked}
    lacking = (
        replace(event, steps=event.steps - have.get(replace(event, steps=0), 0)) for event in seen
    )
    return merge(event for event in lacking if event.steps > 0)

"""The contract of a ledger: what is booked, under which key, and what every store must keep."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol

from fedlr import checks
from fedlr.errors import LedgerError, LedgerMoved
from fedlr.privacy.events import Release, merge

DAY_S = 86_400
"""Seconds of a day of `Entry`."""

MONTH_DAYS = 30
"""Days, today included, of what a monthly budget bounds."""


@dataclass(frozen=True)
class JobKey:
    """What one reservation is for; a retry of a failed job needs a new nonce.

    Attributes:
        run: Identifier of the federation run, not empty.
        round: Round of that run, ≥ 0.
        client: Identifier of the client, not empty.
        nonce: Chosen by whoever sends the job, once per attempt, not empty.

    Raises:
        ValueError: An empty string or a negative round.
    """

    run: str
    round: int
    client: str
    nonce: str

    def __post_init__(self) -> None:
        checks.at_least("round", self.round, 0)
        for name in ("run", "client", "nonce"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ValueError(f"{name} = {value!r} must be a non-empty string")


@dataclass(frozen=True)
class Booking:
    """What a ledger holds under one key.

    Attributes:
        job: Digest of the job it was reserved for; ``""`` where none was given.
        committed: Whether it was committed; if not, it is open and counts whole.
        update: What was released, as it was given to `Ledger.commit`; None while it
            is open, and once a later commit of the same run and client has replaced it.
    """

    job: str
    committed: bool
    update: bytes | None


RECOVERED = "recovered"
"""Run and client of what `fedlr.privacy.ledger.SqliteLedger.recover` books."""


@dataclass(frozen=True)
class Entry:
    """Releases of one run on one day.

    The day is that of the machine's clock, but never before the day of anything booked
    earlier: a clock that is set back takes no release out of a window that looks back. A
    clock set forward dates what is booked then, and everything after it until the true
    time has caught up, too late: that counts for longer than it should. While it is
    forward, a reader who takes "today" from it leaves out releases that are recent; the
    ledger cannot know.

    Attributes:
        run: Identifier of the run.
        day: Days since 1970, as above; 0 where unknown.
        event: What was released, open reservations as reserved.
    """

    run: str
    day: int
    event: Release

    def times(self, count: int) -> Entry:
        """Return one entry for ``count`` equal ones."""
        return replace(self, event=replace(self.event, steps=self.event.steps * count))


@dataclass(frozen=True)
class Declaration:
    """What the operator of a ledger answers for, because nobody can check it.

    Attributes:
        kind: ``disjoint``: no row of its data was in another ledger; ``loss``: its
            witness is lost, and the ledger knows all the same of every release.
        reason: The operator's words.
        head: Where the ledger stood.
        day: Days since 1970; 0 where unknown.
    """

    kind: Literal["disjoint", "loss"]
    reason: str
    head: int
    day: int


@dataclass(frozen=True)
class History:
    """Everything in a ledger at one moment.

    Attributes:
        head: Moved by every reservation and every commit; it only ever grows.
        entries: One per run, day and mechanism.
    """

    head: int
    entries: tuple[Entry, ...]

    def events(self, run: str | None = None, since: int | None = None) -> tuple[Release, ...]:
        """Return merged events, of one run or from one day on if asked.

        An entry whose day is unknown is recent, and one that was recovered from a witness
        is of every run: budgets must never under-count.
        """
        return merge(
            entry.event
            for entry in self.entries
            if (run in (None, entry.run) or entry.run == RECOVERED)
            and (since is None or entry.day == 0 or entry.day >= since)
        )


class Ledger(Protocol):
    """Durable record of all that one data source has released; one contract, all stores.

    Guarantees:
        Every call is atomic and, where the store is a file, on disk when it
        returns. Thread-safe. Never under-counts: at every moment `spent`
        covers all that can have left the process.
    """

    def reserve(
        self,
        key: JobKey,
        event: Release,
        max_joins: int | None = None,
        job: str = "",
        head: int | None = None,
    ) -> bool:
        """Book the most that the job can release, before its first gradient.

        Args:
            key: The job.
            event: The most that it can release.
            max_joins: Keys this ledger may hold, the new one included; counted in
                the same transaction, so two processes cannot exceed it jointly.
                None: no bound.
            job: Digest of the whole job, for whoever asks again (`recall`).
            head: `History.head` at which the caller's budget was computed; nothing may
                have been booked since. None: it does not matter.

        Returns:
            True; False where ``max_joins`` is reached, and nothing is booked.

        Raises:
            LedgerError: The key was ever reserved before, committed or not.
            LedgerMoved: The ledger no longer stands at ``head``; nothing is booked.
        """
        ...

    def commit(self, key: JobKey, event: Release, update: bytes = b"") -> None:
        """Replace the reservation by what was released, before it leaves the process.

        The update is kept with its event, in one transaction: whoever asks for the
        same job again gets what is already paid for. Updates of earlier commits of
        the same run and client are dropped: nobody asks for them once a later job came.

        Args:
            key: An open reservation.
            event: At most as many steps as reserved, everything else equal;
                zero steps if nothing was released.
            update: What leaves the process, encoded; noised already.

        Raises:
            LedgerError: The key is not open, or the event exceeds or differs
                from its reservation; the reservation then stays open.
        """
        ...

    def check_room(self, size: int) -> None:
        """Raise LedgerError where a `commit` of ``size`` bytes would not find room now.

        To be asked before `reserve`: a round that is booked, trained and then cannot be
        committed is spent for nothing. Others may take the room meanwhile.
        """
        ...

    def recall(self, key: JobKey) -> Booking | None:
        """Return what is booked under ``key``; None where nothing is."""
        ...

    def released(self, run: str, round: int, client: str) -> bytes | None:
        """Return the update committed last by ``client`` in ``run``, if it is of ``round``."""
        ...

    def history(self) -> History:
        """Return everything booked, and where the ledger stands."""
        ...

    def spent(self) -> tuple[Release, ...]:
        """Return all committed events, and every open reservation as reserved, merged."""
        ...

    def joins(self, run: str | None = None) -> int:
        """Return the number of keys ever reserved, committed or not; of one run if asked.

        Keys that were recovered from a witness are of every run: bounds must never
        under-count.
        """
        ...

    def observe(self, fingerprint: str) -> bool:
        """Note the digest of the data as they are now.

        Returns:
            Whether they have changed since they were last observed. That starts no
            new ledger: the rows that stayed keep their history.
        """
        ...

    def close(self) -> None:
        """Release resources; any later call but ``close`` raises LedgerError."""
        ...


def check_head(found: int, expected: int | None) -> None:
    """Raise LedgerMoved unless nothing was booked since the caller looked."""
    if expected is not None and found != expected:
        raise LedgerMoved(
            f"the ledger stands at {found}, not at {expected}: something was booked meanwhile; "
            "compute the budget again"
        )


def check_covered(reserved: Release, actual: Release) -> None:
    """Raise LedgerError unless ``actual`` is ``reserved`` with at most as many steps."""
    if replace(actual, steps=reserved.steps) != reserved or actual.steps > reserved.steps:
        raise LedgerError(
            f"committed event {actual.to_json()} is not covered by its reservation "
            f"{reserved.to_json()}; the reservation stays open and counts whole"
        )


def known(key: JobKey) -> str:
    """Message for a key that was reserved before."""
    return f"{key} is already in the ledger; a retry is a new release and needs a new nonce"


def not_open(key: JobKey) -> str:
    """Message for a commit without an open reservation."""
    return f"{key} has no open reservation; reserve before training, commit once"

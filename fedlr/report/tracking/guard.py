"""A tracker that may fail or hang, made harmless: the run goes on without it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import ClassVar

from fedlr.report.live import say
from fedlr.report.records import RoundRecord, Summary
from fedlr.report.tracking.tracker import TrackedRun, Tracker
from fedlr.report.units import printable

PATIENCE_S = 60.0
"""Seconds that the end of a run waits for its tracker: a new database on a slow disk takes half."""

LEFT_S = 5.0
"""The same where little is lost: the run was interrupted, or its tool has failed or hung."""

LONGEST = 200
"""Characters of a tool's complaint that are shown."""


class Guarded:
    """Calls a tracker in a thread of its own, in order.

    Guarantees:
        No call raises, and none but `close` waits. The first failure is said once; after
        it the tracker is only closed. `close` waits ``patience_s`` at most, `LEFT_S` where
        the run did not finish, or its tool failed or hung in this or an earlier run of this
        process, and says so when that was too short, once.

    Args:
        tracker: What is called.
        kind: Its name, as in ``tracking=``.
        patience_s: Seconds that `close` waits, > 0.
    """

    _hung: ClassVar[set[str]] = set()  # tools that were left, by kind

    def __init__(self, tracker: Tracker, kind: str, patience_s: float = PATIENCE_S) -> None:
        self._tracker = tracker
        self._kind = kind
        self._patience_s = patience_s
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._failed = threading.Event()
        self._finished = False
        self._closing = False
        # A daemon: a server that never answers must not keep the process alive.
        self._thread = threading.Thread(target=self._work, name=f"tracking={kind}", daemon=True)

    def start(self, run: TrackedRun) -> None:
        """See `Tracker.start`."""
        self._calls.put(lambda: self._tracker.start(run))
        self._thread.start()

    def round(self, record: RoundRecord) -> None:
        """See `Tracker.round`."""
        if not self._failed.is_set():
            self._calls.put(lambda: self._tracker.round(record))

    def finish(self, summary: Summary) -> None:
        """See `Tracker.finish`."""
        self._finished = True
        self._calls.put(lambda: self._tracker.finish(summary))

    def close(self) -> None:
        """See `Tracker.close`; may be called twice, and without a start."""
        if self._closing or not self._thread.is_alive():
            return
        self._closing = True
        self._calls.put(None)
        patience_s = self._patience_s
        if not self._finished or self._failed.is_set() or self._kind in self._hung:
            patience_s = min(patience_s, LEFT_S)
        self._thread.join(patience_s)
        if not self._thread.is_alive():
            self._hung.discard(self._kind)
            return
        self._hung.add(self._kind)
        if not self._failed.is_set():
            self._failed.set()
            say(
                f"tracking={self._kind} was not done after {patience_s:g} s and is left; what it "
                "lacks is in the run folder"
            )

    def _work(self) -> None:
        """Call what is queued until `close`; the tool may raise anything."""
        while (call := self._calls.get()) is not None:
            if not self._failed.is_set():
                self._attempt(call)
        self._attempt(self._tracker.close)

    def _attempt(self, call: Callable[[], None]) -> None:
        """Make a call; the first failure of all is said, and ends the tracking."""
        try:
            call()
        except (Exception, SystemExit) as error:  # some tools exit where they should raise
            if self._failed.is_set():
                return
            self._failed.set()
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:LONGEST]
            say(
                f"tracking={self._kind} failed and is off from now on: {printable(reason)}; the "
                "run goes on, and its folder holds everything"
            )

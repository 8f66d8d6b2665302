"""A Grid that hands replies over one by one as they come, and that can be told to stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

POLL_S = 0.1
"""Seconds between two looks for replies; Flower's own grid of a simulation waits as long."""


class Stopped(Exception):
    """The run is to end now; passes through the ServerApp to where it was started."""


class WatchedGrid(Grid):
    """A Grid that hands replies over as they come, until it is told to stop.

    Args:
        grid: Carries the messages.
        stop: Once it is set, asking for nodes or replies raises `Stopped`.
        poll_s: Seconds between two looks for replies.
    """

    def __init__(self, grid: Grid, stop: threading.Event, poll_s: float = POLL_S) -> None:
        self._grid = grid
        self._stop = stop
        self._poll_s = poll_s

    def set_run(self, run: Run) -> None:
        """See `Grid.set_run`."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """See `Grid.run`."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a new message; Flower deprecates this in favour of `Message`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the nodes that are registered by now."""
        self._check()
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """See `Grid.push_messages`."""
        self._check()
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """See `Grid.pull_messages`."""
        self._check()
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send ``messages`` now and return an iterator over their replies as they come.

        Whoever stops iterating waits for no more replies. A message that could not be sent
        is one without a reply.

        Args:
            messages: Each gets its message id at once.
            timeout: Seconds after which the iterator ends without the replies that
                are still missing; None waits for all of them.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        # Flower gives None for a message that it did not take, to a node that is no more.
        sent = {message_id for message_id in self.push_messages(list(messages)) if message_id}
        return self._replies(sent, deadline)

    def _replies(self, missing: set[str], deadline: float | None) -> Iterator[Message]:
        while missing:
            for reply in self.pull_messages(missing):
                missing.discard(reply.metadata.reply_to_message_id)
                yield reply
            if deadline is not None and time.monotonic() >= deadline:
                return
            if missing:
                self._stop.wait(self._poll_s)

    def _check(self) -> None:
        if self._stop.is_set():
            raise Stopped

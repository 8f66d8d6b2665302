"""Flower's Grid on one process: messages go straight into the ClientApp.

The ServerApp, Strategy and ClientApp are the ones of a deployment; only what
carries the messages differs. Nothing is sent over a network.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

BatchHandler = Callable[[list[Message]], Iterable[Message]]
"""Train messages of one cohort → their replies, in any order, as they come."""

FAILED = "the client application failed; see the log of its site"
NO_SUCH_NODE = "no such node"
NO_REPLY = "the batch handler gave no reply to this message"

_log = logging.getLogger("fedlr.grid")


class InProcessGrid(Grid):
    """Answers messages by calling a ClientApp in this process, one node after the other.

    Guarantees:
        Each message and each reply is handed over as a deep copy, so no client
        sees an object of the server or of another client. An exception in the
        ClientApp becomes an error reply with a fixed reason; its text goes to
        the logger ``fedlr.grid`` only. A node keeps its Context between messages.

    Args:
        client_app: The app that answers.
        nodes: Node id → its node config, e.g. ``{"partition-id": 0,
            "num-partitions": 10}``.
        batch_handler: Answers all train messages of one `send_and_receive`
            together; None sends them to ``client_app`` one by one.
        run_config: The run config in every node's Context.

    Note:
        Flower's `Message` takes the sender from the process-wide, semi-private
        ``TaskIdentity``; a process without one gets ids of 1 here.
    """

    def __init__(
        self,
        client_app: ClientApp,
        nodes: Mapping[int, UserConfig],
        batch_handler: BatchHandler | None = None,
        run_config: UserConfig | None = None,
    ) -> None:
        identify_process()
        self._client_app = client_app
        self._batch_handler = batch_handler
        self._run = Run.create_empty(TaskIdentity.run_id)
        self._replies: dict[str, Message] = {}
        self._contexts = {
            node: Context(
                run_id=self._run.run_id,
                node_id=node,
                node_config=dict(config),
                state=RecordDict(),
                run_config=dict(run_config or {}),
            )
            for node, config in nodes.items()
        }

    def set_run(self, run: Run) -> None:
        """Set the run this grid operates in."""
        self._run = run

    @property
    def run(self) -> Run:
        """A copy of the run information."""
        return copy.copy(self._run)

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
        """Return the ids of all nodes, in the order they were given."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Answer ``messages`` now and return their ids, with which to pull the replies."""
        pushed = _with_ids(messages)
        for reply in self._answer_all(pushed):
            self._replies[reply.metadata.reply_to_message_id] = reply
        return [message.metadata.message_id for message in pushed]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to pushed messages; each can be pulled once."""
        return [self._replies.pop(name) for name in message_ids if name in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Return an iterator that answers one message whenever it is asked for a reply.

        Args:
            messages: Each gets its message id at once.
            timeout: Accepted and ignored: an answer in this process cannot get lost.

        Returns:
            Exactly one reply for each message: first those of the batch
            handler, then the others in the order of ``messages``.
        """
        return self._answer_all(_with_ids(messages))

    def _answer_all(self, messages: list[Message]) -> Iterator[Message]:
        handler = self._batch_handler
        if handler is not None:
            batch = [message for message in messages if self._is_training(message)]
            messages = [message for message in messages if not self._is_training(message)]
            if batch:
                yield from self._answer_batch(handler, batch)
        for message in messages:
            yield self._answer(message)

    def _is_training(self, message: Message) -> bool:
        """Return whether ``message`` asks a node of this grid to train."""
        metadata = message.metadata
        return (
            metadata.message_type.partition(".")[0] == "train"
            and metadata.dst_node_id in self._contexts
        )

    def _answer(self, message: Message) -> Message:
        """Call the ClientApp of one node."""
        context = self._contexts.get(message.metadata.dst_node_id)
        if context is None:
            return _error(message, ErrorCode.NODE_UNAVAILABLE, NO_SUCH_NODE)
        try:
            reply = self._client_app(message=copy.deepcopy(message), context=context)
            return _delivered(reply)
        except Exception:
            _log.exception("node %d: the client application failed", context.node_id)
            return _error(message, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, FAILED)

    def _answer_batch(self, handler: BatchHandler, batch: list[Message]) -> Iterator[Message]:
        """Hand a cohort over whole; every message gets one reply, whatever happens."""
        open_messages = {message.metadata.message_id: message for message in batch}
        reason = NO_REPLY
        try:
            for reply in handler(copy.deepcopy(batch)):
                if open_messages.pop(reply.metadata.reply_to_message_id, None) is not None:
                    yield _delivered(reply)
        except Exception:
            _log.exception("the batch handler failed")
            reason = FAILED
        for message in open_messages.values():
            yield _error(message, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)


def identify_process() -> None:
    """Give this process the ids that Flower's `Message` needs, where it has none."""
    for name in ("_task_id", "_run_id", "_node_id"):
        if getattr(TaskIdentity, name) is None:
            setattr(TaskIdentity, name, 1)


def _with_ids(messages: Iterable[Message]) -> list[Message]:
    """Give each message a fresh id, as Flower's own grids do on sending."""
    sent = list(messages)
    for message in sent:
        message.metadata.__dict__["_message_id"] = uuid4().hex
    return sent


def _delivered(reply: Message) -> Message:
    """Return a copy of ``reply`` with an id of its own."""
    return _with_ids([copy.deepcopy(reply)])[0]


def _error(message: Message, code: int, reason: str) -> Message:
    """Return an error reply; ``reason`` is one of the fixed texts above."""
    return _with_ids([Message(Error(code=code, reason=reason), reply_to=message)])[0]

"""The in-process grid: one reply per message, copies only, no text of an exception."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp

from server.grid import FAILED, NO_REPLY, NO_SUCH_NODE, InProcessGrid
from tests.server.toys import SECRET

NODES: dict[int, UserConfig] = {
    7: {"partition-id": 0, "num-partitions": 2},
    9: {"partition-id": 1, "num-partitions": 2},
}


def app(seen: list[Message] | None = None) -> ClientApp:
    """Adds its partition to the number it gets, counts its calls, spoils what it was given."""
    client = ClientApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        if seen is not None:
            seen.append(message)
        calls = int(str(context.state.config_records.get("n", {"n": 0})["n"])) + 1
        context.state["n"] = ConfigRecord({"n": calls})
        value = message.content.array_records["x"]["x"].numpy()[0]
        message.content.array_records["x"]["x"] = Array(np.full(1, -1.0))
        partition = int(context.node_config["partition-id"])
        return Message(reply(float(value) + partition, calls), reply_to=message)

    @client.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        raise ValueError(SECRET)

    return client


def reply(value: float, calls: int = 0) -> RecordDict:
    return RecordDict(
        {"x": ArrayRecord({"x": Array(np.array([value]))}), "n": ConfigRecord({"n": calls})}
    )


def value_of(message: Message) -> float:
    return float(message.content.array_records["x"]["x"].numpy()[0])


def shared_messages(kind: str = "train") -> list[Message]:
    """Two messages with one and the same content object, as Flower's FedAvg sends them."""
    content = reply(10.0)
    return [Message(content, node, kind) for node in NODES]


def test_each_message_gets_one_reply_from_its_own_node() -> None:
    grid = InProcessGrid(app(), NODES)
    messages = shared_messages()
    replies = list(grid.send_and_receive(messages, timeout=1e-9))
    assert list(grid.get_node_ids()) == [7, 9]
    assert [reply.metadata.src_node_id for reply in replies] == [7, 9]
    assert [value_of(reply) for reply in replies] == [10.0, 11.0]
    ids = [message.metadata.message_id for message in messages]
    assert [reply.metadata.reply_to_message_id for reply in replies] == ids
    assert len({*ids, *(reply.metadata.message_id for reply in replies)}) == 4


def test_replies_come_one_at_a_time_as_they_are_asked_for() -> None:
    seen: list[Message] = []
    replies = iter(InProcessGrid(app(seen), NODES).send_and_receive(shared_messages()))
    assert seen == []
    next(replies)
    assert len(seen) == 1


def test_no_client_shares_an_object_with_the_server_or_another_client() -> None:
    seen: list[Message] = []
    messages = shared_messages()
    list(InProcessGrid(app(seen), NODES).send_and_receive(messages))
    # The first client replaced its array by −1; the second still added to 10.
    assert value_of(seen[0]) == value_of(seen[1]) == -1.0
    assert [value_of(message) for message in messages] == [10.0, 10.0]
    assert seen[0].content is not seen[1].content


def test_a_reply_kept_by_the_client_cannot_change_what_the_server_holds() -> None:
    kept: list[Message] = []
    client = ClientApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        kept.append(Message(reply(1.0), reply_to=message))
        return kept[-1]

    (answer,) = InProcessGrid(client, {7: {}}).send_and_receive([Message(reply(0.0), 7, "train")])
    kept[0].content.array_records["x"]["x"] = Array(np.full(1, 5.0))
    assert value_of(answer) == 1.0


def test_a_node_keeps_its_state_and_its_config() -> None:
    grid = InProcessGrid(app(), NODES)
    for calls in (1, 2):
        for answer in grid.send_and_receive(shared_messages()):
            assert answer.content.config_records["n"]["n"] == calls


def test_an_exception_becomes_a_fixed_text(caplog: pytest.LogCaptureFixture) -> None:
    replies = list(InProcessGrid(app(), NODES).send_and_receive(shared_messages("evaluate")))
    assert [(reply.error.code, reply.error.reason) for reply in replies] == [(2, FAILED)] * 2
    assert SECRET not in "".join(map(repr, replies))
    assert SECRET in caplog.text


def test_a_message_to_nobody_is_answered_with_an_error() -> None:
    grid = InProcessGrid(app(), NODES, batch_handler=lambda batch: [])
    (answer,) = grid.send_and_receive([Message(reply(0.0), 8, "train")])
    assert answer.error.reason == NO_SUCH_NODE


def test_pushed_messages_are_pulled_once() -> None:
    grid = InProcessGrid(app(), NODES)
    ids = list(grid.push_messages(shared_messages()))
    assert [value_of(answer) for answer in grid.pull_messages(ids)] == [10.0, 11.0]
    assert list(grid.pull_messages(ids)) == []


def test_the_run_is_a_copy() -> None:
    grid = InProcessGrid(app(), NODES)
    run = grid.run
    run.fab_id = "changed"
    assert grid.run.fab_id == ""
    grid.set_run(run)
    assert grid.run.fab_id == "changed"
    message = grid.create_message(reply(0.0), "train", 7, "3", ttl=5.0)
    assert (message.metadata.group_id, message.metadata.ttl) == ("3", 5.0)
    assert message.metadata.run_id == run.run_id


class Handler:
    """Answers a batch by a rule; remembers what it was given."""

    def __init__(self, keep: slice = slice(None), fail: bool = False) -> None:
        self.batches: list[list[Message]] = []
        self.keep, self.fail = keep, fail

    def __call__(self, batch: list[Message]) -> list[Message]:
        self.batches.append(batch)
        if self.fail:
            raise ValueError(SECRET)
        answers = [Message(reply(value_of(m) * 2), reply_to=m) for m in reversed(batch)]
        return answers[self.keep]


def by_node(replies: Iterable[Message]) -> dict[int, str | float]:
    return {
        reply.metadata.src_node_id: str(reply.error.reason)
        if reply.has_error()
        else value_of(reply)
        for reply in replies
    }


def test_a_batch_handler_gets_the_cohort_whole_and_only_training() -> None:
    handler = Handler()
    grid = InProcessGrid(app(), NODES, handler)
    messages = [*shared_messages(), *shared_messages("evaluate")]
    replies = list(grid.send_and_receive(messages))
    assert [len(batch) for batch in handler.batches] == [2]
    assert by_node(replies[:2]) == {7: 20.0, 9: 20.0}
    assert by_node(replies[2:]) == {7: FAILED, 9: FAILED}
    assert handler.batches[0][0].content is not messages[0].content
    list(grid.send_and_receive(shared_messages("query")))
    assert len(handler.batches) == 1


def test_a_failing_or_forgetful_batch_handler_leaves_no_message_without_a_reply(
    caplog: pytest.LogCaptureFixture,
) -> None:
    replies = list(
        InProcessGrid(app(), NODES, Handler(fail=True)).send_and_receive(shared_messages())
    )
    assert by_node(replies) == {7: FAILED, 9: FAILED}
    assert SECRET not in "".join(map(repr, replies))
    assert SECRET in caplog.text
    forgetful = InProcessGrid(app(), NODES, Handler(keep=slice(1)))
    assert by_node(forgetful.send_and_receive(shared_messages())) == {9: 20.0, 7: NO_REPLY}

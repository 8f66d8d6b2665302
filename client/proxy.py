"""The ClientApp of a real site: it holds nothing, and passes jobs to the agent and answers back.

Flower starts a fresh process for every message, with the code of whoever submitted the run, so
nothing of value may be in it: no model, no data, no key. Nothing heavy is imported: torch alone
would take seconds of every round.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import grpc
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from client import wire
from client.agent_pb2 import StatusRequest
from client.agent_pb2_grpc import AgentStub
from fedlr.adapters import npy

AGENT, ORDER = "agent", "order"
"""Key of the node config that names the agent's socket; key of the run config with the order."""

ARRAYS_RECORD, HEADER_RECORD = "arrays", "header"
"""As in `fedlr.adapters.codec`, which would load torch; a test compares them."""

LONGEST_S = 86_400.0
"""Seconds after which a call ends where a message has no time to live of its own."""

LARGEST_ANSWER = 1 << 31
"""Bytes of arrays that an answer may bring: the agent's own limit is what counts."""

_log = logging.getLogger("fedlr.client")


def status(message: Message, context: Context) -> Message:
    """Answer ``query.status`` with what the agent says of the site, or a code."""
    try:
        with _agent(context) as stub:
            request = StatusRequest(order=_order(context))
            answer = stub.Status(request, timeout=_time_left(message), wait_for_ready=True)
        fields = wire.fields_of(answer.fields)
    except Exception:
        _log.exception("the agent cannot be reached")
        fields = {"code": "failed"}
    return _message(message, wire.Record(fields, {}))


def train(message: Message, context: Context) -> Message:
    """Answer ``train`` with the agent's update, or a code."""
    try:
        record = wire.Record(_fields(message), _arrays(message), _order(context))
        with _agent(context) as stub:
            stream = stub.Train(wire.pieces(record), timeout=_time_left(message))
            announced = wire.opening(stream, LARGEST_ANSWER)
            answer = wire.Record(announced.fields, wire.arrays_of(announced, stream))
    except Exception:
        _log.exception("the job was not answered by the agent")
        answer = wire.Record({"client": "", "code": "failed"}, {})
    return _message(message, answer)


@contextmanager
def _agent(context: Context) -> Iterator[AgentStub]:
    channel = grpc.insecure_channel(
        f"unix:{context.node_config[AGENT]}", options=wire.CHANNEL_OPTIONS
    )
    try:
        yield AgentStub(channel)  # type: ignore[no-untyped-call]
    finally:
        channel.close()


def _order(context: Context) -> str:
    return str(context.run_config.get(ORDER, ""))


def _time_left(message: Message) -> float:
    """Return the seconds for which somebody still waits for the answer; ValueError for none."""
    metadata = message.metadata
    left = float(metadata.created_at) + float(metadata.ttl or LONGEST_S) - time.time()
    if left <= 0:
        raise ValueError("nobody waits for the answer any more")
    return min(LONGEST_S, left)


def _fields(message: Message) -> wire.Fields:
    header = cast("Mapping[str, Any]", message.content[HEADER_RECORD])
    return dict(header)


def _arrays(message: Message) -> wire.Arrays:
    held = cast("Mapping[str, Array]", message.content[ARRAYS_RECORD])
    return {name: npy.read(array.data) for name, array in held.items()}


def _message(asked: Message, answer: wire.Record) -> Message:
    arrays = ArrayRecord({name: Array(array) for name, array in answer.arrays.items()})
    header = ConfigRecord({**answer.fields})
    return Message(RecordDict({ARRAYS_RECORD: arrays, HEADER_RECORD: header}), reply_to=asked)

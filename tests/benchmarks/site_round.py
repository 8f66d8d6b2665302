"""One round at a real site as Flower runs it, a process per message:
``python -m tests.benchmarks.site_round proxy|alone policy order message answer``.

``proxy`` is what fedlr's ClientApp does: it passes the job to the agent, which holds the model.
``alone`` is the ClientApp of other systems: model, rows and ledger are loaded in it, anew for
every message. Both read the same bytes of a Flower message and write those of the reply.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage  # type: ignore[attr-defined]

from server.grid import identify_process

from .own_process import peak_bytes


@dataclass(frozen=True)
class NodeContext:
    """What a ClientApp reads of Flower's Context."""

    node_config: dict[str, str]
    run_config: dict[str, str]


def proxy(policy: Path, order: str, message: Message) -> Message:
    """Answer through the agent of the site."""
    from client import main
    from client.declaration import read_declaration

    socket = str(read_declaration(policy).agent.socket)
    context: Any = NodeContext({main.proxy.AGENT: socket}, {main.proxy.ORDER: order})
    return main.proxy.train(message, context)


def alone(policy: Path, order: str, message: Message) -> Message:
    """Answer with all of the site in this process."""
    from client import main  # noqa: F401 - a ClientApp is loaded in either case
    from client.app import make_batch_handler
    from client.declaration import read_declaration
    from client.resident import Resident
    from fedlr.signing import announced

    resident = Resident(read_declaration(policy))
    try:
        site = resident.site_of(announced(order))
        (reply,) = make_batch_handler({message.metadata.dst_node_id: site})([message])
    finally:
        resident.close()
    return reply


SIDES: dict[str, Callable[[Path, str, Message], Message]] = {"proxy": proxy, "alone": alone}


def to_bytes(message: Message) -> bytes:
    """Return a message as it travels."""
    return bytes(message_to_proto(message).SerializeToString())


def from_bytes(text: bytes) -> Message:
    """Return the message that `to_bytes` wrote."""
    return message_from_proto(ProtoMessage.FromString(text))


def main(words: list[str]) -> None:
    """Answer one message; print the peak of this process in bytes."""
    identify_process()
    side, policy, order, message, answer = words
    reply = SIDES[side](
        Path(policy), Path(order).read_text(), from_bytes(Path(message).read_bytes())
    )
    Path(answer).write_bytes(to_bytes(reply))
    print(json.dumps(peak_bytes()))


if __name__ == "__main__":
    main(sys.argv[1:])

"""Records of `fedlr.training.jobs` ↔ Flower messages, seen from the server.

A content has two records: the arrays (the wire form of the parts) and the
header (flat values). The client app builds the same two, under the same names
(`fedlr.adapters.codec`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar, cast

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedlr.adapters import npy
from fedlr.adapters.codec import ARRAYS_RECORD, HEADER_RECORD
from fedlr.errors import BadUpdate
from fedlr.methods.method import ClientUpdate
from fedlr.training import jobs
from fedlr.training.jobs import Abstention, Arrays, Header, Job, SiteStatus

TRAIN, STATUS = "train", "query.status"

T = TypeVar("T")


def status_query(node: int, ttl: float) -> Message:
    """Return the question for a site's status.

    Args:
        node: Flower's id of the node.
        ttl: Seconds after which the question is void.
    """
    return Message(RecordDict(), node, STATUS, ttl=ttl)


def train_messages(job: Job, nonces: Mapping[int, str], ttl: float | None) -> list[Message]:
    """Return one message per node with the same job under a nonce of its own.

    Args:
        job: Its own nonce is not used.
        nonces: Nonce by Flower's node id.
        ttl: Seconds after which the job is void; None is Flower's default (12 h).

    Returns:
        Messages in the order of ``nonces``. They share the encoded arrays.
    """
    arrays, header = jobs.encode_job(replace(job, nonce=""))
    record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    return [
        Message(
            RecordDict({ARRAYS_RECORD: record, HEADER_RECORD: _config({**header, "nonce": nonce})}),
            node,
            TRAIN,
            ttl=ttl,
            group_id=str(job.round),
        )
        for node, nonce in nonces.items()
    ]


def read_outcome(message: Message) -> ClientUpdate | Abstention:
    """Return what a site answered to a job; BadUpdate where it cannot be read."""
    return _read(message, jobs.decode_outcome)


def read_status(message: Message) -> SiteStatus:
    """Return a site's announcement; BadUpdate where it cannot be read."""
    return _read(message, lambda _, header: jobs.decode_status(header))


def code_of(message: Message) -> str:
    """Return the code in a readable reply that is one, else an empty text."""
    if HEADER_RECORD not in message.content:
        return ""
    header = cast("Mapping[str, Any]", message.content[HEADER_RECORD])
    return str(header.get("code", ""))


def _read(message: Message, decode: Callable[[Arrays, Mapping[str, Any]], T]) -> T:
    """Decode a reply of an untrusted site: whatever is wrong with it is a BadUpdate."""
    try:
        content = message.content
        held = (
            cast("Mapping[str, Array]", content[ARRAYS_RECORD]) if ARRAYS_RECORD in content else {}
        )
        header = cast("Mapping[str, Any]", content[HEADER_RECORD])
        return decode({name: npy.read(array.data) for name, array in held.items()}, header)
    except BadUpdate:
        raise
    except Exception as error:
        raise BadUpdate("names", f"the message cannot be read: {error!r}") from error


def _config(header: Header) -> ConfigRecord:
    return ConfigRecord({**header})

"""The ClientApp: decode → site → encode. It holds nothing and decides nothing.

Whatever goes wrong at a site leaves it as a code from a fixed list. Flower
would send the text of an exception to the server, and such a text can quote a
private row; so no exception may leave a handler.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar, cast

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedlr.adapters import npy
from fedlr.adapters.codec import ARRAYS_RECORD, HEADER_RECORD
from fedlr.errors import FedlrError
from fedlr.methods.method import ClientUpdate
from fedlr.training import jobs
from fedlr.training.jobs import Abstention, Arrays, Header, Job, SiteStatus

_log = logging.getLogger("fedlr.client")


class SiteLike(Protocol):
    """What the app needs of a site; `client.site.Site` is the real one."""

    def status(self) -> SiteStatus:
        """Announce the site; every field is public."""
        ...

    def train_many(self, jobs: Sequence[Job]) -> list[ClientUpdate | Abstention]:
        """Answer each job, in order, with an update or a code."""
        ...


S = TypeVar("S", bound=SiteLike)

TrainCohort = Callable[[Sequence[tuple[S, Job]]], Sequence[ClientUpdate | Abstention]]
"""(site, job) pairs of a cohort → one outcome each, in their order."""


def make_client_app(site_of: Callable[[Context], SiteLike]) -> ClientApp:
    """Return the ClientApp with the handlers ``query.status`` and ``train``.

    Args:
        site_of: Context of a node → its simulated site, by
            ``context.node_config["partition-id"]``. A real one has `client.proxy`.
    """
    app = ClientApp()

    @app.query("status")
    def status(message: Message, context: Context) -> Message:
        try:
            header = jobs.encode_status(site_of(context).status())
        except Exception as error:
            _tell(error, f"node {context.node_id}: no status")
            header = {"code": "failed"}
        return Message(_content({}, header), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        try:
            site = site_of(context)
        except Exception as error:
            _tell(error, f"node {context.node_id}: no site")
            return _reply(message, Abstention("", "failed"))
        return _answer([(site, message)], one_by_one)[0]

    return app


def make_batch_handler(
    sites: Mapping[int, S], train_cohort: TrainCohort[S] | None = None, size: int | None = None
) -> Callable[[list[Message]], Iterator[Message]]:
    """Return a handler that trains many sites in one call.

    Args:
        sites: Site by Flower's node id.
        train_cohort: Trains many sites together, e.g. on one resident base
            model; None is `one_by_one`. Where it raises, all that it was given
            abstain: nothing is tried twice, since a site may have paid already.
        size: Most sites of one call; None hands the whole cohort over.

    Returns:
        Train messages → their replies, first those of unknown nodes, then in the order
        of the messages, after each call. Equal, message by message, to the app of
        `make_client_app` where ``train_cohort`` is `one_by_one`.
    """

    def handle(messages: list[Message]) -> Iterator[Message]:
        known = [m for m in messages if m.metadata.dst_node_id in sites]
        for message in messages:
            if message.metadata.dst_node_id not in sites:
                yield _reply(message, Abstention("", "failed"))
        orders = [(sites[message.metadata.dst_node_id], message) for message in known]
        for start in range(0, len(orders), size or len(orders) or 1):
            chunk = orders[start : start + size] if size else orders
            yield from _answer(chunk, train_cohort or one_by_one)

    return handle


def one_by_one(orders: Sequence[tuple[S, Job]]) -> list[ClientUpdate | Abstention]:
    """Train each site alone; a site that raises abstains, the others go on.

    Args:
        orders: (site, job) pairs.

    Returns:
        One outcome per pair, in order.
    """
    outcomes: list[ClientUpdate | Abstention] = []
    for site, job in orders:
        try:
            (outcome,) = site.train_many([job])
        except Exception:
            _log.exception("a job failed")
            outcome = Abstention(_name(site), "failed")
        outcomes.append(outcome)
    return outcomes


def _answer(orders: Sequence[tuple[S, Message]], train: TrainCohort[S]) -> list[Message]:
    """Decode, train together what can be decoded, encode."""
    outcomes: dict[int, ClientUpdate | Abstention] = {}
    readable: dict[int, tuple[S, Job]] = {}
    for index, (site, message) in enumerate(orders):
        try:
            readable[index] = (site, _job(message))
        except Exception:
            _log.exception("a job is malformed")
            outcomes[index] = Abstention(_name(site), "bad_job")
    try:
        trained = train(list(readable.values())) if readable else []
        outcomes |= dict(zip(readable, trained, strict=True))
    except Exception:
        _log.exception("a cohort failed")
        outcomes |= {i: Abstention(_name(site), "failed") for i, (site, _) in readable.items()}
    return [_reply(message, outcomes[index]) for index, (_, message) in enumerate(orders)]


def _job(message: Message) -> Job:
    """Return the job in a message; BadUpdate or another exception where it is malformed."""
    arrays = cast("Mapping[str, Array]", message.content[ARRAYS_RECORD])
    header = cast("Mapping[str, Any]", message.content[HEADER_RECORD])
    return jobs.decode_job({name: npy.read(array.data) for name, array in arrays.items()}, header)


def _reply(message: Message, outcome: ClientUpdate | Abstention) -> Message:
    """Return the reply that carries ``outcome``, or a code where it cannot be encoded."""
    try:
        content = _content(*jobs.encode_outcome(outcome))
    except Exception:
        _log.exception("%s: the update cannot be encoded", outcome.client)
        content = _content(*jobs.encode_outcome(Abstention(outcome.client, "failed")))
    return Message(content, reply_to=message)


def _content(arrays: Arrays, header: Header) -> RecordDict:
    record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    return RecordDict({ARRAYS_RECORD: record, HEADER_RECORD: ConfigRecord({**header})})


def _tell(error: Exception, what: str) -> None:
    """Tell the operator: a sentence where the mistake is theirs, a traceback where it is ours."""
    if isinstance(error, FedlrError):
        _log.error("%s: %s", what, error)
    else:
        _log.error(what, exc_info=error)


def _name(site: SiteLike) -> str:
    """Return the site's public name, empty where it cannot say."""
    try:
        return site.status().client
    except Exception:
        _log.exception("a site has no status")
        return ""

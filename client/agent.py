"""The agent of a site: a long-lived process of its operator, behind a Unix socket.

It owns data, ledger, noise, policy and the resident base model. Whoever may open the socket (the
group of the SuperNode's user) can bring jobs: an app that a stranger submitted runs as that
user. So nothing is taken on trust but the file system's word on who may connect; gRPC cannot
read who is at the other end of a Unix socket, and no claim rests on it. What the operator has not
allowed is answered with a code; why is said on this console alone.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from filelock import FileLock, Timeout
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from client import wire
from client.agent_pb2 import Piece, StatusReply, StatusRequest
from client.agent_pb2_grpc import AgentServicer, add_AgentServicer_to_server
from client.declaration import AgentSettings, Declaration
from client.orderbook import OrderBook
from client.resident import Resident
from client.site import Site
from fedlr.errors import BadUpdate, FedlrError, OrderRefused, RunError
from fedlr.methods.method import ClientUpdate
from fedlr.signing import RunOrder, verify
from fedlr.training import jobs
from fedlr.training.jobs import Abstention, SiteStatus

WORKERS = 8
"""Threads that answer: jobs wait in them, health and status must not wait behind."""

PLACES = 2
"""Jobs that are held: one in training, one that waits for its turn."""

ARRIVAL_S = 120.0
"""Seconds that a job may take to arrive, header and arrays each: whoever stalls, stalls alone."""

POLL_S = 0.1
"""Seconds between two looks at whether who asked still waits."""

GRACE_S = 600.0
"""Seconds that a job in training has to end after SIGTERM: it is paid for already."""

FOLDER_MODE, SOCKET_UMASK = 0o750, 0o117
"""Of the socket's folder; of the process while it binds, so that the socket is born 0660."""

_SERVICE = "fedlr.agent.v1.Agent"
_OPTIONS = (
    ("grpc.max_receive_message_length", wire.MESSAGE_BYTES),
    ("grpc.max_send_message_length", wire.MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
)
_MOST_CALLS = 4 * WORKERS

_log = logging.getLogger("fedlr.agent")

Answer = ClientUpdate | Abstention


class Agent(AgentServicer):
    """Answers for one site.

    Guarantees:
        One job trains at a time and one may wait; a third is answered ``busy`` before its
        arrays are received. A job whose sender has gone, or whose deadline has passed, is not
        begun; one that has begun is finished and kept, since it is paid for. No exception text
        leaves: a call ends with an answer, or is aborted with a fixed word.

    Args:
        declaration: What the operator declares.
        resident: The site's lasting parts.
        orders: The runs that it knows.
    """

    def __init__(self, declaration: Declaration, resident: Resident, orders: OrderBook) -> None:
        self._declaration = declaration
        self._resident = resident
        self._orders = orders
        self._places = threading.BoundedSemaphore(PLACES)
        self._turn = threading.Lock()
        self._known: tuple[str, SiteStatus] | None = None

    def Train(  # noqa: N802 - the name of the call
        self, stream: Iterator[Piece], context: grpc.ServicerContext
    ) -> Iterator[Piece]:
        """Answer one job; see ``agent.proto``."""
        answer = self._guarded(lambda: self._train(stream, context))
        fields, arrays = self._encoded(answer)
        yield from wire.pieces(wire.Record(fields, arrays))

    def Status(  # noqa: N802 - the name of the call
        self, request: StatusRequest, context: grpc.ServicerContext
    ) -> StatusReply:
        """Say what the site is under a run's order; see ``agent.proto``."""
        try:
            order = self._admitted(request.order)
            known = self._known
            if known is None or known[0] != order.digest:
                with self._my_turn(context):
                    known = (order.digest, self._site(order).status())
            header: jobs.Header = jobs.encode_status(known[1])
        except Exception as error:
            header = {"code": self._code(error)}
        return StatusReply(fields=wire.values_of(header))

    def _train(self, stream: Iterator[Piece], context: grpc.ServicerContext) -> Answer:
        with _arriving(context):
            announced = wire.opening(stream, self._declaration.agent.job_bytes)
        order = self._admitted(announced.order)
        if not self._places.acquire(blocking=False):
            return self._abstain("busy")
        try:
            with _arriving(context):
                arrays = wire.arrays_of(announced, stream)
            job = jobs.decode_job(arrays, announced.fields)
            if job.run != order.run:
                raise BadUpdate("names", f"the job is of run {job.run!r}, not of {order.run!r}")
            with self._my_turn(context):
                (answer,) = self._site(order).train_many([job])
            return answer
        finally:
            self._places.release()

    def _admitted(self, text: str) -> RunOrder:
        """Return the order in ``text``; OrderRefused where it may not be followed."""
        order = verify(text, self._declaration.coordinators)
        self._orders.admit(order, self._declaration.approve)
        return order

    def _site(self, order: RunOrder) -> Site:
        site = self._resident.site_of(order)
        self._known = (order.digest, site.status())
        return site

    @contextmanager
    def _my_turn(self, context: grpc.ServicerContext) -> Iterator[None]:
        """Wait until nothing else is done here; _Gone where nobody waits for the answer."""
        while not self._turn.acquire(timeout=POLL_S):
            if not context.is_active():
                raise _Gone
        try:
            if not context.is_active():
                raise _Gone
            yield
        finally:
            self._turn.release()

    def _guarded(self, work: Callable[[], Answer]) -> Answer:
        try:
            return work()
        except Exception as error:
            return self._abstain(self._code(error))

    def _code(self, error: Exception) -> str:
        """Tell the operator what happened, and return what the server is told."""
        if isinstance(error, OrderRefused):
            _log.error("refused, %s: %s", error.code, error)
            return error.code
        if isinstance(error, wire.WireError | BadUpdate):
            _log.error("refused, bad_job: %s", error)
            return "bad_job"
        if isinstance(error, _Gone):
            _log.warning("who asked has gone before the job began; nothing was booked")
            return "failed"
        if isinstance(error, FedlrError):
            _log.error("failed: %s", error)
        else:
            _log.exception("failed")
        return "failed"

    def _abstain(self, code: str) -> Abstention:
        return Abstention(self._declaration.client, code)

    def _encoded(self, answer: Answer) -> tuple[wire.Fields, wire.Arrays]:
        """Return the record of an answer; a code where it would be too large."""
        arrays, header = jobs.encode_outcome(answer)
        if sum(array.nbytes for array in arrays.values()) > self._declaration.agent.job_bytes:
            _log.error("the update is larger than agent.job_megabytes; raise it")
            arrays, header = jobs.encode_outcome(self._abstain("failed"))
        return dict(header), arrays


class _Gone(Exception):
    """Who asked no longer waits."""


@contextmanager
def _arriving(context: grpc.ServicerContext) -> Iterator[None]:
    """End a call whose pieces do not come within `ARRIVAL_S`."""
    timer = threading.Timer(ARRIVAL_S, context.cancel)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def serve(declaration: Declaration, say: Callable[[str], None], stop: threading.Event) -> None:
    """Serve a site until ``stop`` is set; a job in training then has `GRACE_S` to end.

    Args:
        declaration: What its operator declares.
        say: Told what is being done, on the operator's console alone.
        stop: Set by a signal, or by a test.

    Raises:
        FedlrError: Ledger, data or model are not as declared, the socket's folder is not this
            user's alone, or another agent has the socket.
    """
    settings = declaration.agent
    _check_folder(settings)
    lock = FileLock(f"{settings.socket}.lock", thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunError(f"another agent serves {settings.socket}; stop it first") from error
    try:
        resident = Resident(declaration, say)
        try:
            orders = OrderBook(orders_folder(declaration))
            resident.load()
            _serve(Agent(declaration, resident, orders), settings, say, stop)
        finally:
            resident.close()
    finally:
        lock.release()


def orders_folder(declaration: Declaration) -> Path:
    """Return where a site keeps the orders that have come: beside its ledger."""
    return declaration.ledger.with_suffix(".orders")


def _serve(
    agent: Agent, settings: AgentSettings, say: Callable[[str], None], stop: threading.Event
) -> None:
    server = grpc.server(
        ThreadPoolExecutor(WORKERS), options=_OPTIONS, maximum_concurrent_rpcs=_MOST_CALLS
    )
    add_AgentServicer_to_server(agent, server)  # type: ignore[no-untyped-call]
    healthy = health.HealthServicer()
    for name in ("", _SERVICE):
        healthy.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    _bind(server, settings)
    server.start()
    say(f"serving at {settings.socket}")
    try:
        stop.wait()
    finally:
        healthy.enter_graceful_shutdown()
        say("stopping; a job in training is finished first")
        server.stop(GRACE_S).wait()
        settings.socket.unlink(missing_ok=True)


def _bind(server: grpc.Server, settings: AgentSettings) -> None:
    """Bind the socket, which nobody but this user and the group may ever have opened."""
    before = os.umask(SOCKET_UMASK)
    try:
        bound = server.add_insecure_port(f"unix:{settings.socket}")
    except RuntimeError as error:
        raise RunError(
            f"agent.socket = {str(settings.socket)!r} cannot be bound: {error}"
        ) from error
    finally:
        os.umask(before)
    if not bound:
        raise RunError(f"agent.socket = {str(settings.socket)!r} cannot be bound")
    if settings.group is None:
        return
    try:
        for path in (settings.socket, settings.socket.parent):
            shutil.chown(path, group=settings.group)
    except (LookupError, OSError) as error:
        raise RunError(
            f"agent.group = {settings.group!r}: the socket cannot be given to it ({error}); make "
            "the group, and this user a member of it"
        ) from error


def _check_folder(settings: AgentSettings) -> None:
    """Make the socket's folder, or refuse one in which others could put another socket."""
    folder = settings.socket.parent
    try:
        folder.mkdir(mode=FOLDER_MODE, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise RunError(
            f"the folder of agent.socket, {folder}, cannot be made: {error.strerror or error}"
        ) from error
    if status.st_uid != os.geteuid() or status.st_mode & 0o027:
        raise RunError(
            f"the folder of agent.socket, {folder}, must belong to this user, and only the group "
            f"may read it beside: chmod 750 {folder}, or give agent.socket a folder of its own"
        )


def stopped_by_signals(stop: threading.Event) -> None:
    """Let SIGTERM and SIGINT set ``stop``; called from the main thread."""

    def set_stop(number: int, frame: Any) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, set_stop)

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
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from client import wire
from client.agent_pb2 import Piece, StatusReply, StatusRequest
from client.agent_pb2_grpc import AgentServicer, add_AgentServicer_to_server
from client.declaration import AgentSettings, Declaration
from client.hold import held
from client.orderbook import OrderBook, orders_folder
from client.resident import Resident
from fedlr.config import from_json
from fedlr.errors import BadUpdate, FedlrError, LedgerError, OrderRefused, RunError
from fedlr.methods.method import ClientUpdate
from fedlr.report.units import printable
from fedlr.signing import RunOrder, verify
from fedlr.training import jobs
from fedlr.training.jobs import Abstention

WORKERS = 8
"""Threads that answer: one job trains, another waits, and there are some for status and health."""

PLACES = 2
"""Jobs that are held: one in training, one that waits for its turn."""

OPENING_S, ARRIVAL_S = 20.0, 120.0
"""Seconds that a job's header and its arrays may take to arrive: whoever stalls holds a thread."""

MOST_CONNECTIONS = 64
"""Open connections, above which a new one is closed at once. Each is a file handle: without a
bound, whoever may connect takes the handles that ledger and rows need."""

GREETING_S, IDLE_S = 10.0, 30.0
"""Seconds after which a connection is closed that has not said what it is, or that asks nothing."""

POLL_S = 0.1
"""Seconds between two looks at whether who asked still waits."""

REPLY_S = 10.0
"""Seconds that answers have to leave once the last job has ended and the agent is to stop."""

FOLDER_MODE, SOCKET_UMASK = 0o750, 0o117
"""Of the socket's folder; of the process while it binds, so that the socket is born 0660."""

_LONGEST_WORD = 500
_MOST_KNOWN = 64
_OPTIONS = (
    *wire.CHANNEL_OPTIONS,
    ("grpc.so_reuseport", 0),
    ("grpc.max_allowed_incoming_connections", MOST_CONNECTIONS),
    ("grpc.server_handshake_timeout_ms", int(1_000 * GREETING_S)),
    ("grpc.max_connection_idle_ms", int(1_000 * IDLE_S)),
)
_MOST_CALLS = 4 * WORKERS

_log = logging.getLogger("fedlr.agent")

Answer = ClientUpdate | Abstention


class Agent(AgentServicer):
    """Answers for one site.

    Guarantees:
        One job trains at a time and one may wait; a third is answered ``busy`` before its
        arrays are received. A job whose sender has gone, or whose deadline has passed, is not
        begun, nor is any after `stop`; one that has begun is finished and kept, since it is paid
        for. A call ends with an answer, and an answer holds no text but codes.

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
        self._asking = threading.Lock()
        self._turn = threading.Lock()
        self._stopping = threading.Event()
        self._known: dict[str, jobs.Header] = {}

    def Train(  # noqa: N802 - the name of the call
        self, stream: Iterator[Piece], context: grpc.ServicerContext
    ) -> Iterator[Piece]:
        """Answer one job; see ``agent.proto``."""
        try:
            record = self._record(self._train(stream, context))
        except Exception as error:
            record = self._record(self._abstain(self._code(error)))
        yield from wire.pieces(record)

    def Status(  # noqa: N802 - the name of the call
        self, request: StatusRequest, context: grpc.ServicerContext
    ) -> StatusReply:
        """Say what the site is under a run's order; see ``agent.proto``."""
        try:
            header = self._status(request.order, context)
        except Exception as error:
            header = {"code": self._code(error)}
        return StatusReply(fields=wire.values_of(header))

    def stop(self) -> None:
        """Begin no more jobs, and return once the one in training has ended and is kept."""
        self._stopping.set()
        with self._turn:
            pass

    def _status(self, text: str, context: grpc.ServicerContext) -> jobs.Header:
        order = self._admitted(text)
        if (known := self._known.get(order.digest)) is not None:
            return known  # also while another job trains
        if not self._asking.acquire(blocking=False):  # or questions would take every thread
            return {"code": "busy"}
        try:
            with self._my_turn(context):
                found = jobs.encode_status(self._resident.status_of(order))
        finally:
            self._asking.release()
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known[order.digest] = found
        return found

    def _train(self, stream: Iterator[Piece], context: grpc.ServicerContext) -> Answer:
        with _arriving(context, OPENING_S):
            announced = wire.opening(stream, self._declaration.agent.job_bytes)
        order = self._admitted(announced.order)
        if not self._places.acquire(blocking=False):
            return self._abstain("busy")
        try:
            with _arriving(context, ARRIVAL_S):
                arrays = wire.arrays_of(announced, stream)
            job = jobs.decode_job(arrays, announced.fields)
            if job.run != order.run:
                raise BadUpdate("names", f"the job is of run {job.run!r}, not of {order.run!r}")
            with self._my_turn(context):
                (answer,) = self._resident.site_of(order).train_many([job])
            return answer
        finally:
            self._places.release()

    def _admitted(self, text: str) -> RunOrder:
        """Return the order in ``text``; OrderRefused where it may not be followed."""
        order = verify(text, self._declaration.coordinators)
        try:
            from_json(order.config)
        except FedlrError as error:
            raise OrderRefused("policy", f"{order.run} has no configuration: {error}") from error
        self._orders.admit(order, self._declaration.approve)
        return order

    @contextmanager
    def _my_turn(self, context: grpc.ServicerContext) -> Iterator[None]:
        """Wait until nothing else is done here; _Gone where nobody waits for the answer."""
        while not self._turn.acquire(timeout=POLL_S):
            if not context.is_active():
                raise _Gone
        try:
            if self._stopping.is_set() or not context.is_active():
                raise _Gone
            yield
        finally:
            self._turn.release()

    def _code(self, error: Exception) -> str:
        """Tell the operator what happened, and return what the server is told."""
        told = printable(str(error))[:_LONGEST_WORD]  # a stranger's words may be in it
        if isinstance(error, OrderRefused):
            _log.error("refused, %s: %s", error.code, told)
            return error.code
        if isinstance(error, wire.WireError | BadUpdate):
            _log.error("refused, bad_job: %s", told)
            return "bad_job"
        if isinstance(error, LedgerError):
            _log.error("the ledger refuses: %s", told)
            return "ledger"
        if isinstance(error, _Gone):
            _log.warning("a job was not begun: who asked has gone, or the agent stops")
        elif isinstance(error, FedlrError | grpc.RpcError):
            _log.error("failed: %s", told or "the call ended before its message was whole")
        else:
            _log.exception("failed")
        return "failed"

    def _abstain(self, code: str) -> Abstention:
        return Abstention(self._declaration.client, code)

    def _record(self, answer: Answer) -> wire.Record:
        """Return the record of an answer; ValueError where the operator set a smaller limit."""
        arrays, header = jobs.encode_outcome(answer)
        size, limit = sum(array.nbytes for array in arrays.values()), self._declaration.agent
        if size > limit.job_bytes:
            raise ValueError(
                f"the update has {size} bytes, agent.job_megabytes = {limit.job_megabytes} is less"
            )
        return wire.Record(dict(header), arrays)


class _Gone(Exception):
    """Who asked no longer waits, or the agent stops."""


class _Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Says that the agent serves, which it does from before it is bound; watches nothing."""

    def Check(  # noqa: N802 - the name of the call
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """Answer the standard question."""
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


@contextmanager
def _arriving(context: grpc.ServicerContext, seconds: float) -> Iterator[None]:
    """End a call whose pieces do not come in time."""
    timer = threading.Timer(seconds, context.cancel)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def serve(declaration: Declaration, say: Callable[[str], None], wait: Callable[[], object]) -> None:
    """Serve a site until ``wait`` returns, and then until the job in training has ended.

    Args:
        declaration: What its operator declares.
        say: Told what is being done, on the operator's console alone.
        wait: Returns when the agent is to stop: after a signal, or in a test.

    Raises:
        FedlrError: Ledger, data or model are not as declared, the socket's folder is not its
            own, or another process has the site (`client.hold`).
    """
    _make_folder(declaration.agent)
    with held(declaration.ledger):
        resident = Resident(declaration, say)
        try:
            orders = OrderBook(orders_folder(declaration.ledger))
            resident.load()
            _serve(Agent(declaration, resident, orders), declaration.agent, say, wait)
        finally:
            resident.close()


def _serve(
    agent: Agent, settings: AgentSettings, say: Callable[[str], None], wait: Callable[[], object]
) -> None:
    server = grpc.server(
        ThreadPoolExecutor(WORKERS), options=_OPTIONS, maximum_concurrent_rpcs=_MOST_CALLS
    )
    add_AgentServicer_to_server(agent, server)  # type: ignore[no-untyped-call]
    health_pb2_grpc.add_HealthServicer_to_server(_Health(), server)
    _bind(server, settings)
    server.start()
    say(f"serving at {settings.socket}")
    try:
        wait()
    finally:
        say("stopping; a job in training is finished first")
        # Calls that are stopped count as ended while their job still trains: wait for the job.
        ended = server.stop(threading.TIMEOUT_MAX)
        agent.stop()
        ended.wait(REPLY_S)
        server.stop(None).wait()
        settings.socket.unlink(missing_ok=True)


def _bind(server: grpc.Server, settings: AgentSettings) -> None:
    """Bind the socket, which nobody but this user and the group may ever have opened."""
    name = f"agent.socket = {str(settings.socket)!r}"
    before = os.umask(SOCKET_UMASK)
    try:
        bound = server.add_insecure_port(f"unix:{settings.socket}")
    except RuntimeError as error:
        raise RunError(f"{name} cannot be bound: {error}; give another place") from error
    finally:
        os.umask(before)
    if not bound:
        raise RunError(f"{name} cannot be bound; give another place")
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


def _make_folder(settings: AgentSettings) -> None:
    """Make the socket's folder, or refuse one that others can write to, or that holds more.

    The group may enter it: whatever else lay there would be open to every app that runs there.
    """
    folder = settings.socket.parent
    try:
        if not folder.exists():
            folder.mkdir()
            folder.chmod(FOLDER_MODE)  # whatever the umask is
        status = folder.stat()
        others = sorted(path.name for path in folder.iterdir() if path != settings.socket)
    except OSError as error:
        raise RunError(
            f"the folder of agent.socket, {folder}, cannot be made: {error.strerror or error}; "
            "give agent.socket another place"
        ) from error
    if others:
        raise RunError(
            f"the folder of agent.socket, {folder}, holds {others[0]} beside the socket, and agent."
            "group may enter it; give agent.socket a folder of its own"
        )
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid != os.geteuid() or mode != FOLDER_MODE:
        raise RunError(
            f"the folder of agent.socket, {folder}, has mode {mode:o} of user {status.st_uid}, it "
            f"must be {FOLDER_MODE:o} of this one; chmod 750 {folder}, or take it away"
        )

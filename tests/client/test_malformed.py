"""A thousand messages that are none: the agent neither hangs nor dies, and pays for no lie."""

from __future__ import annotations

import os
import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from threading import Event, Thread
from typing import Any

import grpc
import pytest

from client.agent import MOST_CONNECTIONS
from client.agent_pb2 import Piece, StatusReply, StatusRequest
from client.declaration import Declaration
from client.wire import CHANNEL_OPTIONS, Record, fields_of, pieces
from fedlr.cli.main import main
from fedlr.errors import OrderRefused
from fedlr.methods.method import ClientUpdate
from fedlr.signing import announced, verify
from fedlr.training.jobs import ABSTENTION_CODES, Job, SiteStatus, encode_job
from tests.client import malformed
from tests.client.processes import Running, running
from tests.client.real_site import Place, ask, first_job, place, status

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("FEDLR_FUZZ_SEED", "20"))
"""Another seed gives other messages; it is shown where a test fails."""

ROUNDS = 3
"""That the run may book: a damaged job whose arrays and nonce alone differ is a job."""

STREAMS, ORDERS, GREETINGS, LEAVING = 500, 250, 200, 50

LONGEST_S = 60
"""Seconds within which everything is answered: above them a call ends with another code."""

MOST_MEMORY = 300_000_000
"""Bytes by which the agent may grow: eight headers of two megabytes, read, and what remains."""

TRAIN, STATUS = "/fedlr.agent.v1.Agent/Train", "/fedlr.agent.v1.Agent/Status"

REFUSED = {
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.CANCELLED,
}
"""What gRPC itself may answer: no message, one too large, one that was cancelled."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return place(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def job(site: Place) -> Job:
    return first_job(site)


@pytest.fixture(scope="module")
def agent(site: Place, job: Job) -> Iterator[Running]:
    with running(site.policy, site.folder / "agent.log") as made:
        warm = replace(job, nonce="warm")
        # What a first job makes is made before memory and time are looked at.
        assert isinstance(ask(site.declaration, site.signed(), warm, LONGEST_S), ClientUpdate)
        yield made


@pytest.fixture
def draws() -> random.Random:
    print(f"FEDLR_FUZZ_SEED={SEED}")
    return random.Random(SEED)


@pytest.fixture
def channel(site: Place, agent: Running) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"unix:{site.declaration.agent.socket}", CHANNEL_OPTIONS) as made:
        yield made


@pytest.fixture(autouse=True)
def unharmed(site: Place, agent: Running) -> Iterator[None]:
    """Watch the agent's memory; after the test it lives, serves, and has said nothing strange."""
    before, peak, over = agent.memory, [0], Event()

    def watch() -> None:
        while not over.wait(0.05):
            peak[0] = max(peak[0], agent.memory)

    watcher = Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
    assert agent.process.poll() is None
    assert isinstance(status(site.declaration, site.signed()), SiteStatus)
    assert peak[0] - before < MOST_MEMORY
    # gRPC shows where it could not read a message; nothing else may be a surprise.
    assert agent.text.count("Traceback") == agent.text.count("Exception deserializing message!")
    assert main(["ledger", "verify", str(site.ledger)]) == 0


def told(call: Any) -> str:
    """The code of an answer, empty for an update; what gRPC said where it answered itself."""
    return answered(call)[0]


def answered(call: Any) -> tuple[str, bytes]:
    """The same, and the arrays of an update."""
    first: Any = None
    rest: list[Any] = []
    refused: Any = None
    try:
        first, *rest = list(call)
    except grpc.RpcError as error:
        refused = error
    if refused is not None:
        assert refused.code() in REFUSED, refused
        words = refused.details().replace("Exception deserializing request!", "")
        assert "Exception" not in words
        return str(refused.code().name), b""
    code = str(fields_of(first.header.fields).get("code", ""))
    return code, b"".join(piece.data for piece in rest)


def train_with(channel: grpc.Channel) -> Any:
    return channel.stream_stream(TRAIN, None, Piece.FromString)


def messages(job: Job, order: str) -> list[bytes]:
    """A whole job as it travels, in pieces so small that there are many."""
    arrays, header = encode_job(job)
    first, *rest = pieces(Record(dict(header), arrays, order))
    data = b"".join(piece.data for piece in rest)
    chunks = [Piece(data=data[at : at + 200]) for at in range(0, len(data), 200)]
    return [piece.SerializeToString() for piece in (first, *chunks)]


def test_streams_that_are_no_job_are_refused(
    site: Place, job: Job, channel: grpc.Channel, draws: random.Random
) -> None:
    whole, train, found = messages(job, site.signed()), train_with(channel), Counter[str]()
    released = set[bytes]()
    for _ in range(STREAMS):
        mutation = draws.choice(malformed.STREAMS)
        code, update = answered(train(iter(mutation(draws, whole)), timeout=LONGEST_S))
        found[code] += 1
        released |= {update} - {b""}
    print(found)
    assert found.keys() <= {"", *ABSTENTION_CODES, *(code.name for code in REFUSED)}
    assert found["bad_job"] > STREAMS // 4
    # Beside the one that warmed the agent; the same job again gets what is paid for.
    assert 1 + len(released) <= site.rounds_booked() <= ROUNDS


def test_every_order_that_was_changed_is_refused(
    site: Place, job: Job, channel: grpc.Channel, draws: random.Random
) -> None:
    text, before = site.signed(), site.rounds_booked()
    ask_status = channel.unary_unary(
        STATUS, StatusRequest.SerializeToString, StatusReply.FromString
    )
    train = train_with(channel)
    for number in range(ORDERS):
        changed = malformed.order(draws, text)
        if is_same(site, changed, text):
            continue
        if number % 2:
            code = told(train(iter(messages(job, changed)), timeout=LONGEST_S))
        else:
            reply = ask_status(StatusRequest(order=changed), timeout=LONGEST_S)
            code = str(fields_of(reply.fields).get("code", "none"))
        assert code == "unsigned", changed
    assert site.rounds_booked() == before


def is_same(site: Place, changed: str, text: str) -> bool:
    """Whether another text stands for the very same order: a blank in JSON means nothing."""
    try:
        return verify(changed, site.declaration.coordinators) == announced(text)
    except OrderRefused:
        return False


def test_connections_that_speak_no_grpc_are_let_go(
    site: Place, agent: Running, draws: random.Random
) -> None:
    before, held = agent.handles, list[socket.socket]()
    for number in range(GREETINGS):
        with_agent = socket.socket(socket.AF_UNIX)
        with_agent.settimeout(10)
        with_agent.connect(str(site.declaration.agent.socket))
        try:
            with_agent.sendall(malformed.greeting(draws))
            if draws.random() < 0.3:
                with_agent.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has closed already
        if number % 10:
            with_agent.close()
        else:
            held.append(with_agent)
    for one in held:
        one.close()
    wait_for(lambda: agent.handles <= before + 2)


def test_no_more_connections_are_held_than_files_can_be_spared_for(
    site: Place, agent: Running
) -> None:
    before, held = agent.handles, list[socket.socket]()
    for _ in range(4 * MOST_CONNECTIONS):
        held.append(socket.socket(socket.AF_UNIX))
        held[-1].connect(str(site.declaration.agent.socket))
    time.sleep(0.5)
    # A few more than asked for, while they are being closed.
    assert MOST_CONNECTIONS // 2 < agent.handles - before <= MOST_CONNECTIONS + 8
    for one in held:
        one.close()
    wait_for(lambda: agent.handles <= before + 2)


def wait_for(found: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def slowly(parts: list[bytes], go_on: Event) -> Iterator[bytes]:
    for part in parts:
        yield part
        if go_on.wait(0.02):
            return


def test_who_leaves_in_the_middle_leaves_nothing_behind(
    site: Place, job: Job, channel: grpc.Channel, draws: random.Random
) -> None:
    whole, train, before = messages(job, site.signed()), train_with(channel), site.rounds_booked()
    for _ in range(LEAVING):
        over = Event()
        some = malformed.ended(draws, whole)
        call = train(slowly(some, over), timeout=LONGEST_S)
        time.sleep(draws.uniform(0, 0.1))
        call.cancel()
        over.set()
    wait_for(lambda: told(train(iter([]), timeout=LONGEST_S)) == "bad_job")
    assert site.rounds_booked() == before


def test_a_valid_job_is_served_after_all_that(site: Place, agent: Running, job: Job) -> None:
    before = site.rounds_booked()
    served: Declaration = site.declaration
    answer = ask(served, site.signed(run="after"), replace(job, run="after"))
    assert isinstance(answer, ClientUpdate)
    assert site.rounds_booked() == before + 1

"""An agent answers what its operator has allowed, once, and everything else with a code."""

from __future__ import annotations

import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from grpc_health.v1 import health_pb2, health_pb2_grpc

from client import agent as agent_module
from client import wire
from client.agent_pb2 import Piece
from client.declaration import Declaration
from client.orderbook import OrderBook, orders_folder
from client.site import Site
from fedlr.errors import LedgerError, RunError
from fedlr.methods.combiners import COMBINERS
from fedlr.methods.method import ClientUpdate
from fedlr.signing import CLOCKS_APART_S, sign
from fedlr.training.jobs import Abstention, Job, SiteStatus, encode_job
from fedlr.training.local import LocalTrainer
from tests.client.real_site import (
    AGENTS,
    RUN,
    SIZE,
    Place,
    agent,
    ask,
    first_job,
    place,
    send,
    status,
    stub_of,
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return place(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def job(site: Place) -> Job:
    return first_job(site)


@pytest.fixture(scope="module")
def served(site: Place) -> Iterator[Declaration]:
    with agent(site) as declaration:
        yield declaration


def held(served: Declaration) -> int:
    """Jobs that the running agent holds."""
    return agent_module.PLACES - AGENTS[served.path]._places._value  # type: ignore[attr-defined]


def wait_until(holds: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def code(answer: ClientUpdate | Abstention) -> str:
    assert isinstance(answer, Abstention), answer
    return answer.code


def test_a_site_says_what_is_declared_and_nothing_that_is_counted(
    site: Place, served: Declaration
) -> None:
    found = status(served, site.signed())
    assert isinstance(found, SiteStatus)
    assert (found.client, found.declared_size) == ("client-000", SIZE)
    assert found.noise_multiplier > 0
    assert found.delta == 1e-5


def test_a_job_is_answered_once_and_paid_once(site: Place, served: Declaration, job: Job) -> None:
    order, before = site.signed(), site.rounds_booked()
    mine = replace(job, nonce="once")
    first, again = ask(served, order, mine), ask(served, order, mine)
    assert isinstance(first, ClientUpdate)
    assert isinstance(again, ClientUpdate)
    assert first.parts.keys() == {key for key in job.parts if key.role in job.send}
    assert all(torch.equal(value, again.parts[key]) for key, value in first.parts.items())
    assert any(not torch.equal(value, job.parts[key]) for key, value in first.parts.items())
    assert site.rounds_booked() == before + 1


def test_nobody_else_can_ask(site: Place, served: Declaration, job: Job) -> None:
    before = site.rounds_booked()
    stranger = sign(site.order(), Ed25519PrivateKey.generate())
    altered = site.signed().replace(r"\"rounds\":3", r"\"rounds\":9")
    assert altered != site.signed()
    for text in ("", "{}", stranger, altered):
        assert code(ask(served, text, replace(job, nonce="x"))) == "unsigned"
        assert status(served, text) == "unsigned"
    late = site.signed(issued=1_000, expires=2_000)
    assert code(ask(served, late, replace(job, nonce="x"))) == "expired"
    assert site.rounds_booked() == before


@pytest.mark.parametrize("ahead", [600, -600])
def test_a_clock_may_be_ten_minutes_off(site: Place, served: Declaration, ahead: int) -> None:
    now = int(time.time())
    order = site.signed(run=f"ahead{ahead}", issued=now + ahead, expires=now + 3_600)
    assert isinstance(status(served, order), SiteStatus)


def test_an_order_that_is_to_come_is_refused(site: Place, served: Declaration, job: Job) -> None:
    before, later = site.rounds_booked(), int(time.time()) + CLOCKS_APART_S + 60
    order = site.signed(run="to-come", issued=later, expires=later + 3_600)
    assert status(served, order) == "expired"
    assert code(ask(served, order, replace(job, run="to-come"))) == "expired"
    assert site.rounds_booked() == before


def test_a_run_keeps_the_order_it_came_with(site: Place, served: Declaration, job: Job) -> None:
    run = "other-1a2b"
    first, before = site.signed(run=run), site.rounds_booked()
    assert isinstance(status(served, first), SiteStatus)
    other = site.signed(site.config("federation.rounds=9"), run=run)
    assert status(served, other) == "replayed"
    assert code(ask(served, other, replace(job, run=run))) == "replayed"
    assert site.rounds_booked() == before


def test_a_job_under_the_order_of_another_run_is_refused(
    site: Place, served: Declaration, job: Job
) -> None:
    before = site.rounds_booked()
    assert code(ask(served, site.signed(), replace(job, run="another"))) == "bad_job"
    assert site.rounds_booked() == before


REFUSED: list[tuple[tuple[str, ...], str]] = [
    (("privacy=none",), "allows private training alone"),
    (("privacy=dry", "data.public=true"), "allows private training alone"),
    (("privacy.unit=user", "data.user_column=text"), "says unit = 'example'"),
    (("privacy.delta=0.02",), "allows δ ≤ 0.01"),
    (("privacy.delta=0.4",), "must be < 1/N"),
    (("model.random_weights=true",), "model.random_weights"),
    (("adapter.modules=[nowhere]",), "nowhere"),
]


@pytest.mark.parametrize(("words", "reason"), REFUSED, ids=[words[0] for words, _ in REFUSED])
def test_what_the_policy_does_not_allow_is_refused(
    site: Place,
    served: Declaration,
    job: Job,
    caplog: pytest.LogCaptureFixture,
    words: tuple[str, ...],
    reason: str,
) -> None:
    run = "refused-" + words[0].replace("=", "-").replace("[", "").replace("]", "")
    order, before = site.signed(site.config(*words), run=run), site.rounds_booked()
    assert code(ask(served, order, replace(job, run=run))) == "policy"
    assert reason in caplog.text
    assert site.rounds_booked() == before


def test_an_order_without_a_configuration_is_refused_and_not_noted(
    site: Place, served: Declaration
) -> None:
    for number, config in enumerate(("", "{", '{"seed": -1}')):
        assert status(served, site.signed(config, run=f"none-{number}")) == "policy"
    book = OrderBook(orders_folder(served.ledger))
    assert not [asked for asked in book.all() if asked.order.run.startswith("none")]


def test_the_name_that_is_the_ledgers_own_is_refused(site: Place, served: Declaration) -> None:
    assert status(served, site.signed(run="recovered")) == "policy"


@pytest.mark.parametrize("kind", COMBINERS)
def test_how_the_server_combines_is_no_matter_of_a_site(
    site: Place, served: Declaration, kind: str
) -> None:
    config = site.config(
        "federation.clients=6", "federation.clients_per_round=6", f"combine={kind}"
    )
    assert isinstance(status(served, site.signed(config, run=f"combined-{kind}")), SiteStatus)


def test_arrays_that_do_not_fit_cost_nothing(site: Place, served: Declaration, job: Job) -> None:
    before = site.rounds_booked()
    key = next(key for key in job.parts if key.role in job.train)
    wrong = [
        {k: v for k, v in job.parts.items() if k != key},
        {**job.parts, key: job.parts[key][:, :1].contiguous()},
        {**job.parts, key: torch.full_like(job.parts[key], torch.nan)},
        {**job.parts, key: torch.full_like(job.parts[key], 1e30)},
        {**job.parts, replace_site(key): job.parts[key]},
    ]
    for number, parts in enumerate(wrong):
        answer = ask(served, site.signed(), replace(job, nonce=f"w{number}", parts=parts))
        assert code(answer) == "bad_job", number
    assert site.rounds_booked() == before


def replace_site(key: object) -> object:
    return key._replace(site="nowhere")  # type: ignore[attr-defined]


def test_more_than_the_operator_takes_is_refused_before_it_is_received(
    site: Place, served: Declaration, job: Job
) -> None:
    _, header = encode_job(job)
    huge = wire.Record(dict(header), {"a/b": np.zeros(300_000, np.float32)}, site.signed())
    sent = []

    def counted() -> Iterator[Piece]:
        for piece in wire.pieces(huge):
            sent.append(len(piece.data))
            yield piece
            time.sleep(0.3)  # gRPC reads ahead

    with stub_of(served) as stub:
        (first, *_) = stub.Train(counted(), timeout=30)
    assert first.header.fields["code"].text == "bad_job"
    assert sum(sent) < 1_200_000


def test_jobs_that_are_none_are_answered_and_nothing_is_booked(
    site: Place, served: Declaration, job: Job
) -> None:
    arrays, header = encode_job(job)
    before = site.rounds_booked()
    for fields in ({}, {**header, "round": "one"}, {**header, "codec": "none"}, {"train": "b"}):
        assert code(send(served, wire.Record(dict(fields), arrays, site.signed()))) == "bad_job"
    assert site.rounds_booked() == before


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [Piece(data=b"x")],
        [Piece()],
        [Piece(header=wire.Header()), Piece(header=wire.Header())],
        [Piece(header=wire.Header(arrays=[wire.ArraySpec(name="a", shape=[2**40, 2**40])]))],
        [Piece(header=wire.Header(arrays=[wire.ArraySpec(name="a", shape=[0, 2**63])]))],
        [Piece(header=wire.Header(arrays=[wire.ArraySpec(name="a", shape=[1])] * 2))],
    ],
    ids=["nothing", "data", "empty", "two headers", "huge", "huge and empty", "twice"],
)
def test_pieces_that_make_no_job_are_answered(served: Declaration, pieces: list[Piece]) -> None:
    with stub_of(served) as stub:
        (answer,) = stub.Train(iter(pieces), timeout=30)
    assert answer.header.fields["code"].text in ("bad_job", "unsigned")


def test_one_trains_one_waits_and_a_third_is_told_so(
    site: Place, served: Declaration, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, answers = threading.Event(), threading.Event(), dict[str, object]()
    assert isinstance(status(served, site.signed()), SiteStatus)

    def waiting(self: Site, sent: object) -> list[Abstention]:
        begun.set()
        assert go_on.wait(30)
        return [Abstention("client-000", "budget")]

    monkeypatch.setattr(Site, "train_many", waiting)

    def bring(nonce: str) -> None:
        answers[nonce] = ask(served, site.signed(), replace(job, nonce=nonce))

    threads = [threading.Thread(target=bring, args=(name,)) for name in ("one", "two")]
    threads[0].start()
    assert begun.wait(30)
    threads[1].start()
    wait_until(lambda: held(served) == 2)
    assert code(ask(served, site.signed(), replace(job, nonce="three"))) == "busy"
    assert isinstance(status(served, site.signed()), SiteStatus)  # does not wait behind them
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert [code(answers[name]) for name in ("one", "two")] == ["budget"] * 2  # type: ignore[arg-type]


def test_who_has_gone_before_the_turn_is_not_trained_for(
    site: Place, served: Declaration, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, trained = threading.Event(), threading.Event(), []

    def waiting(self: Site, sent: list[Job]) -> list[Abstention]:
        trained.append(sent[0].nonce)
        begun.set()
        assert go_on.wait(30)
        return [Abstention("client-000", "budget")]

    monkeypatch.setattr(Site, "train_many", waiting)
    first = threading.Thread(target=lambda: ask(served, site.signed(), replace(job, nonce="first")))
    first.start()
    assert begun.wait(30)
    with pytest.raises(grpc.RpcError) as gone:
        ask(served, site.signed(), replace(job, nonce="gone"), timeout=0.5)
    assert gone.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
    time.sleep(0.3)
    go_on.set()
    first.join(30)
    wait_until(lambda: held(served) == 0)
    assert trained == ["first"]


def test_a_sender_who_stalls_is_let_go(
    site: Place, served: Declaration, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "ARRIVAL_S", 0.5)
    arrays, header = encode_job(job)
    whole = list(wire.pieces(wire.Record(dict(header), arrays, site.signed())))
    released = threading.Event()

    def stalled() -> Iterator[Piece]:
        yield whole[0]
        released.wait(30)

    with stub_of(served) as stub, pytest.raises(grpc.RpcError) as cancelled:
        list(stub.Train(stalled(), timeout=20))
    released.set()
    assert cancelled.value.code() is grpc.StatusCode.CANCELLED  # type: ignore[attr-defined]
    monkeypatch.undo()
    wait_until(lambda: held(served) == 0)


def test_the_health_service_says_that_it_serves(served: Declaration) -> None:
    with grpc.insecure_channel(f"unix:{served.agent.socket}") as channel:
        asked = health_pb2.HealthCheckRequest(service="fedlr.agent.v1.Agent")
        answer = health_pb2_grpc.HealthStub(channel).Check(asked, timeout=10)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_only_user_and_group_reach_the_socket(served: Declaration) -> None:
    socket = served.agent.socket
    assert stat.S_IMODE(socket.stat().st_mode) == 0o660
    assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o750


def test_a_second_agent_is_refused(site: Place, served: Declaration) -> None:
    with pytest.raises(RunError, match="another agent serves"), agent(site):
        pass
    assert isinstance(status(served, site.signed()), SiteStatus)


def test_a_folder_that_others_can_write_or_that_holds_more_is_no_place_for_a_socket(
    tmp_path: Path,
) -> None:
    site = place(tmp_path)
    door = tmp_path / "door"
    door.mkdir()
    door.chmod(0o777)
    with pytest.raises(RunError, match="has mode 777"), agent(site):
        pass
    door.chmod(0o750)
    (door / "train.jsonl").write_text("rows of patients")
    with pytest.raises(RunError, match=r"holds train\.jsonl beside the socket"), agent(site):
        pass
    assert not (door / "agent.sock").exists()


def test_a_socket_beside_the_data_is_refused(tmp_path: Path) -> None:
    site = place(tmp_path, agent={"socket": "agent.sock"})
    before = stat.S_IMODE(tmp_path.stat().st_mode)
    with pytest.raises(RunError, match="a folder of its own"), agent(site):
        pass
    assert stat.S_IMODE(tmp_path.stat().st_mode) == before


def test_a_socket_that_a_killed_agent_left_is_no_hindrance(tmp_path: Path) -> None:
    site = place(tmp_path)
    (tmp_path / "door").mkdir()
    (tmp_path / "door").chmod(0o750)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "door" / "agent.sock"))
    with agent(site) as served:
        assert isinstance(status(served, site.signed()), SiteStatus)


def test_what_a_site_is_shows_without_its_rows(tmp_path: Path) -> None:
    # How long an answer takes would tell of them.
    site = place(tmp_path)
    job = first_job(site)
    with agent(site) as served:
        (tmp_path / "data" / "train.jsonl").unlink()
        assert isinstance(status(served, site.signed()), SiteStatus)
        assert code(ask(served, site.signed(), job)) == "policy"
    assert site.rounds_booked() == 0


def test_rows_are_read_anew_for_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site, rows = place(tmp_path), list[int]()
    job, path = first_job(site), tmp_path / "data" / "train.jsonl"
    real = Site.train_many

    def counting(self: Site, sent: Sequence[Job]) -> list[ClientUpdate | Abstention]:
        rows.append(self.units.count)
        return real(self, sent)

    monkeypatch.setattr(Site, "train_many", counting)
    with agent(site) as served:
        ask(served, site.signed(), job)
        path.write_text("\n".join(path.read_text().splitlines()[:30]) + "\n")
        ask(served, site.signed(), replace(job, round=1, nonce="n1"))
        ask(served, site.signed(run="next"), replace(job, run="next"))
    assert rows == [SIZE, SIZE, 30]


def test_a_job_in_training_is_finished_and_kept_when_the_agent_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, begun, go_on = place(tmp_path), threading.Event(), threading.Event()
    job, order, real = first_job(site), site.signed(), LocalTrainer.train

    def slowly(self: LocalTrainer, *given: Any) -> Any:
        begun.set()
        assert go_on.wait(30)
        return real(self, *given)

    monkeypatch.setattr(LocalTrainer, "train", slowly)
    with agent(site) as served:
        sender = threading.Thread(target=lambda: impatient(served, order, job))
        sender.start()
        assert begun.wait(30)
        sender.join(30)  # and has gone
        threading.Timer(0.5, go_on.set).start()
    with agent(site) as served:
        again = ask(served, order, job)
    assert isinstance(again, ClientUpdate)
    assert site.rounds_booked() == 1


def impatient(served: Declaration, order: str, job: Job) -> None:
    with pytest.raises(grpc.RpcError):
        ask(served, order, job, timeout=5)


def test_an_agent_makes_no_ledger(tmp_path: Path) -> None:
    site = place(tmp_path)
    site.ledger.unlink()
    with pytest.raises(LedgerError, match="fedlr ledger new"), agent(site):
        pass
    assert not site.ledger.exists()


def test_a_run_waits_for_its_operator_where_they_want_to_look_at_it(tmp_path: Path) -> None:
    site = place(tmp_path, allow={"approve": True})
    job, order = first_job(site), site.signed()
    with agent(site) as served:
        assert status(served, order) == "unapproved"
        assert code(ask(served, order, job)) == "unapproved"
        assert site.rounds_booked() == 0
        OrderBook(orders_folder(served.ledger)).approve(RUN)
        assert isinstance(ask(served, order, job), ClientUpdate)
        later = site.signed(expires=site.order().expires + 60)
        assert isinstance(status(served, later), SiteStatus)
        other = site.signed(site.config("federation.rounds=2"))
        assert status(served, other) == "replayed"


def test_the_budget_of_a_run_is_the_operators(tmp_path: Path) -> None:
    site = place(tmp_path, budget={"epsilon_per_run": 7.5})
    job = first_job(site)
    with agent(site) as served:
        answers = [
            ask(served, site.signed(), replace(job, round=number, nonce=f"n{number}"))
            for number in range(3)
        ]
    codes = [answer.code if isinstance(answer, Abstention) else "" for answer in answers]
    # Alone the first round is 7.2, all three are the 8 that the noise was calibrated for.
    assert codes[0] == ""
    assert codes[-1] == "run_budget"
    assert site.rounds_booked() == codes.count("")


def test_a_paid_update_outlives_the_agent(tmp_path: Path) -> None:
    site = place(tmp_path)
    job, order = first_job(site), site.signed()
    with agent(site) as served:
        first = ask(served, order, job)
    with agent(site) as served:
        again = ask(served, order, job)
    assert isinstance(first, ClientUpdate)
    assert isinstance(again, ClientUpdate)
    assert all(torch.equal(value, again.parts[key]) for key, value in first.parts.items())
    assert site.rounds_booked() == 1

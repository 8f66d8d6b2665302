"""A whole real site in a folder: policy, ledger, rows and model; a coordinator, and an agent."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client import wire
from client.agent import Agent, serve
from client.agent_pb2 import StatusRequest
from client.agent_pb2_grpc import AgentStub
from client.declaration import Declaration, read_declaration
from client.orderbook import OrderBook
from client.resident import Resident
from fedlr.build import Workbench, build
from fedlr.cli.compose import compose
from fedlr.config import RunConfig, to_json
from fedlr.methods.method import ClientUpdate, Parts
from fedlr.privacy.ledger import SqliteLedger
from fedlr.signing import RunOrder, public_key, sign
from fedlr.training import jobs
from fedlr.training.jobs import Abstention, Job, Provenance, SiteStatus, encode_job
from server.session import first
from tests.cli.small import LABELS, small

RUN = "tiny-1a2b"
SIZE = 40
"""Rows of `small`, and what the operator declares."""


@dataclass(frozen=True)
class Place:
    """A site's folder, and who may ask it.

    Attributes:
        folder: Holds everything.
        words: Overrides of the run that its coordinator asks for.
        key: The coordinator's.
    """

    folder: Path
    words: list[str]
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)

    @property
    def policy(self) -> Path:
        return self.folder / "site.toml"

    @property
    def declaration(self) -> Declaration:
        return read_declaration(self.policy)

    @property
    def ledger(self) -> Path:
        return self.declaration.ledger

    def config(self, *words: str) -> RunConfig:
        return compose([*self.words, *words])

    def order(self, config: RunConfig | str | None = None, **changes: Any) -> RunOrder:
        now = int(time.time())
        text = config if isinstance(config, str) else to_json(config or self.config())
        return replace(RunOrder(RUN, text, now, now + 3600), **changes)

    def signed(self, config: RunConfig | str | None = None, **changes: Any) -> str:
        return sign(self.order(config, **changes), self.key)

    def rounds_booked(self) -> int:
        with closing(SqliteLedger(self.ledger)) as ledger:
            return ledger.joins()


def place(folder: Path, *words: str, **sections: Mapping[str, Any]) -> Place:
    """Make a site; ``sections`` change its policy, a section ``top`` the lines above them."""
    made = Place(folder, [*small(folder), *words])
    content: dict[str, dict[str, Any]] = {
        "top": {
            "client": "client-000",
            "declared_size": SIZE,
            "unit": "example",
            "labels": list(LABELS),
            "source_id": "ward-7",
            "ledger": "ward.sqlite",
        },
        "budget": {"delta": 1e-2, "epsilon_total": 50.0},
        "allow": {"coordinators": [public_key(made.key)]},
        "data": {"path": "data"},
        "model": {"name": str(folder / "model")},
        "kernels": {"device": "cpu"},
        "agent": {"socket": "door/agent.sock", "job_megabytes": 1},
    }
    for name, changes in sections.items():
        content[name] = {**content[name], **changes}
    lines = []
    for name, values in content.items():
        lines += [] if name == "top" else [f"[{name}]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    made.policy.write_text("\n".join(lines) + "\n", encoding="utf-8")
    SqliteLedger(made.ledger, "ward-7", disjoint="made up for a test").close()
    return made


def sites_like(
    bench: Workbench, folder: Path, words: list[str], key: Ed25519PrivateKey, **top: Any
) -> list[Place]:
    """Real sites in folders ``site-<i>`` that hold the rows of a simulation's clients."""
    train, made = bench.data.train, []
    for index, plan in enumerate(bench.clients):
        site = place(
            folder / f"site-{index}",
            *words,
            top={"client": plan.name, "declared_size": plan.declared_size, **top},
            allow={"dry": True, "coordinators": [public_key(key)]},
            data={"public": True},
        )
        rows = [
            json.dumps({"text": train.texts[row], "label": int(train.labels[row])})
            for row in plan.units.rows.tolist()
        ]
        (site.folder / "data" / "train.jsonl").write_text("\n".join(rows) + "\n")
        made.append(site)
    return made


AGENTS: dict[Path, Agent] = {}
"""The agents of this process, by policy file: for tests that look inside."""


class Known(Agent):
    """An agent that is in `AGENTS`."""

    def __init__(self, declaration: Declaration, resident: Resident, orders: OrderBook) -> None:
        super().__init__(declaration, resident, orders)
        AGENTS[declaration.path] = self


@contextmanager
def agent(site: Place) -> Iterator[Declaration]:
    """Serve a site in a thread of this process; ends with it."""
    declaration, stop, failed = site.declaration, threading.Event(), list[BaseException]()
    ready = threading.Event()

    def say(text: str) -> None:
        if text.startswith("serving"):
            ready.set()

    def work() -> None:
        try:
            with patch("client.agent.Agent", Known):
                serve(declaration, say, stop.wait)
        except BaseException as error:
            failed.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert ready.wait(60)
        if failed:
            raise failed[0]
        yield declaration
    finally:
        stop.set()
        thread.join(60)
        assert not thread.is_alive()


@contextmanager
def stub_of(declaration: Declaration) -> Iterator[AgentStub]:
    with grpc.insecure_channel(f"unix:{declaration.agent.socket}") as channel:
        yield AgentStub(channel)


def status(declaration: Declaration, order: str) -> SiteStatus | str:
    """What the site says of itself, or the code of its refusal."""
    with stub_of(declaration) as stub:
        fields = wire.fields_of(stub.Status(StatusRequest(order=order), timeout=60).fields)
    return str(fields["code"]) if "code" in fields else jobs.decode_status(fields)


def ask(
    declaration: Declaration, order: str, job: Job, timeout: float = 60
) -> ClientUpdate | Abstention:
    """Bring a job and return the answer."""
    arrays, header = encode_job(job)
    return send(declaration, wire.Record(dict(header), arrays, order), timeout)


def send(
    declaration: Declaration, record: wire.Record, timeout: float = 60
) -> ClientUpdate | Abstention:
    with stub_of(declaration) as stub:
        stream = stub.Train(wire.pieces(record), timeout=timeout)
        announced = wire.opening(stream, 1 << 30)
        arrays = wire.arrays_of(announced, stream)
    return jobs.decode_outcome(arrays, announced.fields)


def server_side(site: Place, *words: str) -> tuple[Workbench, Parts]:
    """What a coordinator builds of the same configuration, and what it broadcasts first."""
    bench = build(site.config(*words))
    return bench, bench.method.broadcast(first(bench).state)


def first_job(site: Place, nonce: str = "n0", **changes: Any) -> Job:
    """The first job of the run."""
    bench, parts = server_side(site)
    phase = bench.method.plan(first(bench).state).phases[0]
    made = Job(RUN, 0, 0, nonce, phase.train, phase.send, parts, bench.provenance)
    return replace(made, **changes)


__all__ = ["RUN", "Place", "Provenance", "agent", "ask", "first_job", "place", "send", "status"]

"""A stranger's app, as the SuperNode's user, gets nothing of the agent's, and spends no more than
its policy allows.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.wire import Record, pieces
from fedlr.cli.main import main
from fedlr.deploy.certificates import new_authority
from fedlr.methods.method import ClientUpdate
from fedlr.signing import CLOCKS_APART_S, public_key, sign
from fedlr.training.jobs import Job, SiteStatus, encode_job
from tests.cli.small import LABELS, small
from tests.client.intruder import CONNECTIONS, GOT
from tests.client.processes import FEDLR, Running, running
from tests.client.real_site import RUN, SIZE, Place, ask, first_job, status
from tests.client.users import ROOT, Users, make_users, missing
from tests.deploy.test_certificates import write_authority

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=missing() or "all is here"),
]

DENIED = {"EACCES", "EPERM", "ENOENT"}
"""No way in, not allowed, or not to be seen."""


@dataclass(frozen=True)
class Machine(Place):
    """A site that `fedlr site init` made as root and handed over to its two users."""

    @property
    def policy(self) -> Path:
        return self.folder / "site" / "site.toml"

    @property
    def users(self) -> Users:
        return Users(self.folder / "users")

    @property
    def rows(self) -> Path:
        return self.folder / "data" / "train.jsonl"

    def environment(self) -> dict[str, str]:
        """Of a process of either user."""
        return {
            "PATH": os.environ["PATH"],
            "HOME": "/nonexistent",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def run(self, user: str, *words: str) -> str:
        done = subprocess.run(
            [*self.users.around(user), *words],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            cwd=ROOT,
            env=self.environment(),
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return str(done.stdout)

    def intrude(self, user: str, asked: Mapping[str, Any]) -> dict[str, str]:
        path = self.folder / "asked.json"
        path.write_text(json.dumps(asked))
        path.chmod(0o644)
        told = self.run(user, sys.executable, "-m", "tests.client.intruder", str(path))
        found: dict[str, str] = json.loads(told.splitlines()[-1])
        return found

    def secrets(self) -> dict[str, str]:
        ledger = self.ledger
        return {
            "the rows": str(self.rows),
            "the policy": str(self.policy),
            "the ledger": str(ledger),
            "its log": f"{ledger}-wal",
            "its witness": f"{ledger}.witness",
            "the orders": f"{ledger}.orders",
            "an order": f"{ledger}.orders/{RUN}.json",
            "the lock": f"{ledger}.agent",
            "the ledger's folder": str(ledger.parent),
        }


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    folder = Path(tempfile.mkdtemp(prefix="fedlr-two-users-"))
    try:
        folder.chmod(0o711)  # pytest's own folders are root's alone
        (folder / "users").mkdir()
        make_users(folder / "users")
        made = Machine(folder, [*small(folder), "federation.rounds=2"])
        hand_over(made)
        yield made
    finally:
        shutil.rmtree(folder)


def hand_over(made: Machine) -> None:
    """Do as the guide says: the rows are readable by the agent's user alone."""
    authority = write_authority(made.folder, new_authority("test"), "test")
    for path in (made.folder / "data", *(made.folder / "data").iterdir()):
        shutil.chown(path, 64_001, 64_001)
        path.chmod(0o700 if path.is_dir() else 0o600)
    for path in (made.folder / "model").iterdir():
        path.chmod(0o644)
    checked = [word for word in made.words if word.startswith(("model", "adapter"))]
    made.run(
        "root",
        *(FEDLR, "site", "init", str(made.folder / "site"), *checked, "--client", "client-000"),
        *("--data", str(made.folder / "data"), "--label", LABELS[0], "--label", LABELS[1]),
        *("--server", "127.0.0.1:9", "--authority", str(authority)),
        *("--coordinator", public_key(made.key), "--disjoint", "made for a test"),
        *("--epsilon-total", "50", "--epsilon-per-run", "8.5", "--delta", "0.01"),
        *("--declared-size", str(SIZE)),
        *("--model", str(made.folder / "model"), "--device", "cpu"),
    )


@pytest.fixture(scope="module")
def job(machine: Machine) -> Job:
    return first_job(machine)


@pytest.fixture(scope="module")
def agent(machine: Machine, job: Job) -> Iterator[Running]:
    around, log = machine.users.around("fedlr"), machine.folder / "agent.log"
    with running(machine.policy, log, around, machine.environment()) as made:
        asked = ask(machine.declaration, machine.signed(), job)
        assert isinstance(asked, ClientUpdate)
        yield made


def owner(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_uid, stat.S_IMODE(found.st_mode)


def test_the_agent_is_another_user_and_what_it_has_is_its_own(
    machine: Machine, agent: Running
) -> None:
    assert owner(Path(f"/proc/{agent.process.pid}"))[0] == 64_001
    closed = {name: text for name, text in machine.secrets().items() if name != "an order"}
    for name, text in closed.items():
        user, mode = owner(Path(text))
        assert (user, mode & 0o077) == (64_001, 0), name
    assert owner(machine.folder / "site" / "node" / "key") == (64_002, 0o600)


def test_its_files_and_its_process_are_out_of_reach(machine: Machine, agent: Running) -> None:
    asked = {"files": machine.secrets(), "pid": agent.process.pid}
    found = machine.intrude("flower", asked)
    assert len(found) > 50
    assert {name: told for name, told in found.items() if told not in DENIED} == {}
    assert agent.process.poll() is None


def test_the_same_attempts_succeed_where_they_may(machine: Machine, agent: Running) -> None:
    # Or a mistake in an attempt would pass for a denial.
    only = [f"read {name}" for name in machine.secrets()]
    only += ["read environ", "read maps", "read fd", "follow cwd", "enter its root"]
    asked = {"files": machine.secrets(), "pid": agent.process.pid, "only": only}
    assert machine.intrude("root", asked) == dict.fromkeys(only, GOT)


def test_the_socket_stays_what_and_where_it_is(machine: Machine, agent: Running) -> None:
    socket = machine.declaration.agent.socket
    before = socket.stat()
    found = machine.intrude("flower", {"door": str(socket)})
    assert {name: told for name, told in found.items() if told not in DENIED} == {}
    assert socket.stat() == before
    assert [path.name for path in socket.parent.iterdir()] == [socket.name]


def sent(job: Job, order: str) -> list[str]:
    arrays, header = encode_job(job)
    record = Record(dict(header), arrays, order)
    return [piece.SerializeToString().hex() for piece in pieces(record)]


def false_orders(machine: Machine, job: Job) -> dict[str, tuple[str, list[str]]]:
    """Messages by name, with the code that each is to get."""
    order, other = machine.signed(), Ed25519PrivateKey.generate()
    changed = {key: value + 1e-3 for key, value in job.parts.items()}
    huge = machine.config("privacy.epsilon=1e3")
    more, later = machine.config("federation.rounds=9"), int(time.time()) + CLOCKS_APART_S + 60
    return {
        "no order": ("unsigned", sent(job, "")),
        "an altered order": ("unsigned", sent(job, order.replace("rounds", "r0unds"))),
        "an order of another coordinator": ("unsigned", sent(job, sign(machine.order(), other))),
        "an order that is over": ("expired", sent(job, machine.signed(issued=1, expires=2))),
        "an order that is to come": (
            "expired",
            sent(job, machine.signed(issued=later, expires=later + 60)),
        ),
        "the name of a run for another": ("replayed", sent(job, machine.signed(more))),
        "a nonce for another job": ("ledger", sent(replace(job, parts=changed), order)),
        "a run beyond the budget": (
            "budget",
            sent(replace(job, run="huge"), machine.signed(huge, run="huge")),
        ),
        "a job of another run": ("bad_job", sent(replace(job, run="another"), order)),
        "a job of another model": (
            "provenance",
            sent(replace(job, provenance=replace(job.provenance, base="0" * 64)), order),
        ),
    }


def test_no_false_order_is_followed(machine: Machine, agent: Running, job: Job) -> None:
    before, expected = machine.rounds_booked(), false_orders(machine, job)
    brought = [(name, parts) for name, (_, parts) in expected.items()]
    asked = {"socket": str(machine.declaration.agent.socket), "sent": brought}
    found = machine.intrude("flower", asked)
    assert found == {name: code for name, (code, _) in expected.items()}
    assert machine.rounds_booked() == before


def test_a_stolen_order_buys_no_more_than_its_run(
    machine: Machine, agent: Running, job: Job
) -> None:
    run = "stolen"
    order, before = machine.signed(run=run), machine.rounds_booked()
    brought = [
        (f"round {number}", sent(replace(job, run=run, round=number, nonce=f"s{number}"), order))
        for number in range(5)
    ]
    asked = {"socket": str(machine.declaration.agent.socket), "sent": brought}
    codes = list(machine.intrude("flower", asked).values())
    assert codes == [GOT, GOT, "max_joins", "max_joins", "max_joins"]
    assert machine.rounds_booked() == before + 2


def test_a_flood_is_over_when_it_is_over(machine: Machine, agent: Running, job: Job) -> None:
    before = agent.handles
    socket = str(machine.declaration.agent.socket)
    assert machine.intrude("flower", {"socket": socket, "flood": True}) == {"flood": GOT}
    began = time.monotonic()
    run = f"after-{CONNECTIONS}"
    assert isinstance(status(machine.declaration, machine.signed(run=run)), SiteStatus)
    answer = ask(machine.declaration, machine.signed(run=run), replace(job, run=run))
    assert isinstance(answer, ClientUpdate)
    assert time.monotonic() - began < 30
    assert agent.handles <= before + 4


def test_the_ledger_is_whole_after_all_that(machine: Machine, agent: Running) -> None:
    assert main(["ledger", "verify", str(machine.ledger)]) == 0
    assert "Traceback" not in agent.text

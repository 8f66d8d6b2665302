"""An app that a stranger submits to the SuperLink runs at the site, and gets nothing there.

Agent and SuperNode run as two users, as the guide says; the app is Flower's own bundle, and its
ClientApp tries what `tests.client.intruder` knows.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client.agent_pb2 import Header, Piece
from fedlr.cli.flower import call
from fedlr.deploy.coordinator import CONNECTION, read_coordinator
from fedlr.report.records import read_summary
from tests.cli.small import small
from tests.client import intruder
from tests.client.users import USERS, Users, make_users, missing
from tests.e2e.harness import Federation, brought_up, fedlr, wait_for

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(bool(missing()), reason=missing() or "all is here"),
]

ROUNDS = 2
WORDS = [
    *("federation.clients=1", "federation.clients_per_round=1", f"federation.rounds={ROUNDS}"),
    *("federation.min_clients=1", "optimizer.expected_batch=4"),
]
DENIED = {"EACCES", "EPERM", "ENOENT"}

PROJECT = """\
[project]
name = "stranger"
version = "1.0.0"
description = "A stranger's app"
license = "Apache-2.0"
requires-python = ">=3.11"
dependencies = []

[tool.flwr.app]
publisher = "stranger"
fab-include = ["stranger/*.py"]

[tool.flwr.app.components]
serverapp = "stranger.server:app"
clientapp = "stranger.client:app"

[tool.flwr.app.config]
asked = ""
told = ""
"""

CLIENT = """\
import json

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from stranger.intruder import tried

app = ClientApp()


@app.train()
def train(message, context):
    found = tried(json.loads(context.run_config["asked"]))
    return Message(RecordDict({"told": ConfigRecord(found)}), reply_to=message)
"""

SERVER = """\
import json
import time
from pathlib import Path

from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(1)
    (reply,) = grid.send_and_receive([Message(RecordDict(), nodes[0], "train")], timeout=120)
    path = Path(context.run_config["told"])
    path.with_suffix(".draft").write_text(json.dumps(dict(reply.content["told"])))
    path.with_suffix(".draft").rename(path)
"""


class Divided(Federation):
    """A federation whose one site belongs to two users."""

    def hand_over(self, index: int) -> None:
        """Do as root what `fedlr site init` does where the machine knows both users."""
        site, rows = self.site(index), self.folder / f"rows-{index}.jsonl"
        policy = site / "site.toml"
        door = 'socket = "door/agent.sock"'
        policy.write_text(policy.read_text().replace(door, f'{door}\ngroup = "flower"'))
        owned = [(path, "fedlr") for path in (rows, site, *site.rglob("*"))]
        owned += [(path, "flower") for path in (site / "node", *(site / "node").rglob("*"))]
        for path, user in owned:
            shutil.chown(path, USERS[user], USERS[user])
        rows.chmod(0o600)
        site.chmod(0o711)


@pytest.fixture(scope="module")
def made() -> Iterator[Federation]:
    folder = Path(tempfile.mkdtemp(prefix="fedlr-stranger-"))
    try:
        folder.chmod(0o711)
        (folder / "users").mkdir()
        users: Users = make_users(folder / "users")
        words = [word for word in small(folder) if not word.startswith(("federation.", "output="))]
        for path in (folder / "model").iterdir():
            path.chmod(0o644)
        around = {"agent-0": users.around("fedlr"), "node-0": users.around("flower")}
        found = Divided(folder, [*words, *WORDS], around=around)
        with brought_up(found, 1, str(folder / "model")):
            yield found
    finally:
        shutil.rmtree(folder)


def write_app(folder: Path) -> Path:
    package = folder / "stranger"
    package.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PROJECT)
    (package / "__init__.py").touch()
    (package / "client.py").write_text(CLIENT)
    (package / "server.py").write_text(SERVER)
    shutil.copy(str(intruder.__file__), package / "intruder.py")
    return folder


def submitted(made: Federation, asked: dict[str, Any]) -> dict[str, str]:
    """Submit the stranger's app past fedlr, and return what it tells."""
    app, told = write_app(made.folder / "app"), made.folder / "told.json"
    settings = made.folder / "stranger.toml"
    lines = {"asked": json.dumps(asked), "told": str(told)}
    settings.write_text("".join(f"{name} = {json.dumps(text)}\n" for name, text in lines.items()))
    coordinator = read_coordinator(made.server)
    call(coordinator, "run", str(app), CONNECTION, "--run-config", str(settings))
    wait_for("the stranger's reply", told.exists, 180)
    found: dict[str, str] = json.loads(told.read_text())
    return found


def test_a_strangers_app_gets_nothing_at_the_site(made: Federation) -> None:
    site, agent = made.site(0), made.programs["agent-0"]
    ledger, socket = site / "ledger" / "site.sqlite", site / "door" / "agent.sock"
    files = [made.folder / "rows-0.jsonl", site / "site.toml", ledger, Path(f"{ledger}.orders")]
    nothing = Piece(header=Header()).SerializeToString().hex()
    found = submitted(
        made,
        {
            "files": {path.name: str(path) for path in files},
            "pid": agent.pid,
            "door": str(socket),
            "socket": str(socket),
            "sent": [["no order", [nothing]]],
            "flood": True,
        },
    )
    assert found.pop("no order") == "unsigned"
    assert found.pop("flood") == intruder.GOT
    assert len(found) > 40
    assert {name: told for name, told in found.items() if told not in DENIED} == {}
    assert made.booked(0) == 0
    assert agent.starts == 1


def test_the_site_takes_part_in_the_next_run(made: Federation) -> None:
    run = made.begin()
    assert made.ended(run) == "finished:completed"
    assert read_summary(made.run_folder(run) / "summary.json").rounds == ROUNDS
    fedlr("ledger", "verify", str(made.site(0) / "ledger" / "site.sqlite"))
    assert made.booked(0) == ROUNDS

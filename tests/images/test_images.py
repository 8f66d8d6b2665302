"""Both images, and a federation on them from the commands of ``docker/README.md``.

The tests stand in the order of that guide, and need one another.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from tests.images.engine import HOST, Engine, Image, wait_healthy

pytestmark = pytest.mark.images

AGENT, NODE = 10001, 10002
SITES = ("a", "b", "c")
STAY = (
    "superlink",
    "superexec",
    *(f"{kind}-{s}" for s in SITES for kind in ("agent", "supernode")),
)
RUN = (
    *("data=file", "data.path=/data/public", "data.label_names=[no,yes]"),
    *("federation.clients=3", "federation.clients_per_round=3", "federation.rounds=2"),
    *("optimizer.steps=2", "optimizer.expected_batch=16", "kernels.threads=1"),
)
ASK = """
import http.client, ssl
import time
time.sleep(2)
for path in ("/v1/control/list-runs", "/health", "/v1/fleet/activate-node"):
    context = ssl.create_default_context(cafile="/srv/fedlr/ca.crt")
    one = http.client.HTTPSConnection("localhost", 443, context=context)
    one.request("POST", path, b"")
    print(one.getresponse().status)
"""
MAIN = """\
pid /tmp/nginx.pid;
events {}
http {
    access_log off; error_log stderr;
    client_body_temp_path /tmp/body; proxy_temp_path /tmp/proxy;
    fastcgi_temp_path /tmp/f; uwsgi_temp_path /tmp/u; scgi_temp_path /tmp/s;
    include /etc/nginx/conf.d/*.conf;
}
"""


def rows(path: Path, count: int) -> None:
    """Write made-up rows of two kinds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    words = {"no": "the road was dry and the day was long", "yes": "patient reports severe pain"}
    lines = [
        json.dumps({"text": f"{words[label]} {row}", "label": label})
        for row in range(count)
        for label in [("no", "yes")[row % 2]]
    ]
    path.write_text("\n".join(lines) + "\n")


def own(folder: Path, user: int, mode: int = 0o700) -> None:
    """Do what ``install -d -o`` and ``chown -R`` do."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder, *folder.rglob("*")):
        os.chown(path, user, user)
    folder.chmod(mode)


def told(text: str, pattern: str) -> str:
    found = re.search(pattern, text, re.M)
    assert found is not None, text
    return found[1]


@pytest.mark.parametrize("target", ["server", "client"])
def test_an_image_is_what_the_dockerfile_says(images: dict[str, Image], target: str) -> None:
    config = images[target].config
    assert config["User"] == f"{AGENT}:{AGENT}"
    assert config["Healthcheck"]["Test"][:3] == ["CMD", "fedlr", "health"]
    root = images[target].root
    assert not (root / "src").exists()
    assert not (root / "opt/fedlr/bin/pip").exists()
    assert not list((root / "opt/fedlr").rglob("*.py[co]~"))


def test_the_server_comes_up(engine: Engine) -> None:
    own(engine.folder / "server", AGENT)
    print(engine.run("server-init", "--host", HOST))
    rows(engine.folder / "public" / "validation.jsonl", 40)
    engine.start("net")
    engine.start("superlink")
    wait_healthy(engine.started["superlink"], 120)
    engine.start("superexec")
    wait_healthy(engine.started["superexec"], 120)


def test_the_proxy_lets_the_nodes_paths_through_and_nothing_else(engine: Engine) -> None:
    """With this machine's nginx in the place of the image, as its user and with its files."""
    client = next(image for name, image in engine.images.items() if "client" in name)
    (engine.folder / "nginx.conf").write_text(MAIN)  # the image has one of its own
    engine.file["services"]["proxy"]["volumes"].append("./nginx.conf:/etc/nginx/nginx.conf:ro")
    here = Image(Path("/"), client.config)
    nginx = str(shutil.which("nginx"))
    proxy = engine.start("proxy", nginx, "-e", "stderr", "-g", "daemon off;", image=here)
    answered = engine.started["superlink"].execute("python3", "-c", ASK)
    told = answered.stdout.split()
    assert told[:2] == ["404", "404"], answered.stderr + proxy.text
    assert told[2] == "415", answered.stdout  # of the SuperLink, which wants another type


@pytest.mark.parametrize("site", SITES)
def test_a_site_comes_up(engine: Engine, site: str) -> None:
    folder = engine.folder / "sites" / site
    rows(folder / "data" / "train.jsonl", 120)
    shutil.copy(engine.folder / "server" / "fedlr" / "ca.crt", folder / "ca.crt")
    own(folder, AGENT)
    shown = engine.run("coordinator", "server", "show", "/srv/fedlr", "--json")
    key = json.loads(shown)["coordinator"]
    words = ["--client", f"site-{site}", "--label", "no", "--label", "yes", "--coordinator", key]
    words += ["--epsilon-total", "50", "--disjoint", "made up", "--device", "cpu"]
    print(engine.run(f"site-init-{site}", *words))
    made = folder / "fedlr-site"
    shutil.copy(made / "node" / "key.pub", engine.folder / "server" / f"{site}.pub")
    own(made / "node", NODE)
    register = ("server", "register", "/srv/fedlr", f"/srv/{site}.pub", "--name", f"site-{site}")
    engine.run("coordinator", *register)
    agent = engine.start(f"agent-{site}")
    assert not agent.healthy()  # it loads its model first
    print(f"agent-{site} healthy after {wait_healthy(agent, 300):.0f} s")
    node = engine.start(f"supernode-{site}")
    print(f"supernode-{site} healthy after {wait_healthy(node, 120):.0f} s")


def test_all_is_well(engine: Engine) -> None:
    states = {name: engine.started[name].healthy() for name in STAY}
    print(states)
    assert all(states.values())


@pytest.mark.parametrize("name", STAY)
def test_a_service_can_write_nothing_and_become_nobody(engine: Engine, name: str) -> None:
    made = engine.started[name]
    state = made.execute("cat", "/proc/1/status", "/proc/self/status").stdout
    for one in ("CapEff", "CapPrm", "CapBnd", "CapInh"):
        assert re.findall(rf"{one}:\s+(\w+)", state)[-1] == "0" * 16, one
    assert re.findall(r"NoNewPrivs:\s+(\d)", state)[-1] == "1"
    assert re.findall(r"Uid:\s+(\d+)", state)[-1] == made.service["user"].split(":")[0]
    for place in ("/opt/fedlr/x", "/etc/x", "/srv/x", "/x"):
        assert made.execute("touch", place).returncode != 0, place
    assert made.execute("touch", "/tmp/x").returncode == 0


@pytest.mark.parametrize("site", SITES)
def test_a_supernode_finds_nothing_of_its_agent_s(engine: Engine, site: str) -> None:
    node, agent = engine.started[f"supernode-{site}"], engine.started[f"agent-{site}"]
    assert agent.execute("cat", "/data/train.jsonl", "/srv/fedlr-site/site.toml").returncode == 0
    for place in (
        "/data/train.jsonl",
        "/srv/fedlr-site/site.toml",
        "/var/lib/fedlr/ledger/site.sqlite",
    ):
        assert node.execute("cat", place).returncode != 0, place
    assert agent.execute("cat", "/proc/net/dev").stdout.count(":") == 1  # lo
    assert agent.execute("cat", "/srv/fedlr-site/node/key").returncode != 0


def test_no_server_s_program_finds_the_coordinator_s_key(engine: Engine) -> None:
    for name in ("superlink", "superexec"):
        for key in ("coordinator.key", "ca.key"):
            assert engine.started[name].execute("cat", f"/srv/fedlr/{key}").returncode != 0


def test_doctor_is_content_in_an_agent(engine: Engine) -> None:
    done = engine.started["agent-a"].execute("fedlr", "doctor", seconds=600)
    print(done.stdout, done.stderr)
    assert done.returncode == 0


def test_a_run_comes_to_its_end(engine: Engine) -> None:
    text = engine.run("coordinator", "submit", "/srv/fedlr", *RUN, seconds=900)
    print(text[-3000:])
    run = told(text, r"^/srv/fedlr/runs/(\S+)$")
    assert (engine.folder / "volumes" / "runs" / run / "summary.json").exists()
    shown = engine.started["agent-b"].execute(
        "fedlr", "ledger", "show", "/var/lib/fedlr/ledger/site.sqlite"
    )
    print(shown.stdout)
    assert shown.returncode == 0


def test_an_agent_that_is_killed_is_seen_and_comes_back(engine: Engine) -> None:
    agent, node = engine.started["agent-a"], engine.started["supernode-a"]
    address = agent.service["healthcheck"]["test"][-1]
    agent.signal(signal.SIGKILL)
    agent.process.wait(30)
    assert not agent.healthy()
    seen = node.execute("fedlr", "health", address)  # over the socket that it left behind
    print(seen.stderr)
    assert seen.returncode == 7
    assert node.healthy()
    assert engine.started["agent-b"].healthy()
    again = engine.start("agent-a")
    print(f"agent-a healthy again after {wait_healthy(again, 300):.0f} s")
    assert node.execute("fedlr", "health", address).returncode == 0


def test_an_agent_that_is_told_to_stop_stops(engine: Engine) -> None:
    agent = engine.started["agent-c"]
    agent.signal(signal.SIGTERM)
    assert agent.process.wait(60) == 0
    assert "a job in training is finished first" in agent.text


def test_a_superlink_that_is_killed_comes_back_in_the_same_network(engine: Engine) -> None:
    superlink = engine.started["superlink"]
    superlink.signal(signal.SIGKILL)
    superlink.process.wait(30)
    assert not superlink.healthy()
    assert engine.started["superexec"].healthy()
    print(f"healthy again after {wait_healthy(engine.start('superlink'), 120):.0f} s")
    shown = engine.run("coordinator", "status", "/srv/fedlr")
    print(shown)
    assert "finished:completed" in shown

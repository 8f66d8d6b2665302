"""What the images and ``docker/compose.yaml`` promise, as far as it shows without an engine."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

from fedlr import __version__
from fedlr.deploy.coordinator import OFFLINE, Coordinator
from fedlr.deploy.site_folder import AGENT_STOP_S, SiteFolder
from fedlr.told import KEPT

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text("utf-8"))
CUDA: dict[str, Any] = yaml.safe_load((ROOT / "docker" / "compose.cuda.yaml").read_text("utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SITES = ("a", "b", "c")
AGENT, NODE = "10001:10001", "10002:10002"
SECRETS = ("server.key", "superexec.secret", "coordinator.key", "ca.key", "node/key", ".toml")

each = pytest.mark.parametrize("name", SERVICES)
each_site = pytest.mark.parametrize("site", SITES)


def mounts(name: str) -> dict[str, str]:
    """Places in a service, by what they show."""
    volumes = [entry.split(":") for entry in SERVICES[name].get("volumes", [])]
    files = {one["source"]: one["target"] for one in SERVICES[name].get("secrets", [])}
    return {entry[0]: entry[1] for entry in volumes} | files


def read_only(name: str) -> set[str]:
    """Places in a service that it cannot write to."""
    return {entry.split(":")[1] for entry in SERVICES[name]["volumes"] if entry.endswith(":ro")}


def programs(words: list[str]) -> list[str]:
    """A command without the place of its program, and without where it says that it is up."""
    words = [PurePosixPath(words[0]).name, *words[1:]]
    if "--health-server-address" in words:
        at = words.index("--health-server-address")
        words = words[:at] + words[at + 2 :]
    return [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word) for word in words]


@each
def test_no_service_is_root_or_can_become_it(name: str) -> None:
    service = SERVICES[name]
    user, group = service["user"].split(":")
    assert int(user) > 10_000
    assert int(group) > 10_000
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "devices", "pid", "ipc", "userns_mode"} & set(service)


@each
def test_no_service_writes_outside_its_volumes(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["init"] is True
    assert [entry.split(":")[0] for entry in service["tmpfs"]] == ["/tmp"]
    assert service["pids_limit"] > 0


@each
def test_a_service_that_stays_is_asked_if_it_is_well(name: str) -> None:
    service = SERVICES[name]
    if "profiles" in service or name == "net":
        assert service["healthcheck"] == {"disable": True}
    else:
        assert service["healthcheck"]["test"][0] == "CMD"
        assert service["stop_grace_period"] if name != "proxy" else True
        assert service["restart"] == "unless-stopped"


@each
def test_secrets_are_files_that_only_those_see_who_need_them(name: str) -> None:
    service = SERVICES[name]
    assert set(service.get("environment", {})) <= {KEPT}  # a place, and no secret
    assert "env_file" not in service
    if "profiles" in service:
        return
    for entry in service.get("volumes", []):
        source, _, _ = entry.partition(":")
        assert not source.endswith(SECRETS) or name.startswith("agent-"), entry
        assert source not in ("./server", "./server/fedlr")
        assert not source.endswith("fedlr-site")
    held = {secret["source"] for secret in service.get("secrets", [])}
    expected = {
        "superlink": {"server.key", "superexec.secret"},
        "superexec": {"superexec.secret"},
        "proxy": {"server.key"},
        **{f"supernode-{site}": {f"node-{site}"} for site in SITES},
    }
    assert held == expected.get(name, set())


@each_site
def test_a_supernode_shares_the_socket_with_its_agent_and_nothing_else(site: str) -> None:
    agent, node = mounts(f"agent-{site}"), mounts(f"supernode-{site}")
    assert set(agent) & set(node) == {f"door-{site}"}
    assert set(node) == {
        *(f"door-{site}", f"node-{site}", f"./sites/{site}/fedlr-site/node/ca.crt")
    }
    assert read_only(f"supernode-{site}") >= {"/srv/fedlr-site/door", "/srv/fedlr-site/node/ca.crt"}
    assert SERVICES[f"agent-{site}"]["user"] == AGENT
    assert SERVICES[f"supernode-{site}"]["user"] == NODE
    assert SERVICES[f"agent-{site}"]["group_add"] == [NODE.split(":")[1]]


@each_site
def test_an_agent_has_no_network_and_keeps_its_ledger_in_a_volume(site: str) -> None:
    agent = SERVICES[f"agent-{site}"]
    assert agent["network_mode"] == "none"
    assert mounts(f"agent-{site}")[f"ledger-{site}"] == "/var/lib/fedlr/ledger"
    assert {"/srv/fedlr-site/site.toml", "/data", "/models"} == read_only(f"agent-{site}")
    assert agent["stop_grace_period"] == f"{AGENT_STOP_S // 3600}h"


def test_sites_share_nothing() -> None:
    for one in SITES:
        for other in set(SITES) - {one}:
            for kind in ("agent", "supernode", "site-init"):
                text = str([SERVICES[f"{kind}-{one}"].get("volumes"), mounts(f"{kind}-{one}")])
                assert f"sites/{other}" not in text
                assert f"-{other}'" not in text


def test_the_runs_and_the_superlink_s_state_outlive_their_containers() -> None:
    assert mounts("superexec")["runs"] == "/srv/fedlr/runs"
    assert mounts("superlink")["superlink"] == "/srv/fedlr/superlink"
    used = {entry.split(":")[0] for one in SERVICES.values() for entry in one.get("volumes", [])}
    assert {name for name in used if not name.startswith(".")} == set(COMPOSE["volumes"])


def test_a_server_app_finds_what_was_submitted() -> None:
    kept = Coordinator(Path("/srv/fedlr")).environment()[KEPT]
    assert SERVICES["superexec"]["environment"] == {KEPT: kept}
    assert f"./server/fedlr/submitted/configs:{kept}:ro" in SERVICES["superexec"]["volumes"]


def test_the_superlink_is_reached_through_the_proxy_alone() -> None:
    published = {name for name, service in SERVICES.items() if "ports" in service}
    assert published == {"net"}
    assert SERVICES["net"]["ports"] == ["443:443"]
    within = {name for name, one in SERVICES.items() if one.get("network_mode") == "service:net"}
    assert within == {"superlink", "superexec", "proxy", "coordinator"}
    assert "127.0.0.1" in SERVICES["superlink"]["command"]


def test_the_server_runs_what_its_units_run() -> None:
    for name, words in Coordinator(Path("/srv/fedlr")).commands(8000).items():
        assert programs(SERVICES[name.removeprefix("fedlr-")]["command"]) == programs(words)


@each_site
def test_a_site_runs_what_its_units_run(site: str) -> None:
    made = SiteFolder(Path("/srv/fedlr-site"), Path("/var/lib/fedlr/ledger"))
    node = made.node_command("fl.example.org:443", 9094)
    assert programs(SERVICES[f"supernode-{site}"]["command"]) == programs(node)
    assert programs(SERVICES[f"agent-{site}"]["command"]) == programs(made.agent_command())
    places = mounts(f"supernode-{site}")
    assert places[f"node-{site}"] == str(made.key)
    assert places[f"door-{site}"] == str(made.socket.parent)
    asked = SERVICES[f"agent-{site}"]["healthcheck"]["test"]
    assert asked == ["CMD", "fedlr", "health", f"unix:{made.socket}"]
    init = shlex.join(SERVICES[f"site-init-{site}"]["entrypoint"])
    assert f"fedlr site init {made.folder} --ledger-folder {made.ledger.parent}" in init


@pytest.mark.parametrize("name", ["superlink", "superexec", "supernode-a"])
def test_a_program_of_flower_is_asked_where_it_says_that_it_is_up(name: str) -> None:
    command = SERVICES[name]["command"]
    said = command[command.index("--health-server-address") + 1]
    assert SERVICES[name]["healthcheck"]["test"] == ["CMD", "fedlr", "health", said]


def test_every_image_is_named_by_its_version() -> None:
    for service in (*SERVICES.values(), *CUDA["services"].values()):
        image, _, tag = service["image"].rpartition(":")
        assert tag[0].isdigit(), service["image"]
        if image.startswith("fedlr-"):
            assert tag.removesuffix("-cuda") == __version__


def test_the_cuda_file_changes_the_agents_alone() -> None:
    expected = {f"{kind}-{site}" for kind in ("agent", "site-init") for site in SITES}
    assert set(CUDA["services"]) == expected
    for service in CUDA["services"].values():
        assert set(service) <= {"image", "build", "environment", "tmpfs", "deploy"}


def stage(name: str) -> str:
    """The lines of a stage of the Dockerfile."""
    found = re.search(rf"^FROM \S+ AS {name}$(.*?)(?=^FROM |\Z)", DOCKERFILE, re.M | re.S)
    assert found is not None, name
    return found[1]


def test_the_images_are_pinned_as_pyproject_and_the_constraints_say() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    base = re.search(r"^ARG BASE=python:(\d+)\.(\d+)\.\d+-slim-\w+$", DOCKERFILE, re.M)
    assert base is not None, "BASE must be a full version"
    lowest = re.fullmatch(r">=(\d+)\.(\d+)", project["requires-python"])
    assert lowest is not None
    assert tuple(map(int, base.groups())) >= tuple(map(int, lowest.groups()))
    classifiers = [one.rpartition(" ")[2] for one in project["classifiers"]]
    assert ".".join(base.groups()) in classifiers
    torch = re.search(r'^ARG TORCH="(\S+)"$', DOCKERFILE, re.M)
    constraints = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    assert torch is not None
    assert torch[1] in constraints
    assert f"TORCH ?= {torch[1]}\n" in (ROOT / "Makefile").read_text("utf-8")
    assert "--constraint constraints.txt" in stage("build")
    extras = re.search(r'^ARG EXTRAS="(\w+)"$', DOCKERFILE, re.M)
    assert extras is not None
    assert extras[1] in project["optional-dependencies"]


def test_compose_builds_what_the_dockerfile_builds_by_itself() -> None:
    own = dict(re.findall(r'^ARG (\w+)="?([^"\n]+)"?$', DOCKERFILE, re.M))
    for service in SERVICES.values():
        if "build" in service:
            args = service["build"]["args"]
            assert args == {name: f"${{{name}:-{value}}}" for name, value in own.items()}


@pytest.mark.parametrize("name", ["server", "client"])
def test_an_image_is_nobody_s_root_and_has_a_health_check(name: str) -> None:
    text = stage(name)
    assert f"USER {AGENT}\n" in text
    assert "HEALTHCHECK" in text
    assert "RUN" not in text  # both are one installation, and share every layer


def test_the_numbers_of_the_users_are_the_same_everywhere() -> None:
    text = stage("runtime")
    assert "groupadd --gid 10001 fedlr" in text
    assert "groupadd --gid 10002 flower" in text
    assert "useradd --uid 10001 --gid fedlr --groups flower" in text
    assert "useradd --uid 10002 --gid flower" in text


def test_nothing_in_an_image_calls_home() -> None:
    text = stage("runtime")
    for name, value in OFFLINE.items():
        assert f"{name}={value}" in text


def test_a_build_sees_what_the_wheel_is_made_of_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    seen = {rule[1:] for rule in rules if rule.startswith("!")}
    assert seen == {
        *("pyproject.toml", "constraints.txt", "README.md", "LICENSE"),
        *("fedlr", "server", "client", "conf"),
    }

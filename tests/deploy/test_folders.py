"""The folders of a coordinator and a site: whole or not there, secrets for their owners alone."""

from __future__ import annotations

import grp
import os
import pwd
import shlex
import shutil
import stat
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from client import proxy
from fedlr.deploy import coordinator as coordinators
from fedlr.deploy.bundle import write_app, write_run_config
from fedlr.deploy.certificates import names_of
from fedlr.deploy.coordinator import (
    Coordinator,
    ServerSettings,
    read_coordinator,
    renew_certificate,
    write_coordinator,
)
from fedlr.deploy.site_folder import SiteFolder, SiteSettings, hand_over, policy_text, write_site
from fedlr.deploy.units import unit
from fedlr.deploy.users import missing
from fedlr.errors import ConfigError
from fedlr.signing import public_key, read_key

SETTINGS = ServerSettings(("fl.example.org",))


def open_to_others(folder: Path) -> set[str]:
    """Files below a folder that others than their owner may read."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH)
    }


@pytest.fixture
def made(tmp_path: Path) -> Coordinator:
    return write_coordinator(tmp_path / "server", SETTINGS)


def test_secrets_are_the_owner_s_alone(made: Coordinator) -> None:
    secrets = {"coordinator.key", "ca.key", "server.key", "superexec.secret"}
    everything = {p.relative_to(made.folder).as_posix() for p in made.folder.rglob("*.*")}
    assert secrets <= everything
    assert not secrets & open_to_others(made.folder)
    assert made.folder.stat().st_mode & 0o777 == 0o750
    assert len(public_key(read_key(made.key))) == 64


def test_the_world_reaches_the_nodes_paths_and_nothing_else(made: Coordinator) -> None:
    text = (made.folder / "reverse-proxy.conf").read_text()
    places = [line.split()[1] for line in text.splitlines() if line.strip().startswith("location")]
    assert places == ["/v1/fleet/", "/"]
    assert "return 404" in text.split("location / ")[1]
    superlink = (made.folder / "fedlr-superlink.service").read_text()
    assert "--host 127.0.0.1" in superlink
    assert "--enable-supernode-auth" in superlink
    assert "--isolation process" in superlink
    assert "--insecure" not in superlink
    for name in ("fedlr-superlink", "fedlr-superexec"):
        text = (made.folder / f"{name}.service").read_text()
        assert f"InaccessiblePaths={made.key} {made.authority_key}\n" in text


def test_flower_finds_the_connection(made: Coordinator) -> None:
    found = tomllib.loads((made.home / "config.toml").read_text())["superlink"]
    connection = found[found["default"]]
    assert connection["address"] == "127.0.0.1:8000"
    assert connection["root-certificates"] == str(made.authority)
    assert read_coordinator(made.folder) == made


def test_a_folder_that_holds_something_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    write_coordinator(tmp_path / "server", SETTINGS)  # empty ones are taken
    key = (tmp_path / "server" / "coordinator.key").read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        write_coordinator(tmp_path / "server", SETTINGS)
    assert (tmp_path / "server" / "coordinator.key").read_bytes() == key


def test_a_failure_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(coordinators, "_texts", full)
    with pytest.raises(ConfigError, match="No space left"):
        write_coordinator(tmp_path / "server", SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_another_authority_is_used_and_its_key_not_copied(tmp_path: Path) -> None:
    first = write_coordinator(tmp_path / "first", SETTINGS)
    given = ServerSettings(("b.example.org",), authority=(first.authority, first.authority_key))
    second = write_coordinator(tmp_path / "second", given)
    assert second.authority.read_bytes() == first.authority.read_bytes()
    assert not second.authority_key.exists()
    with pytest.raises(ConfigError, match=r"ca\.key is not here; give it with --authority-key"):
        renew_certificate(second, ["b.example.org"])
    renew_certificate(second, ["c.example.org"], first.authority_key)
    assert names_of(second.certificate.read_bytes())[0] == "c.example.org"


def test_a_renewed_certificate_is_for_the_same_authority(made: Coordinator) -> None:
    before = made.certificate.read_bytes(), made.authority.read_bytes()
    renew_certificate(made, ["new.example.org"])
    assert made.certificate.read_bytes() != before[0]
    assert made.authority.read_bytes() == before[1]
    assert names_of(made.certificate.read_bytes())[0] == "new.example.org"
    assert made.certificate_key.stat().st_mode & 0o777 == 0o600


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        ServerSettings(("https://a/",), public_port=0, port=99999, user="Me!")
    told = str(caught.value)
    assert all(word in told for word in ("https://a/", "public port = 0", "99999", "Me!"))
    with pytest.raises(ConfigError, match="--host is missing"):
        ServerSettings(())


def test_no_coordinator_s_folder_is_told_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fedlr server init"):
        read_coordinator(tmp_path)


POLICY: dict[str, Any] = {
    "client": 'a "b" \\ c',
    "declared_size": 40,
    "labels": ["no", "ja, schön"],
    "budget": {"delta": 1e-06, "epsilon_total": 10.0},
    "allow": {"approve": True},
}


def settings(folder: Path, **changes: Any) -> SiteSettings:
    (folder / "ca.crt").write_text("certificate")
    values = {"server": "h:443", "authority": folder / "ca.crt", "disjoint": "new data"}
    return SiteSettings(**(values | changes))


def site(folder: Path, options: SiteSettings) -> SiteFolder:
    return write_site(folder, POLICY, options, lambda ledger: ledger.touch(0o600))


def test_a_policy_is_read_as_it_was_meant() -> None:
    assert tomllib.loads(policy_text(POLICY)) == POLICY


def test_a_site_s_secrets_are_its_own(tmp_path: Path) -> None:
    made = site(tmp_path / "site", settings(tmp_path))
    assert open_to_others(made.folder) == {
        *("node/key.pub", "node/ca.crt", "fedlr-agent.service", "fedlr-supernode.service")
    }
    assert made.node.stat().st_mode & 0o777 == 0o700
    assert made.ledger.parent.stat().st_mode & 0o777 == 0o700
    assert not made.socket.parent.exists()  # the agent makes it, for the group that it has then
    assert tomllib.loads(made.policy.read_text()) == POLICY
    with pytest.raises(ConfigError, match="exists already"):
        site(tmp_path / "site", settings(tmp_path))


def test_the_node_is_told_the_agent_as_flower_reads_it(tmp_path: Path) -> None:
    from flwr.common.config import parse_config_args

    made = site(tmp_path / "a site", settings(tmp_path))
    text = (made.folder / "fedlr-supernode.service").read_text()
    words = shlex.split(next(x for x in text.splitlines() if x.startswith("ExecStart="))[10:])
    found = parse_config_args([words[words.index("--node-config") + 1]])
    assert found == {proxy.AGENT: str(made.socket)}
    assert f"User={settings(tmp_path).node_user}" in text
    assert "ReadWritePaths" in text


def test_users_that_are_not_there_are_made_by_hand(tmp_path: Path) -> None:
    options = settings(tmp_path, user="nobody-here-1", node_user="nobody-here-2")
    made = site(tmp_path / "site", options)
    told = hand_over(made, options)
    assert any(line.startswith("chown -R nobody-here-1:") for line in told)
    assert any(line.startswith("chown -R nobody-here-2:") for line in told)
    if os.geteuid() == 0:
        assert "useradd --system nobody-here-1" in told


def test_root_hands_the_files_over(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    options = settings(tmp_path, user="daemon", node_user="nobody", group=None)
    made = site(tmp_path / "site", options)
    assert hand_over(made, options) == []
    assert (made.policy.owner(), made.key.owner()) == ("daemon", "nobody")
    assert made.folder.stat().st_mode & 0o777 == 0o711


def test_who_is_not_in_the_socket_s_group_is_told(tmp_path: Path) -> None:
    group = grp.getgrgid(pwd.getpwnam("nobody").pw_gid).gr_name
    options = settings(tmp_path, user="daemon", node_user="nobody", group=group)
    made = site(tmp_path / "site", options)
    left = hand_over(made, options)
    assert left[0] == f"usermod -aG {group} daemon"
    if os.geteuid() == 0:
        assert left[1:] == []
        assert made.policy.owner() == "daemon"
    new = ["nobody-here-2", "nobody-here-1"]
    assert missing(new, "nobody-here-2") == [
        "useradd --system nobody-here-2",
        "useradd --system nobody-here-1",
        "usermod -aG nobody-here-2 nobody-here-1",
    ]
    assert missing(["daemon"], "no-group-here") == [
        "groupadd --system no-group-here",
        "usermod -aG no-group-here daemon",
    ]
    assert missing(["daemon", "nobody"], None) == []


def test_a_ledger_may_have_a_folder_of_its_own(tmp_path: Path) -> None:
    kept = tmp_path / "a volume"
    kept.mkdir(mode=0o700)
    options = settings(tmp_path, user="daemon", node_user="nobody", group=None, ledger_folder=kept)
    made = site(tmp_path / "site", options)
    assert made.ledger == kept / "site.sqlite"
    assert not (made.folder / "ledger").exists()
    unit_text = (made.folder / "fedlr-agent.service").read_text()
    assert f'ReadWritePaths={made.folder} "{kept}"' in unit_text
    left = hand_over(made, options)
    if os.geteuid() == 0:
        assert (left, kept.owner()) == ([], "daemon")
    else:
        assert f"chown -R daemon: {made.folder} '{kept}'" in left


def test_a_ledger_s_folder_must_be_there_and_empty(tmp_path: Path) -> None:
    for place in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match="--ledger-folder"):
            settings(tmp_path, ledger_folder=place)


def test_what_a_site_is_told_wrong_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(
            tmp_path, server="https://h", disjoint=" ", user="a", node_user="a", node_port=99999
        )
    told = str(caught.value)
    assert all(word in told for word in ("https://h", "--disjoint", "--node-user", "99999"))


def test_a_certificate_that_is_not_there_leaves_no_folder(tmp_path: Path) -> None:
    options = settings(tmp_path, authority=tmp_path / "none.crt")
    with pytest.raises(ConfigError, match=r"none\.crt"):
        site(tmp_path / "site", options)
    assert not (tmp_path / "site").exists()


def test_a_unit_reads_words_as_systemd_does() -> None:
    text = unit(
        "d",
        ["/bin/a", 'b "c" 50%', "$HOME"],
        {"K": "a b"},
        "u",
        {"ReadWritePaths": [Path("/x y")]},
        7,
    )
    lines = text.splitlines()
    assert 'ExecStart=/bin/a "b \\"c\\" 50%%" $$HOME' in lines
    assert 'Environment="K=a b"' in lines
    assert 'ReadWritePaths="/x y"' in lines
    assert "TimeoutStopSec=7" in lines


def test_a_dollar_is_a_letter_but_behind_the_program() -> None:
    text = unit(
        "100% d", ["/a$b/c%d", "$x"], {"K": "a$b\\c%"}, "u", {"ReadWritePaths": [Path("/x$y")]}, 7
    )
    lines = text.splitlines()
    assert "Description=100%% d" in lines
    assert "ExecStart=/a$b/c%%d $$x" in lines
    assert 'Environment="K=a$b\\\\c%%"' in lines
    assert "ReadWritePaths=/x$y" in lines


@pytest.mark.parametrize("at", ["description", "command", "environment", "paths"])
def test_no_word_begins_another_setting(at: str) -> None:
    bad = "/a\nExecStartPre=/bin/b"
    given = {name: bad if name == at else "/x" for name in ("description", "command")}
    words = [given["command"]]
    variables = {"K": bad if at == "environment" else "v"}
    places = {"ReadWritePaths": [Path(bad if at == "paths" else "/x")]}
    with pytest.raises(ConfigError, match="control character"):
        unit(given["description"], words, variables, "u", places, 7)


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    """Its own reader, on a program and a folder with every letter that it might read otherwise."""
    reader = shutil.which("systemd-analyze")
    if reader is None:
        pytest.skip("systemd-analyze is not installed")
    place = tmp_path / "a $b %c"
    place.mkdir()
    program = place / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    words = [str(program), "$HOME", "50%", 'a "b"', "c\\d", "e'f", ";"]
    text = unit("d", words, {"K": "$a %b \\c"}, "root", {"ReadWritePaths": [place]}, 7)
    (tmp_path / "made.service").write_text(text)
    told = subprocess.run(
        [reader, "verify", "--man=no", str(tmp_path / "made.service")],
        capture_output=True,
        text=True,
        check=False,
    ).stderr
    ours = [line for line in told.splitlines() if "made.service" in line]
    # Before version 254 systemd tries again after the same time always, and says so.
    newer = ("RestartSteps", "RestartMaxDelaySec")
    assert [line for line in ours if not any(key in line for key in newer)] == []


def test_the_app_is_one_that_flower_builds(tmp_path: Path) -> None:
    from flwr.cli.build import build_fab_from_disk
    from flwr.cli.config_utils import load_and_validate

    (tmp_path / "app").mkdir()
    app = write_app(tmp_path / "app")
    config, warnings = load_and_validate(app / "pyproject.toml")
    assert warnings == []
    assert config["tool"]["flwr"]["app"]["config"] == {proxy.ORDER: ""}
    assert 0 < len(build_fab_from_disk(app)) < 10_000  # nothing of a run's code travels


@pytest.mark.parametrize("text", ['{"a": "b"}', "a\nb\t\"'\\", "ä ε 你好 \u2028"])
def test_an_order_survives_the_run_config(tmp_path: Path, text: str) -> None:
    found = tomllib.loads(write_run_config(tmp_path / "run.toml", text).read_text())
    assert found == {proxy.ORDER: text}

"""``fedlr server``, ``submit``, ``status``, ``stop``; a script plays Flower's command line."""

from __future__ import annotations

import json
import stat
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlr.cli import flower, submit
from fedlr.cli.main import main
from fedlr.config import from_json
from fedlr.deploy.certificates import new_node_key
from fedlr.deploy.coordinator import Coordinator, read_coordinator
from fedlr.errors import EndedEarly
from fedlr.report.records import write_summary
from fedlr.signing import public_key, read_key, verify
from fedlr.told import for_sites, kept
from tests.cli.playing_flower import FLWR, Flower
from tests.cli.small import small
from tests.report.samples import SUMMARY

UNIT = "fedlr-superexec.service"


def runs(status: str, details: str = "") -> dict[str, Any]:
    one = {"run-id": "77", "status": status, "status-details": details}
    return {"success": True, "runs": [one]}


@pytest.fixture
def flwr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Flower:
    folder = tmp_path / "flwr"
    folder.mkdir()
    script = folder / "flwr"
    script.write_text(FLWR.format(python=sys.executable, folder=str(folder)))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    for module in (flower, submit):
        monkeypatch.setattr(module, "program", lambda name: str(folder / name))
    monkeypatch.setattr(submit, "POLL_S", 0.05)
    made = Flower(folder)
    made.answers(
        run={"success": True, "run-id": "77"},
        list=[runs("running"), runs("finished:completed")],
        stop={"success": True},
        supernode_register={"success": True, "node-id": 4711},
        supernode_unregister={"success": True},
        supernode_list={
            "success": True,
            "nodes": [
                {"node-id": "4711", "status": "online"},
                {"node-id": "9", "status": "offline"},
            ],
        },
    )
    return made


@pytest.fixture
def server(tmp_path: Path, flwr: Flower) -> Coordinator:
    assert main(["server", "init", str(tmp_path / "server"), "--host", "fl.example.org"]) == 0
    return read_coordinator(tmp_path / "server")


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    (tmp_path / "rows").mkdir()
    given = [one for one in small(tmp_path / "rows") if not one.startswith("output=")]
    (tmp_path / "rows" / "data" / "train.jsonl").unlink()  # a server has none
    return given


def finish(server: Coordinator, run: str, rounds: int = 3) -> None:
    (server.runs / run).mkdir(parents=True)
    told = (*SUMMARY.notices, "round 2: 1 of 2 clients sent an update") if rounds < 3 else ()
    write_summary(server.runs / run / "summary.json", replace(SUMMARY, rounds=rounds, notices=told))


def test_show_tells_what_sites_need(
    server: Coordinator, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["server", "show", str(server.folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["coordinator"] == public_key(read_key(server.key))
    assert found["hosts"] == ["fl.example.org", "localhost", "127.0.0.1"]
    assert main(["server", "show", str(server.folder)]) == 0
    assert found["coordinator"] in capsys.readouterr().out


def test_a_site_is_let_in_once_and_kept_out_again(
    server: Coordinator, flwr: Flower, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = new_node_key()
    (tmp_path / "key").write_bytes(private)
    (tmp_path / "key.pub").write_bytes(public)
    register = ["server", "register", str(server.folder), str(tmp_path / "key.pub")]
    assert main([*register, "--name", "ward-7"]) == 0
    assert flower.names_of_nodes(server) == {"4711": "ward-7"}
    assert main([*register, "--name", "ward-7"]) == 2
    assert (
        main(["server", "register", str(server.folder), str(tmp_path / "key"), "--name", "x"]) == 2
    )
    assert "must not leave its site" in capsys.readouterr().err
    assert main(["server", "unregister", str(server.folder), "--name", "nobody"]) == 2
    assert "known: ward-7" in capsys.readouterr().err
    assert main(["server", "unregister", str(server.folder), "--name", "ward-7"]) == 0
    assert flower.names_of_nodes(server) == {}
    kept = [call for call in flwr.words() if call[0] == "supernode"]
    assert [call[1:3] for call in kept] == [
        ["register", str(tmp_path / "key.pub")],
        ["unregister", "4711"],
    ]
    assert {(call["home"], call["telemetry"]) for call in flwr.calls} == {(str(server.home), "0")}


@pytest.mark.parametrize(
    "given",
    [
        ["register", "{folder}"],
        ["register", "{folder}", "key.pub"],
        ["show", "{folder}", "key.pub"],
        ["init", "{folder}/new", "--host", "a", "--authority", "x"],
        ["renew", "{folder}", "--authority", "x", "--authority-key", "y"],
        ["renew", "{folder}", "--authority-key", "nothing"],
        ["show", "{folder}", "--authority-key", "y"],
        ["unregister", "{folder}", "--name", "../up"],
        ["explode", "{folder}"],
        ["show", "{folder}/none"],
    ],
)
def test_words_that_do_not_fit_are_a_sentence(
    server: Coordinator, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["server", *(word.format(folder=server.folder) for word in given)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_renewing_keeps_the_names(server: Coordinator, capsys: pytest.CaptureFixture[str]) -> None:
    before = server.certificate.read_bytes()
    assert main(["server", "renew", str(server.folder)]) == 0
    assert server.certificate.read_bytes() != before
    capsys.readouterr()
    main(["server", "show", str(server.folder), "--json"])
    assert json.loads(capsys.readouterr().out)["hosts"][0] == "fl.example.org"


def test_an_authority_s_key_that_is_kept_elsewhere_is_given(
    server: Coordinator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    away = server.authority_key.rename(tmp_path / "away.key")
    assert main(["server", "renew", str(server.folder)]) == 2
    assert "--authority-key" in capsys.readouterr().err
    before = server.certificate.read_bytes()
    assert main(["server", "renew", str(server.folder), "--authority-key", str(away)]) == 0
    assert server.certificate.read_bytes() != before


@pytest.fixture
def finishing(server: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ServerApp leaves a result as soon as a run is submitted."""
    remember: Callable[..., None] = flower.remember

    def remembered(coordinator: Coordinator, one: flower.Submitted) -> None:
        remember(coordinator, one)
        finish(coordinator, one.run)

    monkeypatch.setattr(submit, "remember", remembered)


def test_a_run_is_signed_handed_over_and_followed(
    server: Coordinator,
    flwr: Flower,
    words: list[str],
    finishing: None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert main(["submit", str(server.folder), *words, "privacy.epsilon=3"]) == 0
    told = capfd.readouterr()
    (call,) = [call for call in flwr.calls if call["words"][0] == "run"]
    assert call["files"] == ["__init__.py", "client.py", "pyproject.toml", "server.py"]
    text = tomllib.loads(call["run_config"])["order"]
    order = verify(text, [public_key(read_key(server.key))])
    config = json.loads(order.config)
    assert config["privacy"]["epsilon"] == 3.0
    assert config["federation"]["engine"] == "deploy"
    # The sites' operators read this: nothing in it tells of the server's disk.
    assert str(server.folder.parent) not in text
    whole = kept(server.configs, order.run)
    assert whole is not None
    assert whole.output == str(server.runs)
    assert Path(str(whole.data.path)).is_absolute()
    assert for_sites(whole) == from_json(order.config)
    assert told.out.splitlines()[-1] == str(server.runs / order.run)
    assert "round 1/3" in told.out
    assert flower.all_submitted(server) == [
        flower.Submitted("77", order.run, str(server.runs / order.run))
    ]


def test_a_run_that_ended_early_has_a_status_of_its_own(
    server: Coordinator,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    remember: Callable[..., None] = flower.remember

    def remembered(coordinator: Coordinator, one: flower.Submitted) -> None:
        remember(coordinator, one)
        finish(coordinator, one.run, rounds=1)

    monkeypatch.setattr(submit, "remember", remembered)
    assert main(["submit", str(server.folder), *words]) == EndedEarly.exit_code == 12
    told = capsys.readouterr()
    (one,) = flower.all_submitted(server)
    assert told.out.splitlines()[-1] == one.folder
    why = told.err.splitlines()[-1]
    assert "after 1 of 3 rounds (round 2: 1 of 2 clients sent an update)" in why
    assert f"in {one.folder}" in why
    assert f"--resume {one.run}" in why


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (runs("finished:failed", "it broke"), "ended as finished:failed: it broke"),
        (runs("finished:stopped"), "finished:stopped"),
        (runs("finished:completed"), "has no result"),
    ],
)
def test_the_exit_status_is_the_run_s(
    server: Coordinator,
    flwr: Flower,
    words: list[str],
    status: dict[str, Any],
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flwr.answers(list=status)
    assert main(["submit", str(server.folder), *words]) == 7
    assert told in capsys.readouterr().err


def test_a_server_that_is_away_for_a_while_is_waited_for(
    server: Coordinator, flwr: Flower, words: list[str], finishing: None
) -> None:
    flwr.answers(list=[runs("running"), "Connection refused", runs("finished:completed")])
    assert main(["submit", str(server.folder), *words]) == 0


def test_a_server_that_stays_away_is_told(
    server: Coordinator,
    flwr: Flower,
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(submit, "LOST_S", 0.2)
    flwr.answers(list="Connection refused")
    assert main(["submit", str(server.folder), *words]) == 7
    assert "can no longer be followed" in capsys.readouterr().err
    flwr.answers(run="Connection refused")
    assert main(["submit", str(server.folder), *words]) == 7
    assert "Connection refused" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["federation=local"], "asks no real sites"),
        (["privacy.epsilon=-1"], "privacy.epsilon = -1"),
        (["federation.spare_clients=3"], "federation.spare_clients = 3"),
        (["data.validation_split=nothing"], "data.validation_split"),
        (["--days", "0"], "expires"),
        (["--resume", "x"], "give --resume alone"),
    ],
)
def test_what_is_wrong_is_found_before_anything_is_submitted(
    server: Coordinator,
    flwr: Flower,
    words: list[str],
    given: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["submit", str(server.folder), *words, *given]) != 0
    assert told in capsys.readouterr().err
    assert flwr.calls == []


def test_status_shows_sites_and_runs_by_their_names(
    server: Coordinator, flwr: Flower, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (server.sites / "ward-7.node").write_text("4711\n")
    assert main(["submit", str(server.folder), *words, "--detach"]) == 0
    capsys.readouterr()
    assert main(["status", str(server.folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["site"], one["status"]) for one in found["sites"]] == [
        ("ward-7", "online"),
        ("(registered elsewhere)", "offline"),
    ]
    (run,) = found["runs"]
    assert (run["status"], run["rounds"]) == ("running", 0)
    assert main(["status", str(server.folder)]) == 0
    assert run["run"] in capsys.readouterr().out


def test_a_run_is_stopped_by_its_name(
    server: Coordinator, flwr: Flower, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", str(server.folder), *words, "--detach"]) == 0
    (one,) = flower.all_submitted(server)
    assert main(["stop", str(server.folder), "other"]) == 2
    assert main(["stop", str(server.folder), one.run]) == 0
    assert flwr.words()[-1][:3] == ["stop", "77", "fedlr"]
    assert "--resume" in capsys.readouterr().err
    assert main(["stop", str(server.folder), one.run]) == 0
    assert "has ended already" in capsys.readouterr().err


def test_a_run_that_goes_on_is_known_and_over(
    server: Coordinator, flwr: Flower, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", str(server.folder), "--resume", "none"]) == 2
    assert main(["submit", str(server.folder), *words, "--detach"]) == 0
    (one,) = flower.all_submitted(server)
    capsys.readouterr()
    assert main(["submit", str(server.folder), "--resume", one.run]) == 7
    assert "is running" in capsys.readouterr().err


def test_a_run_that_never_began_is_asked_for_again(
    server: Coordinator, flwr: Flower, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flwr.answers(list=runs("finished:failed", "0 of 2 clients answered"))
    assert main(["submit", str(server.folder), *words, "optimizer.steps=2"]) == 7
    (one,) = flower.all_submitted(server)
    (server.runs / one.run).mkdir(parents=True)  # what a ServerApp may leave that died early
    capsys.readouterr()
    again = ["submit", str(server.folder), "--resume", one.run, "--detach"]
    assert main(again) == 0
    assert "has not begun yet" in capsys.readouterr().err
    first, second = (
        verify(tomllib.loads(call["run_config"])["order"], [public_key(read_key(server.key))])
        for call in flwr.calls
        if call["words"][0] == "run"
    )
    assert first.digest == second.digest  # what an operator has approved stays approved
    assert json.loads(second.config)["optimizer"]["steps"] == 2
    (server.configs / f"{one.run}.json").unlink()
    assert main(again) == 7
    assert "does not tell what the run" in capsys.readouterr().err


def test_what_a_server_app_wrote_into_the_run_is_not_signed(
    server: Coordinator, flwr: Flower, words: list[str]
) -> None:
    flwr.answers(list=runs("finished:failed", "0 of 2 clients answered"))
    assert main(["submit", str(server.folder), *words, "optimizer.steps=2"]) == 7
    (one,) = flower.all_submitted(server)
    folder = server.runs / one.run
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    (folder / "config.json").write_text('{"config": {"optimizer": {"steps": 99}}}')
    assert main(["submit", str(server.folder), "--resume", one.run, "--detach"]) == 0
    asked = tomllib.loads(flwr.calls[-1 - (flwr.calls[-1]["words"][0] != "run")]["run_config"])
    order = verify(asked["order"], [public_key(read_key(server.key))])
    assert json.loads(order.config)["optimizer"]["steps"] == 2
    assert f"ReadOnlyPaths={server.submitted}" in (server.folder / UNIT).read_text()

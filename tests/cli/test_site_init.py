"""``fedlr site init`` and ``check``: from rows to a site that an agent serves."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest

from client.declaration import read_declaration
from client.hold import held
from fedlr.cli import site_init
from fedlr.cli.main import main
from fedlr.doctor.finding import Finding
from fedlr.errors import DoctorError, LedgerError, RunError
from fedlr.privacy.ledger import SqliteLedger
from tests.cli.small import LABELS, small
from tests.client.real_site import agent, place
from tests.models import LONGEST

KEY = "ab" * 32
LEFT_OUT = "left out"
RUN = ("model=encoder", "model.name=any", "adapter=query_value", f"model.max_length={LONGEST}")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    (tmp_path / "rows").mkdir()
    small(tmp_path / "rows")
    (tmp_path / "ca.crt").write_text("certificate")
    return tmp_path / "rows"


def given(folder: Path, rows: Path, *more: str, **changes: str) -> list[str]:
    options = {
        "--client": "ward-7",
        "--data": str(rows / "data" / "train.jsonl"),
        "--server": "fl.example.org:443",
        "--authority": str(rows.parent / "ca.crt"),
        "--coordinator": KEY,
        "--epsilon-total": "10",
        "--disjoint": "collected for this federation",
        "--model": str(rows / "model"),
        "--device": "cpu",
        "--group": "",
        "--user": "nobody-here-1",
        "--node-user": "nobody-here-2",
        "--declared-size": "40",
    }
    options |= {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    words = [word for name, value in options.items() if value != LEFT_OUT for word in (name, value)]
    labels = [word for label in LABELS for word in ("--label", label)]
    return ["site", "init", str(folder), *RUN, *words, *labels, *more]


def test_a_site_is_made_checked_and_ready(
    tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / "site"
    assert main(given(site, rows, "--epsilon-per-run", "4", "--approve")) == 0
    told = capsys.readouterr()
    assert told.out.splitlines()[-1] == (site / "node" / "key.pub").read_text().strip()
    assert "chown -R nobody-here-2" in told.out
    assert "the private step holds on cpu" in told.err
    declaration = read_declaration(site / "site.toml")
    limits = declaration.limits
    assert (declaration.client, limits.declared_size) == ("ward-7", 40)
    assert (limits.epsilon_total, limits.epsilon_per_run, limits.delta) == (10.0, 4.0, 1e-5)
    assert (declaration.approve, declaration.dry) == (True, False)
    assert declaration.coordinators == {KEY}
    ledger = SqliteLedger(declaration.ledger, "ward-7")
    assert ledger.joins() == 0
    ledger.close()
    assert main(["site", "check", str(site / "site.toml"), *RUN]) == 0
    assert main(["site", "check", str(site / "site.toml")]) == 2
    assert "must be ≤" in capsys.readouterr().err


def test_the_ledger_may_lie_in_a_volume(tmp_path: Path, rows: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    words = given(tmp_path / "site", rows, ledger_folder=str(volume))
    assert main(words) == 0
    declaration = read_declaration(tmp_path / "site" / "site.toml")
    assert declaration.ledger == volume / "site.sqlite"
    assert declaration.ledger.exists()
    assert main(given(tmp_path / "again", rows, ledger_folder=str(volume))) == 2
    assert not (tmp_path / "again").exists()


def test_a_label_may_hold_a_comma_and_users_may_be_the_unit(tmp_path: Path, rows: Path) -> None:
    data = rows / "data" / "train.jsonl"
    lines = [{"text": "a b", "label": "yes, sir", "who": str(row % 7)} for row in range(40)]
    data.write_text("\n".join(map(json.dumps, lines)) + "\n")
    words = given(
        tmp_path / "site", rows, "--unit", "user", "--user-column", "who", declared_size="10"
    )
    words = ["yes, sir" if word == "yes" else word for word in words]
    assert main(words) == 0
    found = tomllib.loads((tmp_path / "site" / "site.toml").read_text())
    assert found["labels"] == ["no", "yes, sir"]
    assert (found["declared_size"], found["unit"], found["data"]["user_column"]) == (
        10,
        "user",
        "who",
    )


def test_few_units_are_not_counted_for_the_world(
    tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = given(tmp_path / "site", rows, declared_size=LEFT_OUT)
    assert main(words) == 2
    assert "e.g. --declared-size 40, down to tens" in capsys.readouterr().err
    assert not (tmp_path / "site").exists()
    lines = (rows / "data" / "train.jsonl").read_text().splitlines()
    (rows / "data" / "train.jsonl").write_text("\n".join((lines * 4)[:127]) + "\n")
    assert main(words) == 0
    found = tomllib.loads((tmp_path / "site" / "site.toml").read_text())
    assert (found["declared_size"], found["budget"]["delta"]) == (120, 1e-5)


@pytest.mark.parametrize(
    ("more", "changes", "told"),
    [
        ([], {"declared_size": "0"}, "--declared-size 0 must be ≥ 1"),
        (["--delta", "0"], {}, "--delta 0.0 must be in (0, 0.5]"),
        (["--delta", "nan"], {}, "--delta nan"),
        ([], {"epsilon_total": "nan"}, "epsilon_total = nan"),
        (["--epsilon-per-run", "-1"], {}, "epsilon_per_run = -1.0 must be > 0"),
        ([], {"client": "ward\x7f"}, "TOML"),
        ([], {"user": "Fed LR"}, "--user 'Fed LR' must match"),
        ([], {"node_user": "-x"}, "--node-user"),
        ([], {"node_user": "nobody-here-1"}, "are both 'nobody-here-1'"),
        ([], {"group": "a b"}, "--group 'a b' must match"),
        ([], {"coordinator": "xyz"}, "--coordinator"),
        ([], {"data": "/nowhere"}, "/nowhere"),
        ([], {"server": "fl.example.org"}, "host:port"),
        ([], {"authority": "/nowhere/ca.crt"}, "/nowhere/ca.crt"),
        ([], {"disjoint": ""}, "--disjoint"),
        (["--unit", "user"], {}, "--user-column"),
        (["--label-column", "nothing"], {}, "nothing"),
        (["--epsilon-total", "much"], {}, "--epsilon-total"),
    ],
)
def test_a_mistake_leaves_nothing(
    tmp_path: Path,
    rows: Path,
    more: list[str],
    changes: dict[str, str],
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(given(tmp_path / "site", rows, *more, **changes)) != 0
    assert told in capsys.readouterr().err
    assert not (tmp_path / "site").exists()


def test_a_ledger_that_cannot_be_made_leaves_nothing(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise LedgerError("no room for a ledger")

    monkeypatch.setattr(site_init, "_make_ledger", full)
    before = sorted(tmp_path.iterdir())
    assert main(given(tmp_path / "site", rows)) == LedgerError.exit_code
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["site", "init", "x"]) == 2
    assert "--epsilon-total" in capsys.readouterr().err


def test_a_device_that_does_not_keep_the_promise_is_told(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: Any) -> tuple[Finding, ...]:
        raise DoctorError("privacy does not hold on this machine")

    monkeypatch.setattr("client.resident.quick", broken)
    site = tmp_path / "site"
    assert main(given(site, rows)) == DoctorError.exit_code
    told = capsys.readouterr()
    assert told.err.splitlines()[-1] == "fedlr: privacy does not hold on this machine"
    again = f"sudo -u nobody-here-1 fedlr site check {site / 'site.toml'} {' '.join(RUN)}"
    assert again in told.err
    # What was made can be handed over all the same.
    assert told.out.splitlines()[-1] == (site / "node" / "key.pub").read_text().strip()
    assert "chown -R nobody-here-1" in told.out
    assert (site / "ledger" / "site.sqlite").exists()


def test_a_check_does_not_work_beside_an_agent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = place(tmp_path)
    words = ["site", "check", str(site.policy), *RUN]
    with agent(site):
        assert main(words) == RunError.exit_code
        assert "stop the agent first" in capsys.readouterr().err
    assert main(words) == 0
    lock = site.ledger.with_name(f"{site.ledger.name}.agent")
    if os.geteuid() == 0:  # which must not lock the agent's user out
        os.chown(site.ledger, 4321, 4322)
        lock.unlink()
        with held(site.ledger):
            assert (lock.stat().st_uid, lock.stat().st_gid) == (4321, 4322)
    lock.unlink(missing_ok=True)
    lock.mkdir()
    assert main(words) == RunError.exit_code
    assert "cannot be locked" in capsys.readouterr().err


def test_a_full_disk_is_told(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(site_init, "LEAST_FREE", 10**18)
    assert main(given(tmp_path / "site", rows)) == 2
    assert "are free beside the ledger" in capsys.readouterr().err

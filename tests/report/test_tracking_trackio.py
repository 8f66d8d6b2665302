"""A Trackio run: the order of the calls, and its own database where it is installed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fedlr.report.tracking.build import _installed
from fedlr.report.tracking.memory import Memory, recall
from fedlr.report.tracking.tracker import closing, series
from fedlr.report.tracking.trackio import Trackio
from tests.report.samples import SUMMARY
from tests.report.tracked import ROUNDS, RUN, interrupted, resumed

SOURCE = """
calls = []
class Run:
    def log(self, values, step):
        calls.append(("log", (step, values)))
def init(**given):
    print("* Trackio project initialized")
    calls.append(("init", given))
    return Run()
def finish():
    print("* Run finished", flush=True)
    calls.append(("finish", None))
"""
"""The part of the package that is called; it prints, as the real one does."""


def test_a_resumed_run_sends_every_round_once_under_one_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretended = ModuleType("trackio")
    exec(SOURCE, vars(pretended))
    monkeypatch.setitem(sys.modules, "trackio", pretended)
    # Other threads write to standard output meanwhile.
    monkeypatch.setattr(contextlib, "redirect_stdout", lambda _: pytest.fail("for all threads"))
    interrupted(Trackio("fedlr"), tmp_path)
    resumed(Trackio("fedlr"), tmp_path)
    assert [name for name, _ in pretended.calls] == [
        *("init", "log", "log", "log", "finish"),
        *("init", "log", "log", "finish"),
    ]
    logged = [what for name, what in pretended.calls if name == "log"]
    assert logged[:4] == [(record.round, series(record)) for record in ROUNDS]
    assert logged[4][1].items() >= closing(SUMMARY).items()
    inits = [what for name, what in pretended.calls if name == "init"]
    assert [(i["name"], i["resume"], i["project"]) for i in inits] == [(RUN, "allow", "fedlr")] * 2
    assert all(i["auto_log_gpu"] is False and i["auto_log_cpu"] is False for i in inits)
    assert recall(tmp_path / "run", "trackio") == Memory(
        kind="trackio", id=RUN, sent=4, finished=True
    )
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Run finished" in printed.err


READ = """
import sys
from pathlib import Path
from fedlr.report.tracking.trackio import Trackio
from tests.report.tracked import interrupted, resumed
folder = Path(sys.argv[1])
interrupted(Trackio("fedlr"), folder)
resumed(Trackio("fedlr"), folder)
from trackio.sqlite_storage import SQLiteStorage
(run,) = SQLiteStorage.get_runs("fedlr")
name = run["name"] if isinstance(run, dict) else run
logs = SQLiteStorage.get_logs("fedlr", name)
print(name, [(row["step"], row["accuracy"]) for row in logs if "accuracy" in row])
print([row["step"] for row in logs if "result/accuracy" in row])
"""


@pytest.mark.skipif(not _installed("trackio"), reason="Trackio is in the extra 'trackio'")
def test_its_database_holds_every_round_once(tmp_path: Path) -> None:
    # A process of its own: Trackio reads where its folder is when it is imported.
    found = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path)],
        env={**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    expected = [(record.round, record.accuracy) for record in ROUNDS]
    assert found.stdout.splitlines() == [f"{RUN} {expected}", "[4]"]

"""What a tracker is told, and that one which fails or hangs harms nothing."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from fedlr.errors import ConfigError, RunError
from fedlr.report.records import RoundRecord, Summary
from fedlr.report.tracking import build as building
from fedlr.report.tracking import guard
from fedlr.report.tracking.build import Kind, Target, build, check
from fedlr.report.tracking.guard import Guarded
from fedlr.report.tracking.memory import TRACKING_FILE, Memory, recall, remember
from fedlr.report.tracking.tracker import NoTracker, TrackedRun, closing, promise, series
from tests.report.samples import RECORD, SUMMARY
from tests.report.tracked import DRY, ROUNDS, announced


class Recorder:
    """Keeps what it is told; fails at the call of one name."""

    def __init__(self, failing: str = "", error: BaseException | None = None) -> None:
        self.calls: list[str] = []
        self.threads: set[int] = set()
        self.failing = failing
        self.error = error or OSError("the disk is full\nat line 3")

    def _told(self, name: str) -> None:
        self.calls.append(name)
        self.threads.add(threading.get_ident())
        if name == self.failing:
            raise self.error

    def start(self, run: TrackedRun) -> None:
        self._told("start")

    def round(self, record: RoundRecord) -> None:
        self._told(f"round {record.round}")

    def finish(self, summary: Summary) -> None:
        self._told("finish")

    def close(self) -> None:
        self._told("close")


def tell(tracker: Guarded, folder: Path) -> None:
    tracker.start(announced(folder))
    for record in ROUNDS:
        tracker.round(record)
    tracker.finish(SUMMARY)
    tracker.close()


WHOLE = ["start", "round 1", "round 2", "round 3", "round 4", "finish", "close"]


def test_the_series_are_the_numbers_of_the_record() -> None:
    assert series(RECORD) == {
        "accuracy": 0.5,
        "loss": 0.69,
        "epsilon_max": 1.25,
        "epsilon/site-0": 1.25,
        "epsilon/site-1": 1.0,
        "accepted": 2.0,
        "refused": 1.0,
        "bytes_up": 200.0,
        "bytes_down": 300.0,
        "wall_s": 2.0,
        "server_s": 0.25,
    }


def test_what_is_unknown_or_infinite_has_no_point() -> None:
    left = {"accuracy", "loss", "epsilon_max", "epsilon/site-0", "epsilon/site-1"}
    plain = replace(RECORD, accuracy=None, loss=math.inf, epsilon_max=None, epsilon_by_client={})
    assert series(plain).keys() == series(RECORD).keys() - left
    assert not [name for name in series(DRY) if name.startswith("epsilon")]


def test_the_result_is_that_of_the_summary() -> None:
    found = closing(SUMMARY)
    assert found["result/accuracy"] == 0.75
    assert found["result/epsilon_max"] == 1.25
    assert found["result/bytes_up_per_client_and_round"] == 58_432
    assert promise(SUMMARY) == {"privacy_mode": "dp", "unit": "example", "accountant": "prv"}
    dry = replace(SUMMARY, privacy_mode="dry", epsilon_max=math.inf)
    assert "result/epsilon_max" not in closing(dry)
    assert promise(dry)["epsilon"] == "inf"


def test_a_summary_keeps_what_may_name_a_folder() -> None:
    placed = replace(SUMMARY, data="/secret/ward", model="/secret/model", notices=("/secret/x",))
    assert "secret" not in json.dumps([closing(placed), promise(placed)])


def test_a_guarded_tracker_is_told_everything_in_order_and_elsewhere(tmp_path: Path) -> None:
    recorder = Recorder()
    tell(Guarded(recorder, "mlflow"), tmp_path)
    assert recorder.calls == WHOLE
    assert len(recorder.threads) == 1
    assert threading.get_ident() not in recorder.threads


@pytest.mark.parametrize("failing", WHOLE)
@pytest.mark.parametrize("error", [OSError("the disk is full\nat line 3"), SystemExit(3)])
def test_a_failure_is_said_once_and_ends_the_tracking_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], failing: str, error: BaseException
) -> None:
    recorder = Recorder(failing, error)
    tell(Guarded(recorder, "mlflow"), tmp_path)
    told = WHOLE[: WHOLE.index(failing) + 1]
    assert recorder.calls == (told if failing == "close" else [*told, "close"])
    said = capfd.readouterr().err
    assert said.count("tracking=mlflow failed and is off from now on") == 1
    assert "Traceback" not in said
    assert "line 3" not in said


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """A tracker whose rounds never end; of two short waits, one is for what may be left."""
    answer = threading.Event()

    class Hanging(Recorder):
        def round(self, record: RoundRecord) -> None:
            answer.wait()

    monkeypatch.setattr(guard, "LEFT_S", 0.02)
    monkeypatch.setattr(Guarded, "_hung", set())
    yield Hanging()
    answer.set()


def test_a_tracker_that_hangs_is_left(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], hanging: Recorder
) -> None:
    guarded = Guarded(hanging, "wandb", patience_s=0.05)
    tell(guarded, tmp_path)
    guarded.close()
    assert capfd.readouterr().err.count("tracking=wandb was not done after 0.05 s") == 1
    # The next run of this process does not wait as long again, and other tools are trusted.
    tell(Guarded(hanging, "wandb", patience_s=0.05), tmp_path)
    assert capfd.readouterr().err.count("tracking=wandb was not done after 0.02 s") == 1
    tell(Guarded(hanging, "mlflow", patience_s=0.05), tmp_path)
    assert capfd.readouterr().err.count("tracking=mlflow was not done after 0.05 s") == 1


def test_an_interrupted_run_does_not_wait_for_its_tracker(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], hanging: Recorder
) -> None:
    guarded = Guarded(hanging, "wandb")
    guarded.start(announced(tmp_path))
    guarded.round(ROUNDS[0])
    guarded.close()
    assert capfd.readouterr().err.count("tracking=wandb was not done after 0.02 s") == 1


def test_a_guarded_tracker_may_be_closed_before_its_start_and_twice(tmp_path: Path) -> None:
    recorder = Recorder()
    guarded = Guarded(recorder, "mlflow")
    guarded.close()
    assert recorder.calls == []
    guarded.start(announced(tmp_path))
    guarded.close()
    guarded.close()
    assert recorder.calls == ["start", "close"]


def test_the_memory_is_of_one_tool_and_says_when_it_is_damaged(tmp_path: Path) -> None:
    assert recall(tmp_path, "mlflow") is None
    remember(tmp_path, Memory(kind="mlflow", id="abc", sent=2))
    assert recall(tmp_path, "mlflow") == Memory(kind="mlflow", id="abc", sent=2)
    assert recall(tmp_path, "wandb") is None
    (tmp_path / TRACKING_FILE).write_text("{")
    with pytest.raises(RunError, match="delete it"):
        recall(tmp_path, "mlflow")


def test_every_tool_has_a_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "_installed", lambda _: True)
    assert set(building.MODULES) == set(get_args(Kind))
    for kind in building.MODULES:
        built = build(Target(kind=kind))
        assert isinstance(built, NoTracker if kind == "none" else Guarded)


@pytest.mark.parametrize("kind", [kind for kind in building.MODULES if kind != "none"])
def test_a_missing_package_is_a_sentence_that_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError) as found:
        build(Target(kind=kind))
    assert f"pip install 'fedlr[{kind}]'" in str(found.value)
    assert f"tracking = {kind} needs {building.MODULES[kind][0]}" in str(found.value)


def test_a_folder_of_a_package_s_name_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no_such_tool").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert importlib.util.find_spec("no_such_tool") is not None
    assert not building._installed("no_such_tool")
    assert building._installed("json")


def test_an_online_run_needs_a_key_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "_installed", lambda _: True)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    online = Target(kind="wandb", mode="online")
    with pytest.raises(ConfigError, match=r"no key for api\.wandb\.ai"):
        check(online)
    for text in ("machine other.example login api.wandb.ai password x", "machine", "\xff" * 9):
        (tmp_path / "netrc").write_bytes(text.encode("latin-1"))
        with pytest.raises(ConfigError, match=r"no key for api\.wandb\.ai|cannot be read"):
            check(online)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x")
    (tmp_path / "netrc").chmod(0o600)
    check(online)
    with pytest.raises(ConfigError, match=r"no key for own\.example"):
        check(replace(online, uri="https://own.example"))
    monkeypatch.setenv("WANDB_API_KEY", "x")
    check(replace(online, uri="https://own.example"))
    check(Target(kind="wandb"))


@pytest.mark.parametrize("name", ["TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"])
def test_trackio_sends_nothing_elsewhere(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(building, "_installed", lambda _: True)
    monkeypatch.setenv(name, "someone/space")
    with pytest.raises(ConfigError, match=name):
        check(Target(kind="trackio"))


def test_no_tool_is_loaded_before_it_is_used() -> None:
    code = (
        "import sys; from fedlr.report.tracking.build import Target, build\n"
        "build(Target(kind='none'))\n"
        "print({'tensorboard', 'mlflow', 'wandb', 'trackio', 'torch'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_nothing_but_public_records_can_be_told() -> None:
    """The interface takes three records; what they hold is fixed here."""
    assert [field.name for field in dataclasses.fields(TrackedRun)] == [
        *("run", "folder", "output", "rounds", "settings", "earlier")
    ]
    taken: dict[str, Any] = {
        name: getattr(NoTracker, name).__annotations__ for name in ("start", "round", "finish")
    }
    assert {name: set(hints.values()) - {"None"} for name, hints in taken.items()} == {
        "start": {"TrackedRun"},
        "round": {"RoundRecord"},
        "finish": {"Summary"},
    }

"""A TensorBoard folder, read back by TensorBoard's own reader."""

from __future__ import annotations

import re
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlr.report.tracking.tensorboard import FOLDER, TensorBoard
from fedlr.report.tracking.tracker import closing, series
from tests.report.samples import SUMMARY
from tests.report.tracked import ROUNDS, announced, interrupted, resumed

pytest.importorskip("tensorboard", reason="TensorBoard is in the extra 'tensorboard'")


def read(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "run" / FOLDER), size_guidance={"scalars": 0})
    found.Reload()
    return found


def scalars(found: Any, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in found.Scalars(tag)]


def texts(found: Any, tag: str) -> str:
    (event,) = found.Tensors(f"{tag}")[-1:]
    return str(event.tensor_proto.string_val[0], encoding="utf-8")


def test_an_interrupted_and_resumed_run_has_every_round_once(tmp_path: Path) -> None:
    interrupted(TensorBoard(), tmp_path)
    resumed(TensorBoard(), tmp_path)
    found = read(tmp_path)
    for name in series(ROUNDS[0]):
        expected = [(record.round, pytest.approx(series(record)[name])) for record in ROUNDS]
        assert scalars(found, name) == expected, name
    for name, value in closing(SUMMARY).items():
        assert scalars(found, name) == [(SUMMARY.rounds, pytest.approx(value))]
    assert "| optimizer.learning_rate | 4.0 |" in texts(found, "configuration")
    assert "| privacy_mode | dp |" in texts(found, "privacy")


def test_no_file_names_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "ward-7")
    interrupted(TensorBoard(), tmp_path)
    resumed(TensorBoard(), tmp_path)
    names = sorted(path.name for path in (tmp_path / "run" / FOLDER).iterdir())
    forms = [re.sub(r"\d{10}", "<time>", name) for name in names]
    assert forms == [f"events.out.tfevents.<time>.fedlr.{n:04d}" for n in (0, 1)]


def test_a_repeated_round_has_its_later_numbers(tmp_path: Path) -> None:
    interrupted(TensorBoard(), tmp_path)
    tracker = TensorBoard()
    tracker.start(announced(tmp_path, ROUNDS[:2]))
    tracker.round(replace(ROUNDS[2], wall_s=77.0))
    tracker.close()
    assert scalars(read(tmp_path), "wall_s") == [(1, 2.0), (2, 2.0), (3, 77.0)]


def test_rounds_that_a_crash_cost_are_added(tmp_path: Path) -> None:
    tracker = TensorBoard()
    tracker.start(announced(tmp_path))
    tracker.round(ROUNDS[0])
    # Killed: nothing is closed, and the second round was never told.
    later = TensorBoard()
    later.start(announced(tmp_path, ROUNDS[:2]))
    later.close()
    assert [step for step, _ in scalars(read(tmp_path), "accuracy")] == [1, 2]
    tracker.close()


def test_a_round_is_on_the_disk_when_it_was_told(tmp_path: Path) -> None:
    tracker = TensorBoard()
    tracker.start(announced(tmp_path))
    tracker.round(ROUNDS[0])
    assert scalars(read(tmp_path), "accuracy") == [(1, 0.125)]
    tracker.close()

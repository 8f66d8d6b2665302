"""A Weights & Biases run: the order of the calls, and the offline file where it is installed."""

from __future__ import annotations

import json
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedlr.report.tracking.build import _installed
from fedlr.report.tracking.memory import Memory, recall
from fedlr.report.tracking.tracker import closing, series
from fedlr.report.tracking.wandb import WandB
from tests.report.samples import SUMMARY
from tests.report.tracked import ROUNDS, RUN, interrupted, resumed


class Pretended:
    """The part of the package that is called."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.summary = SimpleNamespace(update=lambda values: self._told("summary", values))

    def _told(self, name: str, what: Any) -> None:
        self.calls.append((name, what))

    def Settings(self, **given: Any) -> dict[str, Any]:
        return given

    def init(self, **given: Any) -> Pretended:
        self._told("init", given)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self._told("log", (step, values))

    def finish(self, exit_code: int) -> None:
        self._told("finish", exit_code)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    module = Pretended()
    monkeypatch.setitem(sys.modules, "wandb", module)  # type: ignore[arg-type]
    return module


def test_a_resumed_run_sends_every_round_once_under_one_id(
    pretended: Pretended, tmp_path: Path
) -> None:
    interrupted(WandB(None, "fedlr", "offline"), tmp_path)
    resumed(WandB(None, "fedlr", "offline"), tmp_path)
    assert [name for name, _ in pretended.calls] == [
        *("init", "log", "log", "log", "finish"),
        *("init", "log", "summary", "finish"),
    ]
    logged = [what for name, what in pretended.calls if name == "log"]
    assert logged == [(record.round, series(record)) for record in ROUNDS]
    inits = [what for name, what in pretended.calls if name == "init"]
    assert [(i["id"], i["resume"], i["project"]) for i in inits] == [(RUN, "allow", "fedlr")] * 2
    assert [what for name, what in pretended.calls if name == "finish"] == [1, 0]
    assert recall(tmp_path / "run", "wandb") == Memory(kind="wandb", id=RUN, sent=4, finished=True)


def test_it_is_offline_and_told_to_record_nothing_else(
    pretended: Pretended, tmp_path: Path
) -> None:
    interrupted(WandB("https://own.example", "fedlr", "offline"), tmp_path)
    given = pretended.calls[0][1]
    assert given["dir"] == str(tmp_path / "run")
    assert given["settings"]["mode"] == "offline"
    assert given["settings"]["base_url"] == "https://own.example"
    for name in ("disable_git", "disable_code", "x_disable_meta", "x_disable_stats"):
        assert given["settings"][name] is True
    assert given["settings"]["x_disable_machine_info"] is True
    assert given["settings"]["console"] == "off"
    assert given["settings"]["host"] == ""


def messages(file: Path) -> Iterator[bytes]:
    """The messages of an offline file: LevelDB's log format behind a header of 7 bytes."""
    content, at, message = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        size, kind = struct.unpack_from("<HB", content, at + 4)
        left = 32768 - at % 32768
        if left < 7 or kind == 0:  # padding up to the next block
            at += left
            continue
        message += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield message
            message = b""


def rows(file: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """The history of an offline file."""
    from wandb.proto import wandb_internal_pb2

    for message in messages(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(message)
        if record.WhichOneof("record_type") == "history":
            found = {
                (item.key or ".".join(item.nested_key)): json.loads(item.value_json)
                for item in record.history.item
            }
            yield int(found["_step"]), {k: v for k, v in found.items() if k[0] != "_"}


@pytest.mark.skipif(not _installed("wandb"), reason="Weights & Biases is in the extra 'wandb'")
def test_the_offline_files_hold_every_round_once(tmp_path: Path) -> None:
    interrupted(WandB(None, "fedlr", "offline"), tmp_path)
    time.sleep(1.1)  # its folders are named by the second
    resumed(WandB(None, "fedlr", "offline"), tmp_path)
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    found = [row for file in files for row in rows(file)]
    assert sorted(found) == [(record.round, series(record)) for record in ROUNDS]
    content = b"".join(file.read_bytes() for file in files)
    assert all(name.encode() in content for name in closing(SUMMARY))
    assert str(tmp_path).encode() not in content
    assert f'"{socket.gethostname()}"'.encode() not in content

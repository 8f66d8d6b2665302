"""The end of a run: what is looked at afterwards ends nothing, and no lock is left behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest

from fedlr.build import Workbench
from fedlr.config import RunConfig
from fedlr.errors import ConfigError
from fedlr.report.spectra import INTRUDERS_FILE, read_intruders
from server import main, results, session
from tests.server.toys import LAYOUT, run, toy_sites


def bench() -> Workbench:
    adapted = SimpleNamespace(sites=LAYOUT.sites)
    return cast("Workbench", SimpleNamespace(adapted=adapted))


def fail(*_given: Any, **_named: Any) -> Any:
    raise ValueError("no such glyph\nat line 3")


def test_a_page_that_cannot_be_drawn_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "base_weight", lambda model, site: None)
    monkeypatch.setattr(results.run, "write", fail)
    results.write_page(bench(), run(toy_sites()), tmp_path)
    said = capsys.readouterr().err
    again = f"`fedlr report {tmp_path}` tries again"
    assert said == f"fedlr: the page could not be drawn: no such glyph; {again}\n"
    assert read_intruders(tmp_path) is not None


def test_intruders_that_cannot_be_found_are_said_and_older_ones_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[Path] = []
    monkeypatch.setattr(results, "base_weight", fail)
    monkeypatch.setattr(results.run, "write", lambda folder, *_, **__: drawn.append(folder))
    (tmp_path / INTRUDERS_FILE).write_text("{}")
    results.write_page(bench(), run(toy_sites()), tmp_path)
    assert "intruder dimensions could not be looked for: no such glyph" in capsys.readouterr().err
    assert not (tmp_path / INTRUDERS_FILE).exists()
    assert drawn == [tmp_path]


def test_a_run_without_a_round_is_not_compared_with_its_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results.run, "write", lambda *_, **__: None)
    outcome = run(toy_sites())
    results.write_page(bench(), replace(outcome, state=replace(outcome.state, round=0)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_tool_is_told_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("settle", "summarise", "write_results", "write_page"):
        monkeypatch.setattr(session, name, lambda *_, called=name: calls.append(called))
    given: Any = SimpleNamespace(
        start=SimpleNamespace(records=()),
        began=0.0,
        tracker=SimpleNamespace(finish=lambda summary: calls.append("tracker")),
        order="an order",
        **dict.fromkeys(("config", "facts", "workbench", "folder")),
    )
    session.Session.finish(given, run(toy_sites()))
    assert calls == ["settle", "summarise", "write_results", "tracker", "write_page"]


def test_a_session_whose_order_cannot_be_left_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []
    begun = SimpleNamespace(simulated=None, close=lambda: closed.append(True))
    monkeypatch.setattr(main, "build", lambda config, say: None)
    monkeypatch.setattr(main, "begin", lambda *_: begun)
    monkeypatch.setattr(main, "write_order", fail)
    with pytest.raises(ValueError, match="no such glyph"):
        main._begin(RunConfig(), 7)
    assert closed == [True]


def test_a_tracker_that_cannot_be_opened_leaves_the_run_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[bool] = []

    class Journal(session.FileJournal):
        def close(self) -> None:
            closed.append(True)
            super().close()

    def refuse(*_: Any) -> Any:
        raise ConfigError(["no tool"])

    facts = SimpleNamespace(run="r", clients=())
    monkeypatch.setattr(session, "read_facts", lambda folder: facts)
    monkeypatch.setattr(session, "read_config", lambda folder, facts: RunConfig())
    monkeypatch.setattr(session, "build", Mock())
    monkeypatch.setattr(session, "books", Mock())
    for name in ("facts_of", "check_same", "check_policies", "_examine", "first", "order_of"):
        monkeypatch.setattr(session, name, lambda *_: SimpleNamespace(records=()))
    monkeypatch.setattr(session, "open_tracker", refuse)
    monkeypatch.setattr(session, "FileJournal", Journal)
    with pytest.raises(ConfigError, match="no tool"):
        session.resume(tmp_path)
    assert closed == [True]

"""The live display: plain lines off a terminal, bars on one, never on standard output."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import pytest

from fedlr.report.live import LiveProgress, Progress, SilentProgress
from tests.report.samples import RECORD


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def play(progress: Progress) -> None:
    """Two rounds of four, three clients each; only the first is evaluated."""
    progress.start(4, "fedsvd on demo")
    for number in (1, 2):
        record = replace(RECORD, round=number, accuracy=0.5 if number == 1 else None)
        progress.round_started(number, record.cohort)
        for client in record.cohort:
            progress.client_finished(client, 10)
        progress.round_finished(record)
    progress.finish()
    progress.finish()


def test_off_a_terminal_each_round_is_one_plain_line() -> None:
    stream = io.StringIO()
    play(LiveProgress(epsilon_budget=6.0, stream=stream))
    assert stream.getvalue().splitlines() == [
        "fedsvd on demo: 4 rounds",
        # Each round took 2.0 s, so 3 and then 2 rounds are 6.0 s and 4.0 s.
        "round 1/4  clients 2/3  accuracy 50.0 %  ε max 1.25 of 6.00  "
        "up 200 B  down 300 B  left 6.0 s",
        "round 2/4  clients 2/3  accuracy 50.0 %  ε max 1.25 of 6.00  "
        "up 200 B  down 300 B  left 4.0 s",
    ]


def test_without_privacy_no_epsilon_is_shown() -> None:
    stream = io.StringIO()
    progress = LiveProgress(stream=stream)
    progress.start(1, "plain")
    progress.round_finished(replace(RECORD, epsilon_max=None, epsilon_by_client={}))
    assert "ε" not in stream.getvalue()
    assert "left" not in stream.getvalue()


def test_a_terminal_gets_bars_and_the_last_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    play(LiveProgress(epsilon_budget=6.0, stream=stream))
    text = stream.getvalue()
    assert "2/4" in text
    assert "3/3" in text
    assert "ε max 1.25 of 6.00" in text
    hidden, shown = text.rfind("\x1b[?25l"), text.rfind("\x1b[?25h")
    assert -1 < hidden < shown, "the cursor must come back"


@pytest.mark.parametrize("term", ["dumb", ""])
def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(
    monkeypatch: pytest.MonkeyPatch, term: str
) -> None:
    monkeypatch.setenv("TERM", term)
    stream = Terminal()
    play(LiveProgress(stream=stream))
    assert "\x1b" not in stream.getvalue()
    assert len(stream.getvalue().splitlines()) == 3


def test_a_name_cannot_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    progress = LiveProgress(stream=stream)
    progress.start(1, "title\x1b[2J")
    progress.round_started(1, ("evil\x1b]0;x\x07",))
    progress.client_finished("[bold]evil\x1b]0;x\x07", 1)
    progress.finish()
    assert "\x1b[2J" not in stream.getvalue()
    assert "\x1b]0;" not in stream.getvalue()


@pytest.mark.parametrize("make", [LiveProgress, SilentProgress])
def test_standard_output_stays_empty(
    make: Callable[[], Progress], capsys: pytest.CaptureFixture[str]
) -> None:
    play(make())
    captured = capsys.readouterr()
    assert captured.out == ""
    assert bool(captured.err) == (make is LiveProgress)

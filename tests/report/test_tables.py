"""The closing table: every number in human units, safe as plain text."""

from __future__ import annotations

import io
import math
import re
from dataclasses import replace

import pytest

from fedlr.report.tables import closing_table, show_closing
from tests.report.samples import RECORD, SUMMARY


def rows(text: str) -> dict[str, str]:
    """Return value by name for the lines above the table of clients."""
    upper = text[: text.index("\n\n")]
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in upper.splitlines())


def test_the_table_holds_every_promised_number() -> None:
    text = closing_table(SUMMARY, [RECORD, replace(RECORD, round=2)])
    assert rows(text) == {
        "method": "fedsvd, tiny-bert on demo",
        "rounds": "4",
        "accuracy": "25.0 % → 75.0 %  (majority class 37.5 %)",
        "privacy": "ε max 1.25 at δ = 1e-05 per example, budget 6.00",
        "per client and round": "58.4 kB up, 1.5 kB down",
        "wall time": "2 min 5 s, of it aggregation 1.5 s",
        "accountant": "prv",
        # One refusal in each of the two records.
        "refused updates": "2  (over_budget 2)",
    }
    cells = [line.split() for line in text.splitlines()]
    assert ["client", "joins", "steps", "σ", "ε"] in cells
    assert ["site-0", "3", "1,234", "0.812", "1.25"] in cells
    assert ["site-1", "1", "10", "0.812", "1.00"] in cells
    assert "Note: The demo data are synthetic." in text


def test_without_privacy_the_table_claims_none() -> None:
    plain = replace(SUMMARY, privacy_mode="none", epsilon_max=None, delta=None, accountant=None)
    text = closing_table(plain, [])
    assert "off: the updates were not protected" in text
    assert not {"σ", "ε", "δ"} & set(text)


def test_a_dry_run_is_never_shown_as_private() -> None:
    text = closing_table(replace(SUMMARY, privacy_mode="dry", epsilon_max=math.inf), [])
    assert "ε = ∞: a dry run adds no noise" in text
    assert "1e-05" not in text


def test_epsilon_is_never_rounded_down() -> None:
    text = closing_table(replace(SUMMARY, epsilon_max=1.2500001), [])
    assert "ε max 1.26 " in text


def test_off_a_terminal_there_are_no_control_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    hostile = replace(SUMMARY, method="fed\x1b[2Jsvd", notices=("[bold]x[/bold]\x1b[1m",))
    stream = io.StringIO()
    show_closing(hostile, [RECORD], stream)
    assert re.findall(r"[\x00-\x09\x0b-\x1f\x7f]", stream.getvalue()) == []
    assert "[bold]x[/bold]?[1m" in stream.getvalue()


def test_long_names_wrap_and_are_not_lost() -> None:
    text = closing_table(replace(SUMMARY, model="m" * 120), [], width=60)
    assert rows(text)["method"].startswith("fedsvd,")
    assert text.count("m") >= 120
    assert max(len(line) for line in text.splitlines()) <= 60
    with pytest.raises(ValueError, match="width = 39 must be ≥ 40"):
        closing_table(SUMMARY, [], width=39)


def test_on_a_terminal_the_table_is_styled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    show_closing(SUMMARY, [RECORD], stream)
    assert "\x1b[1m" in stream.getvalue()
    assert "site-1" in stream.getvalue()

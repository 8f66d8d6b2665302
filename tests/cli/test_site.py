"""An operator sees what every run asks for, in words, and approves one by its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from client.orderbook import OrderBook, orders_folder
from fedlr.cli.main import main
from fedlr.errors import OrderRefused
from tests.client.real_site import RUN, Place, place


@pytest.fixture
def site(tmp_path: Path) -> Place:
    return place(tmp_path, allow={"approve": True})


def asked(site: Place, run: str = RUN, *words: str) -> OrderBook:
    book = OrderBook(orders_folder(site.ledger))
    with pytest.raises(OrderRefused):
        book.admit(site.order(site.config(*words), run=run), approval=True)
    return book


def test_runs_that_have_asked_are_told_in_words(
    site: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    asked(site)
    asked(site, "second", "privacy=dry", "data.public=true")
    assert main(["site", "orders", str(site.policy)]) == 0
    first, second = sorted(capsys.readouterr().out.strip().split("\n\n"), reverse=True)
    assert f"run        {RUN}, not approved" in first
    assert "ε ≤ 8 at δ = min(1e-5, 1/(10·N)) of one example in the whole run; clip at 1" in first
    assert "fedsvd, 3 rounds of 1 steps, 4 examples expected in each" in first
    assert "NO NOISE: privacy.mode = dry" in second


def test_an_approval_is_seen_and_shown(site: Place, capsys: pytest.CaptureFixture[str]) -> None:
    book = asked(site)
    assert main(["site", "approve", str(site.policy), RUN]) == 0
    assert f"{RUN}, approved" in capsys.readouterr().out
    book.admit(site.order(), approval=True)
    assert main(["site", "orders", str(site.policy), "--json"]) == 0
    (found,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (found["run"], found["approved"]) == (RUN, True)
    assert found["config"]["privacy"]["epsilon"] == 8.0


@pytest.mark.parametrize(
    ("words", "status", "complaint"),
    [
        (("approve",), 2, "approve takes a run"),
        (("orders", RUN), 2, "orders takes none"),
        (("approve", "another"), 7, "no run 'another' has asked here; those that have: none"),
    ],
)
def test_mistakes_are_sentences(
    site: Place,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    status: int,
    complaint: str,
) -> None:
    action, *run = words
    assert main(["site", action, str(site.policy), *run]) == status
    told = capsys.readouterr().err
    assert complaint in told
    assert "Traceback" not in told


def test_without_a_policy_nothing_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["site", "orders", str(tmp_path / "site.toml")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

"""A site knows which runs have asked, and what for; approval is of that alone."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

import pytest

from client.orderbook import OrderBook
from fedlr.errors import OrderRefused, RunError
from fedlr.signing import RunOrder

ORDER = RunOrder(run="tiny-1a2b", config='{"seed":0}', issued=1_000, expires=9_000)


def refusal(book: OrderBook, order: RunOrder, approval: bool = False) -> str:
    with pytest.raises(OrderRefused) as refused:
        book.admit(order, approval)
    return refused.value.code


def test_a_run_is_noted_once_and_its_order_stays(tmp_path: Path) -> None:
    book = OrderBook(tmp_path / "orders")
    book.admit(ORDER, approval=False)
    before = (tmp_path / "orders" / "tiny-1a2b.json").read_bytes()
    book.admit(replace(ORDER, expires=8_000), approval=False)
    assert (tmp_path / "orders" / "tiny-1a2b.json").read_bytes() == before
    assert [asked.order for asked in book.all()] == [ORDER]
    assert refusal(book, replace(ORDER, config="{}")) == "replayed"
    book.admit(replace(ORDER, run="another", config="{}"), approval=False)
    assert len(book.all()) == 2


def test_an_approval_is_of_one_run_and_survives(tmp_path: Path) -> None:
    book, other = OrderBook(tmp_path), replace(ORDER, run="another")
    assert refusal(book, ORDER, approval=True) == "unapproved"
    assert refusal(book, other, approval=True) == "unapproved"
    assert book.approve("tiny-1a2b").approved
    again = OrderBook(tmp_path)
    again.admit(ORDER, approval=True)
    assert refusal(again, other, approval=True) == "unapproved"
    assert refusal(again, replace(ORDER, config="{}"), approval=True) == "replayed"


def test_only_a_run_that_has_asked_can_be_approved(tmp_path: Path) -> None:
    book = OrderBook(tmp_path)
    with pytest.raises(RunError, match="those that have: none"):
        book.approve("tiny-1a2b")
    book.admit(ORDER, approval=False)
    with pytest.raises(RunError, match=r"'\.\./x' has asked here; those that have: tiny-1a2b"):
        book.approve("../x")


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"order": 1}'])
def test_a_damaged_file_lets_nothing_pass(tmp_path: Path, content: str) -> None:
    book = OrderBook(tmp_path)
    (tmp_path / "tiny-1a2b.json").write_text(content)
    with pytest.raises(RunError, match="take it away if the run may ask anew"):
        book.admit(ORDER, approval=False)


def test_an_approval_cannot_be_copied_to_another_run(tmp_path: Path) -> None:
    book = OrderBook(tmp_path)
    book.admit(ORDER, approval=False)
    book.approve("tiny-1a2b")
    (tmp_path / "another.json").write_bytes((tmp_path / "tiny-1a2b.json").read_bytes())
    with pytest.raises(RunError, match="not the file of this order"):
        book.admit(replace(ORDER, run="another"), approval=True)


def test_the_folder_is_its_owners(tmp_path: Path) -> None:
    OrderBook(tmp_path / "orders")
    assert stat.S_IMODE((tmp_path / "orders").stat().st_mode) == 0o700
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be made"):
        OrderBook(tmp_path / "file")

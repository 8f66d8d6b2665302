"""An order arrives as it was given, and ledgers are made where a run starts, once."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlr.config import RunConfig, from_json
from fedlr.errors import LedgerError, RunError
from fedlr.orders import order_file, prepare, read_order, write_order
from fedlr.privacy.ledger import SqliteLedger

SIGMA = {"client-000": 1.5, "client-001": 0.1 + 0.2}


def test_an_order_names_what_the_run_is_made_of(tmp_path: Path) -> None:
    order = prepare(RunConfig(seed=3), "run-1", tmp_path, SIGMA)
    assert from_json(order.config) == RunConfig(seed=3)
    assert dict(zip(order.clients, order.noise, strict=True)) == SIGMA
    assert sorted(tmp_path.iterdir()) == [order.ledger(name) for name in SIGMA]
    assert Path(order.ledgers).is_absolute()
    for name in SIGMA:
        assert SqliteLedger(order.ledger(name)).source_id == f"run-1/{name}"


def test_an_order_is_read_as_it_was_written(tmp_path: Path) -> None:
    order = prepare(RunConfig(), "run-1", tmp_path, SIGMA)
    path = order_file(str(tmp_path), 2**63 + 5)
    write_order(path, order)
    assert read_order(path) == order
    assert hash(read_order(path)) == hash(order)


def test_preparing_again_keeps_what_is_booked_and_another_run_is_refused(tmp_path: Path) -> None:
    before = prepare(RunConfig(), "run-1", tmp_path, SIGMA)
    assert prepare(RunConfig(), "run-1", tmp_path, SIGMA) == before
    with pytest.raises(LedgerError, match="run-1/client-000"):
        prepare(RunConfig(), "run-2", tmp_path, SIGMA)


def test_a_resumed_run_makes_no_ledger(tmp_path: Path) -> None:
    prepare(RunConfig(), "run-1", tmp_path, SIGMA, resumed=True)
    assert list(tmp_path.iterdir()) == []


def test_an_order_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    path = order_file(str(tmp_path), 7)
    with pytest.raises(RunError, match=r"7\.json .*all machines"):
        read_order(path)
    path.parent.mkdir()
    path.write_text('{"config": "{}"}')
    with pytest.raises(RunError, match="is damaged"):
        read_order(path)


def test_an_order_that_cannot_be_written_names_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    order = prepare(RunConfig(), "run-1", tmp_path, {})
    with pytest.raises(RunError, match="file/flower cannot be made"):
        write_order(order_file(str(tmp_path / "file"), 7), order)

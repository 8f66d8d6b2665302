"""What all runs of a sweep spent: read from ledgers, composed, and never too small."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import pytest

from fedlr.cli.composed import composed
from fedlr.privacy.accounting import epsilon
from fedlr.privacy.booking import JobKey
from fedlr.privacy.events import Release
from fedlr.privacy.ledger import SqliteLedger
from fedlr.report.facts import ClientFacts, RunFacts, write_facts
from fedlr.report.sweep import RUN, read_sweep
from tests.cli.small import policies
from tests.report.sweeps import CLIENTS, cell_name, grid, make_sweep

DELTA = 1e-5
NAMES = tuple(f"client-{index:03d}" for index in range(CLIENTS))
ONE_SEED = {"method": ("fedsvd", "ffa_lora"), "privacy.epsilon": ("1", "8"), "seed": ("0",)}
SEEDS = {"privacy.epsilon": ("8",), "seed": ("0", "1")}


def release(number: int, index: int, steps: int = 6) -> Release:
    """What the client of that index released in the cell of that number."""
    return Release(1.0 + 0.25 * number + 0.125 * index, 0.05 + 0.01 * index, steps, "example")


def book(path: Path, source: str, run: str, client: str, event: Release, round: int = 0) -> None:
    with closing(SqliteLedger(path, source)) as ledger:
        key = JobKey(run, round, client, "nonce")
        ledger.reserve(key, event)
        ledger.commit(key, event)


def begin(
    run: Path,
    number: int,
    sources: Mapping[str, str] | None = None,
    digest: str = "0",
    delta: float = DELTA,
) -> str:
    """Make the run folder of a cell with its facts, as a run does; return its identifier."""
    run.mkdir(exist_ok=True)
    name = f"run-{number}"
    own = {client: f"{name}/{client}" for client in NAMES}
    facts = RunFacts(
        run=name,
        config_sha256="0" * 64,
        model="tiny",
        data="demo",
        data_sha256=digest * 64,
        label_names=("no", "yes"),
        majority=0.5,
        base="0",
        tokenizer="0",
        labels="0",
        codec="1",
        clients=tuple(
            ClientFacts(client=client, declared_size=100, delta=delta, noise_multiplier=1.0)
            for client in NAMES
        ),
        sources=tuple({**own, **(sources or {})}.values()),
    )
    write_facts(run, facts)
    return name


def with_ledgers(folder: Path, axes: Mapping[str, tuple[str, ...]], digests: str = "0000") -> Path:
    """A sweep whose finished runs have ledgers; those without privacy have none.

    Args:
        folder: Made.
        axes: As in ``sweep.json``.
        digests: One letter per cell, which stands for the data it read.
    """
    make_sweep(folder, axes)
    for number, values in enumerate(grid(axes)):
        run = folder / "cells" / cell_name(number, values) / RUN
        name = begin(run, number, digest=digests[number])
        if values.get("privacy.epsilon") != "inf":
            (run / "ledgers").mkdir()
            for index, client in enumerate(NAMES):
                place = run / "ledgers" / f"{client}.sqlite"
                book(place, f"{name}/{client}", name, client, release(number, index))
    return folder


def test_clients_that_hold_the_same_rows_are_composed_one_by_one(tmp_path: Path) -> None:
    found = composed(read_sweep(with_ledgers(tmp_path / "s", ONE_SEED)))
    assert found.runs == 4
    for index, name in enumerate(NAMES):
        events = [release(number, index) for number in range(4)]
        assert found.by_client[name] == epsilon(events, DELTA)
        single = [epsilon([event], DELTA) for event in events]
        assert max(single) < found.by_client[name] < sum(single)
    assert found.epsilon_max == max(found.by_client.values())
    assert (found.delta, found.private_epsilon) == (DELTA, None)
    (notice,) = found.notices
    assert "holds if the rows were the same in all runs" in notice


@pytest.mark.parametrize(
    ("axes", "digests"),
    [(SEEDS, "00"), ({**SEEDS, "seed": ("0",), "privacy.epsilon": ("6", "8")}, "01")],
    ids=["another seed", "other data"],
)
def test_where_rows_move_no_assignment_of_clients_costs_more(
    tmp_path: Path, axes: dict[str, tuple[str, ...]], digests: str
) -> None:
    found = composed(read_sweep(with_ledgers(tmp_path / "s", axes, digests)))
    assert found.by_client == {}
    assert found.epsilon_max is not None
    worst = max(
        epsilon([release(0, first), release(1, second)], DELTA)
        for first, second in itertools.product(range(CLIENTS), repeat=2)
    )
    assert worst <= found.epsilon_max < 1.5 * worst
    assert "deal the data differently" in found.notices[0]


def test_a_run_without_privacy_makes_it_infinite(tmp_path: Path) -> None:
    axes = {"privacy.epsilon": ("1", "8", "inf"), "seed": ("0",)}
    found = composed(read_sweep(with_ledgers(tmp_path / "s", axes)))
    assert (found.runs, found.epsilon_max) == (3, math.inf)
    pairs = [[release(0, index), release(1, index)] for index in range(CLIENTS)]
    assert found.private_epsilon == max(epsilon(events, DELTA) for events in pairs)


def test_a_lost_ledger_leaves_the_number_unknown(tmp_path: Path) -> None:
    folder = with_ledgers(tmp_path / "s", ONE_SEED)
    next(folder.rglob("client-001.sqlite")).unlink()
    found = composed(read_sweep(folder))
    assert found.epsilon_max is None
    assert found.by_client == {}
    assert "client-001.sqlite" in found.notices[0]


def test_what_has_not_begun_spent_nothing_and_what_was_cut_short_did(tmp_path: Path) -> None:
    states = {0: "waiting", 1: "interrupted", 2: "failed"}
    folder = make_sweep(
        tmp_path / "s", ONE_SEED, lambda number, values: states.get(number, "waiting")
    )
    run = folder / "cells" / cell_name(1, grid(ONE_SEED)[1]) / RUN
    name = begin(run, 1)
    (run / "ledgers").mkdir()
    for index, client in enumerate(NAMES):
        place = run / "ledgers" / f"{client}.sqlite"
        with closing(SqliteLedger(place, f"{name}/{client}")) as ledger:
            # Reserved and never committed: it may have left.
            ledger.reserve(JobKey(name, 0, client, "nonce"), release(1, index))
    found = composed(read_sweep(folder))
    assert found.runs == 1
    assert found.by_client["client-002"] == epsilon([release(1, 2)], DELTA)
    assert "4 of 4 cells have not finished" in found.notices[0]


def public(folder: Path) -> Path:
    for path in folder.rglob("cell.json"):
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(r"\"public\":false", r"\"public\":true"), encoding="utf-8")
    return folder


def test_public_rows_are_told_by_their_digest(tmp_path: Path) -> None:
    assert composed(read_sweep(public(with_ledgers(tmp_path / "s", ONE_SEED)))).notices == ()


def test_the_least_delta_of_any_run_counts(tmp_path: Path) -> None:
    folder = with_ledgers(tmp_path / "s", ONE_SEED)
    begin(folder / "cells" / cell_name(2, grid(ONE_SEED)[2]) / RUN, 2, delta=DELTA / 10)
    found = composed(read_sweep(folder))
    assert found.delta == DELTA / 10
    events = [release(number, 0) for number in range(4)]
    assert found.by_client[NAMES[0]] == epsilon(events, DELTA / 10)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("data.max_examples", ("90", "100")),
        ("partition.alpha", ("0.1", "1.0")),
        ("federation.clients", ("3", "4")),
    ],
)
def test_what_deals_rows_to_clients_keeps_them_from_being_composed_one_by_one(
    tmp_path: Path, name: str, values: tuple[str, ...]
) -> None:
    axes = {"privacy.epsilon": ("8",), name: values, "seed": ("0",)}
    found = composed(read_sweep(with_ledgers(tmp_path / "s", axes)))
    assert found.by_client == {}
    assert "deal the data differently" in found.notices[0]


def test_all_steps_of_a_client_are_in_the_bound(tmp_path: Path) -> None:
    folder = with_ledgers(tmp_path / "s", SEEDS)
    for number, values in enumerate(grid(SEEDS)):
        place = folder / "cells" / cell_name(number, values) / RUN / "ledgers"
        # Of another σ, or the ledger adds its steps to the others.
        source, last = f"run-{number}/{NAMES[0]}", Release(5.0, 0.05, 9, "example")
        book(place / f"{NAMES[0]}.sqlite", source, f"run-{number}", NAMES[0], last, round=1)
    found = composed(read_sweep(folder))
    rate = release(0, CLIENTS - 1).sample_rate
    events = [
        Release(release(number, 0).noise_multiplier, rate, 6 + 9, "example") for number in range(2)
    ]
    assert found.epsilon_max == epsilon(events, DELTA)


def test_units_are_not_mixed(tmp_path: Path) -> None:
    folder = with_ledgers(tmp_path / "s", ONE_SEED)
    path = next(folder.rglob("cell.json"))
    text = path.read_text(encoding="utf-8")
    changed = text.replace(r"\"unit\":\"example\"", r"\"unit\":\"user\"")
    assert changed != text
    path.write_text(changed, encoding="utf-8")
    found = composed(read_sweep(folder))
    assert found.epsilon_max is None
    assert "ε of the units example and user cannot be composed" in found.notices
    assert any("deal the data differently" in notice for notice in found.notices)


@pytest.mark.parametrize(
    ("lost", "says"),
    [
        ("run/run.json", "has rounds.jsonl and no run.json; bring run.json back"),
        ("cell.json", "has a run and no cell.json"),
        ("", "of the cells numbered 001 nothing is there"),
    ],
    ids=["facts", "cell", "folder"],
)
def test_what_was_there_and_is_lost_leaves_the_number_unknown(
    tmp_path: Path, lost: str, says: str
) -> None:
    folder = with_ledgers(tmp_path / "s", ONE_SEED)
    cell = folder / "cells" / cell_name(1, grid(ONE_SEED)[1])
    if lost:
        (cell / lost).unlink()
    else:
        shutil.rmtree(cell)
    found = composed(read_sweep(folder))
    assert found.epsilon_max is None
    assert any(says in notice for notice in found.notices), found.notices


def test_an_operators_ledger_counts_for_the_runs_of_the_sweep(tmp_path: Path) -> None:
    axes = {"privacy.epsilon": ("8",), "seed": ("0",)}
    folder = make_sweep(tmp_path / "s", axes)
    own = (
        'source_id = "ward"\nledger = "ward.sqlite"\n[budget]\nepsilon_total = 9.0\ndelta = 0.01\n'
    )
    word = policies(tmp_path / "policies", client_001=own)
    values = grid(axes)[0]
    cell = folder / "cells" / cell_name(0, values)
    text = (cell / "cell.json").read_text(encoding="utf-8")
    quoted = rf"\"policies\":\"{word.partition('=')[2]}\""
    changed = text.replace(r"\"policies\":null", quoted)
    assert changed != text
    (cell / "cell.json").write_text(changed, encoding="utf-8")
    name = begin(cell / RUN, 0, {"client-001": "ward"})
    (cell / RUN / "ledgers").mkdir()
    ward = tmp_path / "policies" / "ward.sqlite"
    book(ward, "ward", "another run", "client-001", release(3, 1, steps=500))
    for index, client in enumerate(NAMES):
        place = cell / RUN / "ledgers" / f"{client}.sqlite"
        where, source = (ward, "ward") if index == 1 else (place, f"{name}/{client}")
        book(where, source, name, client, release(0, index))
    found = composed(read_sweep(folder))
    assert found.by_client["client-001"] == epsilon([release(0, 1)], DELTA)
    assert "client-001" in found.notices[0]


@pytest.mark.parametrize("kind", ["dry", "none"])
def test_runs_without_any_privacy_have_no_epsilon_but_infinity(tmp_path: Path, kind: str) -> None:
    folder = make_sweep(tmp_path / "s", {"privacy.epsilon": ("inf",), "seed": ("0",)})
    (path,) = folder.rglob("cell.json")
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(r"\"mode\":\"none\"", rf"\"mode\":\"{kind}\""), encoding="utf-8")
    begin(path.parent / RUN, 0)
    found = composed(read_sweep(folder))
    assert (found.runs, found.epsilon_max, found.private_epsilon) == (1, math.inf, None)

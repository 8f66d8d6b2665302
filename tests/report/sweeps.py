"""Sweep folders with made-up results, written by the writers that a sweep itself uses."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fedlr.config import from_mapping
from fedlr.report.records import (
    ROUNDS_FILE,
    SUMMARY_FILE,
    ClientSummary,
    RoundLog,
    RoundRecord,
    Summary,
    write_summary,
)
from fedlr.report.sweep import (
    CELLS,
    RUN,
    CellFacts,
    Failure,
    SweepFacts,
    write_cell,
    write_failure,
    write_sweep_facts,
)
from tests.report.samples import RECORD, SUMMARY

ROUNDS, CLIENTS = 2, 3

BUDGETS: Mapping[str, tuple[str, ...]] = {
    "method": ("fedsvd", "ffa_lora"),
    "privacy.epsilon": ("1", "3", "8", "inf"),
    "seed": ("0", "1", "2"),
}
"""Axes of the usual study of a privacy budget, reduced."""

Values = Mapping[str, str]


def accuracy_of(values: Values) -> float:
    """A plausible accuracy, a share of 1000 examples: the same for the same values."""
    budget = float(values.get("privacy.epsilon", "8"))
    level = 0.92 - 0.16 / (budget + 0.35) ** 0.8
    level -= 0.02 * (values.get("method", "fedsvd") != "fedsvd")
    for name, value in values.items():
        if name not in ("method", "privacy.epsilon", "seed"):
            number = float(value) if value.replace(".", "", 1).isdecimal() else len(value)
            level -= 0.004 * abs(math.log2(number + 0.1) - 2.5)
    noise = random.Random(json.dumps(sorted(values.items())))
    shared = random.Random(values.get("seed", "0"))
    return round(level + shared.gauss(0, 0.006) + noise.gauss(0, 0.004), 3)


def config_of(values: Values) -> str:
    """Canonical JSON of a cell's configuration, as `CellFacts.config`."""
    given: dict[str, Any] = {"federation": {"clients": CLIENTS, "clients_per_round": CLIENTS}}
    for name, value in values.items():
        section, _, key = name.partition(".")
        if name == "method":
            given["method"] = {"name": value}
        elif value == "inf" and name == "privacy.epsilon":
            given["privacy"] = {"mode": "none"}
        elif key:
            given.setdefault(section, {})[key] = json.loads(value)
        else:
            given[name] = json.loads(value)
    config = asdict(from_mapping(given))
    del config["output"], config["name"]
    return json.dumps(config, sort_keys=True, separators=(",", ":"))


def sizes_of(values: Values) -> tuple[int, int]:
    """Payload of one client in one round, down and up: A travels one way with fedsvd."""
    rank = int(values.get("adapter.rank", "8"))
    return (40_000 if values.get("method") == "fedsvd" else 20_000) * rank // 8, 20_000 * rank // 8


def summary_of(values: Values) -> Summary:
    """The summary of a finished cell."""
    budget = float(values.get("privacy.epsilon", "8"))
    down, up = sizes_of(values)
    common = replace(
        SUMMARY,
        method=values.get("method", "fedsvd"),
        rounds=ROUNDS,
        accuracy=accuracy_of(values),
        bytes_up=up,
        bytes_down=down,
        data_sha256=f"{int(values.get('seed', '0')):064x}",
        majority=0.55,
        notices=(),
    )
    clients = tuple(
        ClientSummary(client=f"client-{index:03d}", joins=ROUNDS, steps=10)
        for index in range(CLIENTS)
    )
    if math.isinf(budget):
        return replace(
            common,
            privacy_mode="none",
            unit=None,
            accountant=None,
            epsilon_max=None,
            epsilon_budget=None,
            delta=None,
            clients=clients,
        )
    spent = 0.99 * budget
    clients = tuple(replace(one, noise_multiplier=1.0, epsilon=spent) for one in clients)
    return replace(common, epsilon_max=spent, epsilon_budget=budget, clients=clients)


def rounds_of(values: Values, count: int = ROUNDS) -> list[RoundRecord]:
    """The closed rounds of a cell."""
    down, up = sizes_of(values)
    cohort = tuple(f"client-{index:03d}" for index in range(CLIENTS))
    summary = summary_of(values)
    spent = summary.epsilon_max
    return [
        replace(
            RECORD,
            round=number,
            cohort=cohort,
            accepted=CLIENTS,
            refused=(),
            accuracy=summary.accuracy if number == ROUNDS else None,
            loss=0.5 if number == ROUNDS else None,
            epsilon_max=spent,
            epsilon_by_client={} if spent is None else dict.fromkeys(cohort, spent),
            bytes_down=CLIENTS * down,
            bytes_up=CLIENTS * up,
        )
        for number in range(1, count + 1)
    ]


def grid(axes: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """Every combination, the last axis fastest."""
    return [dict(zip(axes, chosen, strict=True)) for chosen in itertools.product(*axes.values())]


def cell_name(number: int, values: Values) -> str:
    """Name of a cell's folder."""
    return f"{number:03d}-" + "-".join(value.replace("_", "-") for value in values.values())


def make_sweep(
    folder: Path,
    axes: Mapping[str, Sequence[str]] = BUDGETS,
    state: Callable[[int, Values], str] = lambda number, values: "finished",
    search: bool = False,
    combinations: Sequence[Mapping[str, str]] | None = None,
) -> Path:
    """Write a sweep.

    Args:
        folder: Made if missing.
        axes: As in ``sweep.json``.
        state: Of each cell: ``finished``, ``waiting``, ``interrupted`` or ``failed``.
        search: Whether it is a search.
        combinations: Of the cells; all of ``axes`` if None.
    """
    folder.mkdir(parents=True, exist_ok=True)
    facts = SweepFacts(
        name=folder.name,
        study="privacy_budget",
        about="What does a privacy budget cost in accuracy?",
        fixed=("federation.rounds=2",),
        axes={name: tuple(values) for name, values in axes.items()},
        search=search,
    )
    write_sweep_facts(folder, facts)
    # Nobody needs these files after a power failure, and waiting for the disk takes seconds.
    with patch("os.fsync"):
        for number, values in enumerate(grid(axes) if combinations is None else combinations):
            make_cell(folder, number, values, state(number, values))
    return folder


def make_cell(folder: Path, number: int, values: Values, state: str = "finished") -> Path:
    """Write one cell of a sweep and return its folder."""
    name = cell_name(number, values)
    cell = folder / CELLS / name
    cell.mkdir(parents=True)
    words = tuple(
        "privacy=none" if word == "privacy.epsilon=inf" else word
        for word in (f"{axis}={value}" for axis, value in values.items())
    )
    facts = CellFacts(
        cell=name,
        number=number,
        values=dict(values),
        overrides=("federation.rounds=2", *words),
        rounds=ROUNDS,
        config=config_of(values),
    )
    write_cell(cell, facts)
    if state == "failed":
        write_failure(cell, Failure(kind="DataError", message="the file rows.jsonl is missing"))
    if state in ("finished", "interrupted"):
        run = cell / RUN
        run.mkdir()
        log = RoundLog(run / ROUNDS_FILE)
        for record in rounds_of(values, ROUNDS if state == "finished" else 1):
            log.append(record)
        if state == "finished":
            write_summary(run / SUMMARY_FILE, summary_of(values))
    return cell

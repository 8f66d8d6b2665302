"""A tuned sweep in tables: page, Markdown and summaries say the same, and tuning is in no mean."""

from __future__ import annotations

import csv
import json
import math
import re
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from fedlr.report import strict_json, units
from fedlr.report.page import sweep as sweep_page
from fedlr.report.page.sweep_cells import Grid, read_grid
from fedlr.report.page.sweep_choice import SweepCost
from fedlr.report.page.sweep_figures import MOST_LINES, pictures
from fedlr.report.page.sweep_summary import markdown, summary_table, to_markdown
from fedlr.report.page.sweep_tables import CSV_FILE, settings_table, write_csv
from fedlr.report.page.sweep_tests import compare
from fedlr.report.page.table import Cell, Column, Table
from fedlr.report.records import SUMMARY_FILE, read_rounds, read_summary, write_summary
from fedlr.report.statistics import interval
from fedlr.report.sweep import CELL_FILE, RUN, CellFacts, read_sweep, write_cell, write_sweep_facts
from fedlr.report.tuning import tuning_of
from tests.report.sweeps import cell_name, grid, make_cell, make_sweep
from tests.report.test_sweep_page import page_of

AXES = {"method": ("fedsvd", "ffa_lora"), "privacy.epsilon": ("1", "inf"), "seed": ("0", "1")}
TUNING = tuning_of("optimizer.learning_rate", "1,2,4", 100, "0.1,0.3")
COST = SweepCost(runs=14, epsilon_max=math.inf, delta=1e-5, private_epsilon=3.25)
BEST = {"1": "2", "inf": "0.3"}
"""Value by ε that the made-up tuning runs choose: within the three, and at the edge of the two."""


def retuned(place: Path, value: str, tuning: bool) -> None:
    """Say of a made cell which value it had, and of a tuning cell that it was best at `BEST`."""
    facts = strict_json.decode(CellFacts, (place / CELL_FILE).read_text(encoding="utf-8"))
    config = json.loads(facts.config)
    config["optimizer"]["learning_rate"] = float(value)
    config["seed"] = int(facts.values["seed"])
    write_cell(place, replace(facts, tuned=value, tuning=tuning, config=json.dumps(config)))
    path = place / RUN / SUMMARY_FILE
    if tuning and path.exists():  # far from all others: a mean with one of them is seen
        chosen = BEST[facts.values["privacy.epsilon"]] == value
        write_summary(path, replace(read_summary(path), accuracy=0.01 + 0.01 * chosen))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two methods and two ε, with one combination whose tuning has failed."""
    folder = make_sweep(tmp_path_factory.mktemp("sweeps") / "tuned", AXES, combinations=())
    facts = read_sweep(folder).facts
    write_sweep_facts(folder, replace(facts, tuning=TUNING))
    number = 0
    for values in grid({name: AXES[name] for name in ("method", "privacy.epsilon")}):
        for value in TUNING.offered(values["privacy.epsilon"] == "inf"):
            own = {**values, "seed": "100"}
            state = "failed" if _fails(values) else "finished"
            retuned(make_cell(folder, number, own, state), value, tuning=True)
            number += 1
    for values in grid(AXES):
        if not _fails(values):
            place = make_cell(folder, number, values)
            retuned(place, BEST[values["privacy.epsilon"]], tuning=False)
            number += 1
    return folder


def _fails(values: Mapping[str, str]) -> bool:
    return values["method"] == "ffa_lora" and values["privacy.epsilon"] == "inf"


@pytest.fixture
def numbers(tuned: Path) -> Grid:
    return read_grid(read_sweep(tuned))


def parsed(text: str) -> list[list[str]]:
    """The texts of a Markdown table, its headings first."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [re.split(r"(?<!\\) ?\| ?", line)[1:-1] for line in lines]
    assert all(set(mark) <= set(":-") for mark in cells[1])
    return [[re.sub(r"\\(.)", r"\1", text) for text in row] for row in (cells[0], *cells[2:])]


def test_means_bytes_and_times_are_those_of_the_reported_runs(numbers: Grid) -> None:
    assert len(numbers.settings) == 3
    assert numbers.strangers == {}
    for setting in numbers.settings:
        mine = [
            result.cell
            for result in numbers.results
            if not result.cell.facts.tuning
            and all(result.values[name] == value for name, value in setting.values)
        ]
        summaries = [read_summary(cell.run / SUMMARY_FILE) for cell in mine]
        assert setting.accuracy == interval([one.accuracy or 0 for one in summaries])
        assert setting.bytes_up == statistics.fmean(one.bytes_up for one in summaries)
        assert setting.bytes_down == statistics.fmean(one.bytes_down for one in summaries)
        times = [
            statistics.median(one.server_s for one in read_rounds(cell.run / "rounds.jsonl"))
            for cell in mine
        ]
        assert setting.server_s == statistics.median(times)
        assert setting.choice is not None
        assert setting.choice.value == BEST[setting.value("privacy.epsilon")]


def test_page_table_and_markdown_say_the_same(tuned: Path, numbers: Grid) -> None:
    read = page_of(tuned)
    headings, *rows = read.tables["Finished cells by setting"]
    page = [dict(zip([h for h, _ in headings], [c for c, _ in row], strict=True)) for row in rows]
    names, *lines = parsed(markdown(numbers, COST))
    table = [dict(zip(names, line, strict=True)) for line in lines]
    assert len(page) == len(table) == 4
    pairs = {"learning rate": "learning rate", "up": "bytes up", "down": "bytes down"}
    for mine, theirs in zip(table, page, strict=True):
        for name, other in ({**pairs, "server": "server", "ε max": "ε max"}).items():
            assert mine[name] == theirs[other]
        assert (mine["method"], mine["ε asked for"]) == (theirs["method"], theirs["ε asked for"])
        found = re.findall(r"[\d.]+", mine["accuracy (95 % interval)"])
        assert found == [
            number
            for name in ("mean accuracy", "from", "to")
            for number in re.findall(r"[\d.]+", theirs[name])
        ]
    assert [line["learning rate"] for line in table] == [
        *("2 of 1, 2, 4", "0.3 of 0.1, 0.3 ↕", "2 of 1, 2, 4", "none of 0.1, 0.3: all failed")
    ]
    assert "ffa_lora, ε ∞: every tuning run failed" in read.words
    assert "chosen for each setting by one run per value on seed 100" in read.words
    assert "8 runs were there to tune" not in read.words
    assert "10 runs were there to tune" in read.words


def test_the_page_shows_tuning_runs_and_leaves_them_out(tuned: Path) -> None:
    read = page_of(tuned)
    headings, *rows = read.tables["All cells; click a heading to sort"]
    column = [heading for heading, _ in headings].index("learning rate")
    states = [row[-1][0] for row in rows]
    assert states.count("finished, tuning") == 8
    assert states.count("failed, tuning") == 2
    assert [row[column][0] for row in rows[:5]] == ["1", "2", "4", "0.1", "0.3"]
    text = (tuned / "summary.csv").read_text(encoding="utf-8").splitlines()
    assert "seed,optimizer.learning_rate,accuracy" in text[0]
    assert sum(",tuning," in line for line in text) == 10
    assert "tune.values=1,2,4 tune.without_privacy=0.1,0.3 tune.seed=100" in read.words


def test_means_are_those_of_the_rows_in_the_csv_that_are_to_be_reported(
    tuned: Path, numbers: Grid
) -> None:
    write_csv(numbers, tuned)
    with (tuned / CSV_FILE).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(numbers.results)
    for setting in numbers.settings:
        mine = [
            row
            for row in rows
            if row["stage"] == "run" and all(row[name] == value for name, value in setting.values)
        ]
        assert {row["optimizer.learning_rate"] for row in mine} == {
            BEST[setting.value("privacy.epsilon")]
        }
        assert {row["seed"] for row in mine} == set(AXES["seed"])
        assert statistics.fmean(float(row["accuracy"]) for row in mine) == pytest.approx(
            setting.accuracy.mean, rel=1e-12
        )


def test_markdown_comes_back(numbers: Grid) -> None:
    table = summary_table(numbers)
    expected = [[c.heading for c in table.columns], *([c.text for c in r] for r in table.rows)]
    assert parsed(to_markdown(table)) == expected
    odd = ["a|b", "*x*", "[y](z)", "a_b_c", "`q`", "<b>", "back\\slash"]
    columns = tuple(Column(name) for name in odd)
    rows = (tuple(map(Cell, odd)),)
    text = to_markdown(Table("", columns, rows))
    assert parsed(text) == [odd, odd]
    assert "<b>" not in text.replace("\\<b>", "")


def test_the_note_names_what_was_chosen_from(numbers: Grid) -> None:
    text = markdown(numbers, COST).replace("\\", "")
    assert "optimizer.learning_rate was chosen for each row from 1, 2, 4 (without privacy" in text
    assert "over 2 seeds" in text
    assert "↕: the best of them is at their edge" in text
    assert units.percent(numbers.settings[0].accuracy.mean) in text
    assert "so ε of the choice is ∞" in text
    assert f"it would cost ε = {units.privacy_loss(3.25)} at δ" in text
    unknown = SweepCost(runs=14, epsilon_max=None, notices=("cell 3 cannot be read",))
    assert markdown(numbers, unknown).endswith("cell 3 cannot be read.\n")


def test_a_cell_that_is_not_tuned_does_not_belong(tuned: Path, tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", AXES)
    facts = read_sweep(folder).facts
    write_sweep_facts(folder, replace(facts, tuning=TUNING))
    strangers = read_grid(read_sweep(folder)).strangers
    assert len(strangers) == len(grid(AXES))
    assert set(strangers.values()) == {"it is tuned and the others are not, or the other way round"}


def test_many_variants_are_compared_with_the_first_and_parted_over_pictures(
    tmp_path: Path,
) -> None:
    names = tuple(f"variant {letter}" for letter in "abcdefghij")
    axes = {"variant": names, "privacy.epsilon": ("1", "8"), "seed": ("0", "1")}
    combinations = grid(axes)
    folder = make_sweep(tmp_path / "s", axes, combinations=())
    for number, values in enumerate(combinations):
        plain = {name: value for name, value in values.items() if name != "variant"}
        place = make_cell(folder, number, plain)
        facts = strict_json.decode(CellFacts, (place / CELL_FILE).read_text(encoding="utf-8"))
        write_cell(place, replace(facts, values=values, config=f"{number}"))
        place.rename(place.with_name(cell_name(number, values).replace(" ", "-")))
    found = read_grid(read_sweep(folder))
    tests = compare(found)
    assert tests is not None
    assert [(one.first, one.second) for one in tests.overall] == [
        (names[0], other) for other in names[1:]
    ]
    drawings = pictures(found)
    assert len(drawings) == 2
    shown = [[name for name in names if f"{name}:" in one.alternative] for one in drawings]
    assert shown == [list(names[:MOST_LINES]), list(names[MOST_LINES:])]
    assert "variant a" in sweep_page.write(folder, figures=False).read_text(encoding="utf-8")
    assert len(settings_table(found).rows) == 20

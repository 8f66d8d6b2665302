"""A sweep's page: its numbers are those of the records, and it says what is missing."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from filelock import FileLock

from fedlr.errors import RunError
from fedlr.report import strict_json, units
from fedlr.report.page import sweep as sweep_page
from fedlr.report.page.sweep import SweepCost
from fedlr.report.records import SUMMARY_FILE, Summary, read_summary, write_summary
from fedlr.report.statistics import interval
from fedlr.report.sweep import (
    CELL_FILE,
    CELLS,
    LOCK,
    RUN,
    CellFacts,
    Sweep,
    SweepFacts,
    read_cell,
    read_sweep,
    write_sweep_facts,
)
from fedlr.report.sweeping import failures
from tests.cli.test_composed import begin
from tests.report.sweeps import BUDGETS, ROUNDS, cell_name, make_cell, make_sweep

SMALL = {"method": ("fedsvd", "ffa_lora"), "privacy.epsilon": ("1", "inf"), "seed": ("0", "1")}


@dataclass
class Read:
    """A page as `html.parser` reads it.

    Attributes:
        tables: Rows of (text, data-value) by caption, headings first.
        words: All text.
        code: The texts to be copied.
    """

    tables: dict[str, list[list[tuple[str, str | None]]]] = field(default_factory=dict)
    words: str = ""
    code: list[str] = field(default_factory=list)


class Reader(HTMLParser):
    """Fills a `Read`."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self._rows = Read(), list[list[tuple[str, str | None]]]()
        self._inside, self._skip = "", 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._skip += tag in ("svg", "style", "script")
        if tag == "table":
            self._rows = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("th", "td"):
            self._rows[-1].append(("", dict(attrs).get("data-value")))
        if tag in ("th", "td", "caption", "code"):
            self._inside = tag
        if tag == "code":
            self.read.code.append("")

    def handle_endtag(self, tag: str) -> None:
        self._skip -= tag in ("svg", "style", "script")
        if tag == self._inside:
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._skip:
            return
        self.read.words += data
        if self._inside in ("th", "td"):
            text, value = self._rows[-1][-1]
            self._rows[-1][-1] = (text + data, value)
        elif self._inside == "caption":
            self.read.tables[data.strip()] = self._rows
        elif self._inside == "code":
            self.read.code[-1] += data


def page_of(folder: Path, cost: SweepCost | None = None, figures: bool = False) -> Read:
    reader = Reader()
    path = sweep_page.write(folder, cost=cost, figures=figures)
    reader.feed(path.read_text(encoding="utf-8"))
    reader.read.words = re.sub(r"\s+", " ", reader.read.words)
    return reader.read


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Read]:
    """A finished sweep and its page, for tests that only read them."""
    folder = make_sweep(tmp_path_factory.mktemp("sweeps") / "small", SMALL)
    return folder, page_of(folder, figures=True)


def summaries(folder: Path) -> Mapping[str, Summary]:
    return {
        path.name: read_summary(path / RUN / SUMMARY_FILE)
        for path in sorted((folder / CELLS).iterdir())
    }


def number(value: str | None) -> float | None:
    return None if value is None or value == "" else float(value)


def shown(summary: Summary) -> dict[str, float | None]:
    """What a page must show of a summary, by heading of the table of cells."""
    return {
        "accuracy": summary.accuracy,
        "ε max": math.inf if summary.epsilon_max is None else summary.epsilon_max,
        "δ": summary.delta,
        "bytes up": summary.bytes_up,
        "bytes down": summary.bytes_down,
        "wall time": summary.wall_s,
        "rounds": summary.rounds,
    }


def test_numbers_in_page_csv_and_summaries_agree(small: tuple[Path, Read]) -> None:
    folder, read = small
    headings, *rows = read.tables["All cells; click a heading to sort"]
    names = [text for text, _ in headings]
    with (folder / "summary.csv").open(encoding="utf-8", newline="") as file:
        lines = {line["cell"]: line for line in csv.DictReader(file)}
    found = summaries(folder)
    assert [row[0][0] for row in rows] == list(found) == list(lines)
    columns = dict(zip(shown(next(iter(found.values()))), _csv_columns(), strict=True))
    for row in rows:
        cells, summary = dict(zip(names, row, strict=True)), found[row[0][0]]
        for heading, value in shown(summary).items():
            assert number(cells[heading][1]) == value
            assert number(lines[row[0][0]][columns[heading]]) == value
        assert cells["accuracy"][0] == units.percent(summary.accuracy)
        assert cells["ε max"][0] == units.privacy_loss(shown(summary)["ε max"])
        assert cells["state"][0] == "finished"


def _csv_columns() -> tuple[str, ...]:
    return ("accuracy", "epsilon_max", "delta", "bytes_up", "bytes_down", "wall_s", "rounds")


def test_the_means_of_the_page_are_those_of_the_summaries(small: tuple[Path, Read]) -> None:
    folder, read = small
    _, *rows = read.tables["Finished cells by setting"]
    assert len(rows) == 4
    for row in rows:
        method, budget, runs, mean, low, high = row[:6]
        slug = f"-{method[0].replace('_', '-')}-{'inf' if budget[0] == '∞' else budget[0]}-"
        found = [one.accuracy or 0 for name, one in summaries(folder).items() if slug in name]
        expected = interval(found)
        assert number(runs[1]) == expected.n == 2
        assert [number(end[1]) for end in (mean, low, high)] == pytest.approx(
            [expected.mean, expected.low, min(expected.high or 1.0, 1.0)]
        )


def test_a_finished_sweep_has_figures_and_no_notice(small: tuple[Path, Read]) -> None:
    folder, read = small
    assert "partial report" not in read.words
    names = {path.name for path in (folder / "figures").iterdir()}
    assert names == {"accuracy.svg", "accuracy.png", "trade.svg", "trade.png"}
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:,)[^"']*["']""", text)


def test_the_page_goes_where_it_is_asked_to(small: tuple[Path, Read], tmp_path: Path) -> None:
    made = sweep_page.write(small[0], tmp_path / "new" / "place")
    assert made == tmp_path / "new" / "place" / "report.html"
    assert (made.parent / "summary.csv").is_file()


def test_the_best_cells_are_commands_with_their_price(small: tuple[Path, Read]) -> None:
    folder, _ = small
    cost = SweepCost(runs=8, epsilon_max=math.inf, delta=1e-5, private_epsilon=4.5671)
    read = page_of(folder, cost)
    found = summaries(folder)
    best = max(found, key=lambda name: found[name].accuracy or 0)
    private = [name for name, one in found.items() if one.privacy_mode == "dp"]
    best_private = max(private, key=lambda name: found[name].accuracy or 0)
    for name in (best, best_private):
        facts = read_cell(folder / CELLS / name).facts
        assert " ".join(("fedlr simulate", *facts.overrides)) in read.code
        assert f"{name}: {units.percent(found[name].accuracy)}" in read.words
    assert "not private at all" in read.words
    assert "4.57 at δ = 1e-05" in read.words  # rounded up
    assert "winner's curse" in read.words
    assert "declared public" in read.words


@pytest.mark.parametrize(
    ("cost", "words"),
    [
        (SweepCost(runs=8, epsilon_max=9.871, delta=1e-5), "The honest ε of this choice is 9.88"),
        (SweepCost(runs=1, epsilon_max=None, notices=("a lost ledger",)), "a lost ledger"),
        (SweepCost(runs=8, epsilon_max=2.0, delta=1e-5, by_client={"ward": 2.0}), "ward: ε = 2.00"),
        (None, "composed from the ledgers"),
    ],
    ids=["known", "unknown", "by client", "not asked"],
)
def test_the_price_of_the_choice_is_told(
    small: tuple[Path, Read], cost: SweepCost | None, words: str
) -> None:
    assert words in page_of(small[0], cost).words


def test_what_has_not_finished_is_said_first(tmp_path: Path) -> None:
    states = {1: "failed", 2: "interrupted", 3: "waiting"}
    folder = make_sweep(
        tmp_path / "s", SMALL, lambda number, values: states.get(number, "finished")
    )
    broken = folder / CELLS / "004-ffa-lora-1-0" / RUN / "rounds.jsonl"
    broken.write_text("{}\n", encoding="utf-8")
    read = page_of(folder)
    assert "4 of 8 cells have finished" in read.words
    assert "1 failed: 001-fedsvd-1-1 (the file rows.jsonl is missing)" in read.words
    assert "1 is damaged: 004-ffa-lora-1-0" in read.words
    assert "rounds.jsonl, line 1 is damaged" in read.words
    assert "1 was interrupted; 1 has not begun. This is a partial report" in read.words
    assert "fedlr sweep sweep=privacy_budget federation.rounds=2" in read.words
    _, *rows = read.tables["All cells; click a heading to sort"]
    assert [row[-1][0] for row in rows] == [
        *("finished", "failed", "interrupted", "waiting", "damaged", "finished", "finished"),
        "finished",
    ]
    interrupted = rows[2]
    assert interrupted[4] == ("—", None)
    assert (f"1 of {ROUNDS}", "1") in interrupted


def test_a_run_that_goes_on_meanwhile_is_told(tmp_path: Path) -> None:
    folder = make_sweep(
        tmp_path / "s", SMALL, lambda number, values: "finished" if number else "interrupted"
    )
    lock = folder / CELLS / "000-fedsvd-1-0" / RUN / LOCK
    lock.parent.mkdir()
    with FileLock(lock):
        assert "7 of 8 cells have finished; 1 is running." in page_of(folder).words


def test_a_sweep_that_has_only_begun_is_a_page_too(tmp_path: Path) -> None:
    read = page_of(make_sweep(tmp_path / "s", SMALL, lambda number, values: "waiting"))
    assert "0 of 8 cells have finished; 8 have not begun" in read.words
    assert "nothing to choose" in read.words


def test_the_command_goes_on_in_the_same_place(tmp_path: Path) -> None:
    axes = {"method": ("fedsvd", "[a,b c]")}
    facts = SweepFacts(name="s", study=None, about="", fixed=("seed=1",), axes=axes)
    words = "fedlr sweep seed=1 'method=fedsvd,[a,b c]' name=s"
    for place, output in (("runs", ""), ("/else where", " 'output=/else where'")):
        folder = Path(place) / "sweeps" / "s"
        assert sweep_page.command(Sweep(facts, folder, ())) == words + output


def test_a_sweep_without_cells_is_refused_with_the_way_out(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", SMALL, combinations=())
    with pytest.raises(RunError, match=r"no cells yet.*start it with: fedlr sweep"):
        sweep_page.write(folder)
    with pytest.raises(RunError, match="is no sweep"):
        sweep_page.write(tmp_path)


def test_a_cell_of_other_axes_is_named_and_left_out(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", SMALL)
    make_cell(folder, 8, {"adapter.rank": "4", "seed": "0"})
    make_cell(folder, 9, {"method": "fedsvd", "privacy.epsilon": "6", "seed": "0"})
    read = page_of(folder)
    assert "008-4-0 (its axes are not those of sweep.json" in read.words
    assert "009-fedsvd-6-0 (privacy.epsilon=6 is not in sweep.json)" in read.words
    _, *rows = read.tables["Finished cells by setting"]
    assert [row[1][0] for row in rows] == ["1", "∞", "1", "∞"]
    _, *rows = read.tables["All cells; click a heading to sort"]
    assert [row[-1][0] for row in rows[-2:]] == ["finished, left out"] * 2


def _other_data(folder: Path) -> None:
    path = folder / CELLS / "002-fedsvd-inf-0" / RUN / SUMMARY_FILE
    write_summary(path, replace(read_summary(path), data_sha256="f" * 64))


def _swapped(folder: Path) -> None:
    cell = folder / CELLS / "002-fedsvd-inf-0"
    other = json.loads(read_cell(folder / CELLS / "000-fedsvd-1-0").facts.config)
    text = json.dumps({"config": {**other, "name": "s", "output": "runs"}})
    (cell / RUN / "config.json").write_text(text, encoding="utf-8")


def _doubled(folder: Path) -> None:
    path = folder / CELLS / "002-fedsvd-inf-0" / CELL_FILE
    first = read_cell(folder / CELLS / "000-fedsvd-1-0").facts
    facts = strict_json.decode(CellFacts, path.read_text(encoding="utf-8"))
    path.write_text(strict_json.encode(replace(facts, config=first.config)), encoding="utf-8")


@pytest.mark.parametrize(
    ("mix", "reason"),
    [
        (_other_data, "it was run on other data"),
        (_swapped, "its run folder holds a run with other settings"),
        (_doubled, "it has the configuration of 000-fedsvd-1-0"),
    ],
)
def test_a_mixed_folder_names_what_does_not_belong(
    tmp_path: Path, mix: object, reason: str
) -> None:
    folder = make_sweep(tmp_path / "s", SMALL)
    mix(folder)  # type: ignore[operator]
    read = page_of(folder)
    assert f"The folder mixes what does not belong together: 002-fedsvd-inf-0 ({reason}" in (
        read.words
    )
    _, *rows = read.tables["Finished cells by setting"]
    assert [row[2][0] for row in rows] == ["2", "1", "2", "2"]


def test_other_seeds_may_have_other_digests(tmp_path: Path) -> None:
    """The seed draws the validation split of some sources, so their digests differ by seed."""
    folder = make_sweep(tmp_path / "s", SMALL)
    digests = {summary.data_sha256 for summary in summaries(folder).values()}
    assert len(digests) == 2
    assert "mixes" not in page_of(folder).words


def test_hostile_names_are_text(tmp_path: Path) -> None:
    values = {"seed": "0"}
    folder = make_sweep(tmp_path / "s", {"seed": ("0",)}, lambda number, values: "waiting")
    path = folder / CELLS / cell_name(0, values) / CELL_FILE
    facts = strict_json.decode(CellFacts, path.read_text(encoding="utf-8"))
    hostile = replace(facts, cell="<script>alert(1)</script>\x1b[2J")
    path.write_text(strict_json.encode(hostile), encoding="utf-8")
    text = sweep_page.write(folder).read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "\x1b" not in text


def test_the_numbers_of_a_budget_sweep_survive_sorting_values(tmp_path: Path) -> None:
    """∞ is a number for a sort: its raw value is ``inf``."""
    axes = {**BUDGETS, "method": ("fedsvd",), "seed": ("0",)}
    _, *rows = page_of(make_sweep(tmp_path / "s", axes)).tables["Finished cells by setting"]
    assert [number(row[1][1]) for row in rows] == [1.0, 3.0, 8.0, math.inf]


def test_a_sweep_over_seeds_alone_has_a_mean_and_no_picture_over_seeds(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", {"seed": ("0", "1", "2")})
    read = page_of(folder, figures=True)
    expected = interval([one.accuracy or 0 for one in summaries(folder).values()])
    (_, row) = read.tables["Finished cells by setting"]
    assert [number(cell[1]) for cell in row[:2]] == pytest.approx([3, expected.mean])
    assert not list(folder.rglob("accuracy.svg"))


def test_what_is_damaged_is_not_promised_to_be_run(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", SMALL)
    (folder / CELLS / "004-ffa-lora-1-0" / RUN / SUMMARY_FILE).write_text("{", encoding="utf-8")
    assert "left alone: bring the file that is named back from a copy" in page_of(folder).words
    told = failures(read_sweep(folder))
    assert "7 of 8 cells are finished" in told[1]
    assert "tries" not in "".join(told)
    assert told[2].startswith("1 cell is damaged and left alone: bring")


def changed(folder: Path, **values: object) -> Path:
    """A sweep with other facts in its ``sweep.json``."""
    write_sweep_facts(folder, replace(read_sweep(folder).facts, **values))  # type: ignore[arg-type]
    return folder


def test_what_cells_without_privacy_take_of_their_own_is_shown(tmp_path: Path) -> None:
    own = ("optimizer.learning_rate=0.3",)
    read = page_of(changed(make_sweep(tmp_path / "s", SMALL), without_privacy=own))
    assert re.search(r"at ε = ∞ ?optimizer\.learning_rate=0\.3", read.words)
    # In the captions of both pictures.
    assert read.words.count("At ε = ∞ cells take optimizer.learning_rate=0.3.") == 2
    private = {"method": ("fedsvd", "ffa_lora"), "privacy.epsilon": ("1", "8"), "seed": ("0",)}
    read = page_of(changed(make_sweep(tmp_path / "private", private), without_privacy=own))
    assert "cells take" not in read.words
    assert "at ε = ∞" not in read.words


def test_epsilon_of_an_operators_ledger_is_not_called_the_runs_own(tmp_path: Path) -> None:
    axes = {"method": ("fedsvd", "ffa_lora"), "privacy.epsilon": ("1", "8"), "seed": ("0",)}
    folder = make_sweep(tmp_path / "s", axes)
    read = page_of(folder)
    assert "of its own" in read.words
    assert "cumulative" not in read.words
    for number, path in enumerate(sorted((folder / CELLS).glob(f"*/{RUN}"))):
        begin(path, number, {"client-001": "ward"})
    read = page_of(folder)
    assert "of its own" not in read.words
    assert "counts other runs in the ledgers of operators too" in read.words
    assert "ε is cumulative: ledgers of operators count other runs too." in read.words


def test_the_command_of_a_moved_folder_and_of_a_search(tmp_path: Path) -> None:
    axes = {"optimizer.learning_rate": ("1", "2")}
    made = make_sweep(tmp_path / "sweeps" / "s", axes, search=True)
    moved = made.rename(made.parent / "moved")
    assert f"search.trials=2 name=moved output={tmp_path}" in sweep_page.command(read_sweep(moved))
    assert "search.trials=7" in sweep_page.command(read_sweep(changed(moved, trials=7)))


def test_no_place_of_this_machine_is_on_the_page(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "ward-7" / "sweeps" / "s", SMALL)
    facts = read_sweep(folder).facts
    write_sweep_facts(folder, replace(facts, fixed=(*facts.fixed, f"data.path={tmp_path}/ward-7")))
    assert "ward-7" in sweep_page.command(read_sweep(folder))
    written = sweep_page.write(folder).read_text(encoding="utf-8")
    assert "ward-7" not in written
    assert "data.path=&lt;folder&gt;" in written

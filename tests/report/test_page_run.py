"""The page of a run: its numbers are the records', and it says what it cannot show."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from fedlr.errors import RunError
from fedlr.report import units
from fedlr.report.facts import write_facts
from fedlr.report.page import geometry_figures, run, run_figures
from fedlr.report.page.drawing import Drawing
from fedlr.report.page.run_files import read_run
from fedlr.report.records import ROUNDS_FILE, SUMMARY_FILE
from fedlr.report.spectra import SPECTRA_FILE
from fedlr.report.sweep import LOCK
from tests.report.run_folder import CLIENTS, DEFAULT, FACTS, RECORDS, RESULT, make, with_mode

Row = list[tuple[str, str | None]]


class Reader(HTMLParser):
    """Text and ``data-value`` of every cell by table, and of every result by its name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[Row]] = {}
        self.results: dict[str, tuple[str, str | None]] = {}
        self.text: list[str] = []
        self._rows: list[Row] = []
        self._place, self._value, self._term = "", None, ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th", "caption", "dt", "dd", "style", "script"):
            self._place, self._value = tag, dict(attrs).get("data-value")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._place:
            self._place = ""

    def handle_data(self, data: str) -> None:
        if self._place == "caption":
            self._rows = self.tables.setdefault(data, [])
        elif self._place in ("td", "th"):
            self._rows[-1].append((data, self._value))
        elif self._place == "dt":
            self._term = data
        elif self._place == "dd":
            self.results[self._term] = (data, self._value)
        elif self._place not in ("style", "script"):
            self.text.append(data)


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw nothing: it takes most of a page's time, and other tests look at figures."""
    for module in (run_figures, geometry_figures):
        monkeypatch.setattr(module, "draw", lambda *given: Drawing(*given[:3], "", ""))


def read(folder: Path, default: Mapping[str, Any] = DEFAULT) -> Reader:
    path = run.write(folder, None, default, figures=False)
    return Reader(path.read_text(encoding="utf-8"))


def notices(folder: Path) -> str:
    return " ".join(run.page_of(read_run(folder), DEFAULT).notices)


def test_page_table_and_summary_tell_the_same_numbers(tmp_path: Path) -> None:
    page = read(make(tmp_path / "run"))
    results = {name: value for name, (_, value) in page.results.items()}
    assert results["Accuracy"] == repr(RESULT.accuracy)
    assert results["Before training"] == repr(RESULT.accuracy_start)
    assert results["ε, largest of the clients"] == repr(RESULT.epsilon_max)
    assert results["Rounds"] == repr(RESULT.rounds)
    assert results["Up, per client and round"] == repr(RESULT.bytes_up)
    assert results["Wall time"] == repr(RESULT.wall_s)
    assert page.results["Accuracy"][0] == units.percent(RESULT.accuracy)
    assert page.results["ε, largest of the clients"][0] == units.privacy_loss(RESULT.epsilon_max)
    clients = page.tables["Clients"][1:]
    told = [(row[0][1], row[2][1], row[3][1], row[5][1]) for row in clients]
    assert told == [
        (c.client, repr(c.joins), repr(c.steps), repr(c.epsilon)) for c in RESULT.clients
    ]
    rounds = page.tables["Closed rounds"][1:]
    for row, record in zip(rounds, RECORDS, strict=True):
        values = [value for _, value in row]
        assert values[0] == repr(record.round)
        assert values[1] == (None if record.accuracy is None else repr(record.accuracy))
        assert values[3] == repr(record.epsilon_max)
        assert values[5:7] == [repr(record.bytes_down), repr(record.bytes_up)]
    assert clients[-1][6:] == [
        ("3", "3"),
        *[("the round would have exceeded its ε (budget)",) * 2],
    ]


def test_the_rounds_of_a_client_are_counted_as_the_summary_counts_them(tmp_path: Path) -> None:
    finished, partial = make(tmp_path / "a"), make(tmp_path / "b", finished=False)
    joined = [
        [row[2] for row in read(folder).tables["Clients"][1:]] for folder in (finished, partial)
    ]
    assert joined[0] == joined[1]


def test_an_interrupted_run_says_so_and_how_to_go_on(tmp_path: Path) -> None:
    folder = make(tmp_path / "a run", finished=False, rounds=3)
    told = notices(folder)
    assert "interrupted after 3 of 8 rounds" in told
    assert "fedlr simulate 'resume=<run folder>'\n" in _codes(folder)
    page = read(folder)
    name = "ε of the closed rounds, largest of the clients"
    assert page.results[name][1] == repr(RECORDS[2].epsilon_max)
    assert "the ledgers count it" in " ".join(page.text)
    assert "ε of the closed rounds" in [text for text, _ in page.tables["Clients"][0]]
    assert page.results["Rounds"] == ("3", "3")
    assert page.results["Accuracy"][1] == repr(RECORDS[1].accuracy)


def test_a_run_that_is_going_on_says_so_even_over_an_older_summary(tmp_path: Path) -> None:
    folder = make(tmp_path / "run")
    (folder / LOCK).parent.mkdir()
    with FileLock(folder / LOCK):
        assert "still going: 4 of 8 rounds" in notices(folder)
        assert read_run(folder).summary is None
        # The process that ends the run holds it still when it writes the page.
        assert read_run(folder, ended=True).summary == RESULT
    assert "still going" not in notices(folder)


@pytest.mark.parametrize("name", [ROUNDS_FILE, SPECTRA_FILE])
def test_a_damaged_line_is_named_and_what_precedes_it_is_shown(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "run")
    lines = (folder / name).read_bytes().split(b"\n")
    lines[2] = lines[2][:20]
    (folder / name).write_bytes(b"\n".join(lines))
    assert f"<run folder>/{name}, line 3 is damaged" in notices(folder)
    files = read_run(folder)
    kept = files.records if name == ROUNDS_FILE else files.spectra
    assert [record.round for record in kept] == [1, 2]
    read(folder)


@pytest.mark.parametrize("name", [SUMMARY_FILE, "config.json", "intruders.json"])
def test_a_damaged_file_is_named_and_the_rest_is_shown(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "run")
    (folder / name).write_text("{")
    assert f"<run folder>/{name}" in notices(folder)
    assert len(read(folder).tables["Closed rounds"]) == 5


def test_an_older_run_without_spectra_says_why_they_are_missing(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", spectra=False)
    assert any("an earlier version of fedlr" in text for text in read(folder).text)


def test_a_run_without_a_closed_round_has_a_page(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", finished=False, rounds=0)
    (folder / ROUNDS_FILE).unlink()
    text = " ".join(read(folder).text)
    assert "No round is closed yet." in text
    assert "No round has changed the model yet." in text


@pytest.mark.parametrize(
    ("mode", "sentence"), [("dry", "ε = ∞"), ("none", "the sites' updates were not protected")]
)
def test_without_protection_nothing_is_promised(tmp_path: Path, mode: str, sentence: str) -> None:
    folder = with_mode(make(tmp_path / "run"), mode)
    page = run.page_of(read_run(folder), DEFAULT)
    assert "epsilon" not in [drawing.name for drawing in page.drawings]
    text = " ".join(read(folder).text)
    assert sentence in text
    assert "differentially private" not in text


def test_names_from_outside_are_text(tmp_path: Path) -> None:
    folder = make(tmp_path / "run")
    hostile = '"><script>alert(1)</script>\x1b[2J$x_1$'
    labels = (hostile, "yes")
    write_facts(folder, replace(FACTS, data=hostile, label_names=labels, notices=(hostile,)))
    text = run.write(folder, None, DEFAULT, figures=False).read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "&gt;&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "\x1b" not in text
    assert text.count("<script>") == 1


def test_the_command_holds_what_differs(tmp_path: Path) -> None:
    folder = make(tmp_path / "run")
    stored = json.loads((folder / "config.json").read_text())
    assert "fedlr simulate\n" in _codes(folder)
    stored["config"]["seed"] = 7
    stored["config"]["adapter"]["layers"] = [-1]
    (folder / "config.json").write_text(json.dumps(stored))
    assert "fedlr simulate 'adapter.layers=[-1]' seed=7\n" in _codes(folder)


def test_no_place_of_this_machine_is_on_the_page(tmp_path: Path) -> None:
    folder, secret = make(tmp_path / "ward-7" / "run"), str(tmp_path / "ward-7")
    set_config(
        folder,
        output=secret,
        model={"name": f"{secret}/model"},
        data={"kind": "file", "path": "ward-7/a", "cache": secret, "train_split": "ward-7"},
        privacy={"policies": secret},
        tracking={"kind": "mlflow", "uri": f"sqlite:///{secret}/x.db"},
    )
    told = (f"{secret}/a has no test split.",)
    write_facts(folder, replace(FACTS, model=f"{secret}/model", data="ward-7/a", notices=told))
    loader = f'base = "{secret}/model"\nAutoModel.from_pretrained(base)'
    (folder / "adapter").mkdir()
    (folder / "adapter" / "README.md").write_text(f"```python\n{loader}\n```\n")
    (folder / "intruders.json").write_text("{")
    text = run.write(folder, None, DEFAULT, figures=False).read_text(encoding="utf-8")
    assert "ward-7" not in text
    codes = _codes(folder)
    assert "Fill in <run folder> and <folder> and <file> and <address>" in codes
    assert "'data.path=\"<folder>\"'" in codes
    assert 'base = "<folder>"' in codes
    values = {name: value for (name, _), (value, _) in read(folder).tables["Settings"][1:]}
    assert values["data.path"] == values["model.name"] == "(a folder of this machine)"
    assert values["tracking.kind"] == "mlflow"


@pytest.mark.parametrize(
    ("section", "damage"),
    [
        *(("privacy", {"unit": "ward"}), ("privacy", {"mode": 3}), ("privacy", {"epsilon": "x"})),
        *(("federation", {"rounds": True}), ("model", {"name": None})),
    ],
)
def test_a_setting_that_is_none_is_a_problem_of_the_page(
    tmp_path: Path, section: str, damage: dict[str, Any]
) -> None:
    folder = make(tmp_path / "run", finished=False)
    set_config(folder, **{section: damage})
    (name,) = damage
    assert f"<run folder>/config.json cannot be read: {section}.{name} = " in notices(folder)
    assert "What was promised cannot be told" in " ".join(read(folder).text)


def test_a_run_without_clients_has_a_page(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", finished=False)
    write_facts(folder, replace(FACTS, clients=()))
    assert read(folder).results["δ"] == ("—", None)


def test_no_mark_of_code_is_left_in_a_sentence(tmp_path: Path) -> None:
    told = replace(FACTS, notices=("Say `fedlr report` again.",))
    for mode in ("dp", "dry", "none"):
        folder = make(tmp_path / mode)
        write_facts(folder, told)
        page = read(folder if mode == "dp" else with_mode(folder, mode))
        assert "`" not in "".join(page.text)


def test_the_one_script_that_may_run_is_the_page_s_own(tmp_path: Path) -> None:
    text = run.write(make(tmp_path / "run"), None, DEFAULT, figures=False).read_text("utf-8")
    script = text.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in text
    assert "base-uri 'none'; form-action 'none'" in text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is no run folder: run\.json cannot be read"):
        read_run(tmp_path)


def test_a_client_spends_nothing_before_its_first_round(tmp_path: Path) -> None:
    from fedlr.report.page.run_figures import _epsilon_series

    files = read_run(make(tmp_path / "run"))
    late = replace(
        files.records[0],
        epsilon_by_client={CLIENTS[0]: 0.5},
        epsilon_max=0.5,
    )
    series = _epsilon_series(replace(files, records=(late, *files.records[1:])))
    assert series[CLIENTS[1]][:3] == ((0, 0.0), (1, 0.0), (2, 1.25))


def test_where_epsilon_is_unknown_there_is_no_point(tmp_path: Path) -> None:
    from fedlr.report.page.run_figures import _epsilon_series

    files = read_run(make(tmp_path / "run"))
    spent = {**files.records[0].epsilon_by_client, CLIENTS[1]: math.inf}
    unheard = replace(files.records[0], epsilon_by_client=spent, epsilon_max=math.inf)
    series = _epsilon_series(replace(files, records=(unheard, *files.records[1:])))
    assert series[CLIENTS[1]][:2] == ((0, 0.0), (2, 1.25))


def set_config(folder: Path, **sections: Any) -> None:
    path = folder / "config.json"
    stored = json.loads(path.read_text())
    for name, values in sections.items():
        kept = stored["config"][name]
        stored["config"][name] = {**kept, **values} if isinstance(kept, dict) else values
    path.write_text(json.dumps(stored))


def _codes(folder: Path) -> str:
    page = run.page_of(read_run(folder), DEFAULT)
    blocks = next(section for section in page.sections if section.title == "Repeat and use").blocks
    return "".join(f"{getattr(block, 'text', '')}\n" for block in blocks)

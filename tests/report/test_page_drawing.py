"""Drawings and the frame: two themes of one picture, ids of their own, nothing global."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import pytest

from fedlr.errors import RunError
from fedlr.report.page import drawing, geometry_figures, run, run_figures
from fedlr.report.page.drawing import DARK, LIGHT, Theme, draw, literal, save
from fedlr.report.page.frame import Code, Facts, Figures, Folded, Page, Section, Text, render
from fedlr.report.page.run_files import read_run
from fedlr.report.page.table import Cell, Column, Table, number, word
from fedlr.report.spectra import SiteSpectrum, SpectrumRecord
from tests.report.run_folder import DEFAULT, make

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot(figure: Figure, theme: Theme) -> None:
    axes = figure.subplots()
    axes.plot([0, 1, 2], [0, 2, 1], color=theme.palette[0], marker="o", label=literal("a$b$<c>"))
    axes.fill_between([0, 1], [0, 0], [1, 1], color=theme.palette[1], alpha=0.3)
    axes.legend()


def contrast(one: str, other: str) -> float:
    """WCAG 2.2, contrast ratio."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def in_order(svg: str) -> str:
    """Name what matplotlib names by a digest of colours by its order instead."""
    names = list(dict.fromkeys(re.findall(r"-dark-(\w*[0-9a-f]{10})\b", svg)))
    for index, name in enumerate(names):
        svg = svg.replace(name, f"digest-{index}")
    return svg


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_what_is_drawn_can_be_seen(theme: Theme) -> None:
    assert contrast(theme.text, theme.background) >= 12
    assert contrast(theme.muted, theme.background) >= 4.5
    assert min(contrast(colour, theme.background) for colour in theme.palette) >= 3


def test_the_dark_picture_is_what_drawing_in_dark_colours_gives(tmp_path: Path) -> None:
    page = run.page_of(read_run(make(tmp_path / "run")), DEFAULT)
    assert len(page.drawings) == 9
    for figure in page.drawings:
        assert figure.plot is not None
        raw = drawing._render(figure.size, figure.plot, DARK, "svg", figure.name).decode()
        drawn = drawing._fragment(raw, f"{figure.name}-dark")
        assert in_order(drawn) == in_order(figure.dark)
        assert figure.light != figure.dark


def test_a_page_and_its_figures_are_written_and_the_page_is_the_same_every_time(
    tmp_path: Path,
) -> None:
    folder, output = make(tmp_path / "run"), tmp_path / "elsewhere"
    output.mkdir()
    before = sorted(path.name for path in folder.iterdir())
    assert run.write(folder, output, DEFAULT) == output / "report.html"
    names = {path.stem for path in (output / "figures").iterdir()}
    assert len(names) == 9
    for name in names:
        assert (output / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert (output / "figures" / f"{name}.svg").read_text().startswith("<?xml")
    assert sorted(path.name for path in folder.iterdir()) == before
    first = (output / "report.html").read_bytes()
    assert run.write(folder, output, DEFAULT, figures=False).read_bytes() == first


def test_a_run_whose_update_is_zero_or_that_has_one_round_is_drawn(tmp_path: Path) -> None:
    files = read_run(make(tmp_path / "run", rounds=1))
    one = run.page_of(files, DEFAULT)
    assert "spectrum-rounds" not in [figure.name for figure in one.drawings]
    site = SiteSpectrum(site="query", singular_values=(0.0, 0.0), effective_rank=0.0)
    zero = replace(files, spectra=(SpectrumRecord(round=1, sites=(site,)),), intruders=None)
    page = run.page_of(zero, DEFAULT)
    assert {"effective-rank"} == {f.name for f in page.drawings} - {
        *("accuracy", "epsilon", "bytes", "time"),
    }
    assert "The update is zero so far" in render(page)


def test_more_clients_and_layers_than_colours_are_drawn(tmp_path: Path) -> None:
    files = read_run(make(tmp_path / "run"))
    spent = {f"client-{i:03d}": 0.01 * i for i in range(40)}
    records = tuple(
        replace(record, epsilon_by_client=spent, epsilon_max=1.0) for record in files.records
    )
    found = run_figures.epsilon(replace(files, records=records))
    assert found is not None
    assert "each of 40 clients" in found.light
    assert found.light.count("client-0") == 0
    names = [f"layer.{i}.attention.output.dense.and.more" for i in range(60)]
    assert len(set(geometry_figures.short_names(names))) == 60
    assert max(map(len, geometry_figures.short_names(names))) <= 25
    assert geometry_figures.spread(names)[:: len(names)] == names[:1]


def test_text_stays_text_and_names_are_no_mathematics() -> None:
    found = draw("one", "", "", plot)
    assert ">a$b$&lt;c&gt;</text>" in found.light
    assert set(re.findall(r"font(?:-family)?: ([^;\"]*)", found.light)) == {"sans-serif"}


def test_ids_of_two_drawings_and_two_themes_differ_and_every_reference_is_kept() -> None:
    one, two = draw("one", "", "", plot), draw("two", "", "", plot)
    parts = [one.light, one.dark, two.light, two.dark]
    found = [re.findall(r'\bid="([^"]+)"', part) for part in parts]
    every = [name for names in found for name in names]
    assert len(every) == len(set(every))
    for part, names in zip(parts, found, strict=True):
        used = re.findall(r'(?:href="#|url\(#)([^")]+)', part)
        assert used
        assert set(used) <= set(names)
        assert ElementTree.fromstring(part).attrib["width"] == "100%"


def test_its_style_rule_is_for_itself_alone() -> None:
    rules = re.findall(r"<style[^>]*>(.*?)</style>", draw("one", "", "", plot).light, re.DOTALL)
    assert rules
    assert all(rule.strip().startswith("#one-light ") for rule in rules)


def test_matplotlib_is_left_as_it_was() -> None:
    before = dict(matplotlib.rcParams)
    draw("one", "", "", plot)
    assert dict(matplotlib.rcParams) == before
    program = (
        "import sys\n"
        "from fedlr.report.page.drawing import draw\n"
        "draw('one', '', '', lambda figure, theme: figure.subplots().plot([1, 2]))\n"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_bad_name_and_a_folder_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name = 'A b'"):
        draw("A b", "", "", plot)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot make the folder"):
        save(draw("one", "", "", plot), tmp_path / "file")


def test_every_text_is_escaped() -> None:
    bad = '"><b>&\x1b'
    table = Table(bad, (Column(bad),), ((word(bad),),))
    blocks = (
        *(Text(bad), Code(bad, bad), Facts(((bad, bad), (bad, number(1.0)))), table),
        Figures((draw("one", bad, bad, plot),)),
    )
    text = render(Page(bad, bad, (Section(bad, (*blocks, Folded(bad, (Text(bad),)))),), (bad,)))
    assert "<b>" not in text
    assert text.count("&lt;b&gt;") >= 16
    assert re.findall(r"https?://[^\"\s]*", re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)) == []


def test_doubled_names_and_ragged_tables_are_refused() -> None:
    with pytest.raises(ValueError, match="section s-a appears twice"):
        render(Page("p", "", (Section("A", ()), Section("a", ()))))
    twice = Figures((draw("one", "", "", plot),) * 2)
    with pytest.raises(ValueError, match="drawing one appears twice"):
        render(Page("p", "", (Section("A", (twice,)),)))
    with pytest.raises(ValueError, match="row 1 has 2 cells, expected 1"):
        Table("t", (Column("a"),), ((Cell("1"),), (Cell("1"), Cell("2"))))
    with pytest.raises(ValueError, match="has no columns"):
        Table("t", (), ())

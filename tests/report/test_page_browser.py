"""A run's page in a browser: quiet, self-contained, sortable, in both themes, on a phone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fedlr.report.page import run
from tests.report.browser import Scheme, visit
from tests.report.run_folder import DEFAULT, make

if TYPE_CHECKING:
    from playwright.sync_api import Browser

VISIBLE = "[...document.querySelectorAll('figure .{}')].map(e => e.offsetWidth > 0)"
BACKGROUND = "getComputedStyle(document.body).backgroundColor"
SPENT = """[...document.querySelectorAll('table')].find(t => t.caption.textContent === 'Clients')
  .tBodies[0].rows"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make(tmp_path_factory.mktemp("page") / "run")
    return run.write(folder, None, DEFAULT, figures=False)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_it_is_quiet_asks_for_nothing_and_fits(
    browser: Browser, path: Path, scheme: Scheme, width: int
) -> None:
    with visit(browser, path, width, scheme) as seen:
        seen.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert seen.evaluate("document.documentElement.scrollWidth") <= width
        assert seen.complaints == []
        assert seen.requests == [path.as_uri()]


def test_a_request_would_be_refused_and_noticed(browser: Browser, path: Path) -> None:
    with visit(browser, path) as seen:
        outcome = seen.evaluate("fetch('https://example.org/').catch(e => e.name)")
        assert outcome == "TypeError"
        assert any("Content Security Policy" in line for line in seen.complaints)
        assert [url for url in seen.requests if not url.startswith("file:")] == []


def test_both_themes_follow_the_system_and_the_button(browser: Browser, path: Path) -> None:
    found = {}
    for scheme in ("light", "dark"):
        other = "dark" if scheme == "light" else "light"
        with visit(browser, path, scheme=scheme) as seen:
            found[scheme] = seen.evaluate(BACKGROUND)
            assert set(seen.evaluate(VISIBLE.format(scheme))) == {True}
            assert set(seen.evaluate(VISIBLE.format(other))) == {False}
            seen.page.click("#theme")
            found[f"{other} by button"] = seen.evaluate(BACKGROUND)
            assert set(seen.evaluate(VISIBLE.format(other))) == {True}
            assert set(seen.evaluate(VISIBLE.format(scheme))) == {False}
            seen.page.click("#theme")
            assert seen.evaluate(BACKGROUND) == found[scheme]
    assert found["light"] == found["light by button"] != found["dark"]
    assert found["dark"] == found["dark by button"]


def test_it_is_printed_in_light_colours_with_everything_open(browser: Browser, path: Path) -> None:
    with visit(browser, path, scheme="dark") as seen:
        seen.page.emulate_media(media="print")
        assert set(seen.evaluate(VISIBLE.format("dark"))) == {False}
        assert seen.evaluate(BACKGROUND) == "rgb(255, 255, 255)"
        seen.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert seen.page.locator("details:not([open])").count() == 0
        assert set(seen.evaluate(VISIBLE.format("light"))) == {True}
        seen.evaluate("dispatchEvent(new Event('afterprint'))")
        assert seen.page.locator("details[open]").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_works_without_script(browser: Browser, path: Path, scheme: Scheme) -> None:
    with visit(browser, path, 360, scheme, script=False) as seen:
        assert not seen.page.is_visible("#theme")
        assert seen.page.locator("th button").count() == 0
        assert seen.page.is_visible(f"figure .{scheme} svg >> nth=0")


def test_a_table_sorts_by_number_with_missing_values_last(browser: Browser, path: Path) -> None:
    spent = f"[...{SPENT}].map(row => Number(row.cells[5].dataset.value))"
    stopped = f"[...{SPENT}].map(row => row.cells[6].textContent)"
    heading = "table:has(caption:text-is('Clients')) th:has-text('{}')"
    with visit(browser, path) as seen:
        column = seen.page.locator(heading.format("ε spent"))
        assert column.get_attribute("aria-sort") == "none"
        column.locator("button").click()
        rising = seen.evaluate(spent)
        assert rising == sorted(rising)
        assert column.get_attribute("aria-sort") == "ascending"
        column.locator("button").press("Enter")
        assert seen.evaluate(spent) == rising[::-1]
        assert rising != rising[::-1]
        assert column.get_attribute("aria-sort") == "descending"
        other = seen.page.locator(heading.format("stopped before round"))
        for _ in range(2):
            other.locator("button").click()
            assert seen.evaluate(stopped) == ["3", *"—————"]
        assert column.get_attribute("aria-sort") == "none"


def test_it_can_be_read_without_eyes(browser: Browser, path: Path) -> None:
    with visit(browser, path) as seen:
        page = seen.page
        assert page.locator("h1").count() == 1
        for landmark in ("header", "nav", "main", "footer"):
            assert page.locator(landmark).count() == 1
        assert page.locator("th:not([scope])").count() == 0
        assert page.locator("table:not(:has(caption))").count() == 0
        assert page.locator("figure:not(:has(figcaption))").count() == 0
        labels = page.locator("[role=img]").evaluate_all("all => all.map(e => e.ariaLabel)")
        assert len(labels) == page.locator("figure").count() == 9
        assert all(label.endswith(".") for label in labels)
        ids = seen.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
        assert len(ids) == len(set(ids))
        page.keyboard.press("Tab")
        assert seen.evaluate("document.activeElement.textContent") == "Skip to the content"

"""A sweep's page in a browser: quiet, self-contained, sortable, in both themes, on a phone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fedlr.report.page import sweep
from fedlr.report.page.sweep import SweepCost
from tests.report.browser import Scheme, visit
from tests.report.sweeps import make_sweep

if TYPE_CHECKING:
    from playwright.sync_api import Browser

AXES = {"method": ("fedsvd", "ffa_lora"), "privacy.epsilon": ("1", "8", "inf"), "seed": ("0", "1")}
TABLE = "table:has(caption:text-is('All cells; click a heading to sort'))"
VISIBLE = "[...document.querySelectorAll('figure .{}')].map(e => e.offsetWidth > 0)"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a sweep in which one cell has failed."""
    folder = make_sweep(
        tmp_path_factory.mktemp("sweeps") / "budget",
        AXES,
        lambda number, values: "failed" if number == 2 else "finished",
    )
    cost = SweepCost(runs=11, epsilon_max=9.0, delta=1e-5)
    return sweep.write(folder, cost=cost, figures=False)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_it_is_quiet_asks_for_nothing_and_fits(
    browser: Browser, path: Path, scheme: Scheme, width: int
) -> None:
    other = "dark" if scheme == "light" else "light"
    with visit(browser, path, width, scheme) as seen:
        assert set(seen.evaluate(VISIBLE.format(scheme))) == {True}
        assert set(seen.evaluate(VISIBLE.format(other))) == {False}
        seen.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert seen.evaluate("document.documentElement.scrollWidth") <= width
        assert seen.complaints == []
        assert seen.requests == [path.as_uri()]


def test_cells_sort_with_infinity_last_and_dashes_behind_it(browser: Browser, path: Path) -> None:
    with visit(browser, path) as seen:
        column = seen.page.locator(f"{TABLE} th:has-text('ε max') button")
        values = seen.page.locator(f"{TABLE} tbody tr td:nth-child(7)")
        column.click()
        assert values.all_text_contents() == [*["0.99"] * 4, *["7.92"] * 3, *["∞"] * 4, "—"]
        column.click()
        assert values.all_text_contents() == [*["∞"] * 4, *["7.92"] * 3, *["0.99"] * 4, "—"]


def test_no_label_of_a_figure_leaves_it(browser: Browser, path: Path) -> None:
    """What is drawn beyond the edge of a figure is cut off."""
    beyond = """[...document.querySelectorAll("figure .light svg")].flatMap(svg => {
      const edge = svg.getBoundingClientRect();
      return [...svg.querySelectorAll("text")]
        .map(text => [text.textContent.trim(), text.getBoundingClientRect()])
        .filter(([, box]) => box.left < edge.left - 1 || box.right > edge.right + 1 ||
          box.top < edge.top - 1 || box.bottom > edge.bottom + 1)
        .map(([text]) => text);
    })"""
    with visit(browser, path) as seen:
        assert seen.evaluate(beyond) == []

"""A headless Chromium for tests of pages; they skip, with a reason, where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

Scheme = Literal["light", "dark"]

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@dataclass
class Visit:
    """A page that is open, and what it did."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def evaluate(self, script: str) -> Any:
        """Return what JavaScript says."""
        return self.page.evaluate(script)


def open_browser() -> Iterator[Browser]:
    """Yield a browser; to be used for one module, whose end closes it.

    Playwright keeps an event loop in the thread: other modules must find none.
    """
    pytest.importorskip("playwright", reason="playwright is not installed")
    from playwright.sync_api import Error, sync_playwright

    found = next(filter(None, map(shutil.which, _NAMES)), None)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except Error as error:
            reason = str(error).strip().splitlines()[0]
            pytest.skip(f"no Chromium can be started here: {reason}; `make test-all` installs one")
        yield browser
        browser.close()


@contextmanager
def visit(
    browser: Browser,
    path: Path,
    width: int = 1200,
    scheme: Scheme = "light",
    script: bool = True,
) -> Iterator[Visit]:
    """Open a file and note every complaint and every request."""
    page = browser.new_page(
        viewport={"width": width, "height": 800}, color_scheme=scheme, java_script_enabled=script
    )
    seen = Visit(page)
    page.on("console", lambda message: seen.complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: seen.complaints.append(str(error)))
    page.on("request", lambda request: seen.requests.append(request.url))
    page.goto(path.as_uri())
    try:
        yield seen
    finally:
        page.close()

"""What tests of verbs share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fedlr.report.page import drawing


@pytest.fixture(scope="module")
def blank_figures() -> Iterator[None]:
    """Pages whose figures are blank: drawing them takes longer than a tiny run."""
    svg = drawing._render((1.0, 1.0), lambda figure, theme: None, drawing.LIGHT, "svg", "x")

    def blank(size: object, plot: object, theme: object, kind: str, salt: str) -> bytes:
        return svg if kind == "svg" else b""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "_render", blank)
        yield

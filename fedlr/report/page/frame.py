"""Sections → one HTML page that asks the network for nothing.

Every text is escaped by the template; only drawings, which matplotlib wrote, are markup.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fedlr.report import units
from fedlr.report.page.drawing import Drawing, save
from fedlr.report.page.table import Cell, Table
from fedlr.report.page.template import PAGE, SCRIPT, STYLE
from fedlr.report.records import write_atomically

PAGE_FILE, FIGURES = "report.html", "figures"
"""The page of a folder, and the folder of its figures beside it."""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"

    text: str


@dataclass(frozen=True)
class Listing:
    """A list of sentences, or of names."""

    kind: ClassVar[str] = "listing"

    items: tuple[str, ...]


@dataclass(frozen=True)
class Code:
    """Text to be copied as it stands.

    Attributes:
        label: What it does.
        text: The lines.
    """

    kind: ClassVar[str] = "code"

    label: str
    text: str


@dataclass(frozen=True)
class Facts:
    """Names and what they are; few, and short.

    Attributes:
        items: (name, value) pairs; a `Cell` carries its raw value too.
        prominent: Shown large, as the results that a reader came for.
    """

    kind: ClassVar[str] = "facts"

    items: tuple[tuple[str, str | Cell], ...]
    prominent: bool = False

    @property
    def cells(self) -> tuple[tuple[str, Cell], ...]:
        """The pairs, every value a cell."""
        return tuple((k, v if isinstance(v, Cell) else Cell(v)) for k, v in self.items)


@dataclass(frozen=True)
class Figures:
    """Drawings side by side where the screen is wide, one below the other where it is not."""

    kind: ClassVar[str] = "figures"

    drawings: tuple[Drawing, ...]


@dataclass(frozen=True)
class Folded:
    """Blocks that are opened by the reader, and printed."""

    kind: ClassVar[str] = "folded"

    label: str
    blocks: tuple[Text | Listing | Code | Facts | Figures | Table, ...]


Block = Text | Listing | Code | Facts | Figures | Table | Folded


@dataclass(frozen=True)
class Section:
    """One heading and what stands below it.

    Attributes:
        title: The heading; unique within a page.
        blocks: In the order of reading.
    """

    title: str
    blocks: tuple[Block, ...]

    @property
    def anchor(self) -> str:
        """Its id within the page."""
        return "s-" + re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Page:
    """A whole page.

    Attributes:
        title: Its one heading of the first level.
        subtitle: A line below it.
        sections: In the order of reading.
        notices: Sentences that a reader of the numbers must know: shown first.
    """

    title: str
    subtitle: str
    sections: tuple[Section, ...]
    notices: tuple[str, ...] = ()

    @property
    def drawings(self) -> tuple[Drawing, ...]:
        """Every figure of the page, folded ones too."""
        return tuple(found for section in self.sections for found in _drawings(section.blocks))


def render(page: Page) -> str:
    """Return the page as HTML: style, script and figures inside, nothing fetched.

    Raises:
        ValueError: Two sections or two drawings have one name.
    """
    from jinja2 import Environment, StrictUndefined

    _check_unique("section", [section.anchor for section in page.sections])
    _check_unique("drawing", [drawing.name for drawing in page.drawings])
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["plain"] = units.printable
    template = environment.from_string(PAGE)
    # The one script that runs: a text that slipped through as markup would not.
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return template.render(page=page, style=STYLE, script=SCRIPT, digest=digest)


def write(page: Page, folder: Path, figures: bool = True) -> Path:
    """Write ``report.html`` and, where asked, ``figures/`` into ``folder``.

    Args:
        page: What to write.
        folder: An existing folder.
        figures: Whether to write every drawing as SVG and PNG too.

    Returns:
        The page's file.

    Raises:
        RunError: The folder cannot be written.
    """
    if figures:
        for drawing in page.drawings:
            save(drawing, folder / FIGURES)
    path = folder / PAGE_FILE
    write_atomically(path, render(page).encode())
    return path


def _drawings(blocks: Sequence[Block]) -> list[Drawing]:
    found: list[Drawing] = []
    for block in blocks:
        if isinstance(block, Figures):
            found += block.drawings
        elif isinstance(block, Folded):
            found += _drawings(block.blocks)
    return found


def _check_unique(what: str, names: Sequence[str]) -> None:
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(f"{what} {', '.join(doubled)} appears twice; names must differ")

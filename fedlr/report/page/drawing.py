"""One figure of a page, in a light and a dark theme.

A figure is drawn once, in light colours; the dark one is the same picture with every colour
of the theme exchanged for its counterpart. Text stays text, and every id is its own: any
number of drawings can stand in one HTML page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlr.errors import RunError
from fedlr.report import units
from fedlr.report.records import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = (5.2, 3.6)
"""Inches of a usual figure: on a screen 360 pixels wide its 11 points are ten pixels."""

_FONT_SIZE, _PNG_DPI = 11, 200

_NAME = re.compile(r"[a-z][a-z0-9-]{0,59}")


@dataclass(frozen=True)
class Theme:
    """The colours of one theme, ``#rrggbb``.

    Attributes:
        name: ``light`` or ``dark``.
        background: Of the page, hence of the figure.
        text: Labels and numbers; contrast with the background ≥ 12.
        muted: Reference lines and their labels; contrast ≥ 4.5.
        grid: Grid lines.
        palette: Lines and marks in the order of use. They differ in lightness too, and
            are those of Okabe and Ito (2008), made darker or lighter until their contrast
            with the background is ≥ 3.
        colormap: Name of a matplotlib colormap for ordered quantities such as rounds.
    """

    name: str
    background: str
    text: str
    muted: str
    grid: str
    palette: tuple[str, ...]
    colormap: str = "viridis"


LIGHT = Theme(
    name="light",
    background="#ffffff",
    text="#1b1b1b",
    muted="#5f5f5f",
    grid="#d9d9d9",
    palette=("#0072b2", "#c8551b", "#008766", "#a8528a", "#8a6d00", "#2f8fc4", "#404040"),
)
DARK = Theme(
    name="dark",
    background="#15181c",
    text="#ececec",
    muted="#a3a8ae",
    grid="#363b42",
    palette=("#56b4e9", "#f08b4f", "#2fc79b", "#e29cc5", "#e3c440", "#8fa8ff", "#d0d0d0"),
)

Plot = Callable[["Figure", Theme], None]
"""Draws into an empty figure, with the colours of the theme and of its colormap alone; called
once, and once more for a PNG."""


@dataclass(frozen=True)
class Drawing:
    """A figure, drawn.

    Attributes:
        name: Of its files and the prefix of its ids: lower case letters, digits, ``-``.
        caption: A sentence under it.
        alternative: What it shows, for a reader who does not see it.
        light: An ``<svg>`` element, as wide as what holds it.
        dark: The same in the other theme.
        size: Width and height, inches.
        plot: Draws it once more.
    """

    name: str
    caption: str
    alternative: str
    light: str
    dark: str
    size: tuple[float, float] = SIZE
    plot: Plot | None = field(default=None, repr=False, compare=False)


def draw(
    name: str,
    caption: str,
    alternative: str,
    plot: Plot,
    size: tuple[float, float] = SIZE,
) -> Drawing:
    """Draw a figure in both themes; matplotlib's settings are as before afterwards.

    Args:
        name: See `Drawing`; unique within a page.
        caption: A sentence under it.
        alternative: What it shows, in words and numbers.
        plot: Gets a figure whose colours and fonts are those of the theme.
        size: Width and height, inches.

    Guarantees:
        No display and no pyplot. The same input gives the same text.

    Raises:
        ValueError: ``name`` has another form.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"name = {name!r} must be lower-case letters, digits and '-'")
    raw = _render(size, plot, LIGHT, "svg", name).decode()
    light, dark = _fragment(raw, f"{name}-light"), _fragment(_darkened(raw), f"{name}-dark")
    return Drawing(name, caption, alternative, light, dark, size, plot)


def save(drawing: Drawing, folder: Path) -> None:
    """Write ``<name>.svg`` and ``<name>.png``, light, each whole or not at all.

    Args:
        drawing: What `draw` returned.
        folder: Made if missing.

    Raises:
        RunError: The folder cannot be written.
        ValueError: The drawing cannot be drawn once more.
    """
    if drawing.plot is None:
        raise ValueError(f"drawing {drawing.name!r} has no plot; make it with draw()")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the folder {folder}: {error.strerror or error}") from error
    text = f'<?xml version="1.0" encoding="utf-8"?>\n{drawing.light}\n'
    write_atomically(folder / f"{drawing.name}.svg", text.encode())
    png = _render(drawing.size, drawing.plot, LIGHT, "png", drawing.name)
    write_atomically(folder / f"{drawing.name}.png", png)


def literal(text: str) -> str:
    """Return a name from outside as matplotlib prints it: no mathematics, no control codes.

    Example:
        >>> print(literal("a$b"))
        a\\$b
    """
    return units.printable(text).replace("$", r"\$")


def _render(size: tuple[float, float], plot: Plot, theme: Theme, kind: str, salt: str) -> bytes:
    """Return the file that a figure makes; ``kind`` is ``svg`` or ``png``."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sink = io.BytesIO()
    with matplotlib.rc_context(_settings(theme, salt)):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        plot(figure, theme)
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type")) if kind == "svg" else {}
        figure.savefig(sink, format=kind, dpi=_PNG_DPI, metadata=metadata)
    return sink.getvalue()


def _settings(theme: Theme, salt: str) -> dict[Any, Any]:
    from matplotlib.rcsetup import cycler

    text = ("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor")
    lines = ("axes.edgecolor", "xtick.color", "ytick.color")
    back = ("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor")
    return {
        **dict.fromkeys(text, theme.text),
        **dict.fromkeys(lines, theme.muted),
        **dict.fromkeys(back, theme.background),
        "axes.prop_cycle": cycler(color=theme.palette),
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": _FONT_SIZE,
        "axes.labelsize": _FONT_SIZE,
        "font.size": _FONT_SIZE,
        "font.family": "DejaVu Sans",
        "grid.color": theme.grid,
        "image.cmap": theme.colormap,
        "legend.edgecolor": theme.grid,
        "legend.fontsize": _FONT_SIZE,
        "legend.framealpha": 0.85,
        "lines.linewidth": 1.8,
        "lines.markersize": 4.5,
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
    }


def _darkened(text: str) -> str:
    """Return a light SVG with the colours of the dark theme."""
    colours = dict(zip(_colours(LIGHT), _colours(DARK), strict=True))
    return re.sub(r"(?<=: )#[0-9a-f]{6}\b", lambda m: colours.get(m[0], m[0]), text)


def _colours(theme: Theme) -> tuple[str, ...]:
    return (theme.background, theme.text, theme.muted, theme.grid, *theme.palette)


def _fragment(text: str, own: str) -> str:
    """Return one ``<svg>`` element whose ids and style rule are its own; ``own`` begins them."""
    text = text[text.index("<svg") :].strip()
    text = re.sub(r'\bid="([^"]*)"', rf'id="{own}-\1"', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\1{own}-", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # The rule is for every element of the page, not of the figure alone.
    text = text.replace("*{stroke-linejoin", f"#{own} *{{stroke-linejoin")
    # Metrics are those of DejaVu Sans, which is wider than what a reader's machine has.
    text = re.sub(r"(font-family: |font: [^;\"]*?px )'DejaVu Sans'[^;\"]*", r"\1sans-serif", text)
    head = text[: text.index(">") + 1]
    plain = re.sub(r'\s(?:width|height)="[^"]*"', "", head)
    return plain.replace("<svg", f'<svg id="{own}" width="100%"', 1) + text[len(head) :]

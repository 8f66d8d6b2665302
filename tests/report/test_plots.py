"""The plot: its size, its panels, and that hostile names and empty runs draw."""

from __future__ import annotations

import math
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedlr.errors import RunError
from fedlr.report.plots import curves
from fedlr.report.records import RoundRecord, Summary
from tests.report.samples import RECORD, SUMMARY

RECORDS = [
    replace(RECORD, round=1, accuracy=0.5, epsilon_max=1.25),
    replace(RECORD, round=2, accuracy=None, epsilon_max=1.75),
    replace(RECORD, round=4, accuracy=0.75, epsilon_max=2.5),
]


def points(axes: Axes, line: int) -> list[tuple[float, float]]:
    x, y = axes.lines[line].get_data()
    return list(zip(np.asarray(x).tolist(), np.asarray(y).tolist(), strict=True))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that `curves` makes in the test."""
    figures: list[Figure] = []
    original = Figure.suptitle

    def remember(self: Figure, title: str, **style: int) -> object:
        figures.append(self)
        return original(self, title, **style)

    monkeypatch.setattr(Figure, "suptitle", remember)
    return figures


def test_the_file_is_a_png_of_1200_by_500_pixels(tmp_path: Path) -> None:
    curves(RECORDS, SUMMARY, tmp_path / "curves.png")
    header = (tmp_path / "curves.png").read_bytes()[:24]
    # PNG (ISO 15948): eight bytes of signature, then the IHDR chunk: length,
    # type, and width and height as big-endian 32-bit numbers.
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", header[16:24]) == (1200, 500)
    assert list(tmp_path.iterdir()) == [tmp_path / "curves.png"]


def test_drawing_leaves_pyplot_alone(tmp_path: Path) -> None:
    """It keeps global state; a fresh process, because another library may have imported it here."""
    program = (
        "import sys, pathlib\n"
        "from fedlr.report.plots import curves\n"
        "from tests.report.samples import RECORD, SUMMARY\n"
        "curves([RECORD], SUMMARY, pathlib.Path(sys.argv[1]))\n"
        "sys.exit('matplotlib.pyplot' in sys.modules)\n"
    )
    file = tmp_path / "curves.png"
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", program, str(file)], check=True, cwd=root)
    assert file.is_file()


def test_both_panels_show_the_numbers_of_the_run(tmp_path: Path, drawn: list[Figure]) -> None:
    curves(RECORDS, SUMMARY, tmp_path / "curves.png")
    (figure,) = drawn
    accuracy, epsilon = figure.axes
    # Round 2 was not evaluated; round 0 is the untrained model.
    assert points(accuracy, 0) == [(0, 25.0), (1, 50.0), (4, 75.0)]
    assert points(epsilon, 0) == [(1, 1.25), (2, 1.75), (4, 2.5)]
    assert {y for _, y in points(accuracy, 2)} == {37.5}
    assert {y for _, y in points(epsilon, 1)} == {6.0}
    assert "fedsvd · tiny-bert · demo" in figure.get_suptitle()
    assert "(%)" in accuracy.get_ylabel()
    assert "δ = 1e-05" in epsilon.get_ylabel()
    assert {axes.get_xlabel() for axes in figure.axes} == {"finished rounds"}


@pytest.mark.parametrize(
    ("summary", "epsilon", "reason"),
    [
        (replace(SUMMARY, privacy_mode="none", epsilon_max=None, delta=None), None, "privacy off"),
        (replace(SUMMARY, privacy_mode="dry", epsilon_max=math.inf), math.inf, "ε = ∞"),
    ],
    ids=["none", "dry"],
)
def test_without_a_finite_epsilon_one_panel_says_why(
    tmp_path: Path, drawn: list[Figure], summary: Summary, epsilon: float | None, reason: str
) -> None:
    records = [replace(r, epsilon_max=epsilon, epsilon_by_client={}) for r in RECORDS]
    curves(records, summary, tmp_path / "curves.png")
    assert len(drawn[0].axes) == 1
    assert reason in drawn[0].get_suptitle()


@pytest.mark.parametrize("records", [[], RECORDS[1:2]], ids=["no round", "no evaluation"])
def test_runs_with_nothing_to_draw_still_draw(tmp_path: Path, records: list[RoundRecord]) -> None:
    curves(records, replace(SUMMARY, rounds=0, accuracy_start=None), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_a_dollar_sign_in_a_name_is_a_dollar_sign(tmp_path: Path) -> None:
    hostile = replace(SUMMARY, data=r"$\undefined{$", unit="$x")
    curves(RECORDS, hostile, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()


def test_a_missing_folder_is_a_run_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot write"):
        curves(RECORDS, SUMMARY, tmp_path / "absent" / "curves.png")

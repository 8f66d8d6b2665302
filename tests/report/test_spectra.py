"""Lines and spectra: a crash costs a line, damage is named, nothing else is lost."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from fedlr.errors import RunError
from fedlr.report.lines import read_lines
from fedlr.report.spectra import (
    INTRUDERS_FILE,
    SPECTRA_FILE,
    SiteSpectrum,
    SpectrumLog,
    SpectrumRecord,
    read_intruders,
    write_intruders,
)
from tests.report.run_folder import INTRUDERS, spectrum


def test_a_line_that_a_crash_cut_short_is_left_out_and_written_over(tmp_path: Path) -> None:
    path = tmp_path / SPECTRA_FILE
    log = SpectrumLog(path)
    log.append(spectrum(1))
    log.append(spectrum(2))
    path.write_bytes(path.read_bytes()[:-10])
    assert read_lines(path, SpectrumRecord).records == (spectrum(1),)
    SpectrumLog(path).append(spectrum(2))
    found = read_lines(path, SpectrumRecord)
    assert found.records == (spectrum(1), spectrum(2))
    assert found.problem is None


def test_a_damaged_line_ends_what_is_read_and_is_named(tmp_path: Path) -> None:
    path = tmp_path / SPECTRA_FILE
    log = SpectrumLog(path)
    for number in (1, 2, 3):
        log.append(spectrum(number))
    lines = path.read_text().split("\n")
    lines[1] = lines[1].replace('"round": 2', '"round": -2')
    path.write_text("\n".join(lines))
    found = read_lines(path, SpectrumRecord)
    assert found.records == (spectrum(1),)
    assert found.problem is not None
    assert found.problem.startswith(f"{path}, line 2 is damaged: round = -2")


def test_a_resumed_run_replaces_what_it_repeats(tmp_path: Path) -> None:
    log = SpectrumLog(tmp_path / SPECTRA_FILE)
    for number in (1, 2, 3, 2):
        log.append(spectrum(number))
    assert read_lines(log.path, SpectrumRecord).records == (spectrum(1), spectrum(2))


def test_a_file_that_cannot_be_read_or_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot write"):
        SpectrumLog(tmp_path / "none" / SPECTRA_FILE)
    with pytest.raises(RunError, match="cannot read"):
        read_lines(tmp_path / SPECTRA_FILE, SpectrumRecord)


def test_what_is_no_spectrum_is_refused() -> None:
    for values in ((-1.0,), (math.nan,), (math.inf,)):
        with pytest.raises(ValueError, match=r"query = "):
            SiteSpectrum(site="query", singular_values=values, effective_rank=1.0)


def test_intruders_come_back_and_are_counted(tmp_path: Path) -> None:
    assert read_intruders(tmp_path) is None
    write_intruders(tmp_path, INTRUDERS)
    assert read_intruders(tmp_path) == INTRUDERS
    assert INTRUDERS.count(INTRUDERS.sites[0]) == 1
    (tmp_path / INTRUDERS_FILE).write_text("[]")
    with pytest.raises(RunError, match="is damaged"):
        read_intruders(tmp_path)

"""What the command line does before a verb runs, and after its reader has gone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fedlr
from fedlr.cli.main import check_siblings, main

COMMAND = [sys.executable, "-m", "fedlr.cli.main"]
NAMES = pytest.mark.parametrize("name", ["server", "client"])


def help_of_simulate(folder: Path) -> subprocess.CompletedProcess[str]:
    """`fedlr simulate --help` as a module: the working folder comes first on the path."""
    return subprocess.run(
        [*COMMAND, "simulate", "--help"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_packages_of_this_checkout_are_fedlr_s_own() -> None:
    check_siblings()


@NAMES
@pytest.mark.parametrize("decoy", ["{name}.py", "{name}/__init__.py"])
def test_another_package_of_the_same_name_is_not_imported(
    tmp_path: Path, name: str, decoy: str
) -> None:
    path = tmp_path / decoy.format(name=name)
    path.parent.mkdir(exist_ok=True)
    path.write_text("raise SystemExit(99)")
    found = help_of_simulate(tmp_path)
    assert found.returncode == 7, found.stderr
    assert str(tmp_path / name) in found.stderr
    assert str(Path(fedlr.__file__).parents[1] / name) in found.stderr
    assert "from another folder" in found.stderr
    assert "Traceback" not in found.stderr


@NAMES
def test_a_plain_folder_of_that_name_is_refused_or_harmless(tmp_path: Path, name: str) -> None:
    """It is a namespace package, which comes before an editable install but after a wheel."""
    (tmp_path / name).mkdir()
    found = help_of_simulate(tmp_path)
    if found.returncode == 0:
        assert "usage: fedlr simulate" in found.stdout
    else:
        assert found.returncode == 7, found.stderr
        assert str(tmp_path / name) in found.stderr


def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["simulate", "--help"]) == 7
    assert "the name 'server' means nothing here" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("--help",), ("--version",), ("simulate", "--help")])
def test_a_reader_that_goes_away_is_no_error(words: tuple[str, ...], tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        found = subprocess.run(
            [*COMMAND, *words],
            cwd=tmp_path,
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(writer)
    assert (found.returncode, found.stderr) == (141, "")

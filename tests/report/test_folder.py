"""Run folders: never one over another, and a clear word where none can be made."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest

from fedlr.errors import RunError
from fedlr.report.folder import check_output, create_run_folder, write_config

NOW = datetime(2031, 2, 3, 4, 5, 6)


def test_two_runs_of_one_second_get_two_folders(tmp_path: Path) -> None:
    first, second = (create_run_folder(tmp_path, "name", NOW) for _ in range(2))
    assert first == tmp_path / "2031-02-03" / "04-05-06-name"
    assert second == tmp_path / "2031-02-03" / "04-05-06-name-2"
    assert list(first.iterdir()) == list(second.iterdir()) == []


@pytest.mark.parametrize("name", ["", "a/b", "..\\x", "a b"])
def test_a_name_that_is_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunError, match="name ="):
        create_run_folder(tmp_path, name, NOW)
    with pytest.raises(RunError, match="name ="):
        check_output(tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_an_output_inside_a_file_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for output in (tmp_path / "file", tmp_path / "file" / "runs"):
        with pytest.raises(RunError, match=r"output = .*file is not a folder; choose another"):
            check_output(output, "name")
    with pytest.raises(RunError, match="output ="):
        create_run_folder(tmp_path / "file" / "runs", "name", NOW)
    assert (tmp_path / "file").read_text() == "kept"
    check_output(tmp_path / "new" / "runs", "name")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_configuration_is_written_with_versions(tmp_path: Path) -> None:
    write_config(tmp_path, '{"seed":3}')
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["config"] == {"seed": 3}
    assert {"fedlr", "python", "torch", "flwr", "opacus"} <= set(written["versions"])

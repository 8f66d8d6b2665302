"""``fedlr doctor``: the whole examination of a tiny model, its table, record and exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedlr.cli import doctor
from fedlr.doctor.finding import Finding
from fedlr.errors import ConfigError, DataError
from fedlr.privacy.ledger import SqliteLedger
from fedlr.privacy.noise import Stream
from tests.models import LONGEST, encoder
from tests.test_build import saved

NAMES = [
    *("per-unit gradients", "clip bound", "noise", "base unchanged"),
    *("kernels", "adapter round trip", "secret entropy", "durable ledger", "versions"),
]


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Overrides of a tiny model; its data are not there, and not needed."""
    return [
        *("model=encoder", f"model.name={saved(encoder('bert'), tmp_path / 'model')}"),
        *("data=file", f"data.path={tmp_path / 'nowhere'}", "data.label_names=[no,yes]"),
        *("adapter=query_value", "adapter.rank=2", f"model.max_length={LONGEST}"),
        *("kernels.device=cpu", f"output={tmp_path / 'runs'}"),
    ]


def test_a_sound_machine_passes_and_nothing_is_written(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.run(words) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert [name for name in NAMES if any(line.startswith(name) for line in lines)] == NAMES
    assert lines[-1].startswith("9 checks in ")
    assert lines[-1].endswith("all passed")
    assert max(map(len, lines)) <= 100
    assert shown.err.count("fedlr: checking: ") == len(NAMES)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failure_is_an_exit_status_and_a_line_of_the_record(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Stream.gaussian
    monkeypatch.setattr(Stream, "gaussian", lambda self, shape, sd: 0 * real(self, shape, sd))
    monkeypatch.setattr(SqliteLedger, "joins", lambda self: 1)
    assert doctor.run(["--json", *words]) == 10
    record: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert record["passed"] is False
    assert [finding["name"] for finding in record["findings"]] == NAMES
    failed = {f["name"]: f for f in record["findings"] if f["verdict"] == "failed"}
    assert {"noise", "secret entropy", "durable ledger"} <= set(failed)
    assert not {"per-unit gradients", "clip bound", "versions"} & set(failed)
    assert "1 jobs are booked" in failed["durable ledger"]["detail"]
    assert all(finding["remedy"] for finding in failed.values())


def test_the_table_names_what_failed_and_the_way_out() -> None:
    findings = [
        Finding("noise", True, "deviation 1.00 σC", 0.2),
        Finding("versions", True, "torch 9 is newer", 0.1, warning=True, remedy="install torch 2"),
        Finding("clip bound", False, "3 C, bound 1 C", 1.0, remedy="set kernels=reference"),
    ]
    lines = doctor.table(findings).splitlines()
    assert lines[0].split() == ["noise", "passed", "0.2", "s", "deviation", "1.00", "σC"]
    assert "warning" in lines[1]
    assert lines[1].endswith("torch 9 is newer -> install torch 2")
    assert lines[2].endswith("3 C, bound 1 C -> set kernels=reference")
    assert lines[-1] == "3 checks in 1.3 s: FAILED: clip bound"


def test_what_cannot_be_examined_is_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"privacy\.epsilon"):
        doctor.run(["privacy.epsilom=1"])
    with pytest.raises(DataError, match="nowhere"):
        doctor.run([*words, "data.label_names=null"])


def test_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run(["--help"]) == 0
    assert "--json" in capsys.readouterr().out

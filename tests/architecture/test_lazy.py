"""Importing the library is cheap: no framework loads before it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.architecture import rules
from tests.architecture.tree import ROOT, modules

HEAVY = ("flwr", "opacus", "peft", "hydra", "omegaconf", "triton", "datasets")

PROBE = """
import importlib, sys
heavy, names = set(sys.argv[1].split(",")), sys.argv[2:]
for name in names:
    importlib.import_module(name)
    if loaded := heavy & set(sys.modules):
        sys.exit(f"importing {name} loads {', '.join(sorted(loaded))}")
"""


def probe(heavy: tuple[str, ...], names: list[str]) -> str:
    """Import ``names`` in a new process; return the first complaint, or nothing."""
    result = subprocess.run(
        [sys.executable, "-c", PROBE, ",".join(heavy), *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return "" if result.returncode == 0 else result.stderr or f"exit {result.returncode}"


def homeless() -> list[str]:
    """Return the modules of fedlr that are home to none of the heavy packages."""
    homes = [home for package in HEAVY for home in rules.HOMES[package]]
    return [
        name for name in modules(ROOT) if name[:5] == "fedlr" and not rules.any_fits(homes, name)
    ]


def test_the_package_root_loads_no_framework_and_no_torch() -> None:
    assert probe((*HEAVY, "torch", "numpy"), ["fedlr"]) == ""


def test_no_module_outside_its_home_loads_a_framework() -> None:
    names = homeless()
    assert {"fedlr.lowrank.factors", "fedlr.methods.method", "fedlr.report.live"} <= set(names)
    assert probe(HEAVY, names) == ""


def test_the_records_load_no_third_party_package() -> None:
    third_party = tuple(rules.HOMES)
    assert probe(third_party, ["fedlr.report.records", "fedlr.report.live"]) == ""


@pytest.mark.parametrize("package", ["omegaconf", "datasets"])
def test_the_probe_sees_a_framework(package: str) -> None:
    assert f"importing {package} loads" in probe(HEAVY, ["fedlr", package])

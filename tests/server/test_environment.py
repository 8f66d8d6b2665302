"""Flower makes no call home, and its own log lines stay out of our display."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from server.environment import OFFLINE, quiet_flower
from tests.architecture.tree import ROOT

PROBE = """
import importlib, os, sys
importlib.import_module(sys.argv[1])
from flwr.supercore import telemetry
print(telemetry.FLWR_TELEMETRY_ENABLED, os.environ["FLWR_DISABLE_UPDATE_CHECK"])
"""


def probe(module: str, **chosen: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name not in OFFLINE}
    result = subprocess.run(
        [sys.executable, "-c", PROBE, module],
        cwd=ROOT,
        env={**inherited, **chosen},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return result.stdout.strip()


@pytest.mark.parametrize("module", ["server.grid", "client.app"])
def test_importing_either_side_turns_reports_off_before_flower_loads(module: str) -> None:
    assert probe(module) == "0 1"


def test_the_operators_own_choice_stays() -> None:
    assert probe("client.app", FLWR_TELEMETRY_ENABLED="1") == "1 1"
    assert probe("server.app", FLWR_DISABLE_UPDATE_CHECK="0") == "0 0"


def test_only_flowers_information_is_dropped_and_only_inside(
    caplog: pytest.LogCaptureFixture,
) -> None:
    flower, root, level = logging.getLogger("flwr"), logging.getLogger(), logging.getLogger().level
    caplog.set_level(logging.INFO, logger="ours")
    with quiet_flower():
        flower.info("round table")
        flower.warning("something to know")
        logging.getLogger("ours").info("kept")
        assert root.level == level
    flower.info("afterwards")
    assert caplog.messages == ["something to know", "kept", "afterwards"]

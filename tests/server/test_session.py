"""A run folder keeps the configuration it began with, one of an earlier version too."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlr.config import RunConfig, to_json
from fedlr.errors import RunError
from fedlr.report.folder import CONFIG_FILE
from server.session import read_config
from tests.report.run_folder import FACTS

SINCE = (("adapter", "rank_by_client"), ("method", "downlink"), ("subspace", "refresh"))
"""Settings that earlier versions did not have."""


def earlier(config: RunConfig) -> dict[str, Any]:
    """The configuration as it was written before those settings and `combine` came."""
    written: dict[str, Any] = json.loads(to_json(config))
    del written["combine"]
    for section, name in SINCE:
        del written[section][name]
    return written


def digest(written: dict[str, Any]) -> str:
    text = json.dumps(written, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def put(folder: Path, written: dict[str, Any]) -> None:
    (folder / CONFIG_FILE).write_text(json.dumps({"config": written}, indent=2))


def test_the_configuration_of_an_earlier_version_is_read_with_todays_defaults(
    tmp_path: Path,
) -> None:
    config = RunConfig(seed=11)
    for written in (earlier(config), json.loads(to_json(config))):
        put(tmp_path, written)
        facts = replace(FACTS, config_sha256=digest(written))
        assert read_config(tmp_path, facts) == config


def test_one_that_was_changed_is_refused(tmp_path: Path) -> None:
    written = earlier(RunConfig(seed=11))
    facts = replace(FACTS, config_sha256=digest(written))
    for changed in (
        {**written, "seed": 12},
        {**written, "combine": {"kind": "coordinate_median"}},
        {key: value for key, value in written.items() if key != "privacy"},
    ):
        put(tmp_path, changed)
        with pytest.raises(RunError, match="is not the configuration that the run began with"):
            read_config(tmp_path, facts)

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedlr.data import sources, stdlib
from fedlr.errors import ConfigError
from tests.data.helpers import spec


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "labels.json").write_text('["no", "yes"]')
    rows = [{"text": f"t{row}", "label": row % 2} for row in range(40)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_stdlib_is_dispatched_with_fraction_and_seed() -> None:
    loaded = sources.load(spec("stdlib", validation_fraction=0.2, seed=3))
    assert loaded.sha256 == stdlib.load(0.2, 3).sha256


def test_stdlib_has_its_own_labels() -> None:
    with pytest.raises(ConfigError, match=r"data\.label_names"):
        sources.load(spec("stdlib", label_names=("a", "b")))


def test_max_examples_cuts_train_only(folder: Path) -> None:
    whole = sources.load(spec(path=str(folder)))
    short = sources.load(spec(path=str(folder), max_examples=7))
    assert (len(whole.train), len(short.train)) == (30, 7)
    assert short.validation.texts == whole.validation.texts
    assert set(short.train.texts) < set(whole.train.texts)
    assert short.sha256 != whole.sha256
    assert short.notices == whole.notices


def test_hub_is_dispatched() -> None:
    with pytest.raises(ConfigError, match="data=hub needs"):
        sources.load(spec("hub"))


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "web"},
        {"text_columns": ()},
        {"text_columns": ("a", "b", "c")},
        {"validation_fraction": 0.0},
        {"validation_fraction": float("nan")},
        {"max_examples": 0},
        {"seed": -1},
    ],
    ids=str,
)
def test_a_spec_out_of_bounds_names_the_field(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(changes))} = "):
        spec(**changes)

"""Rows of one process of a real federation: a site's training split, the server's validation."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from fedlr.data import sources
from fedlr.errors import DataError
from tests.data.helpers import spec


def write(folder: Path, name: str, count: int) -> None:
    rows = [{"text": f"{name} {row}", "label": row % 2} for row in range(count)]
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "labels.json").write_text('["no", "yes"]')
    return tmp_path


def test_a_server_reads_no_training_row(folder: Path) -> None:
    write(folder, "dev", 6)
    loaded = sources.load(spec(path=str(folder), only="validation", user_column="patient"))
    assert (len(loaded.train), len(loaded.validation)) == (0, 6)
    write(folder, "train", 4)  # there, and never opened: it has no such column
    assert sources.load(
        spec(path=str(folder), only="validation", user_column="patient")
    ).sha256 == (loaded.sha256)


def test_a_server_with_one_file_has_nothing_else(folder: Path) -> None:
    write(folder, "anything", 6)
    loaded = sources.load(spec(path=str(folder / "anything.jsonl"), only="validation"))
    assert (len(loaded.train), len(loaded.validation)) == (0, 6)


def test_a_server_without_validation_rows_is_told(folder: Path) -> None:
    write(folder, "train", 4)
    with pytest.raises(DataError, match=r"no validation split \(it has train\).*dev, test"):
        sources.load(spec(path=str(folder), only="validation"))


def test_a_server_of_a_hub_reads_one_split(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["no", "yes"]),
        }
    )
    rows = {"text": ["a", "b"], "label": [0, 1]}
    data = datasets.Dataset.from_dict(rows, features=features)
    folder = tmp_path / "hub"
    folder.mkdir()
    data.to_parquet(str(folder / "validation-00000-of-00001.parquet"))
    loaded = sources.load(spec("hub", name=str(folder), only="validation", label_names=("n", "y")))
    assert (len(loaded.train), loaded.validation.texts) == (0, ("a", "b"))


def test_a_server_of_the_embedded_data_keeps_the_validation_rows() -> None:
    both = sources.load(spec("stdlib", validation_fraction=0.2))
    one = sources.load(spec("stdlib", validation_fraction=0.2, only="validation"))
    assert len(one.train) == 0
    assert one.validation.texts == both.validation.texts


def test_a_site_reads_its_training_split_alone(folder: Path) -> None:
    write(folder, "train", 4)
    write(folder, "dev", 6)
    loaded = sources.load(spec(path=str(folder), only="train"))
    assert (len(loaded.train), len(loaded.validation)) == (4, 0)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedlr.data import hub
from fedlr.errors import ConfigError, DataError
from tests.data.helpers import spec
from tests.hub import ask_at, serve

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def make(folder: Path, *, named: bool = True, splits: tuple[str, ...] = ("train",)) -> str:
    """Write a folder as the hub lays one out; ClassLabel names travel in the Parquet file."""
    label = datasets.ClassLabel(names=["no", "yes"]) if named else datasets.Value("int64")
    text = datasets.Value("string")
    features = datasets.Features({"one": text, "two": text, "label": label, "who": text})
    (folder / "data").mkdir(parents=True)
    for split in splits:
        rows = {
            "one": [f"{split} {row}" for row in range(8)],
            "two": [f"pair {row}" for row in range(8)],
            "label": [0, 1] * 4,
            "who": list("aabbccdd"),
        }
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder)


def test_labels_come_from_the_public_feature(tmp_path: Path) -> None:
    name = make(tmp_path / "set", splits=("train", "validation"))
    wanted = spec("hub", name=name, text_columns=("one", "two"), user_column="who")
    loaded = hub.load(wanted)
    assert loaded.label_names == ("no", "yes")
    assert loaded.train.texts == tuple(f"train {row}" for row in range(8))
    assert loaded.train.pairs == tuple(f"pair {row}" for row in range(8))
    assert loaded.train.labels.tolist() == [0, 1] * 4
    assert loaded.train.users == tuple("aabbccdd")
    assert loaded.validation.texts[0] == "validation 0"
    assert loaded.notices == ()


def test_configured_names_win_and_a_missing_split_is_cut(tmp_path: Path) -> None:
    name = make(tmp_path / "set", named=False)
    loaded = hub.load(spec("hub", name=name, text_columns=("one",), label_names=("n", "y", "z")))
    assert loaded.label_names == ("n", "y", "z")
    assert (len(loaded.train), len(loaded.validation)) == (6, 2)
    assert loaded.train.pairs is None
    assert set(loaded.train.texts).isdisjoint(loaded.validation.texts)


def test_a_test_split_as_validation_is_said(tmp_path: Path) -> None:
    name = make(tmp_path / "set", splits=("train", "test"))
    loaded = hub.load(spec("hub", name=name, text_columns=("one",)))
    assert loaded.validation.texts[0] == "test 0"
    assert "test split" in loaded.notices[0]


def test_the_label_list_is_never_inferred(tmp_path: Path) -> None:
    name = make(tmp_path / "set", named=False)
    with pytest.raises(DataError, match="does not declare the classes of 'label'"):
        hub.load(spec("hub", name=name, text_columns=("one",)))


def test_missing_columns_and_splits_are_listed(tmp_path: Path) -> None:
    name = make(tmp_path / "set")
    with pytest.raises(DataError, match="no column 'text'; it has 'one', 'two', 'label', 'who'"):
        hub.load(spec("hub", name=name))
    with pytest.raises(DataError, match=r"train_split = 'training' is not in .* has train"):
        hub.load(spec("hub", name=name, train_split="training"))
    with pytest.raises(DataError, match="validation_split = 'dev' is not in"):
        hub.load(spec("hub", name=name, text_columns=("one",), validation_split="dev"))


def test_an_unlabelled_row_is_named(tmp_path: Path) -> None:
    """The hub marks the rows of hidden test sets with the label -1."""
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text(
        '{"text": "t", "label": 0}\n{"text": "u", "label": -1}\n', encoding="utf-8"
    )
    with pytest.raises(DataError, match="split train, row 2: label -1"):
        hub.load(spec("hub", name=str(folder), label_names=("no", "yes")))


def test_offline_and_unknown_names_give_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.name = 'owner/unknown'.*cannot be reached.*stdlib"):
        hub.load(spec("hub", name="owner/unknown"))
    with pytest.raises(DataError, match=r"cannot be loaded \(FileNotFoundError"):
        hub.load(spec("hub", name=str(tmp_path / "absent")))
    with pytest.raises(ConfigError, match=r"data\.name is not set"):
        hub.load(spec("hub"))


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let the loader ask a hub at an address."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)

    def at(endpoint: str) -> None:
        ask_at(endpoint, monkeypatch)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)

    return at


def test_a_dead_hub_is_asked_once(online: Callable[[str], None]) -> None:
    """The loader itself would try six times, with pauses."""
    with serve(503) as server:
        online(server.endpoint)
        with pytest.raises(DataError, match=r"cannot be reached \(http.*HTTP status 503\); go onl"):
            hub.load(spec("hub", name="owner/unknown"))
        assert server.asked == ["/"]
    assert datasets.config.HF_HUB_OFFLINE is False


def test_a_name_the_hub_does_not_know_is_no_network_problem(online: Callable[[str], None]) -> None:
    with serve() as server:
        online(server.endpoint)
        with pytest.raises(DataError, match=r"'owner/unknown' .* the hub has no such data set"):
            hub.load(spec("hub", name="owner/unknown"))


def test_what_is_cached_needs_no_hub(
    online: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = make(tmp_path / "set", splits=("train", "validation"))
    wanted = spec("hub", name=name, text_columns=("one",))
    from_folder = hub.load(wanted)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")  # where no folder has the name
    with serve(503) as server:
        online(server.endpoint)
        cached = hub.load(replace(wanted, name="set"))
        assert server.asked == ["/"]
    assert cached.train.texts == from_folder.train.texts
    assert cached.label_names == from_folder.label_names


def test_an_unknown_subset_gives_a_way_out(tmp_path: Path) -> None:
    name = make(tmp_path / "set")
    with pytest.raises(DataError, match=r"data\.subset = 'nowhere' cannot be loaded"):
        hub.load(spec("hub", name=name, subset="nowhere"))


def test_a_data_set_that_is_a_program_is_refused_and_not_run(tmp_path: Path) -> None:
    folder, witness = tmp_path / "program", tmp_path / "ran"
    folder.mkdir()
    (folder / "program.py").write_text(f"open({str(witness)!r}, 'w').close()\n")
    with pytest.raises(DataError, match="cannot be loaded"):
        hub.load(spec("hub", name=str(folder)))
    with pytest.raises(DataError, match="cannot be loaded"):
        hub.load(spec("hub", name=str(folder / "program.py")))
    assert not witness.exists()

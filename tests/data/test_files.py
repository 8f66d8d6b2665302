from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedlr.data import files
from fedlr.errors import ConfigError, DataError
from tests.data.helpers import spec

ROWS = [
    {"text": "one, two", "label": 0, "who": "x"},
    {"text": 'a "quote"\nand a line', "label": 1, "who": "y"},
    {"text": "grüße 你好", "label": 1, "who": "x"},
    {"text": "last", "label": 0, "who": "z"},
]
SHARED = Path(__file__).parents[3] / "shared" / "data"


def write_jsonl(path: Path, rows: Sequence[dict[str, object]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_csv(path: Path, rows: Sequence[dict[str, object]]) -> None:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: Sequence[dict[str, object]]) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(list(rows)), path)


WRITERS: dict[str, Callable[[Path, Sequence[dict[str, object]]], None]] = {
    "jsonl": write_jsonl,
    "jsonl.gz": write_jsonl,
    "csv": write_csv,
    "csv.gz": write_csv,
    "parquet": write_parquet,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "labels.json").write_text('["no", "yes"]')
    return tmp_path


@pytest.mark.parametrize("ending", WRITERS)
def test_every_format_gives_the_same_rows(folder: Path, ending: str) -> None:
    WRITERS[ending](folder / f"train.{ending}", ROWS)
    WRITERS[ending](folder / f"dev.{ending}", ROWS[:2])
    loaded = files.load(spec(path=str(folder), user_column="who"))
    assert loaded.train.texts == tuple(row["text"] for row in ROWS)
    assert loaded.train.labels.tolist() == [0, 1, 1, 0]
    assert loaded.train.users == ("x", "y", "x", "z")
    assert loaded.validation.texts == loaded.train.texts[:2]
    assert loaded.label_names == ("no", "yes")
    assert loaded.notices == ()


@pytest.mark.parametrize("ending", WRITERS)
def test_labels_may_be_names(folder: Path, ending: str) -> None:
    named = [row | {"label": ("no", "yes")[int(str(row["label"]))]} for row in ROWS]
    WRITERS[ending](folder / f"train.{ending}", named)
    loaded = files.load(spec(path=str(folder / f"train.{ending}")))
    both = np.concatenate([loaded.train.labels, loaded.validation.labels])
    assert sorted(both.tolist()) == [0, 0, 1, 1]


def test_without_validation_file_a_public_cut_is_made_and_said(folder: Path) -> None:
    write_jsonl(folder / "train.jsonl", ROWS)
    loaded = files.load(spec(path=str(folder), public=False))
    assert (len(loaded.train), len(loaded.validation)) == (3, 1)
    assert set(loaded.train.texts) | set(loaded.validation.texts) == {r["text"] for r in ROWS}
    assert loaded.declared_public is False
    # Notices are published: of private data they hold no count.
    assert not any(character.isdigit() for character in "".join(loaded.notices))
    assert "no privacy guarantee covers them" in loaded.notices[0]
    declared = files.load(spec(path=str(folder), public=True))
    assert "1 rows were cut off" in declared.notices[0]


def test_the_cut_takes_whole_users_where_a_user_is_the_unit(folder: Path) -> None:
    many = [{"text": f"t{row}", "label": row % 2, "who": f"u{row % 5}"} for row in range(40)]
    write_jsonl(folder / "train.jsonl", many)
    plain = spec(path=str(folder), user_column="who")
    by_row, by_user = files.load(plain), files.load(replace(plain, split_by_user=True))
    assert set(by_row.train.users or ()) & set(by_row.validation.users or ())
    assert set(by_user.train.users or ()).isdisjoint(by_user.validation.users or ())
    assert len(by_user.validation) == 8  # round(0.25 · 5) = 1 user of 8 rows
    assert "with all rows of their users" in by_user.notices[0]


def test_a_validation_file_needs_no_user_column(folder: Path) -> None:
    write_jsonl(folder / "train.jsonl", ROWS)
    write_jsonl(folder / "validation.jsonl", [{"text": "v", "label": 1}])
    loaded = files.load(spec(path=str(folder), user_column="who"))
    assert loaded.validation.users is None
    assert loaded.train.users is not None


def test_the_configured_label_list_wins(folder: Path) -> None:
    write_jsonl(folder / "train.jsonl", ROWS)
    loaded = files.load(spec(path=str(folder), label_names=("bad", "good", "unseen")))
    assert loaded.label_names == ("bad", "good", "unseen")


def test_the_label_list_is_never_inferred(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"data\.label_names is not set and .*labels\.json"):
        files.load(spec(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as UTF-8 JSON"),
        ('{"0": "no"}', "must be a JSON array"),
        ('["no", 1]', "must be a string"),
        ('["no"]', "at least two names"),
        ('["no", "no"]', "at least two names"),
    ],
)
def test_a_bad_label_list_is_refused(folder: Path, content: str, message: str) -> None:
    write_jsonl(folder / "train.jsonl", ROWS)
    (folder / "labels.json").write_text(content)
    with pytest.raises(DataError, match=message):
        files.load(spec(path=str(folder)))


def test_no_path_and_missing_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path is not set"):
        files.load(spec())
    with pytest.raises(DataError, match="absent' does not exist"):
        files.load(spec(path=str(tmp_path / "absent")))


def test_a_path_that_the_system_refuses_is_no_traceback() -> None:
    """A name too long stands for every refusal: permissions do not bite a root user."""
    with pytest.raises(DataError, match=r"data\.path = 'x+' cannot be read: .* this user may read"):
        files.load(spec(path="x" * 5000))


def test_no_train_file_lists_what_is_there(folder: Path) -> None:
    (folder / "train.tsv").write_text("text\tlabel\n")
    with pytest.raises(DataError, match=r"no file train\.\*.*labels.json, train.tsv"):
        files.load(spec(path=str(folder)))


def test_two_train_files_are_refused(folder: Path) -> None:
    write_jsonl(folder / "train.jsonl", ROWS)
    write_csv(folder / "train.csv", ROWS)
    with pytest.raises(DataError, match=r"both train.csv and train.jsonl"):
        files.load(spec(path=str(folder)))


def test_unknown_ending_of_a_single_file(folder: Path) -> None:
    (folder / "rows.txt").write_text("hello")
    with pytest.raises(DataError, match=r"rows.txt must end in .jsonl"):
        files.load(spec(path=str(folder / "rows.txt")))


def test_a_single_file_has_no_configured_validation_split(folder: Path) -> None:
    write_jsonl(folder / "rows.jsonl", ROWS)
    with pytest.raises(DataError, match="validation_split = 'dev'"):
        files.load(spec(path=str(folder / "rows.jsonl"), validation_split="dev"))


@pytest.mark.parametrize("ending", WRITERS)
def test_a_missing_column_lists_the_columns_found(folder: Path, ending: str) -> None:
    WRITERS[ending](folder / f"train.{ending}", ROWS)
    with pytest.raises(DataError, match="no column 'sentence'; it has 'text', 'label', 'who'"):
        files.load(spec(path=str(folder), text_columns=("sentence",)))


GOOD = b'{"text": "t", "label": 0}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.jsonl", GOOD + b'{"text": "\xe9", "label": 0}\n', "row 2 is not UTF-8"),
        ("train.jsonl", GOOD + b"\n{oops}\n", "row 3 is not valid JSON"),
        ("train.jsonl", GOOD + b"[1, 2]\n", "row 2 is a JSON list"),
        ("train.jsonl", GOOD + b"[" * 100_000 + b"\n", "row 2 is not valid JSON"),
        ("train.jsonl", GOOD + b'{"text": "t", "label": 9}\n', "row 2: label 9 is not"),
        ("train.jsonl", b"", "has no rows"),
        ("train.jsonl", b"\n \n", "has no rows"),
        ("train.jsonl.gz", b"not gzip", "cannot be read after row 0"),
        # mtime: the bytes are part of the test's name, which every process must agree on.
        ("train.jsonl.gz", gzip.compress(GOOD * 9, mtime=0)[:-12], "cannot be read after row"),
        ("train.csv", b"", "is empty"),
        ("train.csv", b"text,label\n", "has no rows"),
        ("train.csv", b"text,label\nt,0\nu\n", "row 3 has 1 fields, the header has 2"),
        ("train.csv", b"text,label\nt,0\n\xff,1\n", "row 3 is not UTF-8"),
        ("train.csv", b'text,label\nt,0\n"open,1\n', "is not valid CSV"),
        ("train.csv", b"text,label\nt,2\n", "row 2: label '2' is not"),
        ("train.parquet", b"PAR1", "cannot be read as Parquet"),
    ],
)
def test_malformed_files_name_the_row(
    folder: Path, name: str, content: bytes, message: str
) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        files.load(spec(path=str(folder)))


def test_a_byte_order_mark_is_not_a_part_of_the_first_column(folder: Path) -> None:
    (folder / "train.csv").write_bytes("\ufefftext,label\nt,0\nu,1\n".encode())
    loaded = files.load(spec(path=str(folder)))
    assert {*loaded.train.texts, *loaded.validation.texts} == {"t", "u"}


@pytest.mark.parametrize(
    ("name", "user", "train", "validation", "classes", "users"),
    [("sst2", None, 67_349, 872, 2, 0), ("swda", "user", 69_991, 7_694, 41, 166)],
)
def test_shared_data_sets(
    name: str, user: str | None, train: int, validation: int, classes: int, users: int
) -> None:
    """Row, class and user counts are those of the README beside each set."""
    if not (SHARED / name).is_dir():
        pytest.skip(f"the {name} data are not beside the checkout")
    loaded = files.load(spec(path=str(SHARED / name), user_column=user))
    assert (len(loaded.train), len(loaded.validation)) == (train, validation)
    assert len(loaded.label_names) == classes
    assert len(set(loaded.train.users or ())) == users
    if name == "sst2":
        assert np.bincount(loaded.train.labels).tolist() == [29_780, 37_569]

"""Public text: a file read with the run's columns, or comments that are in no docstring."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedlr.data import stdlib
from fedlr.data.public import LARGEST, STDLIB, comments, load_public
from fedlr.errors import DataError
from tests.data.helpers import spec
from tests.data.test_stdlib import ROOT, write

NAMES = ("no", "yes")


def rows(path: Path, count: int = 6, **more: object) -> Path:
    lines = [json.dumps({"text": f"row {n}", "label": NAMES[n % 2], **more}) for n in range(count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_file_and_the_training_split_of_a_folder_are_the_same(tmp_path: Path) -> None:
    place = rows(tmp_path / "train.jsonl")
    rows(tmp_path / "validation.jsonl", count=1)
    for found in (load_public(str(p), spec(), NAMES, True) for p in (place, tmp_path)):
        assert found.texts == tuple(f"row {n}" for n in range(6))
        assert found.labels.tolist() == [0, 1, 0, 1, 0, 1]
        assert found.users is None


def test_the_columns_are_those_of_the_run(tmp_path: Path) -> None:
    place = tmp_path / "public.csv"
    place.write_text("question,answer,kind,who\na,b,yes,ann\nc,d,no,bob\n")
    own = spec(text_columns=("question", "answer"), label_column="kind", user_column="absent")
    found = load_public(str(place), own, NAMES, True)
    assert (found.texts, found.pairs, found.labels.tolist()) == (("a", "c"), ("b", "d"), [1, 0])


def test_no_label_is_needed_or_read_where_none_is_used(tmp_path: Path) -> None:
    place = tmp_path / "public.csv"
    place.write_text("text\na\nb\n")
    assert load_public(str(place), spec(), NAMES, False).labels.tolist() == [0, 0]
    with pytest.raises(DataError, match="has no column 'label'"):
        load_public(str(place), spec(), NAMES, True)
    odd = rows(tmp_path / "odd.jsonl", label="neither")
    assert len(load_public(str(odd), spec(), NAMES, False)) == 6
    with pytest.raises(DataError, match="label 'neither' is not in the label list"):
        load_public(str(odd), spec(), NAMES, True)


def test_more_rows_than_wanted_are_drawn_with_the_public_seed(tmp_path: Path) -> None:
    place = str(rows(tmp_path / "many.jsonl", count=2 * LARGEST))
    one, two, other = (load_public(place, spec(seed=s), NAMES, True) for s in (0, 0, 1))
    assert len(one) == LARGEST
    assert one.texts == two.texts != other.texts


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("absent", r"subspace\.public = '.*absent' cannot be read: No such file"),
        ("empty", r"has no file train\.\* ending in"),
        ("notes.txt", r"must end in \.jsonl"),
    ],
)
def test_what_cannot_be_read_is_told(place: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(DataError, match=message):
        load_public(str(tmp_path / place), spec(), NAMES, True)


def test_the_comments_of_this_python_are_in_no_docstring() -> None:
    areas = tuple(stdlib.LABEL_TEXTS)
    own = {docstring.text for docstring in stdlib.read_docstrings(ROOT)}
    found = load_public(STDLIB, spec("stdlib"), areas, True)
    assert 300 <= len(found) <= LARGEST
    assert own.isdisjoint(found.texts)
    assert len(set(found.texts)) == len(found)
    assert all(len(text.split()) >= 5 and len(text) <= 300 for text in found.texts)
    assert np.bincount(found.labels, minlength=6).min() >= 5


SOURCE = '''"""A docstring of more than five words.

# A line in a docstring, which looks like a comment.
"""
# A comment of two lines
# that are one row of text.
x = 1  # Beside code, so that no row comes of it.
# Too short, this

#!/usr/bin/env this is a comment of its own
# ------------------------------------------

# 1 2 3 4 5 6 7 are no words
y = "# A text that holds what looks like one."
# The same text as a docstring in another file.
'''


def test_whole_lines_of_comments_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, "json.py", SOURCE)
    write(tmp_path, "abc.py", '"""The same text as a docstring in another file."""\n')
    write(tmp_path, "test/test_json.py", "# A comment of a test package is no row.\n")
    write(tmp_path, "ast.py", "# A file that is not Python is skipped here.\nx = (\n")
    taken = {docstring.text for docstring in stdlib.read_docstrings(tmp_path)}
    found = comments(tmp_path, None, 0, taken)
    assert set(found.texts) == {
        "A comment of two lines that are one row of text.",
        "/usr/bin/env this is a comment of its own",
        "A file that is not Python is skipped here.",
    }
    assert not found.labels.any()


def test_labels_are_places_in_the_list_of_the_run(tmp_path: Path) -> None:
    for module in ("json", "abc", "tkinter"):
        write(tmp_path, f"{module}.py", f"# One comment that {module} alone has got.\nx = 1\n")
    names = ("numbers, types and time", "text and markup")
    found = comments(tmp_path, names, 0)
    assert {
        text.split()[3]: int(label) for text, label in zip(found.texts, found.labels, strict=True)
    } == {
        "abc": 0,
        "json": 1,
    }


def test_no_file_has_more_than_its_share_and_the_public_seed_decides_which(tmp_path: Path) -> None:
    lines = "\n".join(f"# Comment number {n} of a long file.\nx{n} = 1" for n in range(20))
    write(tmp_path, "json.py", lines + "\n")
    one, two, other = (comments(tmp_path, None, seed) for seed in (0, 0, 1))
    assert len(one) == 4
    assert one.texts == two.texts != other.texts


def test_a_python_without_sources_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"subspace\.public = stdlib found no comment"):
        comments(tmp_path, None, 0)

"""Public text for the subspace policies that look at a model's reaction to text.

That it is public is the operator's word: nothing here can tell. It is read on the machine
that draws A, and what it shows of its rows goes into A, un-noised and booked by no ledger.
"""

from __future__ import annotations

import re
import tokenize
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedlr.data import files, stdlib
from fedlr.data.dataset import TextDataset, shorten
from fedlr.data.rows import build_dataset
from fedlr.data.spec import SourceSpec
from fedlr.errors import DataError

LARGEST = 512
"""Most rows: a bound on the time that a subspace takes, and no more text than a policy shows."""

STDLIB = "stdlib"
"""The place that means comments of the running Python's standard library."""

_WORD = re.compile(r"[^\W\d_]{2,}")

_PER_FILE = 4
"""Most comments of one file, so that they come from many."""


def check_public(place: str | None, spec: SourceSpec) -> None:
    """Raise DataError now if the text at ``place`` is not there; reads no row.

    Args:
        place: As in `load_public`; None needs nothing.
        spec: The run's data source: its name of the training split.
    """
    if place not in (None, STDLIB):
        _file(Path(str(place)), spec.train_split)


def load_public(
    place: str, spec: SourceSpec, label_names: tuple[str, ...], labelled: bool
) -> TextDataset:
    """Read public text for a run.

    Args:
        place: A file or a folder, read as ``data=file`` reads training rows, or `STDLIB`.
        spec: The run's data source: its columns, its name of the training split and its
            public seed. Its own rows are not read; where it is the embedded data, which
            are public, comments that are among them are left out.
        label_names: The run's label list.
        labelled: Whether labels are wanted; else the column is not needed, and all are 0.

    Returns:
        At most `LARGEST` rows, drawn with the public seed; without users.

    Raises:
        DataError: ``place`` is not there or has no such file, a column is missing, a row
            is malformed, or a label is not in ``label_names``.
    """
    if place == STDLIB:
        root = stdlib.source_root()
        own = stdlib.read_docstrings(root) if spec.kind == "stdlib" else ()
        names = label_names if labelled else None
        return comments(root, names, spec.seed, {docstring.text for docstring in own})
    path, columns = _file(Path(place), spec.train_split), replace(spec, user_column=None)
    if labelled:
        rows = build_dataset(str(path), files.rows_of(path, columns), columns, label_names)
    else:
        unlabelled = replace(columns, label_column=spec.text_columns[0])
        found = ((n, {**row, spec.label_column: 0}) for n, row in files.rows_of(path, unlabelled))
        rows = build_dataset(str(path), found, columns, label_names)
    return shorten(rows, LARGEST, spec.seed)


def comments(
    root: Path, label_names: tuple[str, ...] | None, seed: int, taken: Collection[str] = ()
) -> TextDataset:
    """Return comments of the standard library at ``root``: text that is in no docstring.

    One row is a run of whole-line comments, read with ``tokenize`` so that nothing of a
    docstring is among them: white space normalised, five words or more, cut at 300
    characters, each text once, at most four of a file.

    Args:
        root: Folder of the sources.
        label_names: Areas that are wanted, as in `fedlr.data.stdlib.AREA_OF_MODULE`: the
            label of a row is its module's place in it. None: every area, all labels 0.
        seed: Public seed, ≥ 0: of the order of files and of the choice in a file.
        taken: Texts to leave out.

    Returns:
        At most `LARGEST` rows.

    Raises:
        DataError: There is none: a Python without its sources.
    """
    draws = np.random.default_rng(seed)
    sources = stdlib.source_files(root)
    found: dict[str, int] = {}
    for number in draws.permutation(len(sources)).tolist():
        path, module = sources[number]
        area = stdlib.AREA_OF_MODULE[module]
        if label_names is not None and area not in label_names:
            continue
        texts = [text for text in dict.fromkeys(_comments(path)) if text not in taken]
        for index in draws.permutation(len(texts))[:_PER_FILE].tolist():
            found.setdefault(texts[index], 0 if label_names is None else label_names.index(area))
        if len(found) >= LARGEST:
            break
    if not found:
        raise DataError(
            f"subspace.public = {STDLIB} found no comment at {root}: this Python comes without "
            "its sources. Name a file of public text."
        )
    kept = list(found.items())[:LARGEST]
    labels = np.array([label for _, label in kept], dtype=np.int64)
    return TextDataset(tuple(text for text, _ in kept), None, labels, None)


def _file(place: Path, split: str) -> Path:
    """The file itself, or the training split in a folder."""
    try:
        if place.is_file():
            return place
        splits = files.split_files(place)
    except OSError as error:
        raise DataError(
            f"subspace.public = {str(place)!r} cannot be read: {error.strerror or error}. Give a "
            f"file or a folder of public text, or {STDLIB}."
        ) from error
    if split not in splits:
        raise DataError(
            f"subspace.public = {str(place)!r} has no file {split}.* ending in "
            f"{', '.join(files.ENDINGS)}. Add one, or name the file."
        )
    return splits[split]


def _comments(path: Path) -> Iterator[str]:
    """Yield the runs of whole-line comments of one file; a blank line ends one."""
    run: list[str] = []
    try:
        with path.open("rb") as stream:
            for token in tokenize.tokenize(stream.readline):
                whole_line = token.line.lstrip().startswith("#")
                if token.type == tokenize.COMMENT and whole_line:
                    run.append(token.string)
                elif not (token.type == tokenize.NL and whole_line):
                    yield from _texts(run)
                    run = []
    except (OSError, SyntaxError, tokenize.TokenError):
        return


def _texts(run: list[str]) -> Iterator[str]:
    """Yield the text of a run of comments, where it has enough words."""
    lines = [line.lstrip("#!: ") for line in run]
    words = " ".join(line for line in lines if _WORD.search(line)).split()
    if sum(_WORD.search(word) is not None for word in words) >= stdlib.MINIMUM_WORDS:
        yield " ".join(words)[: stdlib.MAXIMUM_CHARACTERS].rstrip()

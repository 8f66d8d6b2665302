"""``data=file``: JSON Lines, CSV or Parquet at a path.

A folder holds ``train.*`` and, optionally, ``validation.*`` (or ``valid``,
``dev``, ``test``, in this order of preference); the label list comes from the
configuration or from ``labels.json`` beside the data.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from fedlr.data.dataset import LoadedData, TextDataset
from fedlr.data.rows import (
    NumberedRows,
    assemble,
    assemble_one,
    build_dataset,
    check_declared_labels,
    choose_validation,
    needed_validation,
    require_columns,
)
from fedlr.data.spec import SourceSpec
from fedlr.errors import ConfigError, DataError

ENDINGS = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")
"""File name endings that can be read."""


def load(spec: SourceSpec) -> LoadedData:
    """Read a folder of split files, or one file.

    Args:
        spec: ``path``, columns, splits; with one file, all rows are train.

    Returns:
        Train and validation rows. A validation file needs no user column and
        its natural ids are not read. With ``only``, that side is all there is.

    Raises:
        ConfigError: ``path`` is not set.
        DataError: A path, split file, column or label list is missing, a row
            is malformed or not UTF-8, or a label is not in the list.
    """
    if spec.path is None:
        raise ConfigError(["data.path is not set; data=file needs a folder or a file"])
    path = Path(spec.path)
    if is_file(path):
        label_names = _label_names(path.parent, spec)
        if spec.only is not None:
            # Natural ids of validation rows are not read.
            read = spec if spec.only == "train" else replace(spec, user_column=None)
            return assemble_one(spec, _read(path, read, label_names), label_names)
        choose_validation((), spec, spec.path)
        return assemble(spec, _read(path, spec, label_names), None, label_names)
    splits = split_files(path)
    if spec.only == "validation":
        return _validation(spec, path, splits)
    train = splits.get(spec.train_split)
    if train is None:
        present = ", ".join(sorted(entry.name for entry in path.iterdir())[:20])
        raise DataError(
            f"data.path = {str(path)!r} has no file {spec.train_split}.* ending in "
            f"{', '.join(ENDINGS)}; it has {present or 'no files'}. Add one or set "
            "data.train_split."
        )
    label_names = _label_names(path, spec)
    if spec.only is not None:
        return assemble_one(spec, _read(train, spec, label_names), label_names)
    chosen, notices = choose_validation(splits, spec, str(path))
    validation = None
    if chosen is not None:
        validation = _read(splits[chosen], replace(spec, user_column=None), label_names)
    return assemble(spec, _read(train, spec, label_names), validation, label_names, notices)


def is_file(path: Path) -> bool:
    """Return whether ``path`` is a file, or else a folder; DataError if it is neither."""
    try:
        if path.exists():
            if path.is_dir():
                next(path.iterdir(), None)  # may not be allowed
            return not path.is_dir()
    except OSError as error:
        raise DataError(
            f"data.path = {str(path)!r} cannot be read: {error.strerror or error}. Give a folder "
            "or a file that this user may read."
        ) from error
    place = "" if path.is_absolute() else f" in {Path.cwd()}"
    raise DataError(f"data.path = {str(path)!r} does not exist{place}. Give a folder or a file.")


def split_files(folder: Path) -> dict[str, Path]:
    """Return the readable files of ``folder`` by split name; DataError if one has two."""
    splits: dict[str, Path] = {}
    for entry in sorted(folder.iterdir()):
        for ending in ENDINGS:
            name = entry.name.removesuffix(ending)
            if name == entry.name or not entry.is_file():
                continue
            if name in splits:
                raise DataError(
                    f"{folder} has both {splits[name].name} and {entry.name}. Keep one of them."
                )
            splits[name] = entry
    return splits


def _label_names(folder: Path, spec: SourceSpec) -> tuple[str, ...]:
    """Return the declared label list: the configured one, else ``labels.json``."""
    if spec.label_names is not None:
        return check_declared_labels("data.label_names", spec.label_names)
    path = folder / "labels.json"
    if not path.is_file():
        raise DataError(
            f"there is no label list: data.label_names is not set and {path} does not exist. "
            "Set one of them; the list is never inferred from the rows, because that would "
            "reveal which classes occur."
        )
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 JSON: {error}.") from error
    if not isinstance(names, list):
        raise DataError(f"{path} must be a JSON array of class names in index order.")
    return check_declared_labels(str(path), names)


def _validation(spec: SourceSpec, folder: Path, splits: Mapping[str, Path]) -> LoadedData:
    """Return the validation split of a folder alone; DataError where there is none."""
    chosen, notices = needed_validation(splits, spec, str(folder))
    label_names = _label_names(folder, spec)
    rows = _read(splits[chosen], replace(spec, user_column=None), label_names)
    return assemble_one(spec, rows, label_names, notices)


def _read(path: Path, spec: SourceSpec, label_names: tuple[str, ...]) -> TextDataset:
    return build_dataset(str(path), rows_of(path, spec), spec, label_names)


def rows_of(path: Path, spec: SourceSpec) -> NumberedRows:
    """Return the rows of one file, read by its ending; its columns must have those of ``spec``.

    Raises:
        DataError: No such ending; while it is read, a missing column or a malformed row.
    """
    readers: dict[str, Callable[[Path, SourceSpec], NumberedRows]] = {
        ".jsonl": _jsonl,
        ".jsonl.gz": _jsonl,
        ".csv": _csv,
        ".csv.gz": _csv,
        ".parquet": _parquet,
    }
    for ending in ENDINGS:
        if path.name.endswith(ending):
            return readers[ending](path, spec)
    raise DataError(f"{path} must end in {', '.join(ENDINGS)}. Convert or rename the file.")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line) of a UTF-8 text file, gzip or plain."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, row {number} is not UTF-8: {error.reason} at byte {error.start}. "
            "Convert the file to UTF-8."
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read after row {number}: {error}.") from error


def _jsonl(path: Path, spec: SourceSpec) -> Iterator[tuple[int, Mapping[str, object]]]:
    """Yield the objects of a JSON Lines file; blank lines are skipped but counted."""
    del spec
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}, row {number} is not valid JSON: {error}. Each line must be one object."
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, row {number} is a JSON {type(row).__name__}; each line must be one "
                'object such as {"text": "…", "label": 0}.'
            )
        yield number, row


def _csv(path: Path, spec: SourceSpec) -> Iterator[tuple[int, Mapping[str, object]]]:
    """Yield the rows of a CSV file with a header; a row's number is its last line's."""
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    try:
        header = next(reader, None)
        if header is None:
            raise DataError(f"{path} is empty. The first row must name the columns.")
        require_columns(str(path), spec.columns, header)
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(header):
                raise DataError(
                    f"{path}, row {reader.line_num} has {len(fields)} fields, the header has "
                    f"{len(header)}. Quote fields that contain commas or line ends."
                )
            yield reader.line_num, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}, row {reader.line_num} is not valid CSV: {error}.") from error


def _parquet(path: Path, spec: SourceSpec) -> Iterator[tuple[int, Mapping[str, object]]]:
    """Yield the rows of a Parquet file, reading the needed columns only."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            require_columns(str(path), spec.columns, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(columns=list(dict.fromkeys(spec.columns))):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}.") from error

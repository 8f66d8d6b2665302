"""``data=hub``: a text classification set of the Hugging Face hub, by its name.

Only data files are read: the installed ``datasets`` refuses data sets that are
programs, and nothing here asks it to do otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from fedlr.data.dataset import LoadedData
from fedlr.data.reach import cache_if_silent, unknown, unreachable, verdict
from fedlr.data.rows import (
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


def load(spec: SourceSpec) -> LoadedData:
    """Load a hub data set (or a local folder laid out like one).

    Args:
        spec: ``name``, ``subset``, splits and columns. The label list is the
            configured one, else that of the label column's ``ClassLabel``,
            which is public metadata of the data set.

    Raises:
        ConfigError: ``name`` is not set.
        DataError: The data set, subset, split or column does not exist, cannot
            be reached, or has no label list; or a row does not fit it.
    """
    if spec.name is None:
        raise ConfigError(
            ["data.name is not set; data=hub needs a data set such as 'stanfordnlp/sst2'"]
        )
    splits = _download(spec.name, spec.subset)
    if spec.only == "validation":
        return _validation(spec, splits)
    if spec.train_split not in splits:
        raise DataError(
            f"data.train_split = {spec.train_split!r} is not in {spec.name}, which has "
            f"{', '.join(splits)}. Name one of these."
        )
    label_names = _label_names(splits[spec.train_split], spec)
    train = build_dataset(
        f"{spec.name}, split {spec.train_split}",
        _rows(splits[spec.train_split], spec),
        spec,
        label_names,
    )
    chosen, notices = choose_validation(splits, spec, spec.name)
    validation = None
    if chosen is not None:
        public = replace(spec, user_column=None)
        validation = build_dataset(
            f"{spec.name}, split {chosen}", _rows(splits[chosen], public), public, label_names
        )
    return assemble(spec, train, validation, label_names, notices)


def _validation(spec: SourceSpec, splits: Mapping[str, Any]) -> LoadedData:
    """Return the validation split alone; DataError where there is none."""
    chosen, notices = needed_validation(splits, spec, str(spec.name))
    public = replace(spec, user_column=None)
    label_names = _label_names(splits[chosen], public)
    where = f"{spec.name}, split {chosen}"
    rows = build_dataset(where, _rows(splits[chosen], public), public, label_names)
    return assemble_one(spec, rows, label_names, notices)


def _download(name: str, subset: str | None) -> Mapping[str, Any]:
    """Return every split of a data set; from the local cache where the hub does not answer."""
    import datasets

    where = f"data.name = {name!r}" + ("" if subset is None else f", data.subset = {subset!r}")
    elsewhere = "or use data=file with a copy, or the embedded data=stdlib"
    with cache_if_silent(name) as silence:
        try:
            splits: Mapping[str, Any] = datasets.load_dataset(name, subset)
        except datasets.exceptions.DatasetNotFoundError as error:
            raise DataError(f"{where} {unknown('data set')}, {elsewhere}") from error
        except ConnectionError as error:
            raise DataError(f"{where} {unreachable(silence)}, {elsewhere}") from error
        # The loader lets through the exceptions of some ten libraries (HTTP clients, Arrow,
        # compression, file systems) that share no base class but this one.
        except Exception as error:
            told = verdict(error, "data set", silence)
            if told:
                raise DataError(f"{where} {told}, {elsewhere}") from error
            reason = (str(error).splitlines() or [""])[0]
            raise DataError(
                f"{where} cannot be loaded ({type(error).__name__}: {reason}). Check the name and "
                "the subset, or use data=file with a copy."
            ) from error
    return splits


def _label_names(split: Any, spec: SourceSpec) -> tuple[str, ...]:
    """Return the configured label list, else that of the ``ClassLabel`` feature."""
    if spec.label_names is not None:
        return check_declared_labels("data.label_names", spec.label_names)
    require_columns(f"{spec.name}", spec.columns, split.column_names)
    names = getattr(split.features[spec.label_column], "names", None)
    if names is None:
        raise DataError(
            f"{spec.name} does not declare the classes of {spec.label_column!r}. Set "
            "data.label_names; the list is never inferred from the rows."
        )
    return check_declared_labels(f"{spec.name}", names)


def _rows(split: Any, spec: SourceSpec) -> Iterator[tuple[int, Mapping[str, object]]]:
    """Yield numbered rows, a thousand at a time, of the needed columns only."""
    require_columns(f"{spec.name}", spec.columns, split.column_names)
    needed = split.select_columns(list(dict.fromkeys(spec.columns)))
    number = 0
    for batch in needed.iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            number += 1
            yield number, dict(zip(batch, values, strict=True))

"""One door to every data source: ``load(spec)``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from fedlr.data import files, hub, stdlib
from fedlr.data.dataset import LoadedData, shorten
from fedlr.data.spec import SourceSpec
from fedlr.errors import ConfigError

__all__ = ["SourceSpec", "check_present", "load"]


def check_present(spec: SourceSpec) -> None:
    """Raise DataError now if local data are not where ``spec`` says; reads no row."""
    if spec.kind == "file" and spec.path is not None:
        files.is_file(Path(spec.path))


def load(spec: SourceSpec) -> LoadedData:
    """Read the data source that ``spec`` describes.

    Args:
        spec: Kind, place, columns, splits and public seed.

    Returns:
        Train and validation rows with their label list. ``max_examples`` cuts
        train only, after the validation set is set apart, so that a debug run
        is evaluated on the same rows as a whole one.

    Raises:
        ConfigError: The kind's path or name is not set, or a label list is
            given for the embedded data.
        DataError: The data are missing, unreadable, or do not fit the
            declaration.
    """
    if spec.kind == "stdlib":
        if spec.label_names is not None:
            raise ConfigError(
                ["data.label_names is set, but data=stdlib has its own six classes; set it to null"]
            )
        loaded = stdlib.load(spec.validation_fraction, spec.seed, spec.split_by_user)
        if spec.only == "validation":
            none = loaded.train.select(np.array([], dtype=np.int64))
            loaded = replace(loaded, train=none)
    elif spec.kind == "file":
        loaded = files.load(spec)
    else:
        loaded = hub.load(spec)
    if spec.max_examples is None:
        return loaded
    return replace(loaded, train=shorten(loaded.train, spec.max_examples, spec.seed))

"""The description of a data source, as a configuration gives it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedlr import checks

Kind = Literal["stdlib", "hub", "file"]
Side = Literal["train", "validation"]


@dataclass(frozen=True)
class SourceSpec:
    """Where labelled text comes from and how it is read; every field is public.

    Attributes:
        kind: ``stdlib`` (embedded default), ``hub`` (Hugging Face) or ``file``.
        path: Folder or file of ``kind=file``.
        name: Data set of ``kind=hub``: ``owner/name`` or a local folder.
        subset: Configuration of that data set (``sst2`` of ``glue``), or None.
        text_columns: One or two columns: the text, and the second of a pair.
        label_column: Column of the class: an index, or a name of the list.
        user_column: Column of the natural id, or None.
        label_names: Class names in index order; None: from ``labels.json``
            beside the file, or from the data set's public metadata.
        validation_fraction: Part of train cut off where there is no validation
            split, in (0, 1).
        train_split: Split, or file name without ending, to train on.
        validation_split: The one to evaluate on; None: the first found of
            validation, valid, dev, test, else a cut from train.
        max_examples: Upper bound on training rows, ≥ 1, or None.
        public: Whether the operator declares the rows public.
        seed: Public seed of every cut, ≥ 0.
        split_by_user: Whether a cut from train takes whole users, so that
            nobody is in both parts; needed where the unit of privacy is a user.
        only: The one side that is read: ``train`` at a real site of ``kind=file``, which trains
            on every row of its training split; ``validation`` at the server of real sites,
            where one file alone holds nothing else. None reads both, or cuts one off.

    Raises:
        ValueError: A field is outside its bound.
    """

    kind: Kind
    path: str | None
    name: str | None
    subset: str | None
    text_columns: tuple[str, ...]
    label_column: str
    user_column: str | None
    label_names: tuple[str, ...] | None
    validation_fraction: float
    train_split: str
    validation_split: str | None
    max_examples: int | None
    public: bool
    seed: int
    split_by_user: bool = False
    only: Side | None = None

    def __post_init__(self) -> None:
        checks.one_of("kind", self.kind, ("stdlib", "hub", "file"))
        if len(self.text_columns) not in (1, 2):
            raise ValueError(f"text_columns = {self.text_columns} must name one or two columns")
        if not 0.0 < checks.finite("validation_fraction", self.validation_fraction) < 1.0:
            raise ValueError(
                f"validation_fraction = {self.validation_fraction} must be > 0 and < 1"
            )
        if self.max_examples is not None:
            checks.at_least("max_examples", self.max_examples, 1)
        checks.at_least("seed", self.seed, 0)

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column a training row must have."""
        user = () if self.user_column is None else (self.user_column,)
        return (*self.text_columns, self.label_column, *user)

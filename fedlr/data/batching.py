"""From text to padded batches: tokens stored flat, units by index, batches by length.

Clipping is per unit, so neither the order of rows inside a logical batch nor
the way it is cut into physical batches changes the result; sorting by length
only saves padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedlr import checks
from fedlr.data.dataset import Rows, TextDataset
from fedlr.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Integers = npt.NDArray[np.int64]

_ROWS_PER_CALL = 4096


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return ``tensor`` on ``device``; to a GPU without waiting for what that still computes.

    Such a copy starts from page-locked memory, which torch keeps until the copy is done.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True, eq=False)
class Batch:
    """N rows, padded on the right to the longest of them (T tokens).

    Attributes:
        input_ids: Token ids, shape (N, T), int64; N = 0 gives T = 1.
        attention_mask: 1 on tokens and 0 on padding, shape (N, T), int64.
        token_type_ids: 0 on the first and 1 on the second text of a pair,
            shape (N, T), int64; None where the tokenizer makes only zeros.
        labels: Class indices, shape (N,), int64.
        unit_index: Unit of each row within the logical batch, shape (N,),
            int64; rows with one index are clipped as one unit.
        hidden: Cached hidden states of a frozen prefix, shape (N, T, width),
            float32, zeros on padding; None where nothing is cached.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor | None
    labels: Tensor
    unit_index: Tensor
    hidden: Tensor | None = None

    def __len__(self) -> int:
        """N, the number of rows."""
        return int(self.labels.shape[0])

    def to(self, device: torch.device) -> Batch:
        """Return the batch with every tensor on ``device``; itself where it is there already."""
        if self.labels.device == device:
            return self
        kinds, hidden = self.token_type_ids, self.hidden
        return Batch(
            input_ids=moved(self.input_ids, device),
            attention_mask=moved(self.attention_mask, device),
            token_type_ids=None if kinds is None else moved(kinds, device),
            labels=moved(self.labels, device),
            unit_index=moved(self.unit_index, device),
            hidden=None if hidden is None else moved(hidden, device),
        )

    def inputs(self, rows: Tensor | None = None) -> dict[str, Tensor]:
        """Return the encoder's keyword arguments for all rows, or for positions (K,) int64."""
        found = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if self.token_type_ids is not None:
            found["token_type_ids"] = self.token_type_ids
        if rows is None:
            return found
        return {name: value[rows] for name, value in found.items()}


@dataclass(frozen=True, eq=False)
class TokenisedDataset:
    """The tokens of N rows in one flat array, shared by all clients.

    Attributes:
        tokens: All token ids, row after row, shape (total,), int32.
        offsets: Row i is ``tokens[offsets[i]:offsets[i + 1]]``, shape (N + 1,),
            int64.
        token_type_ids: As ``tokens``, int8; None where all are zero.
        labels: Class indices, shape (N,), int64.
        pad_token_id: Id that fills a batch.
        hidden: Cached hidden states of a frozen prefix, one row a token, shape
            (total, width), float32; None where nothing is cached.
    """

    tokens: npt.NDArray[np.int32]
    offsets: Integers
    token_type_ids: npt.NDArray[np.int8] | None
    labels: Integers
    pad_token_id: int
    hidden: Tensor | None = None

    def __len__(self) -> int:
        """N, the number of rows."""
        return len(self.labels)

    @property
    def lengths(self) -> Integers:
        """Tokens of each row, special tokens included, shape (N,), int64, ≥ 1."""
        return np.diff(self.offsets)

    def batch(self, rows: Rows, unit_index: Integers | None = None) -> Batch:
        """Gather and pad ``rows``.

        Args:
            rows: Row indices, shape (n,), any order, repeats allowed, n = 0 too.
            unit_index: Unit of each of them, shape (n,), int64, ≥ 0; None: each
                row is a unit of its own, 0 … n - 1.

        Raises:
            ValueError: A row is outside [0, N), or the shapes differ.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and not (rows.min() >= 0 and rows.max() < len(self)):
            raise ValueError(f"rows reach from {rows.min()} to {rows.max()}; N = {len(self)}")
        units = np.arange(len(rows)) if unit_index is None else np.asarray(unit_index)
        checks.same_shape("unit_index", units.shape, rows.shape)
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        steps = np.arange(int(lengths.max(initial=1)))
        mask = steps < lengths[:, None]  # n x T
        positions = np.where(mask, starts[:, None] + steps, 0)

        def gather(flat: npt.NDArray[np.integer], fill: int) -> Tensor:
            return torch.from_numpy(np.where(mask, flat[positions], fill).astype(np.int64))

        kinds = self.token_type_ids
        return Batch(
            input_ids=gather(self.tokens, self.pad_token_id),
            attention_mask=torch.from_numpy(mask.astype(np.int64)),
            token_type_ids=None if kinds is None else gather(kinds, 0),
            labels=torch.from_numpy(self.labels[rows]),
            unit_index=torch.from_numpy(units.astype(np.int64)),
            hidden=self._cached(positions, mask),
        )

    def _cached(self, positions: Integers, mask: npt.NDArray[np.bool_]) -> Tensor | None:
        if self.hidden is None:
            return None
        states = self.hidden[torch.from_numpy(positions)]
        return states.masked_fill_(~torch.from_numpy(mask).unsqueeze(-1), 0.0)


def tokenise(
    tokenizer: PreTrainedTokenizerBase, dataset: TextDataset, max_length: int
) -> TokenisedDataset:
    """Tokenise every row once.

    Args:
        tokenizer: Of the base model; it adds its special tokens. Where it has
            no padding token, the end-of-text token fills (it is masked).
        dataset: N rows, N = 0 allowed.
        max_length: Upper bound on tokens per row, special tokens included; of
            a pair the longer text is cut first.

    Raises:
        ConfigError: ``max_length`` leaves no room beside the special tokens.
        DataError: A row has no token at all, or the tokenizer has neither a
            padding nor an end-of-text token.
    """
    special = tokenizer.num_special_tokens_to_add(pair=dataset.pairs is not None)
    if max_length <= special:
        raise ConfigError(
            [
                f"model.max_length = {max_length} must be > {special}, the tokenizer's special "
                "tokens; raise it"
            ]
        )
    pad = tokenizer.pad_token_id
    pad = tokenizer.eos_token_id if pad is None else pad
    if pad is None:
        raise DataError(
            f"{tokenizer.name_or_path or 'the tokenizer'} has neither a padding nor an "
            "end-of-text token. Use a tokenizer that has one."
        )
    tokens: list[npt.NDArray[np.int32]] = [np.empty(0, np.int32)]
    kinds: list[npt.NDArray[np.int8]] = [np.empty(0, np.int8)]
    lengths: list[int] = []
    for start in range(0, len(dataset), _ROWS_PER_CALL):
        chunk = slice(start, start + _ROWS_PER_CALL)
        encoded = tokenizer(
            list(dataset.texts[chunk]),
            None if dataset.pairs is None else list(dataset.pairs[chunk]),
            truncation=True,
            max_length=max_length,
        )
        lengths += [len(row) for row in encoded["input_ids"]]
        tokens.append(np.fromiter(chain.from_iterable(encoded["input_ids"]), np.int32))
        kinds.append(np.fromiter(chain.from_iterable(encoded.get("token_type_ids", ())), np.int8))
    if 0 in lengths:
        raise DataError(f"row {lengths.index(0)} has no token. Remove empty texts.")
    flat_kinds = np.concatenate(kinds)
    return TokenisedDataset(
        tokens=np.concatenate(tokens),
        offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
        token_type_ids=flat_kinds if flat_kinds.any() else None,
        labels=dataset.labels,
        pad_token_id=int(pad),
    )


def physical_positions(lengths: Integers, size: int, tokens: int | None = None) -> list[Integers]:
    """Cut a logical batch into physical batches of rows of similar length.

    Args:
        lengths: Tokens of each row of the logical batch, shape (n,).
        size: Upper bound on rows per physical batch, ≥ 1.
        tokens: Upper bound on rows × longest row of a physical batch, padding
            included, ≥ 1; a longer row is a batch of its own. None has none.

    Returns:
        Positions 0 … n - 1, each once: longest rows first (a batch too big for the
        memory fails at once), ties in their order, every piece but the last as
        large as the bounds allow. Empty for n = 0.

    Example:
        >>> [piece.tolist() for piece in physical_positions(np.array([3, 9, 3]), 2)]
        [[1, 0], [2]]
        >>> [piece.tolist() for piece in physical_positions(np.array([3, 9, 3]), 2, 8)]
        [[1], [0, 2]]
    """
    checks.at_least("size", size, 1)
    if tokens is not None:
        checks.at_least("tokens", tokens, 1)
    order = np.argsort(-lengths, kind="stable")
    pieces, start = [], 0
    while start < len(order):
        longest = max(int(lengths[order[start]]), 1)
        count = size if tokens is None else min(size, max(tokens // longest, 1))
        pieces.append(order[start : start + count])
        start += count
    return pieces


def physical_batches(
    rows: Rows, lengths: Integers, size: int, tokens: int | None = None
) -> list[Rows]:
    """Cut ``rows`` into physical batches, see `physical_positions`.

    Args:
        rows: Row indices of a logical batch, shape (n,), n = 0 allowed.
        lengths: Tokens of every row of the data set, `TokenisedDataset.lengths`.
        size: Upper bound on rows per physical batch, ≥ 1.
        tokens: Upper bound on rows × longest row; None has none.

    Example:
        >>> lengths = np.array([5, 1, 4, 2])
        >>> [piece.tolist() for piece in physical_batches(np.array([1, 2, 3]), lengths, 2)]
        [[2, 3], [1]]
    """
    return [rows[piece] for piece in physical_positions(lengths[rows], size, tokens)]


@dataclass(frozen=True, eq=False)
class UnitIndex:
    """A client's rows by unit of privacy: what a Poisson draw of units needs.

    Attributes:
        rows: The client's rows, unit after unit, shape (n,), int64.
        offsets: Unit u has ``rows[offsets[u]:offsets[u + 1]]``, shape
            (count + 1,), int64.

    Example:
        >>> units = UnitIndex.of(("ann", "bob", "ann", "bob"), np.array([0, 1, 2]), "user")
        >>> units.count
        2
        >>> [array.tolist() for array in units.rows_of(np.array([1, 0]))]
        [[1, 0, 2], [0, 1, 1]]
    """

    rows: Rows
    offsets: Integers

    @classmethod
    def of(
        cls, users: Sequence[str] | None, rows: Rows, unit: Literal["example", "user"]
    ) -> UnitIndex:
        """Group a client's rows by unit.

        Args:
            users: User of every row of the data set; needed for ``user`` only.
            rows: The client's row indices, shape (n,), n = 0 allowed.
            unit: ``example``: unit u is ``rows[u]``. ``user``: units are the
                client's users in sorted order, their rows in the given order.

        Raises:
            DataError: ``unit`` is ``user`` and there are no users.
        """
        checks.one_of("unit", unit, ("example", "user"))
        rows = np.asarray(rows, dtype=np.int64)
        if unit == "example":
            return cls(rows, np.arange(len(rows) + 1))
        if users is None:
            raise DataError(
                "privacy.unit=user needs a user per row and the data have none. Set "
                "data.user_column, or use privacy.unit=example."
            )
        mine = [users[row] for row in rows.tolist()]
        number = {user: position for position, user in enumerate(sorted(set(mine)))}
        unit_of_row = np.array([number[user] for user in mine], dtype=np.int64)
        sizes = np.bincount(unit_of_row, minlength=len(number))
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        return cls(rows[np.argsort(unit_of_row, kind="stable")], offsets)

    @property
    def count(self) -> int:
        """Number of units of this client. Private: it must not shape a release."""
        return len(self.offsets) - 1

    def rows_of(self, units: Integers) -> tuple[Rows, Integers]:
        """Return the rows of the drawn units and the unit of each row.

        Args:
            units: Distinct unit numbers in [0, count), shape (k,), k = 0 allowed.

        Returns:
            (rows, unit_index), both of shape (n,), int64: all rows of
            ``units[0]``, then of ``units[1]``, …; ``unit_index`` is the
            position in ``units``, 0 … k - 1.

        Raises:
            ValueError: A unit is outside [0, count).
        """
        units = np.asarray(units, dtype=np.int64)
        if units.size and not (units.min() >= 0 and units.max() < self.count):
            raise ValueError(
                f"units reach from {units.min()} to {units.max()}; count = {self.count}"
            )
        starts = self.offsets[units]
        sizes = self.offsets[units + 1] - starts
        unit_index = np.repeat(np.arange(len(units)), sizes)
        within = np.arange(len(unit_index)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return self.rows[np.repeat(starts, sizes) + within], unit_index


def keep_at_most(
    rows: Rows, unit_index: Integers, limit: int, uniform: npt.NDArray[np.float64]
) -> tuple[Rows, Integers]:
    """Keep at most ``limit`` rows of each drawn unit, chosen uniformly without replacement.

    Floyd's algorithm (Bentley and Floyd 1987, doi 10.1145/30401.315746), all units at once.

    Args:
        rows: Rows of k drawn units, shape (n,), int64.
        unit_index: Unit of each of them, 0 … k - 1, ascending, shape (n,), int64:
            both as `UnitIndex.rows_of` returns them.
        limit: m ≥ 1.
        uniform: Independent uniforms in [0, 1), shape (k, m), float64; a unit of at
            most m rows does not read its own.

    Returns:
        (rows, unit_index) of what is kept, in the given order: min(m, size) rows of
        every unit, each subset of that many equally likely.

    Guarantees:
        What is kept of unit u depends on the rows of unit u and on ``uniform[u]``
        alone, so that other units cannot notice it.

    Example:
        >>> keep_at_most(np.array([7, 8, 9, 4]), np.array([0, 0, 0, 1]), 1, np.array([[0.5], [0]]))
        (array([8, 4]), array([0, 1]))
    """
    checks.at_least("limit", limit, 1)
    checks.same_shape("uniform", uniform.shape[1:], (limit,))
    sizes = np.bincount(unit_index, minlength=len(uniform))
    starts = np.cumsum(sizes) - sizes
    large = sizes > limit
    chosen = np.empty((int(large.sum()), limit), dtype=np.int64)  # positions within a unit
    for place in range(limit):
        last = sizes[large] - limit + place  # positions 0 … last are open to this draw
        drawn = (uniform[large, place] * (last + 1)).astype(np.int64)
        taken = (chosen[:, :place] == drawn[:, None]).any(axis=1)
        chosen[:, place] = np.where(taken, last, drawn)
    keep = ~large[unit_index]
    keep[starts[large][:, None] + chosen] = True
    return rows[keep], unit_index[keep]

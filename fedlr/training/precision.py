"""A frozen base in fewer bits, and what keeps one row's gradient blind to other rows then.

Clipping bounds what a unit changes by C only while no other unit's gradient notices it.
Matrix products choose their order of summation by the shape of the whole batch. In
float32 that moves a gradient by some 1e-6 of its norm; in bfloat16 by some 1e-2, which
over the units of a batch adds up to more than C. So below float32 the shape in which a row
is computed is made a function of that row and of public settings alone: always ``size`` + 1
rows, of which the last is padding (encoders leave the mask out, and take another kernel,
where a whole batch has none), and as many tokens as the smallest power of two that holds
the row (at most ``longest``). In one shape no row's bits depend on its place or on its
companions; `check_same_bits` looks whether that is so on this machine, and ``fedlr doctor`` bounds
what a unit changes through the whole step by C(1 + 1e-5), as in float32.

``nf4`` stores linear layers in 4 bits and computes in float32 (`fedlr.adapters.quantised`):
the weights are other constants, and rounding is that of a float32 base, so rows need no
shape of their own.
"""

from __future__ import annotations

import copy
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlr import checks
from fedlr.adapters.quantised import dequantise, quantise
from fedlr.data.batching import Batch, Integers
from fedlr.errors import ModelError
from fedlr.privacy.gradients import LossOfRows, UnitGradients

Precision = Literal["float32", "bfloat16", "nf4"]

_SHORTEST = 8
_SAME = 1e-4  # float32 rounding with room, relative to the largest hidden state
_CANNOT_RUN = (RuntimeError, ValueError, TypeError, IndexError, AttributeError)


def cast_base(encoder: nn.Module, precision: str) -> None:
    """Round the weights of a base to ``precision``, in place; buffers stay as they are.

    Rotary frequencies are buffers, and their angles need float32. ``nf4`` rounds linear
    layers only, see `fedlr.adapters.quantised.quantise`.

    Args:
        encoder: Frozen, float32, in evaluation mode; for ``nf4`` on the CPU.
        precision: One of `Precision`.

    Raises:
        ConfigError: ``nf4``, and bitsandbytes is missing or there is no linear layer.
        ModelError: ``nf4``, and the model's own code reads a weight past its layer.
    """
    checks.one_of("precision", precision, get_args(Precision))
    if precision == "nf4":
        quantise(encoder)
        _check_computes_with_stored(encoder)
        return
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
    for parameter in encoder.parameters():
        parameter.data = parameter.data.to(dtype)


def _check_computes_with_stored(encoder: nn.Module) -> None:
    """Refuse an encoder that is not what it is with its 4-bit weights written out.

    Code that takes ``layer.weight`` itself would read packed bits as numbers.
    """
    dense = copy.deepcopy(encoder)
    dequantise(dense)
    try:
        expected = _some_states(dense)
    except _CANNOT_RUN:
        return  # not on ids and a mask alone: `fedlr.training.base.check_rows_alone` says so
    try:
        apart = float((_some_states(encoder) - expected).abs().max())
    except _CANNOT_RUN:
        apart = float("inf")
    if not apart <= _SAME * float(expected.abs().max()):
        raise ModelError(
            "model.precision = nf4: this model's own code reads the weights of linear layers, "
            "which cannot be stored in 4 bits then; set model.precision=float32 or bfloat16"
        )


def _some_states(encoder: Any) -> Tensor:
    vocabulary = int(encoder.get_input_embeddings().weight.shape[0])
    ids = (torch.arange(_SHORTEST).reshape(1, -1) * 7 + 11) % vocabulary
    with torch.no_grad():
        found: Tensor = encoder(
            input_ids=ids, attention_mask=torch.ones_like(ids)
        ).last_hidden_state
    return found


def notices(precision: str, own_shapes: int | None) -> tuple[str, ...]:
    """Return the sentences that a reader of a result needs on its base.

    Args:
        precision: One of `Precision`.
        own_shapes: See `fedlr.training.local.LocalSettings`.
    """
    if precision == "nf4":
        return (
            "the linear layers of the frozen base are stored in 4 bits (NF4 in blocks of 64, with "
            "quantised scales) and computed in float32; a merged export holds these rounded "
            "weights, written out in float32, with the update added",
        )
    if own_shapes is None:
        return ()
    return (
        f"the frozen base is rounded to {precision}; the clip bound rests on each row "
        "being computed in a shape of its own, in which no other row changes its bits: checked on "
        "this machine before the first round",
    )


def own_width(lengths: Integers, longest: int) -> Integers:
    """Return the tokens that each row is padded to: a function of its own length.

    Args:
        lengths: Tokens of each row, shape (n,), ≤ ``longest``.
        longest: Public bound, ``model.max_length``.

    Example:
        >>> own_width(np.array([3, 8, 9, 40]), 48).tolist()
        [8, 8, 16, 48]
    """
    checks.at_least("longest", longest, int(lengths.max(initial=1)))
    widths = 2 ** np.ceil(np.log2(np.maximum(lengths, _SHORTEST))).astype(np.int64)
    return np.minimum(widths, longest)


def own_shape_positions(lengths: Integers, size: int, longest: int) -> list[Integers]:
    """Cut a logical batch into pieces of rows of one `own_width`, ≤ ``size`` rows each.

    As `fedlr.data.batching.physical_positions`, longest first; `fill` makes each piece a
    batch of ``size`` + 1 rows.

    Example:
        >>> [p.tolist() for p in own_shape_positions(np.array([3, 9, 5, 4]), 2, 16)]
        [[1], [0, 2], [3]]
    """
    checks.at_least("size", size, 1)
    widths = own_width(lengths, longest)
    pieces: list[Integers] = []
    for width in np.unique(widths)[::-1]:
        mine = np.flatnonzero(widths == width)
        pieces += [mine[start : start + size] for start in range(0, len(mine), size)]
    return pieces


def fill(batch: Batch, size: int, longest: int, pad: int) -> Batch:
    """Return the batch with ``size`` + 1 rows of `own_width` tokens.

    Args:
        batch: 1 ≤ N ≤ ``size`` rows of one `own_width`.
        size: Most rows of any batch.
        longest: As `own_width`.
        pad: Token id that fills.

    Returns:
        The N rows first; the others are one padding token each, of label 0 and unit
        −1, whatever the rows are: they hold nothing private.
    """
    rows, tokens = batch.attention_mask.shape
    wide = int(own_width(batch.attention_mask.sum(1).cpu().numpy(), longest).max()) - tokens
    more = size + 1 - rows

    def grown(array: Tensor, value: int) -> Tensor:
        return functional.pad(array, (0, wide, 0, more), value=value)

    kinds, hidden = batch.token_type_ids, batch.hidden
    mask = grown(batch.attention_mask, 0)
    mask[rows:, 0] = 1
    return Batch(
        input_ids=grown(batch.input_ids, pad),
        attention_mask=mask,
        token_type_ids=None if kinds is None else grown(kinds, 0),
        labels=functional.pad(batch.labels, (0, more)),
        unit_index=functional.pad(batch.unit_index, (0, more), value=-1),
        hidden=None if hidden is None else functional.pad(hidden, (0, 0, 0, wide, 0, more)),
    )


class OwnShapeGradients:
    """Gradients of the first rows of batches that `fill` made; those of the rest are dropped.

    Args:
        inner: What computes them.
        size: Most rows of any batch, as given to `fill`.
    """

    def __init__(self, inner: UnitGradients, size: int) -> None:
        self._inner, self._rows = inner, size + 1

    def __call__(self, losses: LossOfRows, unit_index: Tensor, units: int) -> Any:
        """See `fedlr.privacy.gradients.UnitGradients`; every pass has ``size`` + 1 rows."""
        more = self._rows - unit_index.shape[0]
        if unit_index.shape[0] == 0:
            return self._inner(losses, unit_index, units)
        filled = functional.pad(unit_index, (0, more), value=units)
        found = self._inner(self._whole(losses), filled, units + 1)
        return {key: value[:units] for key, value in found.items()}

    def _whole(self, losses: LossOfRows) -> LossOfRows:
        """Compute any rows in a pass of whole shape: the last row, padding, fills it up."""

        def computed(rows: Tensor) -> Tensor:
            padding = rows.new_full((self._rows - rows.shape[0],), self._rows - 1)
            return losses(torch.cat([rows, padding]))[: rows.shape[0]]

        return computed


def check_same_bits(encoder: nn.Module, vocabulary: int, size: int, longest: int) -> None:
    """Refuse an encoder whose result for a row depends on companions or place in one shape.

    Compares, in every shape that a pass can have, one made-up row, first among whole rows
    and last among short ones, by the hidden states and by the gradient at the token
    embeddings.

    Args:
        encoder: On its device, in the dtype that trains; is left as it was.
        vocabulary: Number of token ids.
        size: Rows of a physical batch.
        longest: Tokens an example is cut at.

    Raises:
        ModelError: A single bit differs.
    """
    for tokens in np.unique(own_width(np.arange(1, longest + 1), longest)).tolist():
        _check_width(encoder, vocabulary, size, tokens)


def _check_width(encoder: nn.Module, vocabulary: int, size: int, tokens: int) -> None:
    ids = (torch.arange((2 * size + 1) * tokens).reshape(-1, tokens) * 7 + 11) % vocabulary
    row, first, second, last = ids[:1], ids[1:size], ids[size + 1 : 2 * size], ids[-1:]
    whole = torch.ones(size + 1, tokens, dtype=torch.int64)
    whole[-1, 1:] = 0
    short = whole.clone()
    short[: size - 1, tokens // 2 :] = 0
    left = _states_and_gradient(encoder, torch.cat([row, first, last]), whole)
    right = _states_and_gradient(encoder, torch.cat([second, row, last]), short)
    if not all(torch.equal(x[0], y[-2]) for x, y in zip(left, right, strict=True)):
        device = next(encoder.parameters()).device
        dtype = str(next(encoder.parameters()).dtype).removeprefix("torch.")
        raise ModelError(
            f"model.precision = {dtype}: on {device.type} this model computes a row of {tokens} "
            "tokens in other bits beside other rows, which no clipping bounds; set "
            "model.precision=float32"
        )


def _states_and_gradient(encoder: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    device = next(encoder.parameters()).device
    embedded: list[Tensor] = []

    def start(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    table: nn.Module = encoder.get_input_embeddings()  # type: ignore[operator]
    handle = table.register_forward_hook(start)
    try:
        with torch.enable_grad():
            found = encoder(input_ids=ids.to(device), attention_mask=mask.to(device))
            states = found.last_hidden_state
            loss = states[mask.bool().to(device)].float().square().sum()
            (gradient,) = torch.autograd.grad(loss, embedded[:1])
    finally:
        handle.remove()
    return states.detach(), gradient

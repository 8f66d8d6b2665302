"""Compute once what is frozen: the layers below the first adapter.

Where adapters sit in the upper layers only, the lower layers map a row to the same
hidden states in every round. They are computed once, kept at the site beside the tokens (in
memory, or memory-mapped in `fedlr.data.store`), and replayed. It changes no result and
no guarantee: each row's hidden states are a function of that row alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlr.adapters.quantised import is_quantised
from fedlr.data.batching import Batch, Integers, TokenisedDataset, physical_batches
from fedlr.data.store import Store, states_key
from fedlr.lowrank.factors import AdapterSite

from .precision import fill, own_shape_positions

_PIECE_BYTES = 1 << 26
"""Hidden states that are in memory at a time on their way to the disk: 67 MB."""


class _Captured(Exception):
    """Ends a forward pass once the prefix is known."""


class _NotReplayable(Exception):
    """The prefix cannot be cut off from the encoder."""


def _replay(cached: Tensor | None, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    """Stand in for a skipped layer's forward: return the cached states, or the input."""
    return hidden_states if cached is None else cached


@dataclass(frozen=True)
class FrozenPrefix:
    """The layers of an encoder that lie below every adapter.

    Attributes:
        blocks: The encoder's list of transformer layers.
        depth: Number of frozen layers at its start, ≥ 1.
    """

    blocks: nn.ModuleList
    depth: int

    @contextmanager
    def replayed(self, hidden: Tensor) -> Iterator[None]:
        """Within the context the encoder starts from ``hidden``, shape (N, T, width)."""
        skipped = list(self.blocks[: self.depth])
        hidden = hidden.to(_computing_dtype(skipped[0]))  # kept in float32, exactly
        for index, block in enumerate(skipped):
            # The layer itself stays: some encoders read its attributes (ModernBERT).
            vars(block)["forward"] = partial(_replay, hidden if index == 0 else None)
        try:
            yield
        finally:
            for block in skipped:
                del vars(block)["forward"]


def find_prefix(encoder: nn.Module, sites: Sequence[AdapterSite]) -> FrozenPrefix | None:
    """Return the frozen prefix of an adapted encoder, or None where there is none.

    There is none when an adapter sits in the first layer, when layers are shared
    (ALBERT), or when the adapted layers are not in one list of layers.
    """
    for name, blocks in encoder.named_modules():
        if not isinstance(blocks, nn.ModuleList):
            continue
        path = re.escape(name.removeprefix("base_model.model."))
        found = [re.match(rf"{path}\.(\d+)\.", site.name) for site in sites]
        depth = min((int(match.group(1)) for match in found if match), default=0)
        if depth > 0 and all(found):
            return FrozenPrefix(blocks, depth)
    return None


def cache_prefix(
    encoder: nn.Module,
    prefix: FrozenPrefix,
    data: TokenisedDataset,
    size: int,
    megabytes: int,
    own_shapes: int | None = None,
) -> TokenisedDataset:
    """Return ``data`` with the prefix's hidden states in memory, see `PrefixCache`."""
    cache = PrefixCache(size, None, megabytes, own_shapes=own_shapes)
    return cache.fill(encoder, prefix, data)


@dataclass(frozen=True)
class PrefixCache:
    """How the hidden states of a frozen prefix are computed and kept.

    Attributes:
        size: Most rows of one forward pass.
        tokens: Most tokens of one forward pass, padding included; None has no bound.
        megabytes: Upper bound on the states of one data set, in memory or on the disk;
            0 keeps none.
        base_sha256: Digest of the base model's weights.
        store: Where they are kept and memory-mapped; None keeps them in memory.
        own_shapes: See `fedlr.training.local.LocalSettings`: a row's states are then a
            function of that row alone, bit for bit.
        say: Told what is computed and kept, or why nothing is.
    """

    size: int
    tokens: int | None
    megabytes: int
    base_sha256: str = ""
    store: Store | None = None
    own_shapes: int | None = None
    say: Callable[[str], None] = lambda _: None

    def fill(
        self, encoder: nn.Module, prefix: FrozenPrefix, data: TokenisedDataset
    ) -> TokenisedDataset:
        """Return ``data`` with the prefix's hidden states, shape (tokens, width), float32, CPU.

        Args:
            encoder: The adapted encoder, in evaluation mode.
            prefix: Its frozen prefix.
            data: The rows.

        Returns:
            ``data`` unchanged where the states would be larger than ``megabytes``, the
            layers do not compute in float32 without ``own_shapes``, a layer returns something other
            than a tensor, or a replay does not reproduce the encoder (a prefix layer that
            is called again higher up).

        Guarantees:
            The same bits from memory and from the disk. Mapped states are replayed
            against the encoder before they are used, as computed ones are.
        """
        width = int(getattr(encoder.config, "hidden_size"))  # noqa: B009 (a Module attribute)
        size = len(data.tokens) * width * 4
        if len(data) == 0 or self.megabytes == 0:
            return data
        if self.own_shapes is None and _kinds(prefix) - {"torch.float32", "nf4"}:
            # In fewer bits a row's states depend on the shape of its batch, so on other rows.
            self.say("the frozen layers are computed in every pass: they are not float32")
            return data
        if size > self.megabytes * 1_000_000:
            self.say(
                f"the {prefix.depth} frozen layers are computed in every pass: "
                f"kernels.prefix_cache_mb = {self.megabytes} is less than the {-(-size // 10**6)} "
                "MB of their output"
            )
            return data
        try:
            kept = self._on_disk(encoder, prefix, data, width)
            if kept is None:
                self._say_computing(prefix)
                kept = torch.cat(list(self._pieces(encoder, prefix, data)))
        except _NotReplayable:
            return data
        return replace(data, hidden=kept)

    def _on_disk(
        self, encoder: nn.Module, prefix: FrozenPrefix, data: TokenisedDataset, width: int
    ) -> Tensor | None:
        """Map the states, written first where they are missing; None where that fails."""
        if self.store is None:
            return None
        device = next(encoder.parameters()).device
        shape = self.own_shapes and (self.own_shapes, self.size)
        settings: Any = encoder.config
        kinds, packages = sorted(_kinds(prefix)), ["transformers"]
        packages += ["bitsandbytes"] if "nf4" in kinds else []
        versions = (torch.__version__, *map(version, packages))
        made = f"{device.type} {kinds} {shape} {versions}"
        made += settings.to_json_string()  # what the weights alone do not tell
        key = states_key(data, self.base_sha256, prefix.depth, made)
        rows = len(data.tokens)
        found = self.store.read_states(key, rows, width)
        if found is not None:
            _, batch = next(self._batches(replace(data, hidden=found), np.arange(len(data))))
            batch = batch.to(device)
            if batch.hidden is not None and _reproduces(encoder, prefix, batch, batch.hidden):
                return found
            self.say("the frozen layers that were kept are not those of this model")
        self._say_computing(prefix)
        pieces = self._pieces(encoder, prefix, data)
        written = self.store.write_states(key, rows * width * 4, pieces)
        return self.store.read_states(key, rows, width) if written else None

    def _say_computing(self, prefix: FrozenPrefix) -> None:
        self.say(f"computing the {prefix.depth} frozen layers below the adapters once")

    def _pieces(
        self, encoder: nn.Module, prefix: FrozenPrefix, data: TokenisedDataset
    ) -> Iterator[Tensor]:
        """Yield the states of consecutive rows, a piece of at most `_PIECE_BYTES` at a time."""
        width = int(getattr(encoder.config, "hidden_size"))  # noqa: B009 (a Module attribute)
        device = next(encoder.parameters()).device
        checked = False
        for rows in _runs(data, _PIECE_BYTES // (4 * width)):
            first, last = data.offsets[[rows[0], rows[-1] + 1]].tolist()
            piece = torch.empty(last - first, width)
            for part, batch in self._batches(data, rows):
                batch = batch.to(device)
                hidden = _hidden_after(encoder, prefix, batch)
                if hidden is None:
                    raise _NotReplayable
                if not checked and not _reproduces(encoder, prefix, batch, hidden.to(device)):
                    raise _NotReplayable
                checked = True
                for position, row in enumerate(part.tolist()):
                    start, end = (data.offsets[[row, row + 1]] - first).tolist()
                    piece[start:end] = hidden[position, : end - start]
            yield piece

    def _batches(self, data: TokenisedDataset, rows: Integers) -> Iterator[tuple[Integers, Batch]]:
        """Yield the rows of each pass and their batch, which may have more rows behind."""
        if self.own_shapes is None:
            for part in physical_batches(rows, data.lengths, self.size, self.tokens):
                yield part, data.batch(part)
            return
        for piece in own_shape_positions(data.lengths[rows], self.size, self.own_shapes):
            batch = data.batch(rows[piece])
            yield rows[piece], fill(batch, self.size, self.own_shapes, data.pad_token_id)


def _kinds(prefix: FrozenPrefix) -> set[str]:
    """Return how the prefix' weights are stored: names of dtypes, and ``nf4`` for 4 bits."""
    return {
        "nf4" if is_quantised(layer) and name == "weight" else str(value.dtype)
        for block in prefix.blocks[: prefix.depth]
        for layer in block.modules()
        for name, value in layer.named_parameters(recurse=False)
    }


def _computing_dtype(block: nn.Module) -> torch.dtype:
    return next(value.dtype for value in block.parameters() if value.is_floating_point())


def _runs(data: TokenisedDataset, tokens: int) -> Iterator[Integers]:
    """Cut all rows into consecutive runs of at most ``tokens`` tokens; a longer row is alone."""
    start = 0
    while start < len(data):
        limit = data.offsets[start] + tokens
        end = max(int(np.searchsorted(data.offsets, limit, side="right")) - 1, start + 1)
        yield np.arange(start, end)
        start = end


def _reproduces(encoder: nn.Module, prefix: FrozenPrefix, batch: Batch, hidden: Tensor) -> bool:
    """Whether the encoder that starts from ``hidden`` computes what the whole one does."""
    tokens = batch.attention_mask.bool() & (batch.unit_index >= 0).unsqueeze(1)
    with torch.no_grad():
        whole = encoder(**batch.inputs()).last_hidden_state[tokens]
        with prefix.replayed(hidden):
            replayed = encoder(**batch.inputs()).last_hidden_state[tokens]
    return torch.allclose(whole, replayed, rtol=1e-4, atol=1e-4)


def _hidden_after(encoder: nn.Module, prefix: FrozenPrefix, batch: Batch) -> Tensor | None:
    found: list[Any] = []

    def capture(_module: nn.Module, _inputs: Any, output: Any) -> None:
        found.append(output)
        raise _Captured

    handle = prefix.blocks[prefix.depth - 1].register_forward_hook(capture)
    try:
        with torch.no_grad():
            encoder(**batch.inputs())
    except _Captured:
        pass
    finally:
        handle.remove()
    return found[0].cpu() if found and isinstance(found[0], Tensor) else None

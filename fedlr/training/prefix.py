"""Compute once what is frozen: the layers below the first adapter.

Where adapters sit in the upper layers only, the lower layers map a row to the same
hidden states in every round. They are computed once, kept at the site beside the
tokens, and replayed. It changes no result and no guarantee: each row's hidden
states are a function of that row alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlr.data.batching import Batch, TokenisedDataset, physical_batches
from fedlr.lowrank.factors import AdapterSite


class _Captured(Exception):
    """Ends a forward pass once the prefix is known."""


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
    encoder: nn.Module, prefix: FrozenPrefix, data: TokenisedDataset, size: int, megabytes: int
) -> TokenisedDataset:
    """Return ``data`` with the prefix's hidden states, shape (tokens, width), float32, CPU.

    Args:
        encoder: The adapted encoder, in evaluation mode.
        prefix: Its frozen prefix.
        data: The rows.
        size: Rows of one forward pass.
        megabytes: Upper bound on the cache; where it would be larger, a layer
            returns something other than a tensor, or a replay does not reproduce
            the encoder (a prefix layer that is called again higher up), ``data``
            comes back unchanged.
    """
    width = int(getattr(encoder.config, "hidden_size"))  # noqa: B009 (a Module attribute)
    if len(data.tokens) * width * 4 > megabytes * 1_000_000 or len(data) == 0:
        return data
    cache = torch.empty(len(data.tokens), width)
    device = next(encoder.parameters()).device
    checked = False
    for rows in physical_batches(np.arange(len(data)), data.lengths, size):
        batch = data.batch(rows).to(device)
        hidden = _hidden_after(encoder, prefix, batch)
        if hidden is None:
            return data
        if not checked and not _reproduces(encoder, prefix, batch, hidden.to(device)):
            return data
        checked = True
        for position, row in enumerate(rows.tolist()):
            start, end = int(data.offsets[row]), int(data.offsets[row + 1])
            cache[start:end] = hidden[position, : end - start]
    return replace(data, hidden=cache)


def _reproduces(encoder: nn.Module, prefix: FrozenPrefix, batch: Batch, hidden: Tensor) -> bool:
    """Whether the encoder that starts from ``hidden`` computes what the whole one does."""
    tokens = batch.attention_mask.bool()
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

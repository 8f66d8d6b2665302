"""What runs in one process share: each costly value is made once for everything it depends on.

A key names all that decides the value, so that a run computes the same bits whether its
values were made for it or for the run before. Nothing is shared unless a caller asks.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import nn

from fedlr.config import RunConfig
from fedlr.data.batching import TokenisedDataset
from fedlr.data.dataset import LoadedData
from fedlr.data.spec import SourceSpec
from fedlr.data.store import Store, tokenise_once
from fedlr.errors import ModelError
from fedlr.training.base import (
    BaseModel,
    check_capacity,
    check_rows_alone,
    load_base,
    weights_digest,
)
from fedlr.training.prefix import FrozenPrefix, PrefixCache

T = TypeVar("T")


class Reuse:
    """Keeps the last values of every kind; not for two threads at once.

    Args:
        on: Whether anything is kept; False makes every value anew.
    """

    def __init__(self, on: bool = True) -> None:
        self._on = on
        self._kept: dict[str, OrderedDict[Hashable, object]] = {}

    def get(self, kind: str, key: Hashable, make: Callable[[], T], keep: int = 1) -> T:
        """Return the value of ``key``, made where it is not there.

        Args:
            kind: What it is, such as ``tokens``; kinds do not displace one another.
            key: Everything that decides the value.
            make: Makes it; what it raises is raised, and nothing is kept.
            keep: Values of this kind that are kept at most, ≥ 1. The one used longest
                ago is let go *before* a new one is made: so much memory and no more.
        """
        if not self._on:
            return make()
        kept = self._kept.setdefault(kind, OrderedDict())
        if key not in kept:
            while len(kept) >= keep:
                kept.popitem(last=False)
            kept[key] = make()
        kept.move_to_end(key)
        return cast(T, kept[key])

    def forget(self, *kinds: str) -> None:
        """Let go of everything of some kinds: what a file may have changed in the meantime."""
        for kind in kinds:
            self._kept.pop(kind, None)

    def base(self, key: Hashable, make: Callable[[], BaseModel]) -> BaseModel:
        """Return a base model whose layers are the caller's own and whose weights are shared.

        Adapters replace layers in place; weights are frozen. That they are is checked
        whenever they are handed out again.

        Args:
            key: See `get`.
            make: Loads it, in evaluation mode, frozen, on its device.

        Raises:
            ModelError: A run has changed the weights.
        """
        if not self._on:
            return make()
        base, digest = self.get("base", key, lambda: _with_digest(make()))
        if weights_digest(base.encoder) != digest:
            raise ModelError(
                f"the frozen weights of {base.name!r} were changed by a run, and cannot be shared "
                "with the next; start each run in a process of its own, and report this"
            )
        return replace(base, encoder=_own_layers(base.encoder))


NOTHING_SHARED = Reuse(on=False)
"""Makes every value anew: for a run that is alone in its process."""


def _with_digest(base: BaseModel) -> tuple[BaseModel, str]:
    return base, weights_digest(base.encoder)


def _own_layers(encoder: nn.Module) -> nn.Module:
    """Return a copy of the modules of ``encoder`` that holds the same parameters and buffers."""
    tensors: list[Any] = [*encoder.parameters(), *encoder.buffers()]
    states = [getattr(tensor, "quant_state", None) for tensor in tensors]  # of 4-bit weights
    shared = {id(value): value for value in (*tensors, *states) if value is not None}
    return copy.deepcopy(encoder, shared)


def base_key(config: RunConfig, device: torch.device) -> tuple[Hashable, ...]:
    """Return all that decides the frozen base model, and that it holds the rows."""
    model = config.model
    drawn = config.seed if model.random_weights else None
    named = (model.name, model.revision, model.sha256)
    return (*named, drawn, model.precision, model.max_length, str(device))


def rows_key(config: RunConfig, spec: SourceSpec) -> tuple[Hashable, ...]:
    """Return all that decides the tokens of the run's rows."""
    model = config.model
    return (spec, model.name, model.revision, model.max_length, config.data.cache)


def resident_base(
    config: RunConfig, device: torch.device, reuse: Reuse, say: Callable[[str], None]
) -> BaseModel:
    """Return the base model of ``config`` on ``device``, able to hold its rows.

    Raises:
        ConfigError, ModelError: As `load_base`, `check_capacity`, `check_rows_alone`.
    """
    model = config.model

    def load() -> BaseModel:
        say(f"loading the model {model.name}")
        drawn = config.seed if model.random_weights else None
        base = load_base(model.name, model.revision, model.sha256, drawn, model.precision)
        base.encoder.to(device)
        check_capacity(base, model.max_length)
        check_rows_alone(base, model.max_length)
        return base

    return reuse.base(base_key(config, device), load)


Splits = tuple[TokenisedDataset, TokenisedDataset]
"""Training and validation rows."""


def resident_tokens(
    base: BaseModel,
    data: LoadedData,
    longest: int,
    store: Store | None,
    say: Callable[[str], None],
) -> Splits:
    """Return the tokens of both parts of ``data``, cut at ``longest``."""
    say("tokenising" if store is None else f"looking for tokens in {store.folder}")
    parts = (data.train, data.validation)
    train, validation = (tokenise_once(base.tokenizer, p, longest, store) for p in parts)
    return train, validation


def with_states(
    parts: Splits,
    cache: PrefixCache,
    frozen: tuple[nn.Module, FrozenPrefix],
    evaluate: bool,
    reuse: Reuse,
    key: Hashable,
) -> Splits:
    """Return ``parts`` with the hidden states of the frozen prefix, see `PrefixCache.fill`.

    Args:
        parts: The rows.
        cache: How states are computed and kept.
        frozen: Encoder and prefix.
        evaluate: Whether validation will be asked for.
        reuse: Where states are shared.
        key: What decides rows and base model; the rest is added here: the last bits
            depend on the passes and on the threads.
    """
    encoder, prefix = frozen
    passes = (cache.size, cache.tokens, cache.megabytes, cache.own_shapes)
    whole = (key, prefix.depth, passes, torch.get_num_threads())
    train, validation = parts
    train = reuse.get("training states", whole, lambda: cache.fill(encoder, prefix, parts[0]))
    if evaluate:
        made = reuse.get("validation states", whole, lambda: cache.fill(encoder, prefix, parts[1]))
        validation = made
    return train, validation

"""What a subspace policy reads off the model before its first round.

Base weights, layer inputs on public text, gradients on public labelled text. Whoever calls
this gives public rows: what comes out goes into A, which leaves for everyone un-noised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlr.adapters.residual import original_weight
from fedlr.adapters.surgery import AdaptedModel
from fedlr.data.batching import Batch, TokenisedDataset, physical_batches
from fedlr.lowrank.subspace import Moments
from fedlr.methods.method import MODEL_ROLES, Parts, Role

from .classifier import Classifier
from .memory import DEFAULT_ROWS


@dataclass(frozen=True)
class PublicModel:
    """A model as it was before its first round.

    Attributes:
        classifier: Adapted encoder with head.
        adapted: Its movable arrays.
        start: Copies of these arrays at the start, where B is 0.
        device: Where the model lives.

    Every function here writes ``start`` into the model, and leaves it so: whoever trains or
    evaluates writes all arrays first.
    """

    classifier: Classifier
    adapted: AdaptedModel
    start: Parts
    device: torch.device

    @classmethod
    def of(cls, classifier: Classifier, adapted: AdaptedModel, device: torch.device) -> PublicModel:
        """Take the arrays of ``adapted`` as they are for those of the start."""
        return cls(classifier, adapted, adapted.read(MODEL_ROLES), device)


def base_weights(adapted: AdaptedModel) -> dict[str, Tensor]:
    """Return W of every site by its name, shape (m, n), as stored, or float32 out of 4 bits.

    W alone: without adapter and without anything that has been folded into it.
    """
    return {
        site.name: original_weight(_layer(adapted, site.name).get_submodule("base_layer"))
        for site in adapted.sites
    }


def input_moments(model: PublicModel, data: TokenisedDataset) -> dict[str, Moments]:
    """Return the moments of every site's input over the tokens of ``data``.

    Args:
        model: The model; its head is not used.
        data: Public rows, N ≥ 0; labels are not read.

    Returns:
        Moments by the site's name: of vectors (n,), one a real token, none of padding,
        and one more for each further pass through a layer that is shared. Sums in float64
        on the model's device: n² · 8 bytes a site.
    """
    sizes = {site.name: site.in_features for site in model.adapted.sites}
    zeros = partial(torch.zeros, dtype=torch.float64, device=model.device)
    counts = dict.fromkeys(sizes, 0)
    totals = {name: zeros(n) for name, n in sizes.items()}
    squares = {name: zeros(n, n) for name, n in sizes.items()}
    mask = torch.ones(0, dtype=torch.bool)

    def add(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        tokens = inputs[0].detach()[mask].double()  # (tokens, n)
        counts[name] += len(tokens)
        totals[name].add_(tokens.sum(0))
        squares[name].addmm_(tokens.mT, tokens)

    model.adapted.write(model.start)
    before = {name: partial(add, name) for name in sizes}
    with _hooked(model.adapted, before, nn.Module.register_forward_pre_hook), torch.no_grad():
        for batch in _batches(model, data):
            mask = batch.attention_mask.bool()
            model.classifier.encoder(**batch.inputs())
    return {name: Moments(counts[name], totals[name], squares[name]) for name in sizes}


def mean_gradients(model: PublicModel, data: TokenisedDataset) -> dict[str, Tensor]:
    """Return G = ∂/∂W of the mean cross-entropy over ``data``, of every site, at B = 0.

    Summed over tokens as Σ δxᵀ, with x the input of the layer and δ the gradient at its
    output, pass after pass: the frozen W itself is not differentiated.

    Args:
        model: The model, with the head that it starts with.
        data: Public rows with labels of the run's list, N ≥ 1.

    Returns:
        G by the site's name, shape (m, n), float64, on the model's device.

    Raises:
        ValueError: ``data`` has no row.
    """
    if not len(data):
        raise ValueError("data has no row; a mean gradient needs at least one")
    zeros = partial(torch.zeros, dtype=torch.float64, device=model.device)
    total = {site.name: zeros(site.out_features, site.in_features) for site in model.adapted.sites}

    def follow(name: str, _: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        x = inputs[0].detach().flatten(0, -2)

        def add(delta: Tensor) -> None:
            total[name].addmm_(delta.flatten(0, -2).double().mT, x.double())

        output.register_hook(add)

    model.adapted.write(model.start)
    # With A training no kernel runs, which would return no gradient at a layer's output.
    trained = list(model.adapted.select_trained(frozenset({Role.A})).values())
    after = {name: partial(follow, name) for name in total}
    try:
        with _hooked(model.adapted, after, nn.Module.register_forward_hook):
            for batch in _batches(model, data):
                loss = model.classifier.losses(batch).sum() / len(data)
                torch.autograd.grad(loss, trained, allow_unused=True)
    finally:
        model.adapted.select_trained(frozenset())
    return total


def _batches(model: PublicModel, data: TokenisedDataset) -> Iterator[Batch]:
    for rows in physical_batches(np.arange(len(data)), data.lengths, DEFAULT_ROWS):
        yield data.batch(rows).to(model.device)


@contextmanager
def _hooked(
    adapted: AdaptedModel, hooks: Mapping[str, Callable[..., None]], register: Callable[..., Any]
) -> Iterator[None]:
    """Hang a hook on the adapted layer of each name, and take all off again."""
    handles = [register(_layer(adapted, name), hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layer(adapted: AdaptedModel, name: str) -> nn.Module:
    return adapted.encoder.get_submodule(f"base_model.model.{name}")

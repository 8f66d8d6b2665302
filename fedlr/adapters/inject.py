"""Put LoRA adapters on chosen linear layers of an encoder (Hu et al., arXiv 2106.09685).

PEFT owns the layer; what is trained, and where A comes from, is decided by the
method and written through `fedlr.adapters.surgery`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fedlr import checks
from fedlr.errors import ConfigError, ModelError
from fedlr.lowrank.factors import AdapterSite

from .quantised import load_package, missing_package

ADAPTER = "default"
"""PEFT's name of the one adapter a model carries."""


def matching_layers(
    model: nn.Module, modules: Sequence[str], layers: Sequence[int] | None
) -> dict[str, nn.Linear]:
    """Return the linear layers to adapt, by name, in model order.

    Args:
        model: The base encoder.
        modules: Suffixes of dotted names: ``query`` matches
            ``...attention.self.query``, ``output.dense`` matches every layer
            whose name ends so (also ``attention.output.dense``).
        layers: Indices of transformer layers (the first number in a dotted
            name), negative ones counted from the top; None takes all. Layers
            outside every numbered block, such as a pooler, are never adapted.

    Returns:
        Name → layer; never empty.

    Raises:
        ConfigError: A suffix or an index that matches nothing, with what exists.
    """
    candidates = {
        name: (int(found.group(1)), module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (found := re.search(r"(?:^|\.)(\d+)\.", name))
    }
    depth = 1 + max((index for index, _ in candidates.values()), default=-1)
    problems = []
    wanted = None
    if layers is not None:
        wanted = {index + depth if index < 0 else index for index in layers}
        outside = [str(index) for index in layers if not -depth <= index < depth]
        if outside:
            verb = "is" if len(outside) == 1 else "are"
            problems.append(
                f"adapter.layers: {', '.join(outside)} {verb} outside [{-depth}, {depth - 1}], the "
                f"model has {depth} layers; at most top:{depth}"
            )
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in candidates})
    for suffix in modules:
        if not any(_ends_with(name, suffix) for name in candidates):
            problems.append(
                f"adapter.modules: {suffix!r} matches no linear layer; this model has: "
                f"{', '.join(suffixes)}"
            )
    if problems:
        raise ConfigError(problems)
    chosen = {
        name: module
        for name, (index, module) in candidates.items()
        if (wanted is None or index in wanted)
        and any(_ends_with(name, suffix) for suffix in modules)
    }
    if not chosen:
        raise ConfigError(
            [
                f"adapter.modules = {list(modules)} matches nothing in adapter.layers = {layers}; "
                "name modules of those layers, or set adapter.layers=null"
            ]
        )
    return chosen


def inject(
    model: nn.Module,
    modules: Sequence[str],
    layers: Sequence[int] | None,
    rank: int,
    alpha: float,
    checkpointing: bool = False,
) -> tuple[nn.Module, tuple[AdapterSite, ...]]:
    """Wrap ``model`` with one LoRA adapter and freeze everything.

    Args:
        model: Base encoder; its layers are replaced in place, its weights are not. What
            `fedlr.adapters.quantised.quantise` stored in 4 bits becomes PEFT's
            ``lora.bnb.Linear4bit``.
        modules: See `matching_layers`.
        layers: See `matching_layers`.
        rank: r, the same at every site.
        alpha: α; the scaling is α / r.
        checkpointing: Keep only the input of each adapted transformer layer for the
            backward pass, which computes the rest again (Chen et al., arXiv
            1604.06174). Changes no result.

    Returns:
        (PEFT model, sites in model order). No parameter requires a gradient;
        the adapter's product is zero and it has no dropout. A and B are float32
        whatever the base's dtype, and are multiplied in float32.

    Raises:
        ConfigError: Nothing matches, or the rank exceeds a layer's dimensions.
        ModelError: PEFT did not adapt exactly the chosen layers.
    """
    if missing_package() is None:
        load_package()  # ours first: PEFT's own import of it may fetch a binary
    from peft import LoraConfig, get_peft_model

    checks.positive("adapter.alpha", alpha)
    chosen = matching_layers(model, modules, layers)
    name, smallest = min(chosen.items(), key=lambda item: min(_shape(item[1])))
    m, n = _shape(smallest)
    if rank > min(m, n):
        raise ConfigError(
            [
                f"adapter.rank = {rank} must be ≤ {min(m, n)}, the smaller side of {name} "
                f"({m} × {n}), the smallest adapted layer; lower it"
            ]
        )
    sites = tuple(
        AdapterSite(name, layer.out_features, layer.in_features, rank, alpha / rank)
        for name, layer in chosen.items()
    )
    settings = LoraConfig(
        r=rank,
        lora_alpha=cast(Any, alpha),
        target_modules=[site.name for site in sites],
        lora_dropout=0.0,
        bias="none",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an old name
        adapted = cast(
            nn.Module, get_peft_model(cast(Any, model), settings, autocast_adapter_dtype=True)
        )
    found = {
        name.removeprefix("base_model.model.")
        for name, module in adapted.named_modules()
        if hasattr(module, "lora_B")
    }
    if found != {site.name for site in sites}:
        raise ModelError(
            f"PEFT adapted {sorted(found)} instead of {[site.name for site in sites]}; the base "
            "model's layer names are ambiguous, choose longer module suffixes"
        )
    for parameter in adapted.parameters():
        parameter.requires_grad_(False)
    if checkpointing:
        _checkpoint_layers(adapted, sites)
    return adapted, sites


def _checkpoint_layers(adapted: nn.Module, sites: Sequence[AdapterSite]) -> None:
    """Make every transformer layer that holds a site recompute its inside when it is needed.

    transformers' own switch does nothing in evaluation mode, which a private step needs.
    """
    found = (re.match(r"(?:.*?\.)??\d+(?=\.)", site.name) for site in sites)
    for name in dict.fromkeys(match.group() for match in found if match):
        layer = adapted.get_submodule(f"base_model.model.{name}")
        vars(layer)["forward"] = partial(_recomputed, layer.forward)


def _recomputed(forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **named)


def _shape(layer: nn.Linear) -> tuple[int, int]:
    return layer.out_features, layer.in_features  # the weight itself may be packed bits


def _ends_with(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("." + suffix)

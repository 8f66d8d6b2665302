"""Frozen linear layers in 4 bits: NF4 with quantised block scales (QLoRA, arXiv 2305.14314).

bitsandbytes stores the weights, and PEFT knows its layer class; the product is ours.
bitsandbytes' own product takes another kernel by the number of rows, by whether a gradient
is wanted and by the processor (bfloat16 sums under AVX512), so that a row's bits would
depend on its companions. Here a layer is x·Wᵀ + bias in float32 with W = dequantise(stored),
the same W forward, backward and in every pass: what holds of a float32 base holds of this one.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import sys
from contextlib import suppress
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlr.errors import ConfigError, ModelError

BLOCK = 64
"""Weights that share a scale."""

_FLAG = "is_loaded_in_4bit"  # where PEFT looks before it takes its class for such layers


def missing_package() -> str | None:
    """Say that 4-bit weights need a package that is not installed, or None."""
    if importlib.util.find_spec("bitsandbytes") is not None:
        return None
    return (
        "model.precision = nf4 needs the package bitsandbytes; install it with "
        "pip install 'fedlr[4bit]', or set model.precision=float32 or bfloat16"
    )


@cache
def load_package() -> Any:
    """Import bitsandbytes without the compiled kernel that it fetches where it can.

    Where the package ``kernels`` is installed, the import would download a binary from the
    hub and load it; and where it is not, print that. PEFT imports bitsandbytes where it
    finds it, so this comes before PEFT.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    before = sys.modules.get("kernels")
    sys.modules["kernels"] = cast(Any, None)  # an import of it fails, which bitsandbytes expects
    try:
        import bitsandbytes

        return bitsandbytes
    finally:
        del sys.modules["kernels"]
        if before is not None:
            sys.modules["kernels"] = before


def quantise(model: nn.Module) -> None:
    """Store the weight of every linear layer of ``model`` in 4 bits, in place.

    Blocks of 64 values in NF4, each with a scale of 8 bits: 4.13 bits a weight. Biases,
    embeddings, norms, linear layers that transformers keeps in float32 (T5's ``wo``), those
    that are no whole number of blocks, and subclasses of ``nn.Linear`` stay as they are.

    Args:
        model: A frozen encoder on the CPU, float32: the bits are rounded there, whatever
            device they are used on.

    Raises:
        ConfigError: bitsandbytes is missing, or the model has no such layer (GPT-2's are
            transposed ``Conv1D``).
        ModelError: What bitsandbytes stored does not stand for the weights.
    """
    if missing := missing_package():
        raise ConfigError([missing])
    layers = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and module.weight.numel() % BLOCK == 0
        and not _is_kept(model, name)
    }
    if not layers:
        raise ConfigError(
            [
                "model.precision = nf4 stores linear layers in 4 bits, and this model has none "
                "(torch.nn.Linear); set model.precision=float32 or bfloat16"
            ]
        )
    for name, layer in layers.items():
        stored = _stored(layer)
        _check_near(name, layer.weight, dense_weight(stored))
        model.set_submodule(name, stored)
    setattr(model, _FLAG, True)


def dequantise(model: nn.Module) -> None:
    """Put float32 linear layers with the weights that were computed with in place of 4 bits."""
    for name, layer in list(model.named_modules()):
        if is_quantised(layer):
            dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            dense.weight = nn.Parameter(dense_weight(layer), requires_grad=False)
            dense.bias = layer.bias
            model.set_submodule(name, dense.train(layer.training))
    with suppress(AttributeError):
        delattr(model, _FLAG)


def is_quantised(layer: nn.Module) -> bool:
    """Whether ``layer`` is a linear layer whose weight is stored in 4 bits."""
    return isinstance(layer, nn.Linear) and _state(layer) is not None


def dense_weight(layer: nn.Module) -> Tensor:
    """Return W of a linear layer, shape (m, n): the stored one, or float32 out of 4 bits."""
    weight = layer.get_parameter("weight")
    if not is_quantised(layer):
        return weight.detach()
    # A block a row: bitsandbytes 0.50 on AVX512 reads another block's scale where rows are a
    # multiple of 16 long and not of 64.
    state = copy.copy(_state(layer))
    state.shape, shape = torch.Size((state.shape.numel() // BLOCK, BLOCK)), state.shape
    dense: Tensor = load_package().functional.dequantize_4bit(weight.detach(), state)
    return dense.reshape(shape)


def _state(layer: nn.Module) -> Any:
    """Return what reads the bits; a move to another device may leave it at the layer alone."""
    own = getattr(layer, "quant_state", None)
    return getattr(layer.weight, "quant_state", None) or own


def _stored(layer: nn.Linear) -> nn.Module:
    package = load_package()
    stored: nn.Module = package.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=False,
        compute_dtype=torch.float32,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    stored.weight = package.nn.Params4bit(
        layer.weight.detach(), compress_statistics=True, quant_type="nf4", module=stored
    ).to("cpu")
    stored.bias = layer.bias
    vars(stored)["forward"] = partial(_forward, stored)
    return stored.train(layer.training)


def _check_near(name: str, weight: Tensor, dense: Tensor) -> None:
    """Refuse entries farther from their weights than NF4 and its scales of 8 bits allow.

    NF4's widest gap is 0.31 of a block's largest entry, and half of it the largest error.
    """
    blocks = weight.reshape(-1, BLOCK)
    allowed = 0.2 * blocks.abs().amax(1, keepdim=True) + 0.02 * weight.abs().max()
    if not bool(((dense.reshape(-1, BLOCK) - blocks).abs() <= allowed).all()):
        raise ModelError(
            f"model.precision = nf4: {name} is not what bitsandbytes was given to store (its "
            "weights are not finite, or this version computes wrongly on this processor); set "
            "model.precision=float32 or bfloat16"
        )


def _forward(layer: Any, x: Tensor) -> Tensor:
    function: Any = _Product
    output: Tensor = function.apply(x, layer.bias, layer)
    return output


class _Product(torch.autograd.Function):
    """x·Wᵀ + bias; W lives for one product, and again for the one of the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        return functional.linear(x, dense_weight(layer), bias)

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor | None, ...]:
        return deltas[0] @ dense_weight(ctx.layer), None, None


def _is_kept(model: nn.Module, name: str) -> bool:
    """Whether transformers keeps the layer in float32: the model's code relies on its dtype."""
    lists = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    kept = [part for attribute in lists for part in getattr(model, attribute, None) or ()]
    return any(f".{part}." in f".{name}.weight." for part in kept)

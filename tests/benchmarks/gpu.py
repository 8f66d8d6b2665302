"""Where and what is measured on a GPU: an encoder of RoBERTa-large's shapes, its rows, its clock.

Weights are random, from the configuration alone: nothing is fetched. A ``dry`` stage is the
same with a tiny encoder on a CPU.
"""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlr.adapters.quantised import missing_package
from fedlr.data.batching import TokenisedDataset, UnitIndex
from fedlr.errors import ConfigError
from fedlr.kernels.dispatch import KERNELS, NAIVE, Call, choose
from fedlr.training.heads import LinearHead
from fedlr.training.precision import cast_base

from .own_process import peak_bytes
from .ratios import Side, clock
from .steps import Shape

MODE_VARIABLE = "FEDLR_BENCH_GPU"
"""Environment variable: ``dry`` runs these benchmarks on the CPU, with tiny shapes and Triton's
interpreter (``TRITON_INTERPRET=1``). Its numbers mean nothing; that they come out does."""

MODULES, RANK, CLASSES, PAD = ("query", "value"), 8, 6, 1

HUGE, BINDING = 1e6, 0.1
"""Clip norms: one that no row reaches, and one that most rows exceed."""


@dataclass(frozen=True)
class Stage:
    """Where is measured, and how large.

    Attributes:
        device: Where the models live.
        layers, hidden, heads, inner, vocabulary: Of the encoder.
        shapes: Batches, in rows × tokens.
        clients: Clients that share passes, and rows of each in a step.
        steps: Steps of one call.
        copied: Bytes of the plain copy that bandwidth is measured with.
    """

    device: torch.device
    layers: int
    hidden: int
    heads: int
    inner: int
    vocabulary: int
    shapes: tuple[Shape, ...]
    clients: Shape
    steps: int
    copied: int


DRY = os.environ.get(MODE_VARIABLE) == "dry"
LARGE = Stage(
    torch.device("cuda"),
    layers=24,
    hidden=1024,
    heads=16,
    inner=4096,
    vocabulary=50_265,
    shapes=(Shape(32, 128), Shape(16, 512)),
    clients=Shape(8, 8),
    steps=5,  # as a task of the default configuration
    copied=2**30,
)
TINY = Stage(
    torch.device("cpu"),
    layers=2,
    hidden=32,
    heads=2,
    inner=64,
    vocabulary=100,
    shapes=(Shape(4, 8),),
    clients=Shape(2, 2),
    steps=2,
    copied=2**16,
)
STAGE = TINY if DRY else LARGE

MARKS = [
    pytest.mark.bench,
    pytest.mark.gpu,
    pytest.mark.skipif(not (DRY or torch.cuda.is_available()), reason="no CUDA device"),
    pytest.mark.skipif(clock() == "cpu", reason="no CPU time counts what a GPU does"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Opacus' hooks fire in an odd order
]
SHAPES = pytest.mark.parametrize("shape", STAGE.shapes, ids=lambda s: f"{s.rows}x{s.tokens}")
PRECISIONS = pytest.mark.parametrize("precision", ["float32", "bfloat16"])


@dataclass(frozen=True)
class Case:
    """One private step.

    Attributes:
        shape: Of the batch; every row is drawn.
        precision: ``model.precision``.
        implementation: ``kernels.implementation``.
        gradients: ``kernels.gradients``.
        steps: ``optimizer.steps``.
        rate: ``optimizer.learning_rate``: so small that several unclipped steps do not run
            away. A clipped change is small, and a larger rate lifts it above B's last bits.
    """

    shape: Shape
    precision: str = "float32"
    implementation: str = NAIVE
    gradients: str = "captured"
    steps: int = STAGE.steps
    rate: float = 0.1

    def __str__(self) -> str:
        return f"{self.shape} {self.precision}"


def runnable(implementation: str, precision: str) -> None:
    """Skip a test where no such kernels run, with their reason."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    call = Call(STAGE.device, dtype, RANK, quantised=precision == "nf4")
    if precision == "nf4" and (missing := missing_package()):
        pytest.skip(missing)
    try:
        for kernel in KERNELS:
            choose(kernel, call, implementation)
    except ConfigError as error:
        pytest.skip(str(error))


def timed(name: str, call: Callable[[], Any], repeats: int = 1) -> Side:
    """Return a side that the clock waits for: a GPU computes after a call has returned."""
    return Side(name, call, repeats, wait=wait)


def wait() -> None:
    """Return when the device has done what it was given."""
    if STAGE.device.type == "cuda":
        torch.cuda.synchronize()


@cache
def _weights(precision: str) -> nn.Module:
    """The frozen encoder, the same in every call; in 4 bits on the CPU, else on the device."""
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=STAGE.vocabulary,
        hidden_size=STAGE.hidden,
        num_hidden_layers=STAGE.layers,
        num_attention_heads=STAGE.heads,
        intermediate_size=STAGE.inner,
        max_position_embeddings=514,
        type_vocab_size=1,
        pad_token_id=PAD,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: nn.Module = RobertaModel(config, add_pooling_layer=False)
    made.eval().requires_grad_(False)
    cast_base(made, precision)
    # A layer in 4 bits that was moved may be without what a copy of it needs.
    return made if precision == "nf4" else made.to(STAGE.device)


def base(precision: str) -> nn.Module:
    """Return a copy of the encoder, on the device."""
    return copy.deepcopy(_weights(precision)).to(STAGE.device)


def head() -> LinearHead:
    """A frozen head like the default one: fixed directions on features of fixed norm."""
    weight = torch.randn(CLASSES, STAGE.hidden, generator=torch.Generator().manual_seed(1))
    made = LinearHead(13.4 * functional.normalize(weight, dim=1), False, 4.4721)
    made.requires_grad_(False)
    return made.to(STAGE.device)


@cache
def factors(site: str) -> tuple[Tensor, Tensor]:
    """An orthonormal A of a site, and a B that is not zero: there A would not matter."""
    generator = torch.Generator().manual_seed(crc32(site.encode()))
    a = torch.linalg.qr(torch.randn(STAGE.hidden, RANK, generator=generator)).Q.T.contiguous()
    return a, 0.02 * torch.randn(STAGE.hidden, RANK, generator=generator)


def random_rows(shape: Shape, first: int | None = None) -> TokenisedDataset:
    """Random tokens and labels from a fixed seed.

    Args:
        shape: Rows × tokens of the longest.
        first: Tokens of the first row; None: as many as the others.

    Returns:
        The last row is a token shorter: a batch of texts has padding, and without any
        attention would take another kernel.
    """
    draws = np.random.default_rng(0)
    lengths = np.full(shape.rows, shape.tokens)
    lengths[-1] -= 1
    lengths[0] = first or shape.tokens
    return TokenisedDataset(
        tokens=draws.integers(PAD + 1, STAGE.vocabulary, lengths.sum()).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        token_type_ids=None,
        labels=draws.integers(0, CLASSES, shape.rows),
        pad_token_id=PAD,
    )


def units(rows: range) -> UnitIndex:
    """Each row a unit."""
    return UnitIndex.of(None, np.array(rows), "example")


def peak(make: Callable[[], Callable[[], Any]]) -> float:
    """Return the most bytes that a side holds on the device in a warm call, its model included.

    On a CPU it is the peak of the whole process.
    """
    if STAGE.device.type != "cuda":
        make()()
        return float(peak_bytes())
    gc.collect()  # models are full of cycles
    before = torch.cuda.memory_allocated()
    side = make()
    side()
    wait()
    torch.cuda.reset_peak_memory_stats()
    side()
    wait()
    return float(torch.cuda.max_memory_allocated() - before)

"""Tiny random-weight encoders of every family, adapted and with a head; rows to feed them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from fedlr.adapters.core import add_cores
from fedlr.adapters.inject import inject
from fedlr.adapters.surgery import AdaptedModel
from fedlr.data.batching import TokenisedDataset, UnitIndex
from fedlr.lowrank.factors import AdapterSite
from fedlr.methods.method import PartKey, Role
from fedlr.training.classifier import Classifier
from fedlr.training.heads import LinearHead
from fedlr.training.local import LocalSettings, LocalTrainer
from fedlr.training.precision import cast_base

WIDTH, VOCABULARY, CLASSES, RANK, LONGEST = 16, 50, 3, 2, 12
PAD = 1
FAMILIES = ("bert", "roberta", "distilbert", "electra", "albert")
MOVABLE = frozenset({Role.A, Role.B, Role.HEAD})
CPU = torch.device("cpu")


def encoder(family: str, layers: int = 2, seed: int = 0, **changes: Any) -> nn.Module:
    """A frozen encoder in evaluation mode; weights ten times the usual, so that nothing is flat."""
    import transformers

    library = cast(Any, transformers)
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4 * LONGEST,
        "pad_token_id": PAD,
        "initializer_range": 0.2,
    }
    usual = {
        "hidden_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 2 * WIDTH,
    }
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "bert": ("Bert", usual),
        "roberta": ("Roberta", usual),
        "electra": ("Electra", {**usual, "embedding_size": WIDTH // 2}),
        "albert": ("Albert", {**usual, "embedding_size": WIDTH // 2}),
        "distilbert": (
            "DistilBert",
            {"dim": WIDTH, "n_layers": layers, "n_heads": 2, "hidden_dim": 2 * WIDTH},
        ),
    }
    name, sizes = kinds[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = getattr(library, f"{name}Config")(**{**common, **sizes, **changes})
        model: nn.Module = getattr(library, f"{name}Model")(config)
    return model.eval().requires_grad_(False)


def modules_of(family: str) -> tuple[str, str]:
    """Two linear layers of an attention block."""
    return ("q_lin", "v_lin") if family == "distilbert" else ("query", "value")


def rows(lengths: Sequence[int], seed: int = 0) -> TokenisedDataset:
    """Random tokens (2 … VOCABULARY − 3) and labels; the last two tokens are left to tests."""
    draws = np.random.default_rng(seed)
    return TokenisedDataset(
        tokens=draws.integers(2, VOCABULARY - 2, sum(lengths)).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        token_type_ids=None,
        labels=draws.integers(0, CLASSES, len(lengths)),
        pad_token_id=PAD,
    )


def units_of(sizes: Sequence[int], first: int = 0) -> UnitIndex:
    """Consecutive rows from ``first`` on, ``sizes[u]`` of them for unit u."""
    offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
    return UnitIndex(np.arange(first, first + int(offsets[-1])), offsets)


@dataclass(frozen=True)
class Tiny:
    """An adapted classifier and the arrays that a federation would move."""

    classifier: Classifier
    adapted: AdaptedModel

    def parts(self, roles: frozenset[Role] = MOVABLE) -> dict[PartKey, Tensor]:
        return self.adapted.read(roles)

    def trainer(self, data: TokenisedDataset, **changes: Any) -> LocalTrainer:
        return LocalTrainer(self.classifier, self.adapted, data, settings(**changes), CPU)


def tiny(
    family: str = "bert",
    layers: int = 2,
    seed: int = 0,
    on: Sequence[int] | None = None,
    checkpointing: bool = False,
    precision: str = "float32",
) -> Tiny:
    """Adapters on attention (layers ``on``, None: all), random B and a trained random head."""
    base = encoder(family, layers, seed)
    cast_base(base, precision)
    return classified(
        *inject(base, modules_of(family), on, RANK, 2.0 * RANK, checkpointing), seed=seed
    )


def of_rank(rank: int, cores: bool = False) -> Tiny:
    """A BERT as `tiny`'s, of another rank and the same scaling, with cores or without."""
    model, sites = inject(encoder("bert"), modules_of("bert"), None, rank, 2.0 * rank)
    if cores:
        add_cores(model, sites)
    return classified(model, sites)


def cored(family: str = "bert", **changes: Any) -> Tiny:
    """As `tiny`, with a random core at every site."""
    model = tiny(family, **changes)
    add_cores(model.adapted.encoder, model.adapted.sites)
    draws = torch.Generator().manual_seed(2)
    cores = model.adapted.read({Role.CORE})
    model.adapted.write({k: torch.randn(v.shape, generator=draws) for k, v in cores.items()})
    return model


def classified(model: nn.Module, sites: tuple[AdapterSite, ...], seed: int = 0) -> Tiny:
    """An adapted encoder with random arrays and a random head."""
    draws = torch.Generator().manual_seed(seed + 1)
    head = LinearHead(torch.randn(CLASSES, WIDTH, generator=draws), True, None)
    head.requires_grad_(False)
    held = {f"head.{name}": value for name, value in head.named_parameters()}
    adapted = AdaptedModel(model, sites, held)
    adapted.write(
        {
            key: 0.3 * torch.randn(value.shape, generator=draws)
            for key, value in adapted.parameters().items()
        }
    )
    classifier = Classifier(model, head)
    return Tiny(classifier.eval(), adapted)


def settings(**changes: Any) -> LocalSettings:
    """One plain SGD step of size 1, unless changed."""
    values: dict[str, Any] = {
        "optimizer": "sgd",
        "learning_rate": 1.0,
        "head_learning_rate": 1.0,
        "momentum": 0.0,
        "steps": 1,
        "physical_batch": 8,
    }
    return LocalSettings(**(values | changes))

"""The composition root: a configuration becomes objects.

The only file that imports every layer. It starts nothing and releases nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedlr.adapters.codec import SCHEMA
from fedlr.adapters.inject import inject
from fedlr.adapters.surgery import AdaptedModel
from fedlr.config import HeadConfig, RunConfig
from fedlr.data.batching import tokenise
from fedlr.data.dataset import LoadedData
from fedlr.data.sources import SourceSpec, check_present, load
from fedlr.data.stdlib import LABEL_TEXTS
from fedlr.errors import ConfigError
from fedlr.lowrank.subspace import SUBSPACES
from fedlr.methods.method import Layout, Method
from fedlr.methods.registry import METHODS
from fedlr.methods.registry import build as build_method
from fedlr.planning import ClientPlan, plan_clients
from fedlr.training.base import (
    BaseModel,
    check_capacity,
    check_rows_alone,
    load_base,
    model_size,
)
from fedlr.training.classifier import Classifier
from fedlr.training.evaluate import Evaluator
from fedlr.training.heads import LinearHead, RandomClsHead, label_embeddings
from fedlr.training.jobs import Provenance
from fedlr.training.local import LocalSettings, LocalTrainer
from fedlr.training.prefix import cache_prefix, find_prefix


@dataclass(frozen=True)
class Workbench:
    """Everything a simulation needs, sharing one resident base model.

    Attributes:
        config: The configuration it was built from.
        base: The frozen encoder, its tokenizer and digests.
        adapted: Movable arrays of the model.
        head: The whole classification head, frozen or trained.
        layout: What the federation adapts.
        method: The federated method.
        trainer: Local training.
        evaluator: Public evaluation.
        provenance: Digests that jobs carry.
        data: The loaded data (train and public validation).
        clients: The simulated clients.
        majority: Share of the largest class of the validation split.
        notices: Sentences a reader of the results must know.
    """

    config: RunConfig
    base: BaseModel
    adapted: AdaptedModel
    head: nn.Module
    layout: Layout
    method: Method
    trainer: LocalTrainer
    evaluator: Evaluator
    provenance: Provenance
    data: LoadedData
    clients: tuple[ClientPlan, ...]
    majority: float
    notices: tuple[str, ...]

    @property
    def whole_head(self) -> dict[str, Tensor]:
        """Every parameter of the head, frozen ones too, by the name it has in parts."""
        return {f"head.{key}": value for key, value in self.head.state_dict().items()}


def build(
    config: RunConfig,
    say: Callable[[str], None] = lambda _: None,
    noise: Mapping[str, float] | None = None,
    evaluate: bool = True,
) -> Workbench:
    """Build everything that ``config`` describes.

    Args:
        config: A checked configuration.
        say: Told what is being done, one short line at a time.
        noise: σ by client where it is known; None calibrates it.
        evaluate: Whether validation will be asked for; False saves its frozen
            layers in a process that only trains.

    Raises:
        ConfigError: A setting that does not fit the model or the data.
        DataError, ModelError: Something cannot be loaded.
    """
    check_names(config)
    if config.kernels.threads is not None:
        torch.set_num_threads(config.kernels.threads)
    device = _device(config)
    check_present(source_spec(config))
    say(f"loading the model {config.model.name}")
    base = load_base(
        config.model.name,
        config.model.revision,
        config.model.sha256,
        config.seed if config.model.random_weights else None,
    )
    base.encoder.to(device)
    check_capacity(base, config.model.max_length)
    check_rows_alone(base, config.model.max_length)
    say("reading the data")
    data = load(source_spec(config))
    head = build_head(config, base, data.label_names)
    adapter = config.adapter
    encoder, sites = inject(
        base.encoder, adapter.modules, adapter.layers, adapter.rank, adapter.alpha
    )
    # After what is quickly found wrong, before what takes long.
    clients = plan_clients(config, data, noise, say)
    prefix = find_prefix(encoder, sites)
    classifier = Classifier(encoder, head.to(device).requires_grad_(False), prefix)
    adapted = AdaptedModel(encoder, sites, _trained_head(head, config.model.head))
    say("tokenising")
    training = tokenise(base.tokenizer, data.train, config.model.max_length)
    validation = tokenise(base.tokenizer, data.validation, config.model.max_length)
    size = config.kernels.physical_batch
    if prefix is not None:
        say(f"computing the {prefix.depth} frozen layers below the adapters once")
        limit = config.kernels.prefix_cache_mb
        training = cache_prefix(encoder, prefix, training, size, limit)
        if evaluate:
            validation = cache_prefix(encoder, prefix, validation, size, limit)
    return Workbench(
        config=config,
        base=base,
        adapted=adapted,
        head=head,
        layout=Layout(
            sites, {name: value.detach().cpu().clone() for name, value in adapted.head.items()}
        ),
        method=build_method(config.method.name, SUBSPACES[config.subspace.kind]),
        trainer=LocalTrainer(classifier, adapted, training, local_settings(config), device),
        evaluator=Evaluator(classifier, adapted, validation, size, device),
        provenance=provenance(config, base, data.label_names),
        data=data,
        clients=clients,
        majority=float(np.bincount(data.validation.labels).max() / len(data.validation)),
        notices=data.notices,
    )


def check_names(config: RunConfig) -> None:
    """Check names that only the libraries know; ConfigError with all that are wrong."""
    problems = []
    if config.method.name not in METHODS:
        problems.append(f"method.name = {config.method.name!r} must be one of {', '.join(METHODS)}")
    if config.kernels.device == "cuda" and not torch.cuda.is_available():
        problems.append("kernels.device = cuda but no CUDA device is visible; use auto or cpu")
    if problems:
        raise ConfigError(problems)


def source_spec(config: RunConfig) -> SourceSpec:
    """Return the data source that ``config.data`` describes, with the public seed."""
    data = config.data
    return SourceSpec(
        kind=data.kind,
        path=data.path,
        name=data.name,
        subset=data.subset,
        text_columns=data.text_columns,
        label_column=data.label_column,
        user_column=data.user_column,
        label_names=data.label_names,
        validation_fraction=data.validation_fraction,
        train_split=data.train_split,
        validation_split=data.validation_split,
        max_examples=data.max_examples,
        public=data.public,
        seed=config.seed,
        split_by_user=config.privacy.unit == "user",
    )


def local_settings(config: RunConfig) -> LocalSettings:
    """Return the public settings of local training."""
    optimizer, kernels = config.optimizer, config.kernels
    return LocalSettings(
        optimizer=optimizer.name,
        learning_rate=optimizer.learning_rate,
        head_learning_rate=optimizer.head_learning_rate or optimizer.learning_rate,
        momentum=optimizer.momentum,
        steps=optimizer.steps,
        physical_batch=kernels.physical_batch,
        gradients=kernels.gradients,
        rows_per_user=config.privacy.rows_per_user,
    )


def build_head(config: RunConfig, base: BaseModel, label_names: tuple[str, ...]) -> nn.Module:
    """Return the head of ``config.model.head``; its random draws come from the public seed.

    Raises:
        ConfigError: The number of label texts is not the number of labels.
        ModelError: The model has no ``hidden_size``: it is no text encoder.
    """
    head, classes = config.model.head, len(label_names)
    width = model_size(base, "hidden_size")
    if head.kind == "random_cls":
        return RandomClsHead(width, classes, torch.Generator().manual_seed(config.seed))
    if head.kind == "linear":
        return LinearHead(torch.zeros(classes, width), bias=True, feature_scale=head.feature_scale)
    texts = _label_texts(head, label_names)
    if len(texts) != classes:
        raise ConfigError(
            [
                f"model.head.label_texts has {len(texts)} texts for {classes} labels "
                f"({', '.join(label_names)}); give one text per label, in that order"
            ]
        )
    weight = label_embeddings(base.encoder, base.tokenizer, texts, head.label_scale)
    return LinearHead(weight, bias=head.trained, feature_scale=head.feature_scale)


def _label_texts(head: HeadConfig, label_names: tuple[str, ...]) -> tuple[str, ...]:
    return head.label_texts or tuple(LABEL_TEXTS.get(name, name) for name in label_names)


def _trained_head(head: nn.Module, settings: HeadConfig) -> dict[str, nn.Parameter]:
    if not settings.trained:
        return {}
    return {f"head.{name}": value for name, value in head.named_parameters()}


def provenance(config: RunConfig, base: BaseModel, label_names: tuple[str, ...]) -> Provenance:
    """Return the digests that server and sites must agree on.

    ``labels`` is the sha256 of the canonical JSON of what gives the arrays their
    meaning: label names, head (with the texts that are embedded), adapters,
    ``model.max_length`` and, where weights are drawn from it, the public seed.
    Settings and not computed weights, whose last bits differ between processors.
    """
    model = config.model
    texts = _label_texts(model.head, label_names) if model.head.kind == "label_text" else None
    drawn = model.random_weights or model.head.kind == "random_cls"
    meaning = {
        "label_names": label_names,
        "head": {**asdict(model.head), "label_texts": texts},
        "adapter": asdict(config.adapter),
        "max_length": model.max_length,
        "seed": config.seed if drawn else None,
    }
    text = json.dumps(meaning, sort_keys=True, separators=(",", ":"))
    labels = hashlib.sha256(text.encode()).hexdigest()
    return Provenance(base.base_sha256, base.tokenizer_sha256, labels, SCHEMA)


def _device(config: RunConfig) -> torch.device:
    choice = config.kernels.device
    if choice == "auto":
        choice = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(choice)

"""The classification head that a configuration asks for."""

from __future__ import annotations

import torch
from torch import nn

from fedlr.config import HeadConfig, RunConfig
from fedlr.data.stdlib import LABEL_TEXTS
from fedlr.errors import ConfigError
from fedlr.training.base import BaseModel, model_size
from fedlr.training.heads import LinearHead, RandomClsHead, label_embeddings


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
    texts = label_texts(head, label_names)
    if len(texts) != classes:
        raise ConfigError(
            [
                f"model.head.label_texts has {len(texts)} texts for {classes} labels "
                f"({', '.join(label_names)}); give one text per label, in that order"
            ]
        )
    weight = label_embeddings(base.encoder, base.tokenizer, texts, head.label_scale)
    return LinearHead(weight, bias=head.trained, feature_scale=head.feature_scale)


def label_texts(head: HeadConfig, label_names: tuple[str, ...]) -> tuple[str, ...]:
    """Return a text for each label: the configured one, the data's own, or the name."""
    return head.label_texts or tuple(LABEL_TEXTS.get(name, name) for name in label_names)


def trained_head(head: nn.Module, settings: HeadConfig) -> dict[str, nn.Parameter]:
    """Return the parameters of a head that clients train, by the name they have in parts."""
    if not settings.trained:
        return {}
    return {f"head.{name}": value for name, value in head.named_parameters()}

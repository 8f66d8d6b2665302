"""Tiny models under examination."""

from __future__ import annotations

from typing import Any

from fedlr.config import from_mapping
from fedlr.doctor.subject import Subject
from fedlr.lowrank.subspace import SUBSPACES
from fedlr.methods.method import Role
from fedlr.methods.registry import build
from fedlr.restore import RunModel
from fedlr.training.base import BaseModel
from tests.data.helpers import word_tokenizer
from tests.models import CLASSES, LONGEST, cored, tiny


def subject(family: str = "bert", on: tuple[int, ...] | None = None, **sections: Any) -> Subject:
    """A tiny adapted model; ``sections`` change the configuration."""
    values: dict[str, dict[str, Any]] = {
        "model": {"max_length": LONGEST, "head": {"kind": "linear", "trained": True}},
        "privacy": {"clip_norm": 0.5},
        "optimizer": {"expected_batch": 8, "steps": 2},
    }
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes}
    config = from_mapping(values)
    method = build(config.method.name, SUBSPACES[config.subspace.kind])
    made = (cored if Role.CORE in method.facts.trains else tiny)(family, on=on)
    base = BaseModel(made.adapted.encoder, word_tokenizer(), "", "", "tiny")
    labels = tuple(f"label {index}" for index in range(CLASSES))
    model = RunModel(config, base, made.adapted, made.classifier.head, labels)
    return Subject.of(model, method, noise_multiplier=0.7)

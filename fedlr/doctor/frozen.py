"""A private round moves what trains and nothing else."""

from __future__ import annotations

from dataclasses import replace

import torch

from fedlr.doctor.finding import Result
from fedlr.doctor.subject import Subject
from fedlr.methods.method import MODEL_ROLES
from fedlr.training.base import weights_digest

_MOST_STEPS = 3
_SAMPLE_RATE = 0.5
_SHORT_STEP = 1e-3
"""Length of a noise entry's step at most: what moves does not depend on it, and long steps on
made-up rows would leave the bound on sizes, which says nothing of this machine."""


def base_unchanged(subject: Subject) -> Result:
    """Train a private round with the configured optimiser, in short steps; compare the rest.

    Base weights, buffers, the frozen head and movable arrays that do not train must
    be what they were, bit for bit; every trained array must have moved.
    """
    adapted, classifier = subject.model.adapted, subject.classifier()
    adapted.write(subject.parts)
    before = weights_digest(classifier)
    settings = subject.settings()
    mechanism = subject.mechanism(subject.noise_multiplier)
    noise = max(1.0, mechanism.noise_multiplier) * mechanism.clip_norm / mechanism.expected_batch
    short = replace(
        settings,
        steps=min(settings.steps, _MOST_STEPS),
        learning_rate=min(settings.learning_rate, _SHORT_STEP / noise),
        head_learning_rate=min(settings.head_learning_rate, _SHORT_STEP / noise),
    )
    task = subject.task(subject.noise_multiplier, _SAMPLE_RATE)
    trained = subject.trainer(short).train(task, subject.units)
    after = adapted.read(MODEL_ROLES)
    idle = [key for key, value in trained.items() if torch.equal(value, subject.parts[key])]
    drifted = [
        key
        for key, value in after.items()
        if key not in trained and not torch.equal(value, subject.parts[key])
    ]
    adapted.write(subject.parts)
    problems = []
    if weights_digest(classifier) != before:
        problems.append("frozen weights have changed")
    if drifted:
        problems.append(f"{drifted[0].site}/{drifted[0].role} does not train and has moved")
    if idle:
        problems.append(f"{idle[0].site}/{idle[0].role} trains and has not moved")
    return Result(
        not problems,
        "; ".join(problems)
        or f"frozen weights equal bit for bit after {short.steps} private steps; "
        f"{len(trained)} trained arrays moved",
    )

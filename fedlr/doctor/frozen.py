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


def base_unchanged(subject: Subject) -> Result:
    """Train a private round with the configured optimiser and compare everything else.

    Base weights, buffers, the frozen head and movable arrays that do not train must
    be what they were, bit for bit; every trained array must have moved.
    """
    adapted, classifier = subject.model.adapted, subject.classifier()
    adapted.write(subject.parts)
    before = weights_digest(classifier)
    settings = subject.settings()
    short = replace(settings, steps=min(settings.steps, _MOST_STEPS))
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

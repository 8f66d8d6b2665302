"""Per-unit gradients of the configured path against plain autograd, one unit at a time."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from fedlr.doctor.finding import Result
from fedlr.doctor.subject import Subject
from fedlr.methods.method import Parts
from fedlr.privacy.gradients import GRADIENTS
from fedlr.training.classifier import Classifier

BOUNDS = {"float32": 1e-3, "bfloat16": 0.1, "nf4": 1e-3}
"""Largest accepted ‖G − G_autograd‖ of a unit, relative to its own gradient, by precision.

Float32 rounding in another batch gives some 1e-6, on models of many layers 1e-5, and
that of bfloat16 some 1e-2; nf4 is computed in float32. A wrong gradient is off by its own
size. That no other row changes a unit's gradient is measured by the clip bound, far more finely.
"""


def same_as_autograd(subject: Subject) -> Result:
    """Compare all units of one batch with each unit's own backward pass.

    The reference runs every layer on the unit's rows alone, without prefix and
    padding: it also shows a path in which one unit's gradient notices another unit.
    """
    path, bound = subject.config.kernels.gradients, BOUNDS[subject.config.model.precision]
    found, expected = (
        path_gradients(subject),
        [_alone(subject, u) for u in range(subject.units.count)],
    )
    norms = [float(reference.norm()) for reference in expected]
    apart = [float((g - e).norm()) for g, e in zip(found, expected, strict=True)]
    if not max(norms) > 0:
        return Result(False, "no gradient reaches the trained arrays")
    # A unit whose own gradient all but vanishes is measured against the largest one.
    floor = 1e-3 * max(norms)
    errors = [error / max(norm, floor) for error, norm in zip(apart, norms, strict=True)]
    worst = float(np.max(errors))  # NaN where one of them is
    return Result(
        worst <= bound,
        f"largest error {worst:.1e} of a unit's gradient, bound {bound:g} "
        f"({path}, {len(errors)} units)",
    )


def path_gradients(subject: Subject) -> list[Tensor]:
    """Return each unit's gradient by the configured path: (d,) each, float64, CPU."""
    adapted, units = subject.model.adapted, subject.units
    adapted.write(subject.parts)
    trained, classifier = adapted.select_trained(subject.train), subject.classifier()
    rows, unit_index = units.rows_of(np.arange(units.count))
    batch = subject.rows.batch(rows, unit_index).to(subject.device)
    found = GRADIENTS[subject.config.kernels.gradients](classifier, trained)(
        partial(classifier.losses, batch), batch.unit_index, units.count
    )
    return [_flat(subject, {k: v[u] for k, v in found.items()}) for u in range(units.count)]


def _alone(subject: Subject, unit: int) -> Tensor:
    adapted = subject.model.adapted
    adapted.write(subject.parts)
    trained = adapted.select_trained(subject.train)
    plain = Classifier(adapted.encoder, subject.model.head).eval()
    rows, _ = subject.units.rows_of(np.array([unit]))
    total = {key: torch.zeros_like(value) for key, value in trained.items()}
    for row in rows:
        loss = plain.losses(subject.rows.batch(np.array([row])).to(subject.device)).sum()
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        for key, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                total[key] += gradient
    return _flat(subject, total)


def _flat(subject: Subject, arrays: Parts) -> Tensor:
    return torch.cat([arrays[key].detach().cpu().double().flatten() for key in subject.trained])

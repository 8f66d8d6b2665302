"""The clip bound: what one unit more or less changes in the sum before the noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from fedlr.data.batching import Batch
from fedlr.doctor.finding import Result
from fedlr.doctor.subject import UNITS, Subject, chosen_units
from fedlr.training.classifier import Classifier

SLACK = 1e-5
"""Float32 rounding allowed beyond C, relative."""

HUGE = 1e6
"""Factor on every loss, times max(1, C): gradients far above any clip norm."""

OVERFLOWING = (1e30, math.inf)
"""Factors on every loss: gradients whose squares, and which themselves, float32 cannot hold."""


class Loud(Classifier):
    """A classifier whose losses, and so gradients, are ``factor`` times the real ones."""

    def __init__(self, subject: Subject, factor: float) -> None:
        super().__init__(subject.model.adapted.encoder, subject.model.head, subject.prefix)
        self._factor = factor

    def losses(self, batch: Batch, rows: Tensor | None = None) -> Tensor:
        """See `Classifier.losses`."""
        return self._factor * super().losses(batch, rows)


def at_most_the_clip(subject: Subject, removed: Mapping[float, Sequence[int]]) -> Result:
    """Remove units from a batch without noise, through the whole local step.

    Args:
        subject: What is examined.
        removed: Units to remove, each from the batch of all units, by the factor on
            every loss (`HUGE`, `OVERFLOWING`).
    """
    everyone, changes = range(len(UNITS)), []
    for factor, units in removed.items():
        loud = Loud(subject, factor)
        whole = subject.release(chosen_units(everyone), 0.0, loud)
        for unit in units:
            others = [other for other in everyone if other != unit]
            less = subject.release(chosen_units(others), 0.0, loud)
            changes.append(float((whole - less).norm()))
    largest = float(np.max(changes))  # NaN where one of them is
    return Result(
        largest <= 1 + SLACK,
        f"one unit changes the sum by at most {largest:.6f} C, bound {1 + SLACK:g} C "
        f"({len(changes)} neighbours, gradients up to {max(removed):.0e} times)",
    )

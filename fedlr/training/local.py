"""One client, one round: broadcast parts in, trained parts out.

The base model stays resident; a client is its factors written into it and its
rows of the shared token array. The private step itself is `fedlr.privacy.dpsgd`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedlr import checks
from fedlr.adapters.surgery import AdaptedModel
from fedlr.data.batching import (
    Batch,
    Integers,
    TokenisedDataset,
    UnitIndex,
    keep_at_most,
    physical_positions,
)
from fedlr.methods.method import MODEL_ROLES, PartKey, Parts, Role
from fedlr.privacy.dpsgd import ClippedSum, Mechanism, private_gradient
from fedlr.privacy.gradients import GRADIENTS, UnitGradients
from fedlr.privacy.noise import Stream

from .classifier import Classifier

LARGEST_UPDATE = 30.0
"""Largest accepted s·‖B‖·‖A‖ of a broadcast, in units of ‖W‖ (Frobenius)."""

LARGEST_HEAD = 1000.0
"""Largest accepted Frobenius norm of a broadcast head array."""


@dataclass(frozen=True)
class LocalSettings:
    """The public settings of local training.

    Attributes:
        optimizer: ``sgd`` or ``adam``; its state is fresh in every round.
        learning_rate: Step size of adapter factors.
        head_learning_rate: Step size of a trained head.
        momentum: Heavy-ball momentum within the round (``sgd``).
        steps: Optimiser steps of a round.
        physical_batch: Rows of one forward pass; changes no result.
        gradients: Implementation of per-unit gradients, a key of `GRADIENTS`.
        rows_per_user: Rows of one unit that a step uses at most, chosen anew in each
            step (`draw_rows`); None uses all.
    """

    optimizer: Literal["sgd", "adam"]
    learning_rate: float
    head_learning_rate: float
    momentum: float
    steps: int
    physical_batch: int
    gradients: str = "captured"
    rows_per_user: int | None = None

    def __post_init__(self) -> None:
        checks.positive("learning_rate", self.learning_rate)
        checks.positive("head_learning_rate", self.head_learning_rate)
        checks.in_range("momentum", self.momentum, 0.0, 0.999)
        checks.at_least("steps", self.steps, 1)
        checks.at_least("physical_batch", self.physical_batch, 1)
        checks.one_of("gradients", self.gradients, tuple(GRADIENTS))
        if self.rows_per_user is not None:
            checks.at_least("rows_per_user", self.rows_per_user, 1)


@dataclass(frozen=True)
class LocalTask:
    """What one client does in one round.

    Attributes:
        parts: Broadcast arrays, written before the first step; the others start
            as they were when the trainer was made (B = 0), not as an earlier
            client or round left them.
        train: Roles that train.
        sample_rate: q, probability of each unit in each step.
        mechanism: Clip, noise and divisor; None trains plainly (privacy off).
        sampling: Stream of the Poisson draws and of the choice of rows.
        noise: Stream of the noise.
        rows_per_user: The site's own bound on rows of one unit in a step, where it is
            smaller than that of the settings; None has none.
    """

    parts: Parts
    train: frozenset[Role]
    sample_rate: float
    mechanism: Mechanism | None
    sampling: Stream
    noise: Stream
    rows_per_user: int | None = None


def draw_rows(
    task: LocalTask, units: UnitIndex, rows_per_user: int | None
) -> tuple[Integers, Integers]:
    """Draw the units of one step, and of each of them the rows that stand for it.

    The gradient of a unit is the *sum* over its chosen rows, clipped to C; it is not
    divided by their number, nor scaled up for rows left out. A cap costs no privacy and
    credits none: whichever rows stand for a unit, they are clipped as one, so the unit
    moves the sum by at most C. The choice reads no other unit, so that for any fixed
    choice of rows neighbours differ in one term, and the step is a mixture, with weights
    that are the same for both, of the mechanisms that the accountant knows.

    Args:
        task: Its rate and its sampling stream.
        units: The client's rows by unit.
        rows_per_user: m, most rows of one unit; None takes all and leaves the stream
            to the Poisson draws alone.

    Returns:
        (rows, unit_index) as `UnitIndex.rows_of`; both empty for an empty draw.

    Guarantees:
        The stream is read by the same amount for the same units drawn, however many
        rows they have.
    """
    drawn = task.sampling.poisson_sample(units.count, task.sample_rate)
    rows, unit_index = units.rows_of(drawn)
    if rows_per_user is None:
        return rows, unit_index
    uniform = _uniform(task.sampling, len(drawn) * rows_per_user)
    return keep_at_most(rows, unit_index, rows_per_user, uniform.reshape(-1, rows_per_user))


def _uniform(stream: Stream, count: int) -> npt.NDArray[np.float64]:
    """Return uniforms in [0, 1) of 32 bits, each bit a unit drawn at rate ½."""
    bits = np.zeros(32 * count, dtype=np.uint8)
    bits[stream.poisson_sample(len(bits), 0.5)] = 1
    return np.packbits(bits).view(">u4") * 2.0**-32


class LocalTrainer:
    """Trains any client on the one resident model.

    Args:
        classifier: Adapted encoder with head, in evaluation mode: dropout adds
            nothing under noise and would make a row's gradient random.
        adapted: The movable arrays of ``classifier``.
        data: Tokens of all clients.
        settings: Public settings.
        device: Where the model lives.
    """

    def __init__(
        self,
        classifier: Classifier,
        adapted: AdaptedModel,
        data: TokenisedDataset,
        settings: LocalSettings,
        device: torch.device,
    ) -> None:
        self._classifier = classifier.eval()
        self._adapted = adapted
        self._fresh = adapted.read(MODEL_ROLES)
        self._limits = {site: LARGEST_UPDATE * norm for site, norm in adapted.base_norms().items()}
        self._data = data
        self._lengths = data.lengths
        self._device = device
        self.settings = settings

    def check(self, parts: Parts, train: frozenset[Role]) -> None:
        """Check that what was broadcast fits the model and the roles that train.

        Args:
            parts: Must hold every array that trains.
            train: Roles that train; each needs an array.

        Raises:
            ValueError: An array that trains is missing, one is unknown, of another
                shape, not finite, or too large (`LARGEST_UPDATE`, `LARGEST_HEAD`),
                or a role has no array.
        """
        self._adapted.check(parts)
        expected = self._adapted.parameters()
        if missing := sorted(key for key in expected.keys() - parts.keys() if key.role in train):
            raise ValueError(f"parts lack {missing[0].site}/{missing[0].role}, which would train")
        if unheld := sorted(train - {key.role for key in expected}):
            raise ValueError(f"train has {unheld[0]!r}, of which the model has no array")
        for key, value in parts.items():
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{key.site}/{key.role} holds NaN or infinite entries")
        self._check_sizes({**self._fresh, **parts})

    def _check_sizes(self, parts: Parts) -> None:
        """Refuse factors or heads so large that rounding would couple rows.

        A row's gradient is independent of its companions up to float32 rounding.
        Huge factors amplify that rounding until the sum's sensitivity exceeds C.
        """
        for site, limit in self._limits.items():
            b, a = parts[PartKey(site.name, Role.B)], parts[PartKey(site.name, Role.A)]
            size = site.scaling * float(b.norm()) * float(a.norm())
            if not size <= limit:
                raise ValueError(
                    f"{site.name}: s·‖B‖·‖A‖ = {size:.3g} must be ≤ {limit:.3g}, "
                    f"{LARGEST_UPDATE:g} times the norm of the base weight"
                )
        for key, value in parts.items():
            if key.role is Role.HEAD and not float(value.norm()) <= LARGEST_HEAD:
                raise ValueError(
                    f"{key.site}: ‖head‖ = {float(value.norm()):.3g} must be ≤ {LARGEST_HEAD:g}"
                )

    def train(self, task: LocalTask, units: UnitIndex) -> dict[PartKey, Tensor]:
        """Run the round and return the trained arrays (float32, CPU).

        Args:
            task: What to do.
            units: The client's rows by unit; may be empty, which makes every
                step a noise-only step.

        Raises:
            ValueError: The task's arrays do not fit the model, the mechanism
                does not cover exactly what trains, or σ > 0 with public sampling,
                which would void the amplification that the accountant credits.
        """
        self._adapted.write({**self._fresh, **task.parts})
        trained = self._adapted.select_trained(task.train)
        if task.mechanism is not None and task.mechanism.keys != frozenset(trained):
            raise ValueError("the mechanism's clip groups are not exactly the trained arrays")
        noisy = task.mechanism is not None and task.mechanism.noise_multiplier > 0
        if noisy and not task.sampling.secret:
            raise ValueError("a private batch was asked from a public stream; use secret_stream()")
        gradients = GRADIENTS[self.settings.gradients](self._classifier, trained)
        optimizer = self._optimizer(trained)
        bounds = (self.settings.rows_per_user, task.rows_per_user)
        limit = min((bound for bound in bounds if bound is not None), default=None)
        for _ in range(self.settings.steps):
            drawn = draw_rows(task, units, limit)
            if task.mechanism is None:
                direction = self._plain_gradient(trained, *drawn)
            else:
                clipped = self._clipped_sum(gradients, trained, task.mechanism, *drawn)
                direction = private_gradient(clipped, task.mechanism, task.noise)
            for key, parameter in trained.items():
                parameter.grad = direction[key]
            optimizer.step()
        return self._adapted.read(task.train)

    def _clipped_sum(
        self,
        gradients: UnitGradients,
        trained: Mapping[PartKey, nn.Parameter],
        mechanism: Mechanism,
        rows: np.ndarray,
        unit_index: np.ndarray,
    ) -> dict[PartKey, Tensor]:
        """Clip and sum one logical batch, physical batch after physical batch."""
        shapes = {key: value.shape for key, value in trained.items()}
        total = ClippedSum(mechanism, shapes, self._device)
        remaining = np.bincount(unit_index) if len(unit_index) else np.zeros(0, dtype=np.int64)
        for batch in self._physical(rows, unit_index):
            units, local, counts = np.unique(
                batch.unit_index.cpu().numpy(), return_inverse=True, return_counts=True
            )
            if len(units) == len(local):  # one row each: keep the batch's own order
                units, local = batch.unit_index.cpu().numpy(), np.arange(len(local))
                counts = np.ones_like(units)
            remaining[units] -= counts
            found = gradients(
                partial(self._classifier.losses, batch),
                torch.from_numpy(local).to(self._device),
                len(units),
            )
            total.add(found, units.tolist(), (remaining[units] == 0).tolist())
        return total.result()

    def _plain_gradient(
        self, trained: Mapping[PartKey, nn.Parameter], rows: np.ndarray, unit_index: np.ndarray
    ) -> dict[PartKey, Tensor]:
        """Mean gradient of the drawn rows; zeros for an empty draw."""
        total = {key: torch.zeros_like(value) for key, value in trained.items()}
        for batch in self._physical(rows, unit_index):
            loss = self._classifier.losses(batch).sum() / len(rows)
            found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
            for key, gradient in zip(trained, found, strict=True):
                if gradient is not None:
                    total[key] += gradient
        return total

    def _physical(self, rows: np.ndarray, unit_index: np.ndarray) -> Iterator[Batch]:
        for piece in physical_positions(self._lengths[rows], self.settings.physical_batch):
            yield self._data.batch(rows[piece], unit_index[piece]).to(self._device)

    def _optimizer(self, trained: Mapping[PartKey, nn.Parameter]) -> torch.optim.Optimizer:
        settings = self.settings
        groups = [
            {
                "params": [
                    value for key, value in trained.items() if (key.role is Role.HEAD) is head
                ],
                "lr": settings.head_learning_rate if head else settings.learning_rate,
            }
            for head in (False, True)
        ]
        groups = [group for group in groups if group["params"]]
        if settings.optimizer == "adam":
            return torch.optim.Adam(groups)
        return torch.optim.SGD(groups, momentum=settings.momentum)

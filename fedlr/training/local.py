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
    moved,
    physical_positions,
)
from fedlr.kernels.dispatch import ClippedSum as ClippedSumKernel
from fedlr.methods.method import MODEL_ROLES, PartKey, Parts, Role
from fedlr.privacy.dpsgd import ClippedSum, Mechanism, private_gradient
from fedlr.privacy.factored import Factored, FactoredGradients
from fedlr.privacy.gradients import GRADIENTS, UnitGradients
from fedlr.privacy.noise import Stream

from .classifier import Classifier
from .precision import OwnShapeGradients, fill, own_shape_positions

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
        physical_batch: Most rows of one forward pass; changes no result.
        gradients: Implementation of per-unit gradients, a key of `GRADIENTS`.
        rows_per_user: Rows of one unit that a step uses at most, chosen anew in each
            step (`draw_rows`); None uses all.
        tokens_per_batch: Most tokens of one forward pass, padding included (a longer
            row passes alone); None bounds the rows only. Changes no result.
        own_shapes: Tokens of the longest row, public: each row is computed in a shape
            of its own (`fedlr.training.precision`), always ``physical_batch`` + 1 rows.
            Needed below float32; None batches rows as they come.
        kernel: Computes norms and sums from δ and z (`fedlr.privacy.factored`), with
            ``gradients="captured"``; None forms each unit's gradient.
    """

    optimizer: Literal["sgd", "adam"]
    learning_rate: float
    head_learning_rate: float
    momentum: float
    steps: int
    physical_batch: int
    gradients: str = "captured"
    rows_per_user: int | None = None
    tokens_per_batch: int | None = None
    own_shapes: int | None = None
    kernel: ClippedSumKernel | None = None

    def __post_init__(self) -> None:
        checks.positive("learning_rate", self.learning_rate)
        checks.positive("head_learning_rate", self.head_learning_rate)
        checks.in_range("momentum", self.momentum, 0.0, 0.999)
        checks.at_least("steps", self.steps, 1)
        checks.at_least("physical_batch", self.physical_batch, 1)
        checks.one_of("gradients", self.gradients, tuple(GRADIENTS))
        if self.rows_per_user is not None:
            checks.at_least("rows_per_user", self.rows_per_user, 1)
        if self.kernel is not None and (self.gradients, self.own_shapes) != ("captured", None):
            raise ValueError(
                f"kernel needs gradients = 'captured' and own_shapes = None, not "
                f"{self.gradients!r} and {self.own_shapes}"
            )
        if self.tokens_per_batch is not None:
            checks.at_least("tokens_per_batch", self.tokens_per_batch, 1)


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
        self.classifier = classifier.eval()
        self._adapted = adapted
        self._fresh = adapted.read(MODEL_ROLES)
        self._limits = {site: LARGEST_UPDATE * norm for site, norm in adapted.base_norms().items()}
        self._data = data
        self._lengths = data.lengths
        self.device = device
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
        trained = self.begin(task)
        gradients = self._unit_gradients(trained)
        optimizer = self.optimizer(trained)
        limit = self.row_limit(task)
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

    def begin(self, task: LocalTask) -> dict[PartKey, nn.Parameter]:
        """Write what was broadcast into the model, and return the parameters that train.

        Raises:
            ValueError: As `train`.
        """
        self._adapted.write({**self._fresh, **task.parts})
        trained = self._adapted.select_trained(task.train)
        if task.mechanism is not None and task.mechanism.keys != frozenset(trained):
            raise ValueError("the mechanism's clip groups are not exactly the trained arrays")
        noisy = task.mechanism is not None and task.mechanism.noise_multiplier > 0
        if noisy and not task.sampling.secret:
            raise ValueError("a private batch was asked from a public stream; use secret_stream()")
        if task.mechanism is None and self.settings.own_shapes is not None:
            raise ValueError("own_shapes is for private tasks; without a mechanism leave it None")
        return trained

    def _unit_gradients(self, trained: Mapping[PartKey, nn.Parameter]) -> UnitGradients:
        settings = self.settings
        if settings.kernel is not None:
            return FactoredGradients(self.classifier, trained, settings.kernel)
        found = GRADIENTS[settings.gradients](self.classifier, trained)
        if settings.own_shapes is None:
            return found
        return OwnShapeGradients(found, settings.physical_batch)

    def row_limit(self, task: LocalTask) -> int | None:
        """Return the smaller bound on rows of one unit in a step, the run's or the site's."""
        bounds = (self.settings.rows_per_user, task.rows_per_user)
        return min((bound for bound in bounds if bound is not None), default=None)

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
        total = ClippedSum(mechanism, shapes, self.device)
        remaining = np.bincount(unit_index) if len(unit_index) else np.zeros(0, dtype=np.int64)
        batches = self.physical(rows, unit_index)
        for piece, batch in zip(self.pieces(rows), batches, strict=True):
            index = unit_index[piece]  # as batch.unit_index, without waiting for a GPU
            units, local, counts = np.unique(index, return_inverse=True, return_counts=True)
            if len(units) == len(local):  # one row each: keep the batch's own order
                units, local = index, np.arange(len(local))
                counts = np.ones_like(units)
            remaining[units] -= counts
            losses = partial(self.classifier.losses, batch)
            local_index = moved(torch.from_numpy(local), self.device)
            found: Mapping[PartKey, Tensor | Factored] = (
                gradients.factored(losses, local_index, len(units))
                if isinstance(gradients, FactoredGradients)
                else gradients(losses, local_index, len(units))
            )
            total.add(found, units.tolist(), (remaining[units] == 0).tolist())
        return total.result()

    def _plain_gradient(
        self, trained: Mapping[PartKey, nn.Parameter], rows: np.ndarray, unit_index: np.ndarray
    ) -> dict[PartKey, Tensor]:
        """Mean gradient of the drawn rows; zeros for an empty draw."""
        total = {key: torch.zeros_like(value) for key, value in trained.items()}
        for batch in self.physical(rows, unit_index):
            loss = self.classifier.losses(batch).sum() / len(rows)
            found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
            for key, gradient in zip(trained, found, strict=True):
                if gradient is not None:
                    total[key] += gradient
        return total

    def pieces(self, rows: np.ndarray) -> list[Integers]:
        """Return the positions in ``rows`` of each batch that `physical` yields, in its order."""
        size, longest = self.settings.physical_batch, self.settings.own_shapes
        if longest is not None:
            return own_shape_positions(self._lengths[rows], size, longest)
        return physical_positions(self._lengths[rows], size, self.settings.tokens_per_batch)

    def physical(self, rows: np.ndarray, unit_index: np.ndarray) -> Iterator[Batch]:
        """Cut a logical batch, as `draw_rows` returns it, into physical ones on the device."""
        settings = self.settings
        for piece in self.pieces(rows):
            batch = self._data.batch(rows[piece], unit_index[piece])
            if settings.own_shapes is not None:
                pad = self._data.pad_token_id
                batch = fill(batch, settings.physical_batch, settings.own_shapes, pad)
            yield batch.to(self.device)

    def optimizer(self, trained: Mapping[PartKey, nn.Parameter]) -> torch.optim.Optimizer:
        """Return a fresh optimiser over ``trained``: its state lives for one round."""
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

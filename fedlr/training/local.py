"""One client, one round: broadcast parts in, trained parts out.

The base model stays resident; a client is its factors written into it and its
rows of the shared token array. The private step itself is `fedlr.privacy.dpsgd`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from fedlr import checks
from fedlr.adapters.surgery import AdaptedModel
from fedlr.data.batching import (
    Batch,
    Integers,
    TokenisedDataset,
    UnitIndex,
    moved,
    physical_positions,
)
from fedlr.kernels.dispatch import ClippedSum as ClippedSumKernel
from fedlr.methods.method import MODEL_ROLES, PartKey, Parts, Role
from fedlr.privacy.columns import UnitMatrix
from fedlr.privacy.dpsgd import ClippedSum, private_gradient
from fedlr.privacy.factored import Factored, FactoredGradients, dense
from fedlr.privacy.gradients import GRADIENTS, UnitGradients

from .classifier import Classifier
from .precision import OwnShapeGradients, fill, own_shape_positions
from .sizes import LARGEST_HEAD, LARGEST_UPDATE, SizeLimits
from .task import Drawn, LocalTask, Member, draw_rows

__all__ = [
    "LARGEST_HEAD",
    "LARGEST_UPDATE",
    "LocalSettings",
    "LocalTask",
    "LocalTrainer",
    "RowArrays",
    "draw_rows",
]

RowArrays = Callable[
    [Sequence[Mapping[PartKey, Tensor]]], Callable[[Integers], AbstractContextManager[None]]
]
"""Arrays of each member → member of each row → within, a row is multiplied with its own."""


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


def _of_the_model(_: Sequence[Mapping[PartKey, Tensor]]) -> Callable[[Integers], nullcontext[None]]:
    """The `RowArrays` of one member that trains the model's own."""
    return lambda _owner: nullcontext()


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
        self._sizes = SizeLimits(adapted)
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
            ValueError: An array that trains is missing, one is unknown, does not fit
                (`AdaptedModel.check`), is not finite, or too large (`LARGEST_UPDATE`,
                `LARGEST_HEAD`), or a role has no array.
        """
        self._adapted.check({**self._fresh, **parts})
        expected = self._adapted.parameters()
        if missing := sorted(key for key in expected.keys() - parts.keys() if key.role in train):
            raise ValueError(f"parts lack {missing[0].site}/{missing[0].role}, which would train")
        if unheld := sorted(train - {key.role for key in expected}):
            raise ValueError(f"train has {unheld[0]!r}, of which the model has no array")
        for key, value in parts.items():
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{key.site}/{key.role} holds NaN or infinite entries")
        whole = {**self._fresh, **parts}
        self._sizes.check(self._sizes.norms(whole), self._sizes.added(whole))

    def train(self, task: LocalTask, units: UnitIndex) -> dict[PartKey, Tensor]:
        """Run the round and return the trained arrays (float32, CPU).

        Args:
            task: What to do.
            units: The client's rows by unit; may be empty, which makes every
                step a noise-only step.

        Raises:
            ValueError: The task's arrays do not fit the model, the mechanism
                does not cover exactly what trains, or σ > 0 with public sampling,
                which would void the amplification that the accountant credits. As `run`.
        """
        trained = self.begin(task)
        member = Member(task, units, trained, self.optimizer(trained))
        self.run([member], self._unit_gradients(trained))
        return member.result()

    def run(
        self, members: Sequence[Member], gradients: UnitGradients, arrays: RowArrays = _of_the_model
    ) -> None:
        """Take every step of the round: the one loop, for a client alone and for several.

        Args:
            members: At least one; only private ones share passes.
            gradients: Of the arrays that train.
            arrays: Gives each row its own member's arrays; by default there is one member,
                whose arrays are the model's.

        Raises:
            ValueError: A private member's arrays have become too large for another step
                (`SizeLimits`): a function of what was broadcast and of noised sums alone.
        """
        private = [member for member in members if member.task.mechanism is not None]
        bounds = [self._bound(member) for member in private] if self.settings.steps > 1 else []
        for step in range(self.settings.steps):
            for check in bounds if step else ():
                check()
            drawn = Drawn.of([draw_rows(m.task, m.units, self.row_limit(m.task)) for m in members])
            if members[0].task.mechanism is None:
                directions = [self._plain_gradient(members[0].trained, drawn)]
            else:
                sums = self._clipped_sums(members, gradients, drawn, arrays)
                directions = [
                    private_gradient(clipped, member.mechanism, member.task.noise)
                    for member, clipped in zip(members, sums, strict=True)
                ]
            for member, direction in zip(members, directions, strict=True):
                member.step(direction)

    def _bound(self, member: Member) -> Callable[[], None]:
        """Return what raises ValueError once the arrays of ``member`` are too large."""
        sizes, whole = self._sizes, {**self._fresh, **member.task.parts}
        fixed, added = sizes.norms(whole), sizes.added(whole)
        return lambda: sizes.check({**fixed, **sizes.norms(member.trained)}, added)

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

    def _clipped_sums(
        self,
        members: Sequence[Member],
        gradients: UnitGradients,
        drawn: Drawn,
        arrays: RowArrays,
    ) -> list[dict[PartKey, Tensor]]:
        """Clip and sum each member's logical batch, physical batch after physical batch."""
        shapes = {key: value.shape for key, value in members[0].trained.items()}
        sums = [ClippedSum(m.mechanism, shapes, self.device) for m in members]
        arrays_of = arrays([member.trained for member in members])
        left = np.bincount(drawn.unit_index, minlength=len(drawn.owner))  # rows still to come
        for positions, batch in self.physical(drawn.rows, drawn.unit_index):
            index = drawn.unit_index[positions]  # as batch.unit_index, without waiting for a GPU
            left -= np.bincount(index, minlength=len(left))
            units, local = _numbered(index)
            with arrays_of(drawn.owner[index]):
                each = self._differentiate(gradients, batch, positions, local, len(units))
            for member in np.unique(drawn.owner[units]):
                mine = np.flatnonzero(drawn.owner[units] == member)
                whole = len(mine) == len(units)
                sums[member].add(
                    each if whole else _chosen(each, mine),
                    units[mine].tolist(),
                    (left[units[mine]] == 0).tolist(),
                )
        return [total.result() for total in sums]

    def _differentiate(
        self,
        gradients: UnitGradients,
        batch: Batch,
        positions: Integers,
        local: Integers,
        units: int,
    ) -> Mapping[PartKey, Tensor | Factored]:
        """Return the gradients of the units of one pass.

        Args:
            gradients: Of the arrays that train.
            batch: What `physical` yields.
            positions: Likewise.
            local: Unit within the pass of each row of ``positions``, in [0, units).
            units: Their number.
        """
        losses = partial(self.classifier.losses, batch)
        unit_index = moved(torch.from_numpy(local), self.device)
        if isinstance(gradients, FactoredGradients):
            return gradients.factored(losses, unit_index, units)
        return gradients(losses, unit_index, units)

    def _plain_gradient(
        self, trained: Mapping[PartKey, nn.Parameter], drawn: Drawn
    ) -> dict[PartKey, Tensor]:
        """Mean gradient of the drawn rows; zeros for an empty draw."""
        total = {key: torch.zeros_like(value) for key, value in trained.items()}
        for _, batch in self.physical(drawn.rows, drawn.unit_index):
            loss = self.classifier.losses(batch).sum() / len(drawn.rows)
            found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
            for key, gradient in zip(trained, found, strict=True):
                if gradient is not None:
                    total[key] += gradient
        return total

    def physical(self, rows: Integers, unit_index: Integers) -> Iterator[tuple[Integers, Batch]]:
        """Cut a logical batch, as `draw_rows` returns it, into physical ones on the device.

        Yields:
            (positions, batch): the positions in ``rows`` of the batch's rows, in its order.
            With ``own_shapes`` the batch has more rows, of padding, behind them.
        """
        settings, lengths = self.settings, self._lengths[rows]
        size, longest = settings.physical_batch, settings.own_shapes
        if longest is None:
            pieces = physical_positions(lengths, size, settings.tokens_per_batch)
        else:
            pieces = own_shape_positions(lengths, size, longest)
        for piece in pieces:
            batch = self._data.batch(rows[piece], unit_index[piece])
            if longest is not None:
                batch = fill(batch, size, longest, self._data.pad_token_id)
            yield piece, batch.to(self.device)

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


def _numbered(unit_index: Integers) -> tuple[Integers, Integers]:
    """Return the units of one pass, and for each row the place of its unit among them."""
    units, local = np.unique(unit_index, return_inverse=True)
    if len(units) == len(unit_index):  # one row each: keep the batch's own order
        return unit_index, np.arange(len(unit_index))
    return units, local


def _chosen(
    each: Mapping[PartKey, Tensor | Factored], units: Integers
) -> Mapping[PartKey, Tensor | Factored]:
    """Return the gradients of some units of a pass."""
    chosen = torch.from_numpy(units)
    if isinstance(each, UnitMatrix):
        return each.chosen(moved(chosen, each.matrix.device))
    return {key: value[chosen.to(value.device)] for key, value in dense(each).items()}

"""Several clients of one round in one forward and backward pass.

Clients of a round share everything but the arrays they train. So their rows can run
through the base model together, each row multiplied with its own client's arrays
(serving many adapters at once, as S-LoRA does: Sheng et al., arXiv 2311.03285). It pays
where one client's batch is too small to keep the machine busy.

Only the arithmetic is shared. Each client draws its units from its own stream, has its
units clipped into a sum of its own, gets noise from its own stream and takes its own
optimiser step. A row's gradient depends on its companions up to float32 rounding only,
as in any physical batch (`fedlr.training.local` bounds what that can amount to).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from fedlr.data.batching import Integers, UnitIndex
from fedlr.methods.method import PartKey
from fedlr.privacy.dpsgd import ClippedSum, Mechanism, private_gradient
from fedlr.privacy.gradients import CapturedGradients, owning_layers

from .local import LocalTask, LocalTrainer, draw_rows

Arrays = dict[PartKey, Tensor]


@dataclass(frozen=True)
class _Member:
    """One client of a fused round.

    Attributes:
        task: What it does.
        units: Its rows.
        trained: Its own copy of the arrays that train.
        optimizer: Over them.
    """

    task: LocalTask
    units: UnitIndex
    trained: dict[PartKey, nn.Parameter]
    optimizer: torch.optim.Optimizer

    @property
    def mechanism(self) -> Mechanism:
        """Its clip and noise; `can_fuse` let nothing pass that has none."""
        if self.task.mechanism is None:
            raise ValueError("task.mechanism is None; only private tasks are fused")
        return self.task.mechanism


def train_together(
    trainer: LocalTrainer, tasks: Sequence[LocalTask], units: Sequence[UnitIndex]
) -> list[Arrays]:
    """Run one round of several clients and return the trained arrays of each.

    Args:
        trainer: The resident model.
        tasks: One a client.
        units: Their rows, in the order of ``tasks``.

    Returns:
        What ``trainer.train`` returns for each of them, up to float32 rounding
        (1e-5 of the update's norm): a test, for every method and both units.

    Raises:
        ValueError: As `LocalTrainer.train`.

    Edge cases:
        Tasks that cannot be fused (`can_fuse`), and one alone, are trained one after
        the other.
    """
    if not can_fuse(trainer, tasks):
        return [trainer.train(*pair) for pair in zip(tasks, units, strict=True)]
    members = []
    for task, own in zip(tasks, units, strict=True):
        shared = trainer.begin(task)
        trained = {key: nn.Parameter(value.detach().clone()) for key, value in shared.items()}
        members.append(_Member(task, own, trained, trainer.optimizer(trained)))
    gradients = CapturedGradients(trainer.classifier, shared)
    rows = RowWise(trainer.classifier, shared)
    for _ in range(trainer.settings.steps):
        sums = _clipped_sums(trainer, members, gradients, rows)
        for member, clipped in zip(members, sums, strict=True):
            direction = private_gradient(clipped, member.mechanism, member.task.noise)
            for key, parameter in member.trained.items():
                parameter.grad = direction[key]
            member.optimizer.step()
    return [
        {
            key: value.detach().to("cpu", torch.float32, copy=True)
            for key, value in m.trained.items()
        }
        for m in members
    ]


def can_fuse(trainer: LocalTrainer, tasks: Sequence[LocalTask]) -> bool:
    """Return whether ``tasks`` can share their passes through the model.

    They can where each trains privately and all train the same arrays over the same
    others, where per-unit gradients are captured at the layers in torch, and where rows need
    no shape of their own.
    """
    first, *others = tasks
    if not others or trainer.settings.gradients != "captured" or first.mechanism is None:
        return False
    if trainer.settings.own_shapes is not None or trainer.settings.kernel is not None:
        return False
    fixed = {key: value for key, value in first.parts.items() if key.role not in first.train}
    for task in others:
        if task.mechanism is None or task.train != first.train:
            return False
        if {key for key in task.parts if key.role not in task.train} != fixed.keys():
            return False
        if not all(torch.equal(task.parts[key], value) for key, value in fixed.items()):
            return False
    return True


def _clipped_sums(
    trainer: LocalTrainer, members: Sequence[_Member], gradients: CapturedGradients, rows: RowWise
) -> list[Arrays]:
    """Draw a batch for each member, and return each one's sum of clipped gradients."""
    drawn = [draw_rows(m.task, m.units, trainer.row_limit(m.task)) for m in members]
    counts = [int(index.max(initial=-1)) + 1 for _, index in drawn]
    starts = np.concatenate([[0], np.cumsum(counts)])
    all_rows = np.concatenate([own for own, _ in drawn])
    all_units = np.concatenate(
        [index + start for (_, index), start in zip(drawn, starts[:-1], strict=True)]
    )
    owner = np.repeat(np.arange(len(members)), counts)
    shapes = {key: value.shape for key, value in members[0].trained.items()}
    sums = [ClippedSum(m.mechanism, shapes, trainer.device) for m in members]
    remaining = np.bincount(all_units, minlength=int(starts[-1]))
    stacked = {key: torch.stack([m.trained[key].detach() for m in members]) for key in shapes}
    for batch in trainer.physical(all_rows, all_units):
        of_row = batch.unit_index.cpu().numpy()
        found, local = np.unique(of_row, return_inverse=True)
        remaining -= np.bincount(of_row, minlength=len(remaining))
        with rows.each_its_own(stacked, torch.from_numpy(owner[of_row]).to(trainer.device)):
            losses = partial(trainer.classifier.losses, batch)
            each = gradients(losses, torch.from_numpy(local).to(trainer.device), len(found))
        for index in np.unique(owner[found]):
            _add(sums[index], each, found, np.flatnonzero(owner[found] == index), remaining)
    return [total.result() for total in sums]


def _add(
    total: ClippedSum,
    each: Mapping[PartKey, Tensor],
    found: Integers,
    mine: Integers,
    left: Integers,
) -> None:
    """Give one member its units of a physical batch; ``left`` counts rows still to come."""
    units = found[mine]
    chosen = torch.from_numpy(mine)
    total.add(
        {key: value[chosen.to(value.device)] for key, value in each.items()},
        units.tolist(),
        (left[units] == 0).tolist(),
    )


class RowWise:
    """Linear layers whose trained arrays differ from row to row.

    Args:
        model: The module whose linear layers own ``trained``.
        trained: Weights or biases of those layers.
    """

    def __init__(self, model: nn.Module, trained: Mapping[PartKey, nn.Parameter]) -> None:
        self._layers = owning_layers(model, trained)

    @contextmanager
    def each_its_own(self, stacked: Mapping[PartKey, Tensor], owner: Tensor) -> Iterator[None]:
        """Within the context row i is multiplied with the arrays of client ``owner[i]``.

        Args:
            stacked: Per trained array those of all clients, shape (clients, *shape).
            owner: Client of each row of the batch, shape (N,), int64.
        """
        # The modules stay: their hooks are how gradients are captured. All is made before
        # anything is replaced, so that a lack of memory leaves the model as it was.
        forwards = [self._own(*entry, stacked, owner) for entry in self._layers]
        layers = [vars(layer) for layer, _, _ in self._layers]
        before = [layer.get("forward") for layer in layers]
        try:
            for layer, forward in zip(layers, forwards, strict=True):
                layer["forward"] = forward
            yield
        finally:
            for layer, forward_before in zip(layers, before, strict=True):
                layer.pop("forward", None)
                if forward_before is not None:
                    layer["forward"] = forward_before

    def _own(
        self,
        layer: nn.Linear,
        weight: PartKey | None,
        bias: PartKey | None,
        stacked: Mapping[PartKey, Tensor],
        owner: Tensor,
    ) -> Callable[[Tensor], Tensor]:
        weights = layer.weight[None] if weight is None else stacked[weight][owner]
        biases = layer.bias if bias is None else stacked[bias][owner].unsqueeze(1)
        return partial(_row_linear, weights.requires_grad_(), biases)


def _row_linear(weights: Tensor, biases: Tensor | None, inputs: Tensor) -> Tensor:
    """Return x·Wᵢᵀ + bᵢ for row i; inputs (N, …, n), weights (N or 1, m, n)."""
    rows = inputs.shape[0]
    tokens = inputs.reshape(rows, -1, inputs.shape[-1])  # N x T x n
    output = torch.matmul(tokens, weights.to(tokens.dtype).mT)  # N x T x m
    if biases is not None:
        output = output + biases.to(tokens.dtype)
    return output.reshape(*inputs.shape[:-1], output.shape[-1])

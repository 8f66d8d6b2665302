"""Several clients of one round in one forward and backward pass.

Clients of a round share everything but the arrays they train. So their rows can run
through the base model together, each row multiplied with its own client's arrays
(serving many adapters at once, as S-LoRA does: Sheng et al., arXiv 2311.03285). It pays
where one client's batch is too small to keep the machine busy.

Only the arithmetic is shared. Each client draws its units from its own stream, has its
units clipped into a sum of its own, gets noise from its own stream and takes its own
optimiser step. A row's gradient depends on its companions up to float32 rounding only,
as in any physical batch (`fedlr.training.sizes` bounds what that can amount to).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from fedlr.data.batching import Integers, UnitIndex, moved
from fedlr.methods.method import PartKey
from fedlr.privacy.gradients import CapturedGradients, owning_layers

from .local import LocalTrainer
from .task import LocalTask, Member

Arrays = dict[PartKey, Tensor]


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
        Only tasks whose arrays have equal shapes share passes: where ranks differ, those
        of one rank do. Tasks that cannot be fused (`can_fuse`), and one alone, are
        trained one after the other.
    """
    found: dict[int, Arrays] = {}
    for alike in _of_equal_shapes(tasks):
        trained = _train_alike(trainer, [tasks[i] for i in alike], [units[i] for i in alike])
        found.update(zip(alike, trained, strict=True))
    return [found[index] for index in range(len(tasks))]


def _of_equal_shapes(tasks: Sequence[LocalTask]) -> list[list[int]]:
    """Return the places of the tasks, those with arrays of the same shapes together."""
    groups: dict[frozenset[tuple[PartKey, torch.Size]], list[int]] = {}
    for index, task in enumerate(tasks):
        groups.setdefault(_shapes(task), []).append(index)
    return list(groups.values())


def _shapes(task: LocalTask) -> frozenset[tuple[PartKey, torch.Size]]:
    return frozenset((key, value.shape) for key, value in task.parts.items())


def _train_alike(
    trainer: LocalTrainer, tasks: Sequence[LocalTask], units: Sequence[UnitIndex]
) -> list[Arrays]:
    if not can_fuse(trainer, tasks):
        return [trainer.train(*pair) for pair in zip(tasks, units, strict=True)]
    members = []
    for task, own in zip(tasks, units, strict=True):
        shared = trainer.begin(task)
        trained = {key: nn.Parameter(value.detach().clone()) for key, value in shared.items()}
        members.append(Member(task, own, trained, trainer.optimizer(trained)))
    gradients = CapturedGradients(trainer.classifier, shared)
    trainer.run(members, gradients, RowWise(trainer.classifier, shared).of)
    return [member.result() for member in members]


def can_fuse(trainer: LocalTrainer, tasks: Sequence[LocalTask]) -> bool:
    """Return whether ``tasks`` can share their passes through the model.

    They can where each trains privately and all train arrays of the same shapes over the
    same others, where per-unit gradients are captured at the layers in torch, and where rows need
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
        if _shapes(task) != _shapes(first):
            return False
        if not all(_equal(task.parts[key], value) for key, value in fixed.items()):
            return False
    return True


def _equal(one: Tensor, other: Tensor) -> bool:
    return one is other or torch.equal(one, other)


class RowWise:
    """Linear layers whose trained arrays differ from row to row.

    Args:
        model: The module whose linear layers own ``trained``.
        trained: Weights or biases of those layers.
    """

    def __init__(self, model: nn.Module, trained: Mapping[PartKey, nn.Parameter]) -> None:
        self._layers = owning_layers(model, trained)

    def of(
        self, arrays: Sequence[Mapping[PartKey, Tensor]]
    ) -> Callable[[Integers], AbstractContextManager[None]]:
        """Return what gives each row the arrays of its client, see `each_its_own`.

        Args:
            arrays: The trained arrays of each client, of equal keys and shapes.
        """
        stacked = {key: torch.stack([own[key].detach() for own in arrays]) for key in arrays[0]}
        device = next(iter(stacked.values())).device
        return lambda owner: self.each_its_own(stacked, moved(torch.from_numpy(owner), device))

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

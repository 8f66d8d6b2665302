"""What one client does in one round: its task, the rows it draws, the arrays it moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedlr.data.batching import Integers, UnitIndex, keep_at_most
from fedlr.methods.method import PartKey, Parts, Role
from fedlr.privacy.dpsgd import Mechanism
from fedlr.privacy.noise import Stream


@dataclass(frozen=True)
class LocalTask:
    """What one client does in one round.

    Attributes:
        parts: Broadcast arrays, written before the first step; the others start
            as they were when the trainer was made (B = 0, a core the identity), not as
            an earlier client or round left them. A residual is part of the base for the
            round. Where A, B and a core of a site are cut to its leading k columns, the
            others do not exist: k columns train, are clipped, get noise and come back.
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


@dataclass(frozen=True)
class Member:
    """One client of a round: alone, or beside others in the same passes.

    Attributes:
        task: What it does.
        units: Its rows.
        trained: The arrays that train: the model's where it is alone, else copies of its own.
        optimizer: Over them.
    """

    task: LocalTask
    units: UnitIndex
    trained: dict[PartKey, nn.Parameter]
    optimizer: torch.optim.Optimizer

    @property
    def mechanism(self) -> Mechanism:
        """Its clip and noise, where it trains privately."""
        if self.task.mechanism is None:
            raise ValueError("task.mechanism is None; only private tasks clip and share passes")
        return self.task.mechanism

    def step(self, direction: Mapping[PartKey, Tensor]) -> None:
        """Take one step of the optimiser along ``direction``."""
        for key, parameter in self.trained.items():
            parameter.grad = direction[key]
        self.optimizer.step()

    def result(self) -> dict[PartKey, Tensor]:
        """Return copies of the trained arrays: float32 on the CPU."""
        return {
            key: value.detach().to("cpu", torch.float32, copy=True)
            for key, value in self.trained.items()
        }


@dataclass(frozen=True, eq=False)
class Drawn:
    """The logical batches of one step, those of all members side by side.

    Attributes:
        rows: Row indices, member after member, shape (n,), int64.
        unit_index: Unit of each row, 0 … k - 1, numbered through all members, shape (n,).
        owner: Member of each unit, shape (k,), int64.
    """

    rows: Integers
    unit_index: Integers
    owner: Integers

    @classmethod
    def of(cls, batches: Sequence[tuple[Integers, Integers]]) -> Drawn:
        """Join what `draw_rows` returned for each member.

        Example:
            >>> one = (np.array([7, 8]), np.array([0, 0]))
            >>> both = Drawn.of([one, one])
            >>> both.unit_index.tolist(), both.owner.tolist()
            ([0, 0, 1, 1], [0, 1])
        """
        counts = [int(index.max(initial=-1)) + 1 for _, index in batches]
        starts = np.cumsum([0, *counts])[:-1]
        shifted = [index + start for (_, index), start in zip(batches, starts, strict=True)]
        return cls(
            np.concatenate([rows for rows, _ in batches]),
            np.concatenate(shifted),
            np.repeat(np.arange(len(batches)), counts),
        )

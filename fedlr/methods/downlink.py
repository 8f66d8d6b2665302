"""What a method sends in the place of A: a basis once, then small rotations of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from fedlr.methods.method import GlobalState, Parts


@dataclass(frozen=True)
class Compact:
    """A as rotations of a basis that does not change: `fedlr.lowrank.rotation.rotate` gives it.

    Attributes:
        rotations: Q of every site under (site, ``ROTATION``), shape (k, r), float32.
        basis: A₀ of every site under (site, ``A``), shape (r, n), float32; the same in
            every round, so that a client needs it once.
    """

    rotations: Parts
    basis: Parts


@runtime_checkable
class Compacting(Protocol):
    """A method that can send rotations in the place of A."""

    def compact(self, state: GlobalState, rank: int | None = None) -> Compact | None:
        """Return what stands for the A's of ``broadcast(state, rank)``.

        Returns:
            Rotations that give those A's bit for bit; None where A is to be sent itself.
        """
        ...

"""Which results no other one beats in everything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Offer:
    """What a run gives and what it takes.

    Attributes:
        accuracy: More is better.
        epsilon: ε, less is better; ∞ without privacy.
        traffic: Bytes, less is better.

    Raises:
        ValueError: A number is NaN.
    """

    accuracy: float
    epsilon: float
    traffic: float

    def __post_init__(self) -> None:
        for name in ("accuracy", "epsilon", "traffic"):
            if getattr(self, name) != getattr(self, name):
                raise ValueError(f"{name} = nan must be a number")

    def beats(self, other: Offer) -> bool:
        """Return whether this one is at least as good in everything, and better in something."""
        mine, theirs = self._losses(), other._losses()
        return mine != theirs and all(m <= t for m, t in zip(mine, theirs, strict=True))

    def _losses(self) -> tuple[float, float, float]:
        return -self.accuracy, self.epsilon, self.traffic


def front(offers: Sequence[Offer]) -> list[int]:
    """Return the places of those that no other one beats, rising; equal ones are all in it.

    Example:
        >>> front([Offer(0.9, 8.0, 10), Offer(0.8, 8.0, 10), Offer(0.8, 1.0, 20)])
        [0, 2]
    """
    return [
        place
        for place, offer in enumerate(offers)
        if not any(other.beats(offer) for other in offers)
    ]

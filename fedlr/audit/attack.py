"""The observer: what a site released → who was in its data, with abstentions fixed in advance.

The filter is chosen so that independent noise and repeated noise are both attacked by
one number, and no correction for several attempts is needed: see the README.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedlr import checks
from fedlr.audit.bound import Guesses
from fedlr.audit.canaries import Directions
from fedlr.methods.method import Parts, Role
from fedlr.training.local import LocalSettings

LARGEST_NEVER_DRAWN = 0.02
"""Above this chance that no step draws an included canary, low scores are not guessed at."""


def signs(rounds: int) -> tuple[int, ...]:
    """Return the sign of every canary's gradient in each round: +, -, +, - …

    They add up to zero, so that whatever is equal in all rounds cancels: repeated
    noise, and the mean gradient of the site's own data. An odd round at the end is
    left out (0). A single round has nothing to be compared with and gets +.

    Example:
        >>> signs(1), signs(2), signs(5)
        ((1,), (1, -1), (1, -1, 1, -1, 0))
    """
    checks.at_least("rounds", rounds, 1)
    if rounds == 1:
        return (1,)
    return tuple((-1) ** index if index < rounds - rounds % 2 else 0 for index in range(rounds))


class Observer:
    """Adds up, round by round, how far each release went along each canary's direction.

    Args:
        directions: Of the canaries.
        settings: Public settings of local training: the two step sizes.
    """

    def __init__(self, directions: Directions, settings: LocalSettings) -> None:
        self._directions, self._settings = directions, settings
        self.scores: Tensor = torch.zeros(directions.count, dtype=torch.float64)

    def see(self, before: Parts, after: Parts, sign: int) -> None:
        """Take one release.

        Args:
            before: What the round was started from.
            after: What the site sent back.
            sign: Sign of the canaries' gradients in this round.
        """
        steps = {
            key: (before[key].double() - after[key].double()) / self._rate(key.role)
            for key in self._directions.owner
        }
        self.scores += sign * self._directions.project(steps)

    def _rate(self, role: Role) -> float:
        settings = self._settings
        return settings.head_learning_rate if role is Role.HEAD else settings.learning_rate


@dataclass(frozen=True)
class Quota:
    """How many canaries are guessed, fixed before anything is released.

    Attributes:
        included: Highest scores that are guessed to have been included.
        excluded: Lowest scores that are guessed to have been left out.
    """

    included: int
    excluded: int

    @staticmethod
    def of(canaries: int, never_drawn: float) -> Quota:
        """Return a tenth of the canaries each way; only inclusions where absence says little.

        Args:
            canaries: m.
            never_drawn: Public probability that no step draws an included canary,
                (1 - q)^steps. It then looks as if it were left out.

        Example:
            >>> Quota.of(1000, never_drawn=0.0), Quota.of(1000, never_drawn=0.5)
            (Quota(included=100, excluded=100), Quota(included=100, excluded=0))
        """
        tenth = canaries // 10
        return Quota(tenth, tenth if never_drawn <= LARGEST_NEVER_DRAWN else 0)


def guess(scores: Tensor, coins: npt.NDArray[np.bool_], quota: Quota) -> Guesses:
    """Guess, abstain on all canaries beyond the quota, and look at the coins.

    Args:
        scores: Shape (m,), finite.
        coins: Whether each canary was included, shape (m,).
        quota: Its numbers add up to m or less.

    Raises:
        ValueError: The quota exceeds the canaries.

    Example:
        >>> guess(torch.tensor([0.1, 3.0, -1.0, 2.0]), np.array([1, 1, 0, 0]) > 0, Quota(2, 1))
        Guesses(canaries=4, guesses=3, correct=2)
    """
    count, guesses = len(coins), quota.included + quota.excluded
    if guesses > count:
        raise ValueError(f"{quota} has {guesses} guesses, above canaries = {count}")
    order = np.argsort(scores.numpy(), kind="stable")
    highest, lowest = order[count - quota.included :], order[: quota.excluded]
    return Guesses(count, guesses, int(coins[highest].sum() + (~coins[lowest]).sum()))

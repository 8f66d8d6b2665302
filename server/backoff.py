"""Who is left out of the next rounds because it gave no update: longer after each failure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from fedlr import checks


@dataclass
class _Failing:
    """Failures in a row, and the first attempt at a round that the client is asked in again."""

    count: int
    until: int


class BackOff:
    """Leaves a client that failed k times in a row out of min(2ᵏ⁻¹, `longest`) attempts at rounds.

    Counted in attempts, not in seconds, so that it depends on the answers alone. It is the
    memory of one process: a resumed run begins without it.

    Args:
        longest: Most attempts in a row that a client is left out of; 0 leaves nobody out.

    Raises:
        ValueError: ``longest`` < 0.

    Example:
        >>> waits = BackOff(longest=4)
        >>> waits.closed(answered=["a"], failed=["b"])
        >>> waits.paused()
        frozenset({'b'})
        >>> waits.closed(answered=["a"], failed=[])
        >>> waits.paused()
        frozenset()
    """

    def __init__(self, longest: int) -> None:
        self._longest = checks.at_least("longest", longest, 0)
        self._failing: dict[str, _Failing] = {}
        self._attempts = 0

    def closed(self, answered: Collection[str], failed: Collection[str]) -> None:
        """Note what an attempt at a round brought.

        Args:
            answered: Clients that gave what was asked; their failures are forgotten.
            failed: Clients that did not.
        """
        self._attempts += 1
        for client in answered:
            self._failing.pop(client, None)
        for client in failed if self._longest else ():
            failing = self._failing.setdefault(client, _Failing(0, 0))
            failing.count += 1
            pause = min(2 ** min(failing.count - 1, 30), self._longest)
            failing.until = self._attempts + pause

    def paused(self) -> frozenset[str]:
        """Return the clients that are left out of the next attempt."""
        return frozenset(
            client for client, failing in self._failing.items() if failing.until > self._attempts
        )

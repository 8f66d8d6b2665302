"""Who takes part in a round: a public function of the seed and the round."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

from fedlr import checks


def cohort(
    seed: int,
    round: int,
    clients: Collection[int],
    per_round: int,
    first: Collection[int] = (),
    last: Collection[int] = (),
) -> tuple[int, ...]:
    """Return the clients of one round: those with the smallest keyed digests.

    Client i has the key SHA-256(seed, round, i). Keys are independent and
    uniform, so the smallest ``per_round`` are a uniform sample without
    replacement, and a round depends on no other one.

    Args:
        seed: Public seed of the run, any integer.
        round: Zero-based round.
        clients: Indices of those that may be drawn, K ≥ 1 of them. A client that is not
            there changes the place of no other one.
        per_round: Cohort size, in [1, K].
        first: Clients that are taken before all others.
        last: Clients that are taken where there are too few others.

    Returns:
        ``per_round`` distinct ones of ``clients``, sorted.

    Raises:
        ValueError: An argument outside its range.

    Guarantees:
        Pure; equal on every machine and in every version of Python.

    Edge cases:
        ``per_round`` = K is full participation in every round.

    Example:
        >>> cohort(seed=7, round=0, clients=range(3), per_round=3)
        (0, 1, 2)
        >>> cohort(7, 0, range(10), 4) == cohort(7, 0, range(10), 4)
        True
    """
    checks.at_least("round", round, 0)
    checks.at_least("clients", len(clients), 1)
    checks.at_least("per_round", per_round, 1)
    checks.in_range("per_round", per_round, 1, len(clients))
    order = [(i not in first, i in last, _key(seed, round, i), i) for i in clients]
    return tuple(sorted(client for *_, client in sorted(order)[:per_round]))


def _key(seed: int, round: int, client: int) -> bytes:
    return hashlib.sha256(f"fedlr.cohort.v1:{seed}:{round}:{client}".encode()).digest()

"""Clients that stopped because they have given what they may."""

from __future__ import annotations

from collections.abc import Iterable

from fedlr.report.records import RoundRecord

BOUNDS = {
    "budget": "the round would have exceeded its ε",
    "run_budget": "the round would have exceeded its ε for one run",
    "month_budget": "the round would have exceeded its ε for thirty days",
    "max_joins": "it had joined as often as its noise allows",
}
"""Codes of sites that stop because they have given what they may, in words."""


def stops(records: Iterable[RoundRecord]) -> dict[str, tuple[int, str]]:
    """Return (first round it stayed out of, code) of every client that reached a bound.

    Example:
        >>> stops([])
        {}
    """
    first: dict[str, tuple[int, str]] = {}
    for record in records:
        for refusal in record.refused:
            if refusal.code in BOUNDS:
                first.setdefault(refusal.client, (record.round, refusal.code))
    return dict(sorted(first.items()))

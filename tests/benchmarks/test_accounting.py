"""Seconds of a site's budget check: the whole history and one more round, nothing cached."""

from __future__ import annotations

import pytest

from fedlr.privacy import accounting
from fedlr.privacy.accounting import epsilon
from fedlr.privacy.events import Release

from .ratios import seconds

pytestmark = pytest.mark.bench


def history(count: int) -> list[Release]:
    """``count`` runs of ten rounds by five steps, each with noise and rate of its own."""
    return [
        Release(0.8 + 0.02 * number, 0.005 + 0.0003 * number, 50, "example")
        for number in range(count)
    ]


@pytest.mark.parametrize("count", [1, 10, 100, 1000])
def test_budget_check(count: int) -> None:
    epsilon([Release(1.0, 0.5, 1, "example")], 1e-5)  # imports
    events = [*history(count), Release(1.0, 0.1, 5, "example")]
    accounting._divergences.cache_clear()
    accounting._cached.cache_clear()
    first = seconds(lambda: epsilon(events, 1e-5))
    events.append(Release(1.0, 0.1, 5, "example"))
    later = seconds(lambda: epsilon(events, 1e-5))
    again = seconds(lambda: epsilon(events, 1e-5))
    print(
        f"\nbudget check, {count} different events: first {first:.2f} s, "
        f"a round later {later:.2f} s, repeated {again * 1000:.1f} ms",
        flush=True,
    )
    assert 0 < epsilon(events, 1e-5) <= epsilon(events, 1e-5, "rdp")

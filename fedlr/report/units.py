"""Numbers as people read them; every function returns plain text."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Decimal

_SIZES = ("B", "kB", "MB", "GB", "TB")


def data_size(count: int | float) -> str:
    """Return a number of bytes in decimal units (1 kB = 1000 B).

    Example:
        >>> data_size(0), data_size(58_432), data_size(999_999)
        ('0 B', '58.4 kB', '1.0 MB')
    """
    size = float(count)
    for unit in _SIZES[:-1]:
        if size < (999.5 if unit == "B" else 999.95):
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} {_SIZES[-1]}"


def duration(seconds: float) -> str:
    """Return a duration in s, min or h.

    Example:
        >>> duration(3.21), duration(59.7), duration(125), duration(7260)
        ('3.2 s', '1 min 0 s', '2 min 5 s', '2 h 1 min')
    """
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_left} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def percent(share: float | None) -> str:
    """Return a share in [0, 1] as per cent with one decimal; a dash for None.

    Example:
        >>> percent(0.7137), percent(None)
        ('71.4 %', '—')
    """
    return "—" if share is None else f"{100 * share:.1f} %"


def privacy_loss(epsilon: float | None) -> str:
    """Return ε with two decimals, rounded *up*: it never looks better than it is.

    Example:
        >>> privacy_loss(1.2301), privacy_loss(1.1), privacy_loss(math.inf), privacy_loss(None)
        ('1.24', '1.10', '∞', '—')
    """
    if epsilon is None:
        return "—"
    if math.isinf(epsilon):
        return "∞"
    return str(Decimal(repr(float(epsilon))).quantize(Decimal("0.01"), rounding=ROUND_CEILING))


def printable(text: str) -> str:
    """Return ``text`` with every control character replaced by ``?``.

    Names come from other machines: one with an escape sequence must not move
    the cursor of the terminal it is shown on.

    Example:
        >>> printable("site\\x1b[2J-3")
        'site?[2J-3'
    """
    return "".join(character if character.isprintable() else "?" for character in text)

"""How Flower behaves in our processes: no call home, no log lines of its own.

Flower reads the telemetry variable when it is imported, so `stay_offline` runs
in the package's ``__init__``, before any module here imports ``flwr``. In a
deployment Flower's own programs start first: set both variables for them too.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

OFFLINE = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
"""Variables that stop Flower's usage reports and its check for a newer version."""


def stay_offline() -> None:
    """Set `OFFLINE` where the operator has not set another value."""
    for name, value in OFFLINE.items():
        os.environ.setdefault(name, value)


@contextmanager
def quiet_flower(level: int = logging.WARNING) -> Iterator[None]:
    """Drop Flower's log records below ``level`` inside the block; other loggers keep theirs.

    Args:
        level: The least severity that is still shown.
    """
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)

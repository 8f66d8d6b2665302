"""Runs of one test process that share what they can, as the runs of a sweep do."""

from __future__ import annotations

from functools import partial

import pytest

from fedlr.build import build
from fedlr.reuse import Reuse
from server.session import begin


def share(monkeypatch: pytest.MonkeyPatch, reuse: Reuse) -> None:
    """Have every run of this process take model, rows and examination from ``reuse``, where
    nothing that decides them differs; no number of a run depends on it (`tests/test_reuse.py`).
    """
    monkeypatch.setattr("fedlr.build.build", partial(build, reuse=reuse))
    monkeypatch.setattr("server.session.begin", partial(begin, reuse=reuse))

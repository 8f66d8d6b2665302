"""What one check found, and how a check becomes a finding."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["passed", "warning", "failed"]


@dataclass(frozen=True)
class Result:
    """What a check measured.

    Attributes:
        passed: Whether what was measured is within its bound.
        detail: The measured value and its bound; public.
        warning: Whether a reader should act although nothing is wrong.
    """

    passed: bool
    detail: str
    warning: bool = False


@dataclass(frozen=True)
class Check:
    """One question and how to answer it.

    Attributes:
        name: Short, unique.
        ask: Measures; whatever it raises counts as a failure.
        remedy: What a user can do where it fails.
    """

    name: str
    ask: Callable[[], Result]
    remedy: str


@dataclass(frozen=True)
class Finding:
    """The answer to one check.

    Attributes:
        name: Of the check.
        passed: Whether it holds.
        detail: The measured value and its bound.
        seconds: Duration of the check.
        warning: Whether it holds, but a reader should act.
        remedy: What a user can do; empty where nothing is wrong.
    """

    name: str
    passed: bool
    detail: str
    seconds: float = field(compare=False)
    warning: bool = False
    remedy: str = ""

    @property
    def verdict(self) -> Verdict:
        """``passed``, ``warning`` or ``failed``."""
        if not self.passed:
            return "failed"
        return "warning" if self.warning else "passed"


def find(check: Check) -> Finding:
    """Run ``check``; a check that cannot be carried out has failed.

    Example:
        >>> find(Check("sum", lambda: Result(1 + 1 == 2, "1 + 1 = 2"), "buy an abacus")).verdict
        'passed'
    """
    began = time.perf_counter()
    try:
        result = check.ask()
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        result = Result(False, f"could not be carried out: {type(error).__name__}: {reason}")
    seconds = time.perf_counter() - began
    remedy = check.remedy if result.warning or not result.passed else ""
    return Finding(check.name, result.passed, result.detail, seconds, result.warning, remedy)

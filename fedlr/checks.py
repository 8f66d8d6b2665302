"""Checkers for numbers and shapes: the message names argument, value and bound.

Each returns the checked value so that it can be used in an expression. NaN is
rejected first, because every comparison with NaN is false.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def finite(name: str, value: float) -> float:
    """Return ``value`` if it is a finite number.

    Raises:
        ValueError: ``value`` is NaN or infinite.

    Example:
        >>> finite("learning_rate", 0.5)
        0.5
    """
    if not math.isfinite(value):
        raise ValueError(f"{name} = {value} must be a finite number")
    return value


def positive(name: str, value: float) -> float:
    """Return ``value`` if it is finite and > 0; ValueError otherwise."""
    if not finite(name, value) > 0:
        raise ValueError(f"{name} = {value} must be > 0")
    return value


def non_negative(name: str, value: float) -> float:
    """Return ``value`` if it is finite and ≥ 0; ValueError otherwise."""
    if not finite(name, value) >= 0:
        raise ValueError(f"{name} = {value} must be ≥ 0")
    return value


def in_range(name: str, value: float, low: float, high: float) -> float:
    """Return ``value`` if low ≤ value ≤ high; ValueError otherwise.

    Example:
        >>> in_range("sample_rate", 1.5, 0.0, 1.0)
        Traceback (most recent call last):
            ...
        ValueError: sample_rate = 1.5 must be in [0.0, 1.0]
    """
    if not low <= finite(name, value) <= high:
        raise ValueError(f"{name} = {value} must be in [{low}, {high}]")
    return value


def at_least(name: str, value: int, low: int) -> int:
    """Return the integer ``value`` if it is ≥ ``low``; ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} = {value!r} must be an integer")
    if value < low:
        raise ValueError(f"{name} = {value} must be ≥ {low}")
    return value


def one_of(name: str, value: str, choices: Sequence[str]) -> str:
    """Return ``value`` if it is one of ``choices``; ValueError otherwise."""
    if value not in choices:
        raise ValueError(f"{name} = {value!r} must be one of {', '.join(choices)}")
    return value


def same_shape(name: str, shape: Sequence[int], expected: Sequence[int]) -> None:
    """Check a tensor shape; ValueError naming both shapes otherwise."""
    if tuple(shape) != tuple(expected):
        raise ValueError(f"{name} has shape {tuple(shape)}, expected {tuple(expected)}")

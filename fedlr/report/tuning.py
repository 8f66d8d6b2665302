"""What a sweep tunes before it reports: one setting, its values, a seed of its own."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """One setting that is chosen for every combination by runs on a seed of their own.

    Every combination (method, ε, …) gets the value with which one run on ``seed`` is the
    most accurate; what is reported are runs on other seeds with that value.

    Attributes:
        setting: Name on the command line, such as ``optimizer.learning_rate``.
        values: At least two numbers as on the command line, in rising order.
        without_privacy: The same for combinations at ``privacy.epsilon=inf``, whose steps are
            not clipped; empty takes ``values``.
        seed: Public seed of the tuning runs, ≥ 0; never among those that are reported.

    Raises:
        ValueError: Fewer than two values, one that is no finite number, or no such seed.
    """

    setting: str
    values: tuple[str, ...]
    without_privacy: tuple[str, ...] = ()
    seed: int

    def __post_init__(self) -> None:
        if not self.setting:
            raise ValueError("tune.setting is empty; name one, such as optimizer.learning_rate")
        _check("tune.values", self.values)
        if self.without_privacy:
            _check("tune.without_privacy", self.without_privacy)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"tune.seed = {self.seed!r} must be a whole number ≥ 0")

    def offered(self, unbounded: bool) -> tuple[str, ...]:
        """Return the values that a combination is tuned over.

        Args:
            unbounded: Whether it is at ``privacy.epsilon=inf``.
        """
        return self.without_privacy if unbounded and self.without_privacy else self.values


def tuning_of(
    setting: str, values: str, seed: str | int, without_privacy: str | None = None
) -> Tuning:
    """Return a `Tuning` of what a person wrote: values apart by commas, in any order.

    Raises:
        ValueError: As `Tuning`.

    Example:
        >>> tuning_of("optimizer.learning_rate", "4, 1,2.0,2", "100").values
        ('1', '2.0', '4')
    """
    text = str(seed)
    return Tuning(
        setting=setting,
        values=_rising("tune.values", values),
        without_privacy=(
            () if without_privacy is None else _rising("tune.without_privacy", without_privacy)
        ),
        seed=int(text) if text.isascii() and text.isdecimal() else -1,
    )


def slug(name: str) -> str:
    """Return a variant's name as it is written on a command line.

    Example:
        >>> slug("FFA-LoRA (Kaiming A)")
        'ffa-lora-kaiming-a'
    """
    return re.sub(r"[^a-z0-9._]+", "-", name.lower()).strip("-.")


def _rising(name: str, text: str) -> tuple[str, ...]:
    """Return the numbers of a list in rising order, each once; 2 and 2.0 are the same."""
    found: dict[float, str] = {}
    for part in (part.strip() for part in text.split(",")):
        found.setdefault(_number(name, part), part)
    return tuple(found[number] for number in sorted(found))


def _check(name: str, values: tuple[str, ...]) -> None:
    numbers = [_number(name, value) for value in values]
    if len(set(numbers)) < 2 or numbers != sorted(set(numbers)):
        raise ValueError(
            f"{name} = {','.join(values)} must be at least two different numbers, such as 1,2,4"
        )


def _number(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name}: {text!r} must be a finite number; write them as 1,2,4")
    return number

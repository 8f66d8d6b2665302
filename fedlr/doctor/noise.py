"""Noise: there, of the right size, different every time, from secret entropy."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import torch
from torch import Tensor

from fedlr.doctor.finding import Result
from fedlr.doctor.subject import Subject, chosen_units
from fedlr.methods.method import PartKey, Role
from fedlr.privacy.dpsgd import Mechanism, clip_groups, private_gradient
from fedlr.privacy.noise import Stream, public_stream, task_streams

FALSE_ALARM = 1e-9
"""Largest probability that honest noise fails `present_and_fresh`."""

FEWEST_VALUES = 2048
"""Steps are repeated until there are so many noise values: then ⅔ of σC is told from σC."""


def present_and_fresh(subject: Subject) -> Result:
    """Compare the noise of private steps with N(0, σ²C²), on rows and on an empty draw.

    Two steps on equal data and an empty one are repeated until there are
    `FEWEST_VALUES`. Released less the noiseless sum is the noise, N₁ and N₂, of the
    two; the empty step's is N₃. Each of N₁, N₂, N₃ and (N₁ − N₂)/√2 must have the
    deviation σC: the last is 0 where the two steps share a stream.
    """
    sigma = subject.noise_multiplier
    clean = subject.release(subject.units, 0.0)
    repeats = math.ceil(FEWEST_VALUES / len(clean))
    first, second, empty = (
        torch.cat([subject.release(units, sigma) - base for _ in range(repeats)]) / sigma
        for units, base in (
            (subject.units, clean),
            (subject.units, clean),
            (chosen_units(()), torch.zeros_like(clean)),
        )
    )
    difference = (first - second) / math.sqrt(2)
    low, high = deviation_bounds(len(first), 4)
    found = [_deviation(values) for values in (first, second, empty, difference)]
    return Result(
        all(low <= value <= high for value in found),
        f"deviation {found[0]:.3f} and {found[1]:.3f} σC in two steps, {found[2]:.3f} in an empty "
        f"one, {found[3]:.3f} in their difference; bound {low:.3f} … {high:.3f} "
        f"({len(first)} values)",
    )


def deviation_bounds(count: int, samples: int) -> tuple[float, float]:
    """Return where the root mean square of ``count`` standard normals lies.

    The probability that any of ``samples`` of them lies outside is at most
    `FALSE_ALARM`: χ² tails of Laurent and Massart 2000 (doi 10.1214/aos/1015957395),
    lemma 1.

    Example:
        >>> [round(bound, 2) for bound in deviation_bounds(2048, 4)]
        [0.89, 1.11]
    """
    t = math.log(2 * samples / FALSE_ALARM) / count
    return math.sqrt(max(0.0, 1 - 2 * math.sqrt(t))), math.sqrt(1 + 2 * math.sqrt(t) + 2 * t)


def secret_entropy() -> Result:
    """Check that a task's streams differ, ignore seeds, cannot be copied, and are insisted on.

    They are made by `fedlr.privacy.noise.task_streams`, as a site makes them: for one job
    that is asked for twice, under one seed of every other generator.
    """
    with torch.random.fork_rng(devices=[]):
        streams: list[Stream] = []
        draws = []
        for _ in range(2):
            torch.manual_seed(0)
            made = task_streams(True, 0, "client", 0)
            streams += made
            draws += [stream.gaussian((8,), 1.0) for stream in made]
    problems = []
    if any(torch.equal(*pair) for pair in itertools.combinations(draws, 2)):
        problems.append("two streams give the same numbers")
    if any(map(_copies, streams)):
        problems.append("a stream can be copied or pickled")
    if not all(stream.secret for stream in streams):
        problems.append("a task's stream is not from the system's entropy")
    if _accepts_public_noise():
        problems.append("noise from a public stream is accepted")
    return Result(
        not problems,
        "; ".join(problems)
        or "four streams of one task differ under one seed; no copy, no pickle, none public",
    )


def _deviation(values: Tensor) -> float:
    return float(values.pow(2).mean().sqrt())


def _copies(stream: Stream) -> bool:
    for way in (copy.copy, copy.deepcopy, pickle.dumps):
        try:
            way(stream)
        except TypeError:
            continue
        return True
    return False


def _accepts_public_noise() -> bool:
    key = PartKey("doctor", Role.B)
    mechanism = Mechanism(1.0, clip_groups([key], 1.0, None), 1.0, 1)
    try:
        private_gradient({key: torch.zeros(1)}, mechanism, public_stream("doctor"))
    except ValueError:
        return False
    return True

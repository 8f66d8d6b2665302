"""Histories → ε by numerical composition (PRV): Algorithm 1 of Gopi et al., both directions.

What is composed. One step releases N(0, σ²) without the unit in question, and with it
N(1, σ²) with probability q, else N(0, σ²): Q = N(0, σ²) and P = (1-q)·Q + q·N(1, σ²) are
the worst case, see Zhu et al. A site's unit is either there in every step or in none, so
an adaptive history costs no more than the larger of two products: every P against every Q
(the unit is *removed*) and every Q against every P (it is *added*). With the privacy loss
L = log(dP/dQ), the first sums L under P, the second -L under Q. Both are composed here
and the larger ε counts. That addition costs no more than removal is proved for one step;
Lebeda et al. show how such beliefs fail under composition. At q = 1 they are equal.

What is approximated, for each direction:

- truncation: outside [-W, W], with W the caller's half width, the losses are ignored:
  at most δ_error = δ/1000. A Rényi bound for removal serves for addition too, whose
  divergences are no larger (Mironov et al., theorem 5);
- discretisation: each step's loss is put on cells of a mesh, then moved so that its mean
  stays what it is. By theorem 5.5 of Gopi et al. the sum is off by more than
  cell·√(steps·ln(12/δ_error)/2) with probability δ_error at most; that is the ε error;
- wrapping: FFT knows sums modulo 2W only. The window on which the sum is read must be
  [-W, W] *after* the move to the right mean: its whole cells turn the circle, and only the
  rest of a cell moves the window. Mass where none can be, at the ends, is refused;
- rounding: about steps·2⁻⁵² in δ. The caller refuses a δ that small.

Reference:
    Gopi, Lee, Wutschitz 2021 (arXiv 2106.02848); Zhu, Dong, Wang 2022 (arXiv 2106.08567);
    Lebeda et al. 2024 (arXiv 2405.20769); Mironov et al. 2019 (arXiv 1908.10530).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedlr.privacy.events import Release

if TYPE_CHECKING:
    from opacus.accountants.analysis.prv import Domain

Floats = npt.NDArray[np.float64]

EPSILON_ERROR = 0.001
"""Discretisation error of PRV, added to the returned upper bound."""

# exp overflows float64 at 709, and densities of the privacy loss hold exp(2t).
LARGEST_LOSS = 300.0
"""Privacy losses up to here are computed with."""

_LARGEST_EPSILON_ERROR = 0.1
_MESH_POINTS = 2**22
_TOTAL_MESH_POINTS = 2**24
# Largest share of δ within 1 of an end of the window; by the choice of W it is 1/1000.
_EDGE_SHARE = 0.01


def upper_epsilon(history: Sequence[Release], delta: float, half_width: float) -> float:
    """Return an upper bound on ε at ``delta``: the larger of both directions.

    Args:
        history: Different mechanisms, at least one, with σ > 0.
        delta: δ, in (0, 1).
        half_width: W: outside [-(W - 1), W - 1] neither the loss of all nor that of
            any one step may have more than about δ/1000.

    Returns:
        The upper end of PRV's interval; may be negative or NaN.

    Raises:
        RuntimeError: The mesh cannot be fine enough, or what was computed contradicts
            what the arguments promise.
    """
    error = mesh_error(history, delta / 1000, half_width)
    if not (half_width < LARGEST_LOSS and error <= _LARGEST_EPSILON_ERROR):
        raise RuntimeError("the mesh would be too coarse")
    return float(np.max(composed(history, delta, half_width, error)))


def mesh_error(history: Sequence[Release], delta_error: float, half_width: float) -> float:
    """Return the ε error: 0.001, or what the bounded mesh leaves."""
    points = min(_MESH_POINTS, _TOTAL_MESH_POINTS // len(history))
    return max(EPSILON_ERROR, 2 * half_width * _cells(history, delta_error) / points)


def _cells(history: Sequence[Release], delta_error: float) -> float:
    """Return how many cells of the mesh make up the error: √(steps·ln(12/δ_error)/2)."""
    steps = sum(event.steps for event in history)
    return math.sqrt(steps * math.log(12 / delta_error) / 2)


def composed(history: Sequence[Release], delta: float, half_width: float, error: float) -> Floats:
    """Return the upper ends of PRV's intervals for ε, shape (2,): removal, addition.

    Shape (1,) where both are the same, at q = 1.
    """
    delta_error = delta / 1000
    cell = error / _cells(history, delta_error)
    domain = _domain(half_width, cell)
    losses = domain.ts
    directions = 1 if all(event.sample_rate == 1 for event in history) else 2
    spectrum = np.ones((directions, 1), dtype=np.complex128)
    shift, steps = np.zeros(directions), 0
    for event in history:
        mass = masses(event, domain)[:directions]
        gap = means(event)[:directions] - mass @ losses
        if not (np.abs(gap) < cell / 2).all():
            raise RuntimeError("the discrete mean differs from the continuous one")
        spectrum = spectrum * _power(np.fft.rfft(mass), event.steps)
        shift, steps = shift + event.steps * gap, steps + event.steps
    totals = np.fft.irfft(spectrum, domain.size)
    return np.array(
        [
            _upper_end(total, moved, steps, domain, (delta, error))
            for total, moved in zip(totals, shift.tolist(), strict=True)
        ]
    )


def _upper_end(
    total: Floats, shift: float, steps: int, domain: Domain, aim: tuple[float, float]
) -> float:
    """Return the upper end of the interval for ε at ``aim`` = (δ, ε error).

    ``total`` is a sum of ``steps`` discrete losses modulo the domain; ``shift``, all that
    it has to move to the right by, may be many times as wide as a cell or the domain.
    """
    from opacus.accountants.analysis.prv.prvs import DiscretePRV

    delta, error = aim
    cell = domain.dt
    # Zero is in the middle of the mesh, and in that of a sum of `steps` places too far right.
    middle, cells = domain.size // 2 - 1, round(shift / cell)
    total = np.roll(total, (cells - (steps - 1) * middle) % domain.size)
    edge = math.ceil(1 / cell)
    if not max(total[:edge].sum(), total[-edge:].sum()) <= _EDGE_SHARE * delta:
        raise RuntimeError("there is mass at the ends of the window: some of it may have wrapped")
    found = DiscretePRV(total, domain.shift_right(shift - cells * cell))
    return float(found.compute_epsilon(delta, delta / 1000, error)[2])


def _power(base: npt.NDArray[np.complex128], exponent: int) -> npt.NDArray[np.complex128]:
    """Return base**exponent for exponent ≥ 1 by squaring: NumPy takes logarithms above 100."""
    found = base
    for bit in bin(exponent)[3:]:
        found = found * found
        if bit == "1":
            found *= base
    return found


def _domain(half_width: float, cell: float) -> Domain:
    """Return a mesh over at least ±half_width, of a size that FFT likes, zero in its middle."""
    from opacus.accountants.analysis.prv import Domain

    size = 2 * math.ceil(half_width / cell) + 2
    unit = 2 ** max(size.bit_length() - 4, 1)
    size = -(-size // unit) * unit
    middle = size // 2 - 1
    return Domain(-middle * cell, (size - 1 - middle) * cell, size)


def masses(event: Release, domain: Domain) -> Floats:
    """Return one step's privacy loss by cell, given it is on the mesh.

    L exceeds t exactly where the output exceeds σ²·log(1 + (e^t - 1)/q) + 1/2, so the
    tails of two Gaussians give both directions.

    Returns:
        Probabilities, shape (2, cells): of L under P (removal), of -L under Q (addition).
    """
    import torch

    sigma, rate = event.noise_multiplier, event.sample_rate
    edges = np.append(domain.ts, domain.t_max + domain.dt) - domain.dt / 2
    edges[0], edges[-1] = domain.t_min, domain.t_max
    # L is at least log(1 - q); below that there is nothing to compute.
    least = int(np.searchsorted(edges, math.log1p(-rate))) if rate < 1 else 0
    exponent = edges[least:]
    if rate < 1:
        with np.errstate(divide="ignore", over="ignore"):
            exponent = np.log1p(np.maximum(np.expm1(exponent) / rate, -1.0))
    # P(N(mean, σ²) > σ²·exponent + 1/2) by edge.
    tails = np.ones((2, len(edges)))
    for tail, mean in zip(tails, (0.0, 1.0), strict=True):
        reached = torch.from_numpy((mean - 0.5) / sigma - sigma * exponent)
        tail[least:] = torch.special.ndtr(reached).numpy()
    removal = -np.diff((1 - rate) * tails[0] + rate * tails[1])
    # The mesh has one cell more on the right of zero than on the left.
    addition = np.append(-np.diff(tails[0])[-2::-1], 0.0)
    found: Floats = np.stack([removal, addition])
    found /= found.sum(axis=1, keepdims=True)
    return found


def means(event: Release) -> Floats:
    """Return the means of one step's privacy loss, shape (2,): L under P, -L under Q.

    That is `loss` of a Gaussian, an analytic function, for which equal spacing is as
    exact as float64.
    """
    sigma, rate = event.noise_multiplier, event.sample_rate
    x, width = nodes(sigma, 1.0)
    found = loss(x, sigma, rate)
    without, present = (np.exp(-(((x - mean) / sigma) ** 2) / 2) for mean in (0.0, 1.0))
    sums = [found @ ((1 - rate) * without + rate * present), -(found @ without)]
    return np.array(sums) * width / (sigma * math.sqrt(2 * math.pi))


def nodes(sigma: float, last: float) -> tuple[Floats, float]:
    """Return equally spaced points that hold every N(μ, σ²) with μ in [0, last], and their gap.

    The loss is analytic within πσ² of the real line, so 1/4 of σ² is close enough.
    """
    count = math.ceil((last + 20 * sigma) / min(sigma / 8, sigma**2 / 4))
    x, width = np.linspace(-10 * sigma, last + 10 * sigma, count, retstep=True)
    return x, float(width)


def loss(x: Floats, sigma: float, rate: float) -> Floats:
    """Return L of one step with output ``x``: log(1 - q + q·exp((2x - 1)/(2σ²)))."""
    exponent: Floats = (2 * x - 1) / (2 * sigma**2)
    if rate == 1:
        return exponent
    small = np.log1p(rate * np.expm1(np.minimum(exponent, 30.0)))
    large = np.logaddexp(math.log1p(-rate), math.log(rate) + exponent)
    return np.where(exponent < 30.0, small, large)


def single_step_delta(event: Release, epsilon: float) -> float:
    """Return the exact δ(ε) of *one* step for removal: a lower bound for any history.

    The likelihood ratio dP/dQ, 1 - q + q·exp((2x - 1)/(2σ²)), exceeds e^ε exactly for
    x > x*, and δ(ε) is P(x > x*) - e^ε·Q(x > x*).
    """
    sigma, rate = event.noise_multiplier, event.sample_rate
    if epsilon > LARGEST_LOSS:
        return 0.0
    ratio = math.expm1(epsilon) / rate + 1.0
    threshold = sigma**2 * math.log(ratio) + 0.5
    below = math.erfc(threshold / (sigma * math.sqrt(2))) / 2
    above = math.erfc((threshold - 1) / (sigma * math.sqrt(2))) / 2
    return (1 - rate) * below + rate * above - math.exp(epsilon) * below

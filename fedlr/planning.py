"""Who the simulated clients are: their rows, and the public numbers that follow from a size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from fedlr.config import RunConfig
from fedlr.data.batching import UnitIndex
from fedlr.data.dataset import LoadedData
from fedlr.data.partition import partition
from fedlr.errors import ConfigError
from fedlr.privacy.calibration import noise_multiplier


@dataclass(frozen=True)
class ClientPlan:
    """One simulated client: its rows and the public numbers that follow from its size.

    Attributes:
        name: Stable public identifier, ``client-000`` and so on.
        units: Its rows by unit of privacy.
        declared_size: N, declared public: the number of units, above 99 rounded
            down to two significant digits (`declared_size`).
        delta: δ of its guarantee.
        noise_multiplier: σ; 0.0 unless ``privacy.mode=dp``.
    """

    name: str
    units: UnitIndex
    declared_size: int
    delta: float
    noise_multiplier: float


def max_joins(config: RunConfig) -> int:
    """Return the largest number of rounds a site may join: what its noise is calibrated for."""
    rounds = config.federation.rounds
    return min(rounds, config.privacy.max_joins or rounds)


def declared_size(count: int) -> int:
    """Return N, which a client declares public: its number of units, two digits of it.

    Below 100 that is ``count`` itself; from 100 on it is ``count`` rounded down to two
    significant digits. q, σ and δ follow from N alone, so the noise tells of the true
    count no more than N does. Rounding down errs towards a larger q, and so towards
    more noise.

    Example:
        >>> [declared_size(count) for count in (0, 7, 99, 857, 11225)]
        [0, 7, 99, 850, 11000]
    """
    unit: int = 10 ** max(0, len(str(count)) - 2)
    return count // unit * unit


def plan_clients(
    config: RunConfig,
    data: LoadedData,
    noise: Mapping[str, float] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[ClientPlan, ...]:
    """Split the training rows over the clients and calibrate each one's noise.

    Args:
        config: The run; only its public numbers and the declared sizes shape the noise.
        data: Its rows.
        noise: σ by client where it was calibrated before, by whoever started the
            run; None calibrates here (up to a second for each distinct size).
        say: Told what is being done.

    Raises:
        ConfigError: δ ≥ 1/N for a client, or an ε that no noise reaches.
    """
    unit = config.privacy.unit
    parts = partition(
        data.train,
        config.partition.kind,
        config.federation.clients,
        config.seed,
        config.partition.alpha,
        unit,
    )
    plans = []
    for index, rows in enumerate(parts):
        units = UnitIndex.of(data.train.users, rows, unit)
        declared = declared_size(units.count)
        size = max(1, declared)
        delta = config.privacy.delta or min(1e-5, 1 / (10 * size))
        plans.append(ClientPlan(f"client-{index:03d}", units, declared, delta, 0.0))
    if config.privacy.mode != "dp":
        return tuple(plans)
    _check_delta(plans)
    if noise is not None:
        return tuple(replace(plan, noise_multiplier=noise[plan.name]) for plan in plans)
    distinct = len({(plan.declared_size, plan.delta) for plan in plans})
    say(f"calibrating the noise of {len(plans)} clients ({distinct} different sizes)")
    return tuple(replace(plan, noise_multiplier=_sigma(config, plan)) for plan in plans)


def _check_delta(plans: Sequence[ClientPlan]) -> None:
    """Raise ConfigError unless δ < 1/N everywhere; the largest client is the one to fit."""
    sized = [plan for plan in plans if plan.declared_size > 1]
    broken = [plan for plan in sized if plan.delta >= 1 / plan.declared_size]
    if broken:
        worst = max(broken, key=lambda plan: plan.declared_size)
        raise ConfigError(
            [
                f"privacy.delta = {worst.delta} must be < 1/N = {1 / worst.declared_size:.3g} of "
                f"{worst.name} with N = {worst.declared_size} ({len(broken)} of {len(plans)} "
                "clients are too large for it); lower it, or set it to null"
            ]
        )


def _sigma(config: RunConfig, plan: ClientPlan) -> float:
    rate = min(1.0, config.optimizer.expected_batch / max(1, plan.declared_size))
    try:
        return noise_multiplier(
            config.privacy.epsilon,
            plan.delta,
            rate,
            config.optimizer.steps * max_joins(config),
            config.privacy.accountant,
        )
    except ValueError as error:
        raise ConfigError([f"privacy.epsilon = {config.privacy.epsilon}: {error}"]) from error

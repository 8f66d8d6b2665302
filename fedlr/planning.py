"""Who the simulated clients are: their rows, and the public numbers that follow from a size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from fedlr.config import RunConfig
from fedlr.data.batching import UnitIndex
from fedlr.data.dataset import LoadedData
from fedlr.data.partition import partition
from fedlr.data.sources import SourceSpec, check_present, load
from fedlr.errors import ConfigError
from fedlr.privacy.accounting import Accountant
from fedlr.privacy.calibration import noise_multiplier

Say = Callable[[str], None]


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


@dataclass(frozen=True)
class Terms:
    """The public numbers of one client: all that its noise and its ε depend on.

    Attributes:
        name: Stable public identifier.
        declared_size: N.
        delta: δ.
        sample_rate: q = min(1, L/N).
        noise_multiplier: σ; 0.0 unless ``privacy.mode=dp``.
    """

    name: str
    declared_size: int
    delta: float
    sample_rate: float
    noise_multiplier: float


@dataclass(frozen=True)
class OwnRows:
    """The rows of one process of a real federation: those of a site, or those of the server.

    Attributes:
        spec: Where the rows are.
        plan: Loaded data → the site as the only client, where every number is declared and none
            counted; at the server, no client at all.
    """

    spec: SourceSpec
    plan: Callable[[LoadedData], tuple[ClientPlan, ...]]


@dataclass(frozen=True)
class Split:
    """What a plan needs to know of the data.

    Attributes:
        sizes: Units of each client, in client order.
        labels: The label list, in order; None where no data were read to learn it.
    """

    sizes: tuple[int, ...]
    labels: tuple[str, ...] | None


def client_name(index: int) -> str:
    """Return the public identifier of a simulated client.

    Example:
        >>> client_name(7)
        'client-007'
    """
    return f"client-{index:03d}"


def max_joins(config: RunConfig) -> int:
    """Return the largest number of rounds a site may join: what its noise is calibrated for."""
    rounds = config.federation.rounds
    return min(rounds, config.privacy.max_joins or rounds)


def clients_together(config: RunConfig) -> int:
    """Return how many clients share a pass through the model; 1 trains one after the other.

    Args:
        config: Engine ``local``: ``kernels.fused_clients``, or where that is null as many
            expected batches as fill a physical one. Every number in it is public.
    """
    kernels = config.kernels
    if config.federation.engine != "local":
        return 1
    if kernels.fused_clients is not None:
        return kernels.fused_clients
    if config.privacy.mode == "none" or kernels.gradients != "captured":
        return 1
    return max(1, (kernels.physical_batch or 1) // config.optimizer.expected_batch)


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


def client_units(config: RunConfig, data: LoadedData) -> list[UnitIndex]:
    """Split the training rows over the clients with the public seed, in client order."""
    unit, part = config.privacy.unit, config.partition
    clients = config.federation.clients
    rows_of = partition(data.train, part.kind, clients, config.seed, part.alpha, unit)
    return [UnitIndex.of(data.train.users, rows, unit) for rows in rows_of]


def read_split(config: RunConfig, spec: SourceSpec, say: Say = lambda _: None) -> Split:
    """Return how the data fall to the simulated clients; no model is loaded.

    Args:
        config: The run.
        spec: Its data source.
        say: Told what is being done.

    Raises:
        DataError, ConfigError: The data cannot be read, or not be split so.
    """
    check_present(spec)
    say("reading the data")
    data = load(spec)
    sizes = tuple(units.count for units in client_units(config, data))
    return Split(sizes, data.label_names)


def count_units(spec: SourceSpec, unit: str) -> int:
    """Return how many rows, or users, the data of one site have, for `declared_size`.

    Raises:
        DataError: They cannot be read.
    """
    rows = load(spec).train
    return len(set(rows.users or ())) if unit == "user" else len(rows)


def plan_clients(
    config: RunConfig,
    data: LoadedData,
    noise: Mapping[str, float] | None = None,
    say: Say = lambda _: None,
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
    units = client_units(config, data)
    terms = plan_sizes(config, [part.count for part in units], noise, say)
    return tuple(
        ClientPlan(term.name, part, term.declared_size, term.delta, term.noise_multiplier)
        for term, part in zip(terms, units, strict=True)
    )


def plan_sizes(
    config: RunConfig,
    sizes: Sequence[int],
    noise: Mapping[str, float] | None = None,
    say: Say = lambda _: None,
) -> tuple[Terms, ...]:
    """Return the public numbers of clients of ``sizes`` units; else as `plan_clients`."""
    terms = [
        terms_of(config, client_name(index), declared_size(count))
        for index, count in enumerate(sizes)
    ]
    if config.privacy.mode != "dp":
        return tuple(terms)
    check_delta(terms)
    if noise is not None:
        return tuple(replace(term, noise_multiplier=noise[term.name]) for term in terms)
    say(f"calibrating the noise of {_counted(terms)}")
    return tuple(calibrated(config, term) for term in terms)


def terms_of(config: RunConfig, name: str, declared: int) -> Terms:
    """Return the public numbers of a client that declares N = ``declared``, σ not yet among them.

    δ is that of the run, or min(1e-5, 1/(10·N)) where it names none.
    """
    size = max(1, declared)
    delta = config.privacy.delta or min(1e-5, 1 / (10 * size))
    rate = min(1.0, config.optimizer.expected_batch / size)
    return Terms(name, declared, delta, rate, 0.0)


def calibrated(config: RunConfig, term: Terms) -> Terms:
    """Return a client's numbers with its σ for the most rounds it may join; 0.0 unless ``dp``.

    Raises:
        ConfigError: No noise reaches the run's ε.
    """
    privacy, steps = config.privacy, config.optimizer.steps * max_joins(config)
    if privacy.mode != "dp":
        return term
    sigma = calibrate(privacy.epsilon, term.delta, term.sample_rate, steps, privacy.accountant)
    return replace(term, noise_multiplier=sigma)


def _counted(terms: Sequence[Terms]) -> str:
    """Return how many clients there are, and how many of them need a noise of their own."""
    if len(terms) == 1:
        return "1 client"
    distinct = len({(term.declared_size, term.delta) for term in terms})
    sizes = "of one size" if distinct == 1 else f"of {distinct} different sizes"
    return f"{len(terms)} clients {sizes}"


def check_delta(terms: Sequence[Terms]) -> None:
    """Raise ConfigError unless δ < 1/N everywhere; the largest client is the one to fit."""
    sized = [term for term in terms if term.declared_size > 1]
    broken = [term for term in sized if term.delta >= 1 / term.declared_size]
    if broken:
        worst = max(broken, key=lambda term: term.declared_size)
        raise ConfigError(
            [
                f"privacy.delta = {worst.delta} must be < 1/N = {1 / worst.declared_size:.3g} of "
                f"{worst.name} with N = {worst.declared_size} (too large for {len(broken)} of "
                f"{len(terms)} clients); lower it, or set it to null"
            ]
        )


def calibrate(
    epsilon: float, delta: float, rate: float, steps: int, accountant: Accountant = "prv"
) -> float:
    """Return σ for ``steps`` releases at q = ``rate``; ConfigError where ε is out of reach."""
    try:
        return noise_multiplier(epsilon, delta, rate, steps, accountant)
    except ValueError as error:
        raise ConfigError([f"privacy.epsilon = {epsilon}: {error}"]) from error

"""The only list of combiners: configuration name → facts, and settings → combiner.

Flower has strategies with the same rules (``FedMedian``, ``FedTrimmedAvg``, ``Krum``,
``MultiKrum``). They were considered and are not used: they are strategies that talk to
nodes and aggregate message records, so the mathematics could not run without a Flower
server, and the import alone would load it; they know neither a reference nor a smallest
cohort, and ties follow the order of replies. Tests assert that ours give the same
numbers as theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedlr.errors import ConfigError
from fedlr.methods.combine import Combiner, weighted_mean
from fedlr.methods.consensus import Consensus
from fedlr.methods.flag import Flag
from fedlr.methods.nearness import GeometricMedian, Krum, MultiKrum
from fedlr.methods.robust import CoordinateMedian, NormBoundedMean, TrimmedMean


@dataclass(frozen=True)
class CombinerFacts:
    """What a user chooses a combiner by; tables of combiners are made of nothing else.

    Attributes:
        title: Name in the literature.
        source: Authors and arXiv number.
        guarantee: What holds while no more clients are malicious than it bears.
        breakdown: Malicious clients f that it bears among K, as a phrase.
        linear: Whether it is a weighted sum with weights known beforehand: fit for
            secure aggregation.
        weighted: Whether it uses the clients' weights; the others refuse unequal ones.
        malicious: Whether f is a setting of it.
        bounded: Whether a norm bound is a setting of it.
    """

    title: str
    source: str
    guarantee: str
    breakdown: str
    linear: bool = False
    weighted: bool = False
    malicious: bool = False
    bounded: bool = False


COMBINERS: Mapping[str, CombinerFacts] = {
    "weighted_mean": CombinerFacts(
        title="weighted mean",
        source="McMahan et al., arXiv 1602.05629",
        guarantee="exact mean of the clients; one that lies moves it anywhere",
        breakdown="0",
        linear=True,
        weighted=True,
    ),
    "coordinate_median": CombinerFacts(
        title="coordinate-wise median",
        source="Yin et al., arXiv 1803.01498",
        guarantee="every number lies between honest ones",
        breakdown="⌊(K − 1)/2⌋",
    ),
    "trimmed_mean": CombinerFacts(
        title="coordinate-wise trimmed mean",
        source="Yin et al., arXiv 1803.01498",
        guarantee="every number lies between honest ones",
        breakdown="f with K ≥ 2f + 1",
        malicious=True,
    ),
    "norm_bounded_mean": CombinerFacts(
        title="norm-bounded mean",
        source="Sun et al., arXiv 1911.07963",
        guarantee="no client moves the model by more than its share of the bound",
        breakdown="⌊(K − 1)/2⌋ for the median of the norms; harm is bounded, not removed",
        weighted=True,
        bounded=True,
    ),
    "krum": CombinerFacts(
        title="Krum",
        source="Blanchard et al., arXiv 1703.02757",
        guarantee="one client's update, near to honest ones",
        breakdown="f with K ≥ 2f + 3",
        malicious=True,
    ),
    "multi_krum": CombinerFacts(
        title="Multi-Krum",
        source="Blanchard et al., arXiv 1703.02757",
        guarantee="mean of K − f − 2 updates, each near to honest ones",
        breakdown="f with K ≥ 2f + 3",
        weighted=True,
        malicious=True,
    ),
    "geometric_median": CombinerFacts(
        title="geometric median (RFA)",
        source="Pillutla et al., arXiv 1912.13445",
        guarantee="within a multiple of the honest clients' radius",
        breakdown="less than half of the weight",
        weighted=True,
    ),
    "flag": CombinerFacts(
        title="Flag Aggregator",
        source="Almasi et al., arXiv 2302.05865",
        guarantee="no longer than an honest change, inside a subspace near to the updates",
        breakdown="⌊(K − 1)/2⌋ for the length; harm is bounded, not removed",
    ),
}
"""Every combiner by its configuration name."""


def build(
    kind: str,
    malicious: int | None = None,
    bound: float | None = None,
    consensus: float | None = None,
) -> Combiner:
    """Return the combiner called ``kind``.

    Args:
        kind: A key of `COMBINERS`.
        malicious: f ≥ 1; None: the most that a round's cohort allows.
        bound: Largest norm of a client's whole change; None: the median of the round's.
        consensus: Agreement in [0, 1] below which a direction is dropped
            (`fedlr.methods.consensus`); None: no filter.

    Raises:
        ConfigError: ``kind`` is unknown or has no such setting.
        ValueError: A setting is outside its range.

    Example:
        >>> build("krum", malicious=2).minimum
        7
        >>> build("weighted_mean", consensus=0.5).name
        'weighted_mean+consensus'
    """
    if problems := _setting_problems(kind, malicious, bound):
        raise ConfigError(problems)
    combiners: Mapping[str, Combiner] = {
        "weighted_mean": weighted_mean,
        "coordinate_median": CoordinateMedian(),
        "trimmed_mean": TrimmedMean(malicious),
        "norm_bounded_mean": NormBoundedMean(bound),
        "krum": Krum(malicious),
        "multi_krum": MultiKrum(malicious),
        "geometric_median": GeometricMedian(),
        "flag": Flag(),
    }
    found = combiners[kind]
    return found if consensus is None else Consensus(found, consensus)


def problems_of(
    kind: str,
    malicious: int | None,
    bound: float | None,
    consensus: float | None,
    clients: int,
) -> list[str]:
    """Return what is wrong with a choice of combiner and settings; one sentence each.

    Args:
        kind: Name in the configuration.
        malicious: f.
        bound: Norm bound.
        consensus: Threshold of agreement.
        clients: Fewest clients that a round may have.

    Returns:
        Settings that the kind has not or that are out of range; else, a cohort that is
        too small for its breakdown point.
    """
    if problems := _setting_problems(kind, malicious, bound):
        return problems
    try:
        least = build(kind, malicious, bound, consensus).minimum
    except ValueError as error:
        return [f"combine.{error}"]
    if clients >= least:
        return []
    out = f"take {least} clients a round or more"
    if malicious is not None and malicious > 1:
        out += ", lower combine.malicious"
    claim = "" if malicious is None else f" with combine.malicious = {malicious}"
    return [
        f"combine.kind = {kind}{claim} needs {least} clients a round, but it may have "
        f"{clients}; {out}, or set combine=weighted_mean"
    ]


def _setting_problems(kind: str, malicious: int | None, bound: float | None) -> list[str]:
    """An unknown kind, and settings that the kind has not."""
    if kind not in COMBINERS:
        return [f"combine.kind = {kind!r} is unknown; choose one of {', '.join(sorted(COMBINERS))}"]
    problems = []
    facts = COMBINERS[kind]
    if malicious is not None and not facts.malicious:
        able = ", ".join(name for name, value in COMBINERS.items() if value.malicious)
        problems.append(
            f"combine.malicious is set but combine.kind = {kind} has no such setting; set "
            f"combine.malicious=null, or combine.kind to one of {able}"
        )
    if bound is not None and not facts.bounded:
        problems.append(
            f"combine.bound is set but combine.kind = {kind} has no such setting; set "
            "combine.bound=null, or combine=norm_bounded_mean"
        )
    return problems

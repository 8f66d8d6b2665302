"""What was released: frozen, versioned records that the accountant and the ledger share."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, NoReturn

from fedlr import checks
from fedlr.errors import LedgerError

Unit = Literal["example", "user"]
Mechanism = Literal["poisson_subsampled_gaussian"]

UNITS: tuple[Unit, ...] = ("example", "user")
MECHANISMS: tuple[Mechanism, ...] = ("poisson_subsampled_gaussian",)
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Release:
    """``steps`` adaptive runs of the Poisson-subsampled Gaussian mechanism.

    One step draws each unit independently with probability q, sums over the
    drawn units a vector whose Euclidean norm is clipped to C *over all trained
    parameters together* (rows of one unit are added first, then clipped), adds
    independent Gaussian noise of standard deviation σ·C to every coordinate,
    and releases the sum. An empty draw is a step: it releases the noise alone.
    Whatever is computed from the released sums and public values alone (the
    division by the public expected batch, an optimiser, an average) is
    post-processing and costs nothing.

    Neighbouring relation: add or remove one unit. The sum then moves by at
    most C, so σ is the ratio of the noise's standard deviation to the
    sensitivity, and C itself does not enter the accounting.

    Attributes:
        noise_multiplier: σ ≥ 0, finite; 0 is a release without any privacy.
        sample_rate: q, in (0, 1].
        steps: Number of releases, ≥ 0; 0 released nothing.
        unit: What one neighbour differs in: ``"example"`` (one training
            example) or ``"user"`` (all rows of one user of the site).
        mechanism: Name of the mechanism; there is one.

    Raises:
        ValueError: A value is outside its range.

    Example:
        >>> event = Release(noise_multiplier=1.0, sample_rate=0.01, steps=10, unit="example")
        >>> Release.from_json(event.to_json()) == event
        True

    Reference:
        Abadi et al. 2016 (arXiv 1607.00133), algorithm 1; Mironov et al. 2019
        (arXiv 1908.10530), section 3.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int
    unit: Unit
    mechanism: Mechanism = "poisson_subsampled_gaussian"

    def __post_init__(self) -> None:
        checks.non_negative("noise_multiplier", self.noise_multiplier)
        checks.in_range("sample_rate", self.sample_rate, 0.0, 1.0)
        checks.positive("sample_rate", self.sample_rate)
        checks.at_least("steps", self.steps, 0)
        checks.one_of("unit", self.unit, UNITS)
        checks.one_of("mechanism", self.mechanism, MECHANISMS)
        # Equal events must have equal JSON: 1 and 1.0, 0.0 and -0.0 are one value each.
        object.__setattr__(self, "noise_multiplier", float(self.noise_multiplier) + 0.0)
        object.__setattr__(self, "sample_rate", float(self.sample_rate))

    def to_json(self) -> str:
        """Return the canonical one-line JSON: sorted keys, no spaces, exact floats."""
        record = {"version": SCHEMA_VERSION, **asdict(self)}
        return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Release:
        """Return the event written by `to_json`, bit for bit.

        Raises:
            LedgerError: Anything but exactly the fields of a known version and
                mechanism with values in range. An event that the accountant
                does not understand could cost any amount, so it is refused.
        """
        record = _object(text)
        version = record.pop("version", None)
        if version != SCHEMA_VERSION or isinstance(version, bool):
            raise LedgerError(
                f"event version = {version!r}, this program knows {SCHEMA_VERSION}; "
                "upgrade the program, nothing can be released until then"
            )
        expected = set(Release.__dataclass_fields__)
        if set(record) != expected:
            raise LedgerError(
                f"event fields {sorted(record)} must be exactly {sorted(expected)}; "
                "upgrade the program or repair the ledger"
            )
        for name in ("noise_multiplier", "sample_rate"):
            if isinstance(record[name], bool) or not isinstance(record[name], int | float):
                raise LedgerError(f"event {name} = {record[name]!r} must be a number")
        try:
            return Release(**record)
        except (ValueError, OverflowError) as error:
            raise LedgerError(f"unknown event {text[:200]}: {error}") from error


def merge(events: Iterable[Release]) -> tuple[Release, ...]:
    """Return the canonical history: steps of equal mechanisms added, in a fixed order.

    Two events are equal mechanisms if everything but ``steps`` is equal. The
    result does not depend on the order of ``events``, so it can serve as a
    cache key; events of zero steps released nothing and are left out.

    Args:
        events: Any number of events.

    Returns:
        One event per distinct mechanism, sorted by mechanism, unit, σ, q.

    Example:
        >>> a = Release(1.0, 0.1, 3, "example")
        >>> b = Release(2.0, 0.1, 1, "example")
        >>> [(e.noise_multiplier, e.steps) for e in merge([b, a, a])]
        [(1.0, 6), (2.0, 1)]
    """
    totals: dict[tuple[Mechanism, Unit, float, float], int] = {}
    for event in events:
        key = (event.mechanism, event.unit, event.noise_multiplier, event.sample_rate)
        totals[key] = totals.get(key, 0) + event.steps
    return tuple(
        Release(noise_multiplier, sample_rate, steps, unit, mechanism)
        for (mechanism, unit, noise_multiplier, sample_rate), steps in sorted(totals.items())
        if steps > 0
    )


def _object(text: str) -> dict[str, Any]:
    """Parse one JSON object without duplicate keys, NaN or infinity."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(items)
        if len(record) != len(items):
            raise LedgerError(f"event {text[:200]} has a field twice; repair the ledger")
        return record

    def constant(name: str) -> NoReturn:
        raise LedgerError(f"event {text[:200]} holds {name}; repair the ledger")

    try:
        record = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise LedgerError(f"event {text[:200]!r} is not JSON; repair the ledger") from error
    if not isinstance(record, dict):
        raise LedgerError(f"event {text[:200]!r} must be a JSON object; repair the ledger")
    return record

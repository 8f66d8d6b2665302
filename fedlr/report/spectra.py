"""Where the updates of a run point, round by round: ``spectra.jsonl`` and ``intruders.json``.

Every number is computed from the model that the server publishes: post-processing of
private releases, which costs no ε.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedlr import checks
from fedlr.errors import RunError
from fedlr.report import strict_json
from fedlr.report.lines import LineLog
from fedlr.report.records import write_atomically

SPECTRA_FILE, INTRUDERS_FILE = "spectra.jsonl", "intruders.json"
"""Their names in a run folder."""


@dataclass(frozen=True, kw_only=True)
class SiteSpectrum:
    """One adapted layer after one round.

    Attributes:
        site: Name of the layer.
        singular_values: Of its whole update, s·B·A and a residual where the method has
            one; largest first, at most 64 of them, ≥ 0.
        effective_rank: Of all its singular values (Roy and Vetterli 2007); 0 without an
            update.
        angle_rad: Largest principal angle between the row spaces of A now and of the first
            A, radians in [0, π/2]; None where the method has no such pair.
    """

    site: str
    singular_values: tuple[float, ...]
    effective_rank: float
    angle_rad: float | None = None

    def __post_init__(self) -> None:
        for value in (*self.singular_values, self.effective_rank, self.angle_rad or 0.0):
            checks.non_negative(self.site, value)


@dataclass(frozen=True, kw_only=True)
class SpectrumRecord:
    """All adapted layers after one completed round: one line of ``spectra.jsonl``.

    Attributes:
        round: Number of the round, ≥ 1.
        sites: In model order; a layer whose update was not finite is missing.
    """

    round: int
    sites: tuple[SiteSpectrum, ...]

    def __post_init__(self) -> None:
        checks.at_least("round", self.round, 1)


class SpectrumLog(LineLog[SpectrumRecord]):
    """Appends to ``spectra.jsonl``; see `LineLog`."""


@dataclass(frozen=True, kw_only=True)
class SiteSimilarity:
    """How well the base weight of one layer knows the leading directions of the result.

    Attributes:
        site: Name of the layer.
        similarity: Largest cosine of each leading left singular vector of the tuned weight
            with any of the base weight's, [0, 1], the leading one first.
    """

    site: str
    similarity: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Intruders:
    """The directions that training put among the leading ones: ``intruders.json``.

    Attributes:
        leading: Directions looked at in each layer, ≥ 1.
        threshold: A similarity below it makes an intruder, in (0, 1).
        sites: In model order; may be a choice of all layers.
        of_sites: How many layers there are.
        missing: Why layers are left out, a sentence; None where none is.
    """

    leading: int
    threshold: float
    sites: tuple[SiteSimilarity, ...]
    of_sites: int
    missing: str | None = None

    def __post_init__(self) -> None:
        checks.at_least("leading", self.leading, 1)
        checks.in_range("threshold", self.threshold, 0.0, 1.0)
        checks.at_least("of_sites", self.of_sites, len(self.sites))

    def count(self, site: SiteSimilarity) -> int:
        """Return the intruder dimensions of one layer."""
        return sum(value < self.threshold for value in site.similarity)


def write_intruders(folder: Path, intruders: Intruders) -> None:
    """Write ``intruders.json`` into a run folder, whole or not at all."""
    text = strict_json.encode(intruders, indent=2) + "\n"
    write_atomically(folder / INTRUDERS_FILE, text.encode())


def read_intruders(folder: Path) -> Intruders | None:
    """Return ``intruders.json`` of a run folder; None where there is none.

    Raises:
        RunError: It is damaged.
    """
    path = folder / INTRUDERS_FILE
    try:
        return strict_json.decode(Intruders, path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}; the report can do without it") from error

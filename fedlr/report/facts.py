"""What a run was made of: written once, before its first round, into ``run.json``.

With it and the configuration a run is resumed, exported or used without its data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedlr import checks
from fedlr.errors import RunError
from fedlr.report import strict_json
from fedlr.report.records import write_atomically

FACTS_FILE = "run.json"


@dataclass(frozen=True, kw_only=True)
class ClientFacts:
    """The public numbers of one client.

    Attributes:
        client: Stable public identifier.
        declared_size: N.
        delta: δ of its guarantee.
        noise_multiplier: σ; 0.0 unless privacy is on.
    """

    client: str
    declared_size: int
    delta: float
    noise_multiplier: float


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What does not change while a run lasts; all of it public.

    Attributes:
        run: Identifier that jobs carry and ledgers are keyed by; no two runs share one.
        config_sha256: Digest of the canonical JSON of the configuration, hex.
        model: Name of the base model, as a reader would load it.
        data: Name of the data source.
        data_sha256: Digest of the data, hex; of its public part alone where the data
            are not declared public.
        label_names: The declared labels, in the order of the classes.
        majority: Share of the largest class of the validation split, [0, 1].
        base: sha256 of the base weights.
        tokenizer: sha256 of the tokenizer.
        labels: sha256 of what gives the arrays their meaning.
        codec: Schema name of the arrays.
        clients: One entry per client, in client order.
        notices: Sentences a reader of the results must know.
        sources: What each client's ledger is for, in client order.
    """

    run: str
    config_sha256: str
    model: str
    data: str
    data_sha256: str
    label_names: tuple[str, ...]
    majority: float
    base: str
    tokenizer: str
    labels: str
    codec: str
    clients: tuple[ClientFacts, ...]
    notices: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checks.in_range("majority", self.majority, 0.0, 1.0)


def check_same(before: RunFacts, now: RunFacts, names: Sequence[str]) -> None:
    """Raise RunError unless a run still has what it began with; ``names`` are fields."""
    differing = [name for name in names if getattr(before, name) != getattr(now, name)]
    if differing:
        raise RunError(
            f"the run began with another {', '.join(differing)} than is found now; bring back the "
            "model and the data it began with, or start a new run"
        )


def write_facts(folder: Path, facts: RunFacts) -> None:
    """Write ``run.json`` into a run folder, whole or not at all."""
    write_atomically(folder / FACTS_FILE, (strict_json.encode(facts, indent=2) + "\n").encode())


def read_facts(folder: Path) -> RunFacts:
    """Return the facts of a run folder.

    Raises:
        RunError: ``folder`` is no run folder, or its file is damaged.
    """
    path = folder / FACTS_FILE
    try:
        return strict_json.decode(RunFacts, path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(
            f"{str(folder)!r} is no run folder: {FACTS_FILE} cannot be read "
            f"({error.strerror or error}); give the folder that `fedlr simulate` printed last"
        ) from error
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}; restore it from a copy") from error

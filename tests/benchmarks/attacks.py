"""A federation of six in which one site lies about what it has learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from client.site import Site
from fedlr.build import Workbench, build
from fedlr.cli.compose import compose
from fedlr.methods.combiners import build as combiner_of
from fedlr.methods.method import ClientUpdate, Parts
from fedlr.training.jobs import Abstention, Job, SiteStatus

from .rounds import LocalRounds

HONEST, FLIPPED, HUGE, NOT_A_NUMBER = 1.0, -1.0, -100.0, float("nan")
"""What the liar's change is multiplied by."""

WORDS = (
    *("federation.clients=6", "federation.clients_per_round=6", "federation.min_clients=5"),
    # The job of `sweep=methods`, with more rows a step.
    *("adapter.layers=top:1", "model.max_length=32", "optimizer.steps=4"),
    *("optimizer.expected_batch=96", "federation.evaluate_every=1000"),
    # One site after the other, so that each answers for itself.
    "kernels.fused_clients=1",
)
"""The embedded job: all six in every round, of which five must be accepted."""

PLAIN = ("privacy=none", "optimizer.learning_rate=0.3")
"""Nothing is clipped: at the default's rate it diverges."""

SETTINGS = {
    "iid": ("partition=iid", *PLAIN),
    "Dirichlet 0.5": ("partition=dirichlet", "partition.alpha=0.5", *PLAIN),
    "ε = 8": ("partition=iid", "privacy.epsilon=8", "optimizer.learning_rate=5"),
}
"""What the six hold, and whether they are private: overrides by name."""


@dataclass(frozen=True)
class Liar:
    """A site whose change of every array leaves it multiplied by ``factor``."""

    site: Site
    factor: float

    def status(self) -> SiteStatus:
        """Announce the honest site's status."""
        return self.site.status()

    def train_many(self, jobs: Sequence[Job]) -> list[ClientUpdate | Abstention]:
        """Train honestly and answer with the change multiplied."""
        answers = self.site.train_many(jobs)
        return [
            answer if isinstance(answer, Abstention) else self._tampered(answer, job)
            for answer, job in zip(answers, jobs, strict=True)
        ]

    def _tampered(self, update: ClientUpdate, job: Job) -> ClientUpdate:
        parts = {}
        for key, value in update.parts.items():
            start = job.parts[key]
            parts[key] = start + self.factor * (value - start)
        return replace(update, parts=parts)


@dataclass(frozen=True)
class Result:
    """What a federation ended with.

    Attributes:
        accuracy: On the public validation rows, in percent.
        parts: The server's arrays.
        refused: Updates that were not accepted, over all rounds.
    """

    accuracy: float
    parts: Parts
    refused: int


class Federation:
    """Runs on one resident model, each from the same start; one call is one run.

    Args:
        folder: For run folders.
        rounds: Rounds of a run.
        words: Overrides beside `WORDS`.
    """

    def __init__(self, folder: Path, rounds: int, words: Sequence[str]) -> None:
        self._folder, self._rounds = folder, rounds
        self._bench = build(compose([*WORDS, f"federation.rounds={rounds}", *words]))
        self._runs = 0

    def __call__(self, kind: str, factor: float | None = None) -> Result:
        """Run with the combiner ``kind`` and, where ``factor`` is given, with a liar."""
        self._runs += 1
        rounds = LocalRounds(self._with(kind), self._folder / str(self._runs))
        if factor is not None:
            rounds.sites[0] = Liar(rounds.sites[0], factor)  # type: ignore[call-overload]
        try:
            accepted = sum(rounds() for _ in range(self._rounds))
            parts = rounds.at.state.parts
            accuracy, _ = self._bench.evaluator(parts)
        finally:
            rounds.close()
        return Result(100 * accuracy, parts, 6 * self._rounds - accepted)

    def _with(self, kind: str) -> Workbench:
        config = self._bench.config
        config = replace(config, combine=replace(config.combine, kind=kind))  # type: ignore[arg-type]
        method = replace(self._bench.method, combine=combiner_of(kind))  # type: ignore[type-var]
        return replace(self._bench, config=config, method=method)

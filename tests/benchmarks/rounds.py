"""Rounds of our own engine ``local``: strategy, grid, messages, sites and their ledgers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord
from torch import Tensor

from client.simulation import make_sites
from fedlr.build import Workbench, build
from fedlr.cli.compose import compose
from fedlr.cli.simulate import local_grid
from fedlr.methods.shared import factor_pairs
from fedlr.report.records import ROUNDS_FILE, RoundLog
from server.environment import quiet_flower
from server.hooks import Hooks
from server.outcome import Checkpoint
from server.session import begin, strategy_config
from server.strategy import FederatedStrategy

ENOUGH = 200
"""Rounds that noise is calibrated for: no benchmark runs more."""

RATE = 0.01
"""Learning rate: so small that the noise of many rounds stays below a site's bound on what
it is sent. It changes no time."""


def workbench(*overrides: str) -> Workbench:
    """What `fedlr simulate` builds, without evaluation and for `ENOUGH` rounds."""
    rounds = (f"federation.rounds={ENOUGH}", f"federation.evaluate_every={ENOUGH}")
    words = (*rounds, f"optimizer.learning_rate={RATE}", *overrides)
    return build(compose(words), evaluate=False)


def dry(bench: Workbench) -> Workbench:
    """The same with σ = 0 and draws from the public seed, on the same resident model."""
    config = replace(bench.config, privacy=replace(bench.config.privacy, mode="dry"))
    clients = tuple(replace(client, noise_multiplier=0.0) for client in bench.clients)
    return replace(bench, config=config, clients=clients)


class LocalRounds:
    """A run of the engine ``local`` in a folder, one round per call, never evaluated.

    Everything else is there: nonces journaled, messages copied, ε computed, ledgers on
    disk, updates checked, aggregated and logged.
    """

    def __init__(self, bench: Workbench, folder: Path) -> None:
        self.bench = replace(bench, config=replace(bench.config, output=str(folder)))
        self._session = session = begin(self.bench)
        self.sites = make_sites(self.bench, session.order)
        self._grid = local_grid(self.bench.config, self.sites)
        hooks = Hooks(log=RoundLog(session.folder / ROUNDS_FILE), journal=session.journal)
        settings = strategy_config(self.bench.config, session.facts.run)
        self._strategy = FederatedStrategy(
            settings, bench.method, session.start, bench.provenance, hooks
        )

    def __call__(self) -> int:
        """Run one round and return the number of updates that were accepted."""
        with quiet_flower():
            messages = self._strategy.configure_train(0, ArrayRecord(), ConfigRecord(), self._grid)
            replies = self._grid.send_and_receive(messages)
            self._strategy.aggregate_train(0, replies)
        return self.at.records[-1].accepted

    @property
    def at(self) -> Checkpoint:
        """Where the run stands."""
        return self._strategy.checkpoint

    def products(self) -> dict[str, Tensor]:
        """Return s·BA by site."""
        pairs = factor_pairs(self.bench.layout, self.at.state.parts)
        return {name: pair.product() for name, pair in pairs.items()}

    def close(self) -> None:
        """Let go of the run folder."""
        self._session.close()


def drawn_rows(bench: Workbench, client: int, steps: int) -> list[Sequence[int]]:
    """Return the rows of every step of a client in round 0 of a dry run."""
    from fedlr.privacy.noise import public_stream

    plan, expected = bench.clients[client], bench.config.optimizer.expected_batch
    rate = min(1.0, expected / max(1, plan.declared_size))
    stream = public_stream("sampling", bench.config.seed, plan.name, 0, 0)
    draws = (stream.poisson_sample(plan.units.count, rate) for _ in range(steps))
    return [plan.units.rows_of(drawn)[0].tolist() for drawn in draws]

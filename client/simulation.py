"""Simulated sites: one per client of a workbench, sharing its resident model."""

from __future__ import annotations

from pathlib import Path

from client.site import Site, SitePolicy
from fedlr.build import Workbench
from fedlr.planning import ClientPlan, max_joins
from fedlr.privacy.ledger import Ledger, MemoryLedger, SqliteLedger


def make_sites(workbench: Workbench, ledgers: Path | None) -> list[Site]:
    """Return one site per client, in client order.

    Args:
        workbench: What `fedlr.build.build` returned.
        ledgers: Existing folder that gets one SQLite ledger per client; None
            keeps ledgers in memory, for tests.
    """
    return [
        Site(
            policy=_policy(workbench, plan),
            units=plan.units,
            trainer=workbench.trainer,
            ledger=_ledger(plan, ledgers),
            provenance=workbench.provenance,
        )
        for plan in workbench.clients
    ]


def _policy(workbench: Workbench, plan: ClientPlan) -> SitePolicy:
    config = workbench.config
    return SitePolicy(
        client=plan.name,
        mode=config.privacy.mode,
        declared_size=plan.declared_size,
        expected_batch=config.optimizer.expected_batch,
        clip_norm=config.privacy.clip_norm,
        head_share=config.privacy.head_share,
        noise_multiplier=plan.noise_multiplier,
        delta=plan.delta,
        epsilon=config.privacy.epsilon,
        unit=config.privacy.unit,
        max_joins=max_joins(config),
        accountant=config.privacy.accountant,
        public_seed=config.seed,
    )


def _ledger(plan: ClientPlan, folder: Path | None) -> Ledger:
    if folder is None:
        return MemoryLedger()
    return SqliteLedger(folder / f"{plan.name}.sqlite", source_id=plan.name)

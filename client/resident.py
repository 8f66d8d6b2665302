"""A real site: its data, its ledger and its base model, loaded once, and the run it is in.

An order of a coordinator says how a run trains; the operator's declaration says on what, on
which device, and how much ε it may cost. Everything that shapes a release (N, δ, σ, q) follows
from those two, never from the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import numpy as np

from client.declaration import Declaration
from client.policy import SitePolicy, tighten
from client.site import Site
from fedlr.build import build, source_spec
from fedlr.config import FederationConfig, PartitionConfig, RunConfig, TrackingConfig, from_json
from fedlr.data.batching import UnitIndex
from fedlr.data.dataset import LoadedData, Rows
from fedlr.data.sources import load
from fedlr.data.spec import SourceSpec
from fedlr.doctor.checkup import quick
from fedlr.errors import ConfigError, FedlrError, LedgerError, OrderRefused
from fedlr.methods.registry import METHODS
from fedlr.planning import ClientPlan, OwnRows, calibrate, max_joins
from fedlr.privacy.ledger import SqliteLedger
from fedlr.privacy.limits import Declared
from fedlr.reuse import Reuse
from fedlr.signing import RunOrder

Say = Callable[[str], None]


class Resident:
    """The parts of a site that outlive a run; not for two threads at once.

    Args:
        declaration: What its operator declares.
        say: Told what is being done, on the operator's console alone.

    Raises:
        LedgerError: The ledger is not there (an agent never makes one), is damaged, or is that
            of other data.
    """

    def __init__(self, declaration: Declaration, say: Say = lambda _: None) -> None:
        self.declaration = declaration
        self._say = say
        self._reuse = Reuse()
        self._site: tuple[str, Site] | None = None
        path, source = declaration.ledger, str(declaration.limits.source_id)
        if not path.exists():
            raise LedgerError(
                f"ledger {path} does not exist; bring it back, or for data that never had one: "
                f"fedlr ledger new {path} --source-id {source} --disjoint '<reason>'"
            )
        self.ledger = SqliteLedger(path, source)

    def load(self) -> None:
        """Load the base model and the rows now, so that the first run does not wait for them.

        Raises:
            FedlrError: They cannot be loaded, or do not fit the declaration.
        """
        data = self._read(source_spec_of(self.declaration, RunConfig()))
        self._say(f"{len(data.train)} rows are readable")

    def site_of(self, order: RunOrder) -> Site:
        """Return the site as it takes part in the run of ``order``, built where it is another run.

        Args:
            order: Verified; what it asks is held against the declaration here.

        Raises:
            OrderRefused: ``policy``: the operator does not allow such a run, or this site
                cannot carry it out. The message is for the operator.
        """
        if self._site is None or self._site[0] != order.digest:
            self._site = None  # and with it what the last run alone needed
            self._site = (order.digest, self._built(order))
        return self._site[1]

    def close(self) -> None:
        """Let go of the ledger."""
        self._site = None
        with suppress(LedgerError):
            self.ledger.close()

    def _built(self, order: RunOrder) -> Site:
        try:
            config = local_config(from_json(order.config), self.declaration)
            self._hold(config)
            plan = self._plan(config)
            own = OwnRows(source_spec_of(self.declaration, config), plan)
            workbench = build(config, self._say, evaluate=False, reuse=self._reuse, own=own)
            quick(workbench)
        except FedlrError as error:
            raise OrderRefused("policy", f"the run {order.run} is not taken: {error}") from error
        (client,) = workbench.clients
        self._observe(workbench.data, client)
        return Site(
            policy=tighten(_policy(config, client), self.declaration.limits),
            units=client.units,
            trainer=workbench.trainer,
            ledger=self.ledger,
            provenance=workbench.provenance,
        )

    def _hold(self, config: RunConfig) -> None:
        """Raise ConfigError unless the declaration allows such a run."""
        declaration, limits = self.declaration, self.declaration.limits
        mode = config.privacy.mode
        kind = METHODS.get(config.method.name)
        mixes = kind is None or kind.facts.mixed_ranks
        run = Declared(
            client=declaration.client,
            mode="dp" if mode == "dry" and declaration.dry else mode,
            declared_size=int(limits.declared_size or 0),
            unit=config.privacy.unit,
            delta=delta_of(config, declaration),
            method=config.method.name,
            labels=limits.labels,
            columns=None if mixes else config.adapter.rank,
        )
        if problems := limits.conflicts(run):
            raise ConfigError(problems)

    def _plan(self, config: RunConfig) -> Callable[[LoadedData], ClientPlan]:
        """Return the site as a client of the run; its noise follows from declared numbers alone."""
        declaration = self.declaration
        size, delta = int(declaration.limits.declared_size or 0), delta_of(config, declaration)
        sigma = 0.0
        if config.privacy.mode == "dp":
            self._say("calibrating the noise")
            rate = min(1.0, config.optimizer.expected_batch / max(1, size))
            steps, privacy = config.optimizer.steps * max_joins(config), config.privacy
            sigma = calibrate(privacy.epsilon, delta, rate, steps, privacy.accountant)

        def plan(data: LoadedData) -> ClientPlan:
            units = UnitIndex.of(data.train.users, _all_rows(data), config.privacy.unit)
            return ClientPlan(declaration.client, units, size, delta, sigma)

        return plan

    def _read(self, spec: SourceSpec) -> LoadedData:
        return self._reuse.get("data", spec, lambda: load(spec))

    def _observe(self, data: LoadedData, client: ClientPlan) -> None:
        """Note what the rows are now; changed data continue the same ledger."""
        if self.ledger.observe(data.rows_sha256(_all_rows(data))):
            self._say(
                f"the rows of {client.name} have changed since the last run; its ledger goes on, "
                "and rows that stayed keep their history"
            )


def local_config(asked: RunConfig, declaration: Declaration) -> RunConfig:
    """Return the configuration of a run at one site: what is asked, on the site's own things.

    Args:
        asked: The coordinator's configuration.
        declaration: The operator's: rows, place of the base model, device and memory.
    """
    own = declaration.model
    return replace(
        asked,
        model=replace(asked.model, name=own.name, revision=own.revision, sha256=own.sha256),
        data=replace(declaration.data, label_names=declaration.limits.labels),
        partition=PartitionConfig(),
        # A comes from the server.
        subspace=replace(asked.subspace, kind="orthonormal", public=None),
        adapter=replace(asked.adapter, rank_by_client=None),
        privacy=replace(asked.privacy, policies=None),
        federation=FederationConfig(
            clients=1,
            clients_per_round=1,
            rounds=asked.federation.rounds,
            min_clients=1,
            evaluate_every=asked.federation.rounds,
        ),
        kernels=declaration.kernels,
        tracking=TrackingConfig(),
    )


def source_spec_of(declaration: Declaration, config: RunConfig) -> SourceSpec:
    """Return where the rows of a site are: every one of them is trained on."""
    data = replace(declaration.data, label_names=declaration.limits.labels)
    return replace(source_spec(replace(config, data=data)), seed=0, whole=True)


def delta_of(config: RunConfig, declaration: Declaration) -> float:
    """Return δ of a run at a site: what is asked, or min(1e-5, 1/(10·N)) of the declared N.

    Raises:
        ConfigError: δ ≥ 1/N: it would allow to publish a row.
    """
    size = max(1, int(declaration.limits.declared_size or 0))
    delta = config.privacy.delta or min(1e-5, 1 / (10 * size))
    if size > 1 and delta >= 1 / size:
        raise ConfigError(
            [f"privacy.delta = {delta:g} must be < 1/N = {1 / size:.3g}; lower it, or set it null"]
        )
    return delta


def _policy(config: RunConfig, client: ClientPlan) -> SitePolicy:
    privacy = config.privacy
    return SitePolicy(
        client=client.name,
        mode=privacy.mode,
        declared_size=client.declared_size,
        expected_batch=config.optimizer.expected_batch,
        clip_norm=privacy.clip_norm,
        head_share=privacy.head_share,
        noise_multiplier=client.noise_multiplier,
        delta=client.delta,
        epsilon=privacy.epsilon,
        unit=privacy.unit,
        max_joins=max_joins(config),
        accountant=privacy.accountant,
        public_seed=config.seed,
    )


def _all_rows(data: LoadedData) -> Rows:
    return np.arange(len(data.train), dtype=np.int64)

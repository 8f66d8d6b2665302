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
from client.policy import terms_of_run, tighten
from client.site import Site
from fedlr.build import build, device_of, provenance, source_spec
from fedlr.config import (
    FederationConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SubspaceConfig,
    from_json,
)
from fedlr.data.batching import UnitIndex
from fedlr.data.dataset import LoadedData, Rows
from fedlr.data.sources import load
from fedlr.data.spec import SourceSpec
from fedlr.doctor.checkup import quick
from fedlr.errors import ConfigError, FedlrError, LedgerError, OrderRefused
from fedlr.orders import columns_of
from fedlr.planning import ClientPlan, OwnRows, Terms, calibrated, check_delta, terms_of
from fedlr.privacy.booking import RECOVERED
from fedlr.privacy.ledger import SqliteLedger
from fedlr.privacy.limits import Declared
from fedlr.reuse import Reuse, resident_base
from fedlr.signing import RunOrder
from fedlr.training.jobs import SiteStatus

Say = Callable[[str], None]

SHORTEST = 3
"""Least ``model.max_length``: a text, and the tokens around it."""

_OF_THE_ROWS = ("data", "tokens", "training states", "validation states")
"""What is made anew for every run: rows that were deleted must not be trained on."""


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
        """Read the rows and load the base model, so that what is wrong shows before any run.

        Raises:
            FedlrError: They cannot be read or loaded.
        """
        # How long rows may be is a run's matter, and the model is held to it there.
        asked = RunConfig(model=ModelConfig(max_length=SHORTEST))
        plain = local_config(asked, self.declaration)
        rows = len(load(source_spec_of(plain)).train)
        self._say(f"{rows} rows are readable")
        resident_base(plain, device_of(plain), self._reuse, self._say)

    def examine(self, asked: RunConfig) -> str:
        """Hold the private step to its promise on this device; return which device that is.

        Args:
            asked: A run as a coordinator might ask for it.

        Raises:
            DoctorError: It does not hold.
            FedlrError: As `load`, or the run does not fit the model.
        """
        config = local_config(asked, self.declaration)
        size = self._terms(config).declared_size
        # The frozen layers of every row are not needed for it.
        kernels = replace(config.kernels, prefix_cache_mb=0)
        self._built(replace(config, optimizer=_small(config, size), kernels=kernels))
        return str(device_of(config))

    def status_of(self, order: RunOrder) -> SiteStatus:
        """Return what the site is in the run of ``order``, from declared numbers alone.

        No row is touched: how long an answer takes must not tell of them.

        Raises:
            OrderRefused: As `site_of`.
        """
        try:
            config = self._allowed(order)
            client = self._client(config)
            base = resident_base(config, device_of(config), self._reuse, self._say)
            labels = self.declaration.limits.labels or ()
            digests = provenance(config, base, labels)
            policy = tighten(terms_of_run(config, client), self.declaration.limits)
        except FedlrError as error:
            raise _refusal(order, error) from error
        return policy.status(digests)

    def site_of(self, order: RunOrder) -> Site:
        """Return the site as it takes part in the run of ``order``, built where it is another run.

        Args:
            order: Verified; what it asks is held against the declaration here.

        Raises:
            OrderRefused: ``policy``: the operator does not allow such a run, or this site
                cannot carry it out. The message is for the operator.
            LedgerError: The ledger cannot be used now.
        """
        if self._site is None or self._site[0] != order.digest:
            try:
                config = self._allowed(order)  # before the running one is let go
                self._site = None
                self._site = (order.digest, self._built(config))
            except LedgerError:
                raise
            except FedlrError as error:
                raise _refusal(order, error) from error
        return self._site[1]

    def close(self) -> None:
        """Let go of the ledger."""
        self._site = None
        with suppress(LedgerError):
            self.ledger.close()

    def _allowed(self, order: RunOrder) -> RunConfig:
        """Return the configuration of a run here; ConfigError where it is not allowed."""
        if order.run == RECOVERED:
            raise ConfigError([f"the name {RECOVERED} is the ledger's own; give another"])
        config = local_config(from_json(order.config), self.declaration)
        self._hold(config)
        return config

    def _built(self, config: RunConfig) -> Site:
        self._reuse.forget(*_OF_THE_ROWS)
        client = self._client(config)

        def plan(data: LoadedData) -> tuple[ClientPlan, ...]:
            units = UnitIndex.of(data.train.users, _all_rows(data), config.privacy.unit)
            return (replace(client, units=units),)

        own = OwnRows(source_spec_of(config), plan)
        bench = build(config, self._say, evaluate=False, reuse=self._reuse, own=own)
        quick(bench)
        self._observe(bench.data)
        (site,) = bench.clients
        policy = tighten(terms_of_run(config, site), self.declaration.limits)
        return Site(policy, site.units, bench.trainer, self.ledger, bench.provenance)

    def _hold(self, config: RunConfig) -> None:
        """Raise ConfigError unless the declaration allows such a run."""
        declaration, limits = self.declaration, self.declaration.limits
        mode = config.privacy.mode
        terms = self._terms(config)
        check_delta([terms])
        run = Declared(
            client=declaration.client,
            mode="dp" if mode == "dry" and declaration.dry else mode,
            declared_size=terms.declared_size,
            unit=config.privacy.unit,
            delta=terms.delta,
            method=config.method.name,
            labels=limits.labels,
            columns=columns_of(config),
        )
        problems = limits.conflicts(run)
        if config.model.random_weights:
            problems.append("model.random_weights = true would train on no model; set it to false")
        if problems:
            raise ConfigError(problems)

    def _client(self, config: RunConfig) -> ClientPlan:
        """Return the site as a client of the run, without rows; all of it is declared."""
        terms = calibrated(config, self._terms(config))
        none = UnitIndex.of(None, np.array([], dtype=np.int64), "example")
        return ClientPlan(
            terms.name, none, terms.declared_size, terms.delta, terms.noise_multiplier
        )

    def _terms(self, config: RunConfig) -> Terms:
        size = int(self.declaration.limits.declared_size or 0)
        return terms_of(config, self.declaration.client, size)

    def _observe(self, data: LoadedData) -> None:
        """Note what the rows are now; changed data continue the same ledger."""
        if self.ledger.observe(data.rows_sha256(_all_rows(data))):
            self._say(
                "the rows have changed since the last run; the ledger goes on, and rows that "
                "stayed keep their history"
            )


def local_config(asked: RunConfig, declaration: Declaration) -> RunConfig:
    """Return the configuration of a run at one site: what a run may ask, and nothing else of it.

    Args:
        asked: The coordinator's configuration. Seed, shape of model, head and adapter, method,
            refresh, privacy, optimiser and number of rounds are taken from it.
        declaration: The operator's: rows, place of the base model, device and memory.
    """
    own = declaration.model
    return RunConfig(
        seed=asked.seed,
        model=replace(asked.model, name=own.name, revision=own.revision, sha256=own.sha256),
        data=replace(declaration.data, label_names=declaration.limits.labels),
        adapter=replace(asked.adapter, rank_by_client=None),
        method=MethodConfig(name=asked.method.name),
        # A comes from the server.
        subspace=SubspaceConfig(
            refresh=asked.subspace.refresh, refresh_every=asked.subspace.refresh_every
        ),
        privacy=replace(asked.privacy, policies=None),
        optimizer=asked.optimizer,
        federation=FederationConfig(clients=1, clients_per_round=1, rounds=asked.federation.rounds),
        kernels=declaration.kernels,
    )


def _small(config: RunConfig, size: int) -> OptimizerConfig:
    """Return the optimiser of an examination: no more rows in a step than a site of few has."""
    expected = min(config.optimizer.expected_batch, max(1, size))
    return replace(config.optimizer, expected_batch=expected)


def source_spec_of(config: RunConfig) -> SourceSpec:
    """Return where the rows of a site are: every one of its training split is trained on."""
    return replace(source_spec(config), seed=0, only="train")


def _refusal(order: RunOrder, error: FedlrError) -> OrderRefused:
    return OrderRefused("policy", f"the run {order.run} is not taken: {error}")


def _all_rows(data: LoadedData) -> Rows:
    return np.arange(len(data.train), dtype=np.int64)

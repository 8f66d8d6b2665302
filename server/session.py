"""One run and its folder, the same for every engine: begin or resume, strategy, results."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from fedlr.build import Workbench, build
from fedlr.config import RunConfig, from_mapping, to_json
from fedlr.doctor.checkup import quick
from fedlr.errors import ConfigError, RunError
from fedlr.orders import SiteOrder, check_policies, prepare
from fedlr.planning import Say
from fedlr.report.facts import ClientFacts, RunFacts, check_same, read_facts, write_facts
from fedlr.report.folder import (
    CONFIG_FILE,
    create_run_folder,
    make_run_folder,
    output_folder,
    write_config,
)
from fedlr.report.live import LiveProgress, Progress, SilentProgress
from fedlr.report.records import ROUNDS_FILE, SUMMARY_FILE, RoundLog, Summary, read_summary
from fedlr.report.spectra import SPECTRA_FILE
from fedlr.report.traces import LEDGERS
from fedlr.report.tracking.tracker import NoTracker, Tracker
from fedlr.reuse import NOTHING_SHARED, Reuse
from server import books
from server.hooks import Hooks
from server.journal import FileJournal, write_head
from server.membership import Membership
from server.outcome import Checkpoint, Outcome, Patience, StrategyConfig
from server.results import reported, settle, summarise, write_page, write_results
from server.spectra import SpectrumRecorder
from server.strategy import FederatedStrategy
from server.tracking import TrackedProgress, check_tracking, open_tracker, tell_end

FIXED = ("base", "tokenizer", "labels", "codec", "data_sha256", "clients")
"""Facts that a resumed run must find as they were."""


@dataclass(frozen=True)
class Session:
    """A run that is about to start or go on; it holds the journal until `close`.

    Attributes:
        workbench: Model, data and clients.
        folder: The run folder.
        facts: What the run is made of.
        order: What a process needs to be one of its simulated sites; None where they are real.
        start: The state before round 1, or where the run stood.
        journal: Its durable memory.
        began: Monotonic clock at the start, seconds.
        tracker: Shows the run in another tool.
        quiet: Whether nothing is shown on this terminal while it goes on.
    """

    workbench: Workbench
    folder: Path
    facts: RunFacts
    order: SiteOrder | None
    start: Checkpoint
    journal: FileJournal
    began: float = field(default_factory=time.monotonic)
    tracker: Tracker = field(default_factory=NoTracker)
    quiet: bool = False

    @property
    def config(self) -> RunConfig:
        """The configuration of the run."""
        return self.workbench.config

    @property
    def simulated(self) -> SiteOrder:
        """The order of its simulated sites; RunError where they are real."""
        if self.order is None:
            raise RunError(
                f"the run in {self.folder} has real sites; `fedlr submit` goes on with it"
            )
        return self.order

    def strategy(
        self, settings: StrategyConfig | None = None, membership: Membership | None = None
    ) -> FederatedStrategy:
        """Return the strategy that runs what is left of the run.

        Args:
            settings: Another engine's waits; None takes `strategy_config`.
            membership: The clients, where they were asked before; None asks them at its start.

        Raises:
            RunError: The method's states cannot be averaged as configured.
        """
        config = self.config
        budget = config.privacy.epsilon if config.privacy.mode == "dp" else None
        display: Progress = SilentProgress() if self.quiet else LiveProgress(budget)
        hooks = Hooks(
            evaluate=self.workbench.evaluator,
            log=RoundLog(self.folder / ROUNDS_FILE),
            progress=TrackedProgress(display, self.tracker),
            journal=self.journal,
            recorder=SpectrumRecorder(
                self.folder / SPECTRA_FILE, first(self.workbench).state.parts
            ),
        )
        bench = self.workbench
        settings = settings or strategy_config(config, self.facts.run)
        return FederatedStrategy(
            settings, bench.method, self.start, bench.provenance, hooks, membership
        )

    def finish(self, outcome: Outcome) -> Summary:
        """Write adapter, plot, summary and page, tell the tracker, and return the summary.

        ε is that of the ledgers, which also count rounds that were paid for and not
        joined; of real sites it is what they reported. The duration is that of the rounds
        before a resume and of this process.
        """
        earlier = sum(record.wall_s for record in self.start.records)
        wall_s = earlier + time.monotonic() - self.began
        if self.order is None:
            outcome = reported(self.config, self.facts, outcome)
        else:
            outcome = settle(self.config, self.facts, self.order, outcome)
        summary = summarise(self.config, self.facts, outcome, wall_s)
        write_results(self.workbench, outcome, summary, self.folder)
        self.tracker.finish(summary)
        write_page(self.workbench, outcome, self.folder)
        return summary

    def check_progress(self, summary: Summary, outcome: Outcome) -> None:
        """Raise RunError where this process completed no round, with the reason."""
        if outcome.stopped_reason and summary.rounds == self.start.state.round:
            raise RunError(
                f"no round was completed; {outcome.stopped_reason}. What was recorded is in "
                f"{self.folder}"
            )

    def close(self) -> None:
        """Let go of tracker and journal: another process may resume the run."""
        try:
            self.tracker.close()
        finally:
            self.journal.close()


def begin(
    workbench: Workbench,
    began: float | None = None,
    say: Say = lambda _: None,
    folder: Path | None = None,
    reuse: Reuse = NOTHING_SHARED,
) -> Session:
    """Start a run in a new folder: configuration, ledgers, the head as it is now, facts.

    The facts come last: a folder that has them is a run with all its ledgers, and a
    resumed run never makes one. Where something is wrong before, there is no folder.

    Args:
        workbench: What will run.
        began: Monotonic clock at the start of the work, seconds; None is now.
        say: Told what the operators of sites should know, on this console alone.
        folder: Where to make the run, a folder that does not exist yet; None makes one
            by date and time in ``output``.
        reuse: Remembers what was examined for other runs of this process.

    Raises:
        RunError: The folder cannot be made.
        ConfigError: An operator's policy does not allow the run, or the tool that is to
            show it cannot be used here.
        DoctorError: The private step does not do here what it promises.
    """
    began = time.monotonic() if began is None else began
    config = workbench.config
    check_tracking(config)
    check_policies(config, workbench.clients, workbench.data.label_names)
    _examine(workbench, reuse)
    if folder is None:
        folder = create_run_folder(output_folder(config.output), config.name, datetime.now())
    else:
        make_run_folder(folder)
    write_config(folder, to_json(config))
    facts = facts_of(workbench, f"{folder.parent.name}-{folder.name}-{secrets.token_hex(4)}")
    journal = FileJournal(folder)
    try:
        write_head(folder, workbench.whole_head)
        order = prepare(config, facts.run, folder / LEDGERS, _noise(facts))
        books.observe(workbench, order, say)
        told = (*facts.notices, *books.notices(order))
        facts = replace(facts, notices=told, sources=order.sources)
        write_facts(folder, facts)
        start = first(workbench)
        tracker = open_tracker(config, folder, facts)
    except BaseException:
        journal.close()
        raise
    return Session(workbench, folder, facts, order, start, journal, began, tracker)


def finished(folder: Path) -> Summary | None:
    """Return the summary of the run in ``folder`` if its last round is done, else None.

    A tool that knows the run and was never told its end is told it now.

    Raises:
        RunError: ``folder`` is no run folder, or a file in it is damaged.
    """
    facts, path = read_facts(folder), folder / SUMMARY_FILE
    config = read_config(folder, facts)
    summary = read_summary(path) if path.exists() else None
    if summary is None or summary.rounds < config.federation.rounds:
        return None
    tell_end(config, folder, facts, summary)
    return summary


def order_of(folder: Path, config: RunConfig, facts: RunFacts) -> SiteOrder:
    """Return the order of a run that has begun; no ledger is made."""
    return prepare(config, facts.run, folder / LEDGERS, _noise(facts), resumed=True)


def resume(folder: Path, say: Say = lambda _: None, reuse: Reuse = NOTHING_SHARED) -> Session:
    """Continue the run in ``folder`` after its last completed round.

    Args:
        folder: A run folder.
        say: Told what is being done.
        reuse: What other runs of this process have made already.

    Raises:
        RunError: ``folder`` is no run folder, another process has it, a file in it is
            damaged, or model or data are not those the run began with.
        FedlrError: As `fedlr.build.build`.
    """
    began = time.monotonic()
    facts = read_facts(folder)
    config = read_config(folder, facts)
    check_tracking(config)
    journal = FileJournal(folder)
    try:
        workbench = build(config, say, _noise(facts), reuse=reuse)
        check_same(facts, facts_of(workbench, facts.run), FIXED)
        check_policies(config, workbench.clients, workbench.data.label_names)
        _examine(workbench, reuse)
        start = journal.checkpoint(workbench.layout) or first(workbench)
        order = order_of(folder, config, facts)
        books.check_resumed(config, facts, order, start)
        books.observe(workbench, order, say)
        tracker = open_tracker(config, folder, facts, start.records)
    except BaseException:
        journal.close()
        raise
    return Session(workbench, folder, facts, order, start, journal, began, tracker)


def read_config(folder: Path, facts: RunFacts) -> RunConfig:
    """Return the configuration of a run folder.

    Raises:
        RunError: It cannot be read, or is not the one the run began with: what the run
            promised, and what it has spent, holds for that one alone.
    """
    path = folder / CONFIG_FILE
    try:
        written = json.loads(path.read_text(encoding="utf-8"))["config"]
        config = from_mapping(written)
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise RunError(f"{path} is damaged: {error}; bring it back from a copy") from error
    # As it was written: an earlier version has no word for the settings that came since.
    if _digest(written) != facts.config_sha256:
        raise RunError(
            f"{path} is not the configuration that the run began with; bring it back as it was, or "
            "start a new run with the other one"
        )
    return config


def facts_of(workbench: Workbench, run: str) -> RunFacts:
    """Return the facts of a run named ``run`` on ``workbench``."""
    config, provenance = workbench.config, workbench.provenance
    return RunFacts(
        run=run,
        config_sha256=_digest(asdict(config)),
        model=workbench.base.name,
        data=config.data.label,
        data_sha256=workbench.data.publishable_sha256,
        label_names=workbench.data.label_names,
        majority=workbench.majority,
        base=provenance.base,
        tokenizer=provenance.tokenizer,
        labels=provenance.labels,
        codec=provenance.codec,
        clients=tuple(
            ClientFacts(
                client=plan.name,
                declared_size=plan.declared_size,
                delta=plan.delta,
                noise_multiplier=plan.noise_multiplier,
            )
            for plan in workbench.clients
        ),
        notices=workbench.notices,
    )


def strategy_config(config: RunConfig, run: str) -> StrategyConfig:
    """Return the settings of the federation that ``config`` describes."""
    federation = config.federation
    return StrategyConfig(
        run=run,
        seed=config.seed,
        rounds=federation.rounds,
        clients=federation.clients,
        clients_per_round=federation.clients_per_round,
        min_clients=federation.min_clients,
        evaluate_every=federation.evaluate_every,
        average_rounds=federation.average_rounds,
        weights=config.method.weights,
        update_norm_bound=config.method.update_norm_bound,
        round_timeout_s=federation.round_timeout_s,
        start_timeout_s=federation.start_timeout_s,
        patience=Patience(
            spare_clients=federation.spare_clients,
            retries=federation.retries,
            retry_wait_s=federation.retry_wait_s,
            longest_pause=federation.longest_pause,
        ),
    )


def _noise(facts: RunFacts) -> dict[str, float]:
    """Return σ by client."""
    return {client.client: client.noise_multiplier for client in facts.clients}


def _examine(workbench: Workbench, reuse: Reuse) -> None:
    """Carry out `quick`, once for the runs of this process between which it sees no difference.

    It sees the private step on made-up rows: not whose data they are, how many take part
    how often, nor the budget. σ scales one product, whose deviation is measured in
    units of σ, and the seed draws public numbers only. How many rows pass at once, which may
    have been measured, and the threads decide how sums are formed.
    """
    config, plain = workbench.config, RunConfig()
    unseen: dict[str, Any] = {
        name: getattr(plain, name) for name in ("name", "output", "data", "partition", "tracking")
    }
    budget = {
        name: getattr(plain.privacy, name)
        for name in ("epsilon", "delta", "accountant", "max_joins", "policies")
    }
    seen = replace(
        replace(config, **unseen),
        seed=0,
        federation=replace(plain.federation, engine=config.federation.engine),
        privacy=replace(config.privacy, **budget),
    )
    labels = len(workbench.data.label_names)
    trainer = workbench.trainer
    passes = (trainer.settings.physical_batch, torch.get_num_threads())
    key = (to_json(seen), workbench.provenance.base, trainer.device, labels, passes)
    reuse.get("examination", key, lambda: quick(workbench), keep=64)


def first(workbench: Workbench) -> Checkpoint:
    """Return where every run of this configuration starts."""
    generator = torch.Generator().manual_seed(workbench.config.seed)
    return Checkpoint(workbench.method.init(workbench.layout, generator))


def _digest(written: Mapping[str, Any]) -> str:
    """Return sha256, hex, of a configuration in the form of `fedlr.config.to_json`."""
    text = json.dumps(written, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()

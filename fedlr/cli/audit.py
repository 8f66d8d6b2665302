"""``fedlr audit``: a lower bound on the ε of a site's private training, which can fail."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from fedlr import checks
from fedlr.cli.arguments import Parser
from fedlr.cli.compose import compose
from fedlr.config import RunConfig
from fedlr.errors import ConfigError
from fedlr.report.live import say
from fedlr.report.units import privacy_loss

if TYPE_CHECKING:
    from fedlr.audit.run import Report

EXCEEDED = 9
"""Exit status where the bound exceeds the ledger's ε."""

EPSILON = "privacy.epsilon"

_ABOUT = """\
Attack the private training of client-000 of a configuration, and bound its ε from below.
Canaries, included by secret coins, are planted into its data; site, clip, noise, sampling
and ledger are the ones of a simulation. Nothing is written. Overrides are those of `fedlr
simulate`; without privacy.epsilon the audit trains at ε = 1, where it can fail: the code is
the same at every ε, and one run cannot show a large one. Exits with 0 if the bound does not
exceed the ε of the ledger, with 9 if it does: then the training is not as private as claimed."""


def run(words: Sequence[str]) -> int:
    """Run the verb.

    Args:
        words: Hydra overrides, and ``--canaries``, ``--confidence``, ``--json`` or ``--help``.

    Returns:
        0, or `EXCEEDED`; errors are raised as `fedlr.errors.FedlrError`.
    """
    parser = Parser("audit", _ABOUT)
    parser.add_argument("overrides", metavar="overrides", nargs="*", default=[])
    parser.add_argument("--canaries", type=int, default=1000, help="default 1000, at least 100")
    parser.add_argument("--confidence", type=float, default=0.95, help="default 0.95")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    given = parser.parse(words)
    if given is None:
        return 0
    _check(given.canaries, given.confidence)
    named = any(word.lstrip("+").startswith(f"{EPSILON}=") for word in given.overrides)
    overrides = given.overrides if named else [f"{EPSILON}=1", *given.overrides]
    report = audit(compose(overrides), given.canaries, given.confidence)
    print(json.dumps(_record(report), allow_nan=False) if given.json else _table(report))
    return EXCEEDED if report.exceeded else 0


def audit(config: RunConfig, canaries: int = 1000, confidence: float = 0.95) -> Report:
    """Audit the first client of ``config``.

    Args:
        config: A checked configuration with ``privacy.mode=dp``.
        canaries: m ≥ 100.
        confidence: Of the bound, in [0.5, 1).

    Raises:
        FedlrError: The mode is another one, the site cannot be built, or it abstains.
    """
    if config.privacy.mode != "dp":
        raise ConfigError(
            [f"privacy.mode = {config.privacy.mode} claims no ε to audit; use privacy=dp"]
        )
    from client.simulation import make_sites
    from fedlr.audit.canaries import CanaryUnits, toss
    from fedlr.audit.run import Subject, attack, claim_of, first_job, judge
    from fedlr.audit.trainer import CanaryTrainer
    from fedlr.build import build
    from fedlr.orders import check_policies, policy_digest, prepare, read_policies

    bench = build(config, say, evaluate=False)
    check_policies(config, bench.clients, bench.data.label_names)
    plan, trainer, coins = bench.clients[0], CanaryTrainer(bench.trainer), toss(canaries)
    units = CanaryUnits.join(plan.units, coins, trainer.shortest_row)
    bench = replace(bench, trainer=trainer, clients=(replace(plan, units=units),))
    with TemporaryDirectory(prefix="fedlr-audit-") as folder:
        # Nothing is released, so nothing is booked in a ledger that an operator keeps.
        alone = replace(config, privacy=replace(config.privacy, policies=None))
        order = prepare(alone, "audit", Path(folder), {plan.name: plan.noise_multiplier})
        allowed = policy_digest(read_policies(config).get(plan.name))
        (site,) = make_sites(bench, replace(order, policies=(allowed,)))
        policy = site.policy
        job = first_job(bench.method, bench.layout, config.seed, bench.provenance, policy.max_rank)
        subject = Subject(
            site, trainer, job, policy.max_joins, policy.clip_norm, policy.sample_rate
        )
        found = attack(subject, coins, say)
        claim = claim_of(order.ledger(plan.name), policy.delta, policy.accountant)
    return judge(found, claim, confidence)


def _check(canaries: int, confidence: float) -> None:
    """Raise ConfigError with every option that is out of range."""
    problems = []
    for check in (
        lambda: checks.at_least("--canaries", canaries, 100),
        lambda: checks.in_range("--confidence", confidence, 0.5, 0.999999),
    ):
        try:
            check()
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(problems)


def _table(report: Report) -> str:
    found, claim = report.found, report.claim
    rows = [
        ("claimed ε", f"{privacy_loss(claim.epsilon)} at δ = {claim.delta:.2g}, by the ledger"),
        ("canaries", f"{found.canaries}, {found.guesses} guessed, {found.correct} rightly"),
        ("lower bound on ε", f"{report.bound:.2f} at {100 * report.confidence:g} % confidence"),
        ("largest possible", f"{report.ceiling:.2f}, had every guess been right"),
        ("verdict", _verdict(report)),
    ]
    return "\n".join(f"{name:<17} {text}" for name, text in rows)


def _verdict(report: Report) -> str:
    if report.exceeded:
        return "FAILED: less private than claimed"
    if report.ceiling <= report.claim.epsilon:
        return f"nothing found, but nothing could be: lower {EPSILON} or plant more canaries"
    return "passed: no sign of a smaller privacy than claimed"


def _record(report: Report) -> dict[str, float | int | bool | None]:
    claim, found = report.claim, report.found
    return {
        "claimed_epsilon": claim.epsilon if math.isfinite(claim.epsilon) else None,
        "delta": claim.delta,
        "canaries": found.canaries,
        "guesses": found.guesses,
        "correct": found.correct,
        "confidence": report.confidence,
        "epsilon_lower_bound": report.bound,
        "largest_possible_bound": report.ceiling,
        "exceeded": report.exceeded,
    }

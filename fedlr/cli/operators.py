"""What operators allow, and what ledgers hold before, for every run of a plan."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cache

from fedlr.config import RunConfig
from fedlr.errors import ConfigError
from fedlr.forecast import Bounds, Planned
from fedlr.orders import hold_policies, read_policies, run_ledger_of
from fedlr.planning import Split, client_name, plan_sizes
from fedlr.privacy.booking import DAY_S, MONTH_DAYS
from fedlr.privacy.earlier import Earlier, read_ledger
from fedlr.privacy.limits import Limits
from fedlr.report.plan import listed

Policies = Mapping[str, Limits]
"""What operators allow in one run, by client."""


def policies_of(configs: Sequence[RunConfig]) -> list[Policies]:
    """Return what operators allow in every run; ConfigError with all that is wrong."""
    found, problems = list[Policies](), list[str]()
    for config in configs:
        try:
            found.append(read_policies(config))
        except ConfigError as error:
            problems += error.problems
    _refuse(problems)
    return found


def hold(
    configs: Sequence[RunConfig],
    policies: Sequence[Policies],
    splits: Sequence[Split],
    given: Mapping[str, Earlier],
) -> list[dict[str, Earlier]]:
    """Hold every run against the policies, before any noise is calibrated for it.

    Args:
        configs: The runs.
        policies: Of each run.
        splits: How the data fall to the clients of each run.
        given: What the ledgers of ``--ledgers`` hold, by client.

    Returns:
        What counts in each run of what is spent already, by client: that of the ledger
        that its policy names, as in the run itself; else the given one.

    Raises:
        ConfigError: With everything that a run would refuse, and every given ledger that
            is not its client's, of all clients and runs.
    """
    counted, problems = list[dict[str, Earlier]](), list[str]()
    read = cache(read_ledger)  # Once: between two runs of a sweep another process may book.
    for config, limits, split in zip(configs, policies, splits, strict=True):
        problems += _strangers(given, limits)
        try:
            noise = {client_name(index): 1.0 for index in range(len(split.sizes))}  # of no account
            terms = plan_sizes(config, split.sizes, noise)
            own = hold_policies(limits, config, terms, split.labels, read)
        except ConfigError as error:
            problems += error.problems
        else:
            counted.append({**given, **own})
    _refuse(problems)
    return counted


def _refuse(problems: Sequence[str]) -> None:
    """Raise ConfigError with each problem once, if there are any: runs of a sweep share them."""
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


def _strangers(given: Mapping[str, Earlier], policies: Policies) -> list[str]:
    """Return which given ledgers are not those of the clients whose names their files have.

    The source id in the ledger decides: its run and client where a run made it, else the
    data source that a policy names, and no source is that of two clients.
    """
    owners = {policy.source_id: name for name, policy in policies.items() if policy.source_id}
    problems = []
    for name, ledger in given.items():
        source, wanted = ledger.source_id, policies.get(name, Limits()).source_id
        maker = run_ledger_of(source)
        of_source = f"--ledgers: {name}.sqlite belongs to the data source {source!r}"
        other = owners.setdefault(source, name)
        if other == name and source == wanted:
            continue
        if maker is not None and maker != name:
            problems.append(
                f"{of_source}, to {maker} of a run, not to {name}; give each ledger the name of "
                "its client, its witness too"
            )
        elif other != name:
            problems.append(
                f"{of_source}, which is that of {other}, not of {name}; give each client the "
                "ledger of its own data"
            )
        elif wanted is not None and maker is None:
            problems.append(
                f"{of_source}, but the policy of {name} says source_id = {wanted!r}; give the "
                "ledger of that source, or correct the policy"
            )
    return problems


def bounds_of(policies: Policies) -> dict[str, Bounds]:
    """Return the plain numbers of policies, by client; thirty days end today."""
    month_start = int(time.time()) // DAY_S - MONTH_DAYS + 1
    return {
        name: Bounds(
            epsilon_total=policy.epsilon_total,
            epsilon_per_run=policy.epsilon_per_run,
            epsilon_per_month=policy.epsilon_per_month,
            month_start=month_start,
            max_joins=policy.max_joins,
            own_ledger=policy.ledger is not None,
        )
        for name, policy in policies.items()
    }


def about_ledgers(planned: Sequence[Planned], given: Mapping[str, Earlier] | None) -> list[str]:
    """Say what is not counted of earlier runs, and what the run itself would not know.

    Args:
        planned: The runs.
        given: What the ledgers of ``--ledgers`` hold; None without that option.
    """
    private = [run for run in planned if run.config.privacy.mode == "dp"]
    names = dict.fromkeys(term.name for run in private for term in run.terms)
    held = {name for run in private for name in run.earlier}
    own = {name for run in private for name, policy in run.bounds.items() if policy.own_ledger}
    missing, notices = [name for name in names if name not in held], list[str]()
    if missing and given is None and not own:
        return [
            "earlier releases from the same data are not counted; --ledgers <run folder> adds "
            "what its ledgers hold"
        ]
    if missing:
        notices.append(f"no ledger of {listed(missing)}: nothing is counted there")
    if doubled := [name for name in names if name in own and name in (given or {})]:
        notices.append(
            f"of {listed(doubled)} the ledger counts that the policy names, as in the run; what "
            "--ledgers hold there and that one does not is not counted"
        )
    if free := [name for name in names if name in held - own]:
        notices.append(
            f"a simulated run begins a ledger of its own for {listed(free)} and does not know "
            "what --ledgers hold; to be stopped there, name the ledger in the client's policy"
        )
    return notices

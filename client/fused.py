"""Sites of one process that train together: one pass through the model for all of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from client.site import Prepared, Site
from fedlr.methods.method import ClientUpdate, Parts
from fedlr.training.fused import train_together
from fedlr.training.jobs import Abstention, Job

_log = logging.getLogger("fedlr.site")


def train_fused(orders: Sequence[tuple[Site, Job]]) -> list[ClientUpdate | Abstention]:
    """Train the sites of one process together, each as if it were alone.

    Every site checks and books its own job before the first gradient, and commits its own
    update before it leaves, as in `Site.train_many`.

    Args:
        orders: (site, job) pairs; all sites share one trainer.

    Returns:
        One outcome a pair, in their order. Where training fails, it fails for all that
        were booked: their rounds are spent.
    """
    found = [site.prepare(job) for site, job in orders]
    booked = {i: answer for i, answer in enumerate(found) if isinstance(answer, Prepared)}
    trained: dict[int, Parts] = {}
    try:
        if booked:
            sites = [orders[index][0] for index in booked]
            tasks = [prepared.task for prepared in booked.values()]
            results = train_together(sites[0].trainer, tasks, [site.units for site in sites])
            trained = dict(zip(booked, results, strict=True))
    except Exception:
        _log.exception("%d sites that train together: the round failed", len(booked))
    outcomes: list[ClientUpdate | Abstention] = []
    for index, ((site, _), answer) in enumerate(zip(orders, found, strict=True)):
        if isinstance(answer, Prepared):
            own = trained.get(index)
            outcomes.append(site.failed() if own is None else site.complete(answer, own))
        else:
            outcomes.append(answer)
    return outcomes

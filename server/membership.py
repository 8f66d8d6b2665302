"""Who takes part in a run: every node is asked for its status before round 0."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from flwr.serverapp import Grid

from fedlr.errors import BadUpdate, RunError
from fedlr.training.jobs import Provenance, SiteStatus
from server.messages import code_of, read_status, status_query
from server.outcome import StrategyConfig

POLL_S = 1.0
"""Seconds between two looks at which nodes are connected."""

ASK_AGAIN_S = 5.0
"""Seconds after which a node that is not ready yet is asked again."""

NOT_YET = ("unapproved", "busy")
"""Codes of sites that may answer otherwise later: an operator has still to look at the run."""

_log = logging.getLogger("fedlr.server")


@dataclass(frozen=True)
class Member:
    """A client of the run.

    Attributes:
        index: Rank of its name among those that the run began with; cohorts draw indices.
        node: Flower's id of its node.
        status: What it announced.
    """

    index: int
    node: int
    status: SiteStatus

    @property
    def client(self) -> str:
        """Its public identifier."""
        return self.status.client


@dataclass(frozen=True)
class Membership:
    """The admitted clients, in client order, and why others are not among them."""

    members: tuple[Member, ...]
    notices: tuple[str, ...]


def gather(
    grid: Grid,
    config: StrategyConfig,
    provenance: Provenance,
    known: Collection[str] | None = None,
) -> Membership:
    """Ask every node for its status until ``config.clients`` have answered.

    Nodes register one after the other, so the list is read again until the
    deadline of ``config.start_timeout_s``.

    Args:
        grid: Connects to the nodes.
        config: Of the federation.
        provenance: What clients must hold.
        known: Clients of a run that goes on, which wants these and no others, and can do
            without some of them; None begins a run.

    Returns:
        Clients in the order of their names, so that the order of the nodes has
        no influence. Left out, with a notice each: another provenance, a name
        that two nodes claim, a name that is not ``known``, and names beyond
        ``config.clients``.

    Raises:
        RunError: Too few answers in time, or fewer than ``config.min_clients``
            admitted.
    """
    statuses = _ask(grid, config, known)
    wanted = config.clients if known is None else len(known)
    answered = _counted(statuses, known)
    if answered < (wanted if known is None else config.min_clients):
        raise RunError(
            f"{answered} of {wanted} clients answered within "
            f"{config.start_timeout_s:g} s ({_names(statuses)}); look at the log of the others for "
            "why they cannot run, start the missing ones, or lower federation.clients"
        )
    membership = _admit(statuses, config, provenance, known)
    for notice in membership.notices:
        _log.warning("%s", notice)
    if len(membership.members) < config.min_clients:
        raise RunError(
            f"{len(membership.members)} clients were admitted, at least {config.min_clients} are "
            f"needed: {' '.join(membership.notices)}"
        )
    return membership


def _ask(
    grid: Grid, config: StrategyConfig, known: Collection[str] | None
) -> dict[int, SiteStatus]:
    """Return the valid statuses by node id."""
    wanted = config.clients if known is None else len(known)
    deadline = time.monotonic() + config.start_timeout_s
    statuses: dict[int, SiteStatus] = {}
    broken: set[int] = set()
    waiting: dict[int, float] = {}
    while True:
        now = time.monotonic()
        left = deadline - now
        silent = [
            node
            for node in grid.get_node_ids()
            if node not in statuses and node not in broken and waiting.get(node, 0.0) <= now
        ]
        if silent and left > 0:
            found, later = _answers(grid, silent, left, broken)
            statuses |= found
            waiting |= dict.fromkeys(later, time.monotonic() + ASK_AGAIN_S)
        left = deadline - time.monotonic()
        undecided = waiting.keys() - statuses.keys() - broken
        answered = _counted(statuses, known)
        # A run that goes on does without a site for good: whose refusal it is, is not known.
        settled = known is None and answered + len(broken) >= wanted and not undecided
        if answered >= wanted or settled or left <= 0:
            return statuses
        time.sleep(min(POLL_S, left))


def _answers(
    grid: Grid, nodes: list[int], timeout: float, broken: set[int]
) -> tuple[dict[int, SiteStatus], list[int]]:
    """Return the statuses that came, and the nodes that are to be asked again; those that
    answered anything else are added to ``broken``.
    """
    queries = [status_query(node, timeout) for node in nodes]
    replies = grid.send_and_receive(queries, timeout=timeout)
    # A message has no id before it is sent.
    asked = {query.metadata.message_id: query.metadata.dst_node_id for query in queries}
    statuses: dict[int, SiteStatus] = {}
    later: list[int] = []
    for reply in replies:
        node = asked.get(reply.metadata.reply_to_message_id)
        if node is None or reply.has_error():
            continue
        try:
            statuses[node] = read_status(reply)
        except BadUpdate as error:
            not_yet = code_of(reply) in NOT_YET
            later += [node] if not_yet else []
            broken |= set() if not_yet else {node}
            _log.warning("node %d cannot take part%s: %s", node, " yet" * not_yet, error)
    return statuses, later


def _counted(statuses: Mapping[int, SiteStatus], known: Collection[str] | None) -> int:
    """Return how many answers are of clients that the run wants."""
    return sum(known is None or status.client in known for status in statuses.values())


def _admit(
    statuses: Mapping[int, SiteStatus],
    config: StrategyConfig,
    provenance: Provenance,
    known: Collection[str] | None,
) -> Membership:
    notices = []
    claims = Counter(status.client for status in statuses.values())
    admitted: dict[str, tuple[int, SiteStatus]] = {}
    for node, status in sorted(statuses.items(), key=lambda item: (item[1].client, item[0])):
        if claims[status.client] > 1:
            notices.append(
                f"Node {node} is left out: {claims[status.client]} nodes call themselves "
                f"{status.client!r}."
            )
        elif status.provenance != provenance:
            differing = ", ".join(_differing(status.provenance, provenance))
            notices.append(f"Client {status.client!r} is left out: it holds another {differing}.")
        elif known is not None and status.client not in known:
            notices.append(f"Client {status.client!r} is left out: it is new to the run.")
        elif len(admitted) == config.clients:
            notices.append(
                f"Client {status.client!r} is left out: {config.clients} clients are configured."
            )
        else:
            admitted[status.client] = (node, status)
    order = sorted(admitted if known is None else known)
    members = [
        Member(index, *admitted[client]) for index, client in enumerate(order) if client in admitted
    ]
    return Membership(tuple(members), tuple(notices))


def _differing(found: Provenance, expected: Provenance) -> list[str]:
    names = ("base", "tokenizer", "labels", "codec")
    return [name for name in names if getattr(found, name) != getattr(expected, name)]


def _names(statuses: Mapping[int, SiteStatus]) -> str:
    return ", ".join(sorted(status.client for status in statuses.values())) or "none"

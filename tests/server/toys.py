"""A federation of least-squares sites: no language model, no randomness after the targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from flwr.app import Context, Message, UserConfig
from flwr.clientapp import ClientApp

from client.app import SiteLike, make_client_app
from fedlr.lowrank.factors import AdapterSite
from fedlr.lowrank.subspace import orthonormal
from fedlr.methods.combine import weighted_mean
from fedlr.methods.fedsvd import FedSVD
from fedlr.methods.ffa_lora import FFALoRA
from fedlr.methods.method import (
    ClientUpdate,
    GlobalState,
    Layout,
    Method,
    PartKey,
    Parts,
    Role,
)
from fedlr.methods.registry import METHODS
from fedlr.training.downlink import Basis, completed
from fedlr.training.jobs import Abstention, Job, Provenance, SiteStatus
from server.cohort import cohort
from server.grid import BatchHandler, InProcessGrid
from server.hooks import Hooks
from server.outcome import Outcome, StrategyConfig
from server.strategy import FederatedStrategy
from tests.methods.toys import Folding, TwoPhase

LAYOUT = Layout(
    sites=(
        AdapterSite("block.0.query", out_features=6, in_features=8, rank=3, scaling=2.0),
        AdapterSite("block.1.value", out_features=5, in_features=8, rank=2, scaling=0.5),
    ),
    head={"head.weight": torch.ones(2, 3)},
)
PROVENANCE = Provenance(base="base", tokenizer="tokenizer", labels="labels")


class Lowering(FFALoRA):
    """FFA-LoRA that lets a client train one column less after each of its rounds."""

    def aggregate(
        self, state: GlobalState, updates: Sequence[ClientUpdate], weights: Sequence[float]
    ) -> GlobalState:
        lower = {u.client: max(1, state.ranks.get(u.client, 3) - 1) for u in updates}
        after = super().aggregate(state, updates, weights)
        return replace(after, ranks={**state.ranks, **lower})


BUILDERS: dict[str, Callable[..., Method]] = {
    **METHODS,
    "two_phase": TwoPhase,
    "folding": Folding,
    "fedsvd_rotation": partial(FedSVD, downlink="rotation"),
    "lowering": Lowering,
}
STEPS = 4
FIRST_NODE = 1001

SECRET = "row 17 says: the patient is Ada"


def method(name: str = "fedsvd") -> Method:
    return BUILDERS[name](orthonormal, weighted_mean)


def first_state(name: str = "fedsvd") -> GlobalState:
    return method(name).init(LAYOUT, torch.Generator().manual_seed(3))


def targets(seed: int) -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    wanted = {
        s.name: torch.randn(s.out_features, s.in_features, generator=draws) for s in LAYOUT.sites
    }
    wanted |= {name: torch.randn(v.shape, generator=draws) for name, v in LAYOUT.head.items()}
    return wanted


@dataclass
class ToySite:
    """Gradient descent on ½‖s·B·A − W_k‖² and ½‖h − h_k‖², `STEPS` steps."""

    client: str
    seed: int
    size: int = 10
    epsilon_per_round: float | None = None
    provenance: Provenance = PROVENANCE
    joins: int = 0
    rank: int | None = None
    sigma: float = 1.5
    jobs: list[Job] = field(default_factory=list)
    basis: Basis | None = None
    _released: Parts = field(default_factory=dict)

    def status(self) -> SiteStatus:
        private = self.epsilon_per_round is not None
        return SiteStatus(
            self.client,
            self.size,
            self.sigma if private else 0.0,
            1e-5 if private else 0.0,
            self.provenance,
            self.rank,
        )

    def train_many(self, jobs: Sequence[Job]) -> list[ClientUpdate | Abstention]:
        return [self.answer(job) for job in jobs]

    def answer(self, job: Job) -> ClientUpdate | Abstention:
        self.jobs.append(job)
        if job.rotated is not None:
            found = completed(job, self.basis)
            if found is None:
                return Abstention(self.client, "no_base")
            job, self.basis = found
        if not job.train:
            cores = {
                PartKey(key.site, Role.CORE): q.mT @ self._released[PartKey(key.site, Role.B)]
                for key, q in job.parts.items()
            }
            return ClientUpdate(self.client, cores, steps=0)
        self.joins += 1
        self._released = descend(job.parts, job.train, targets(self.seed))
        spent = None if self.epsilon_per_round is None else self.joins * self.epsilon_per_round
        return ClientUpdate(self.client, self._released, steps=STEPS, epsilon=spent)


def descend(
    start: Parts, train: frozenset[Role], wanted: Mapping[str, torch.Tensor]
) -> dict[PartKey, torch.Tensor]:
    parts = {key: value.clone().requires_grad_(key.role in train) for key, value in start.items()}
    trained = {key: value for key, value in parts.items() if key.role in train}
    for _ in range(STEPS):
        grads = torch.autograd.grad(distance(parts, wanted), list(trained.values()))
        with torch.no_grad():
            for value, grad in zip(trained.values(), grads, strict=True):
                value -= 0.05 * grad
    return {key: value.detach() for key, value in trained.items()}


def distance(parts: Parts, wanted: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """½ Σ ‖effective weight − wanted‖²."""
    total = torch.zeros(())
    for site in LAYOUT.sites:
        at = {role: parts[key] for role in Role if (key := PartKey(site.name, role)) in parts}
        left = at[Role.B] @ at[Role.CORE] if Role.CORE in at else at[Role.B]
        weight = site.scaling * left @ at[Role.A]
        if Role.RESIDUAL_A in at:
            weight = weight + at[Role.RESIDUAL_B] @ at[Role.RESIDUAL_A]
        total = total + (weight - wanted[site.name]).square().sum() / 2
    for name in LAYOUT.head:
        total = total + (parts[PartKey(name, Role.HEAD)] - wanted[name]).square().sum() / 2
    return total


def evaluate(parts: Parts) -> tuple[float, float]:
    """(1 / (1 + loss), loss): the distance to the target of site 0."""
    loss = float(distance(parts, targets(0)))
    return 1 / (1 + loss), loss


def toy_sites(count: int = 4, epsilon: float | None = None) -> list[ToySite]:
    return [
        ToySite(f"client-{i:02d}", seed=i, size=10 * (i + 1), epsilon_per_round=epsilon)
        for i in range(count)
    ]


@dataclass
class Wrapped:
    """A site whose answers a test changes; `change` gets the update and the job."""

    site: ToySite
    change: Callable[[ClientUpdate, Job], ClientUpdate | Abstention]

    def status(self) -> SiteStatus:
        return self.site.status()

    def train_many(self, jobs: Sequence[Job]) -> list[ClientUpdate | Abstention]:
        answers: list[ClientUpdate | Abstention] = []
        for job in jobs:
            update = self.site.answer(job)
            assert isinstance(update, ClientUpdate)
            answers.append(self.change(update, job))
        return answers


def with_parts(update: ClientUpdate, **changes: torch.Tensor) -> ClientUpdate:
    """Replace the arrays of the first site by role name."""
    site = LAYOUT.sites[0].name
    new = {PartKey(site, Role(role)): value for role, value in changes.items()}
    return replace(update, parts={**update.parts, **new})


def grid_of(
    sites: Sequence[SiteLike],
    batch: BatchHandler | None = None,
    order: Sequence[int] | None = None,
    tamper: Callable[[list[Message]], list[Message]] | None = None,
) -> InProcessGrid:
    """Nodes in the given order of sites; `tamper` changes the replies to training."""

    def site_of(context: Context) -> SiteLike:
        return sites[int(context.node_config["partition-id"])]

    nodes: dict[int, UserConfig] = {
        FIRST_NODE + position: {"partition-id": index, "num-partitions": len(sites)}
        for position, index in enumerate(range(len(sites)) if order is None else order)
    }
    app = make_client_app(site_of)
    return InProcessGrid(app, nodes, batch) if tamper is None else Tampered(app, nodes, tamper)


class Tampered(InProcessGrid):
    """A network that changes, loses or repeats the replies to training."""

    def __init__(
        self,
        app: ClientApp,
        nodes: dict[int, UserConfig],
        tamper: Callable[[list[Message]], list[Message]],
    ) -> None:
        super().__init__(app, nodes)
        self.tamper = tamper

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        sent = list(messages)
        replies = list(super().send_and_receive(sent, timeout=timeout))
        training = bool(sent) and sent[0].metadata.message_type == "train"
        return self.tamper(replies) if training else replies


def config(**changes: object) -> StrategyConfig:
    base = StrategyConfig(
        run="run-1", seed=5, rounds=3, clients=4, clients_per_round=3, start_timeout_s=0.05
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def strategy(
    settings: StrategyConfig | None = None, name: str = "fedsvd", hooks: Hooks | None = None
) -> FederatedStrategy:
    return FederatedStrategy(
        settings or config(), method(name), first_state(name), PROVENANCE, hooks or Hooks(evaluate)
    )


def by_hand(
    name: str, sites: Sequence[ToySite], rounds: int, per_round: int, declared: bool = False
) -> list[GlobalState]:
    """The same federation as a loop of a dozen lines."""
    one, state, states = method(name), first_state(name), []
    for number in range(rounds):
        drawn = [sites[i] for i in cohort(5, number, range(len(sites)), per_round)]
        for phase in one.plan(state).phases:
            parts = one.broadcast(state)
            job = Job("r", number, state.phase, "n", phase.train, phase.send, parts, PROVENANCE)
            updates = [site.answer(job) for site in drawn]
            weights = [float(site.size) if declared else 1.0 for site in drawn]
            state = one.aggregate(
                state, [u for u in updates if isinstance(u, ClientUpdate)], weights
            )
        states.append(state)
    return states


def run(
    sites: Sequence[SiteLike],
    settings: StrategyConfig | None = None,
    name: str = "fedsvd",
    hooks: Hooks | None = None,
) -> Outcome:
    return strategy(settings, name, hooks).run(grid_of(sites))


def assert_same_parts(found: Parts, expected: Parts) -> None:
    assert found.keys() == expected.keys()
    for key in expected:
        assert torch.equal(found[key], expected[key]), key

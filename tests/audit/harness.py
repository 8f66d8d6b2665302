"""A site of seconds to audit, with a real `Site`, a real ledger file and a tiny random model."""

from __future__ import annotations

from pathlib import Path

import torch

from client.site import Site, SitePolicy
from fedlr.adapters.inject import inject
from fedlr.adapters.surgery import AdaptedModel
from fedlr.audit.canaries import CanaryUnits, toss
from fedlr.audit.run import Report, Subject, attack, claim_of, judge
from fedlr.audit.trainer import CanaryTrainer
from fedlr.methods.method import Parts, Role
from fedlr.privacy.calibration import noise_multiplier
from fedlr.privacy.ledger import SqliteLedger
from fedlr.training.classifier import Classifier
from fedlr.training.heads import LinearHead
from fedlr.training.jobs import Job, Provenance
from fedlr.training.local import LocalTrainer
from tests.models import CLASSES, CPU, WIDTH, encoder, modules_of, rows, settings, units_of

CANARIES, OWN, BATCH, ROUNDS, STEPS = 1000, 20, 12, 8, 2
RATE, DELTA, CLIP = BATCH / OWN, 1e-5, 0.5
RANK = 16
PROVENANCE = Provenance("base", "tokenizer", "labels")
TRAINED = frozenset({Role.B, Role.HEAD})
UNITS = units_of([1] * OWN)


def trainer(rank: int = RANK, **changes: object) -> tuple[LocalTrainer, Parts]:
    """A trainer and its arrays; at rank 16 it trains 1075 coordinates, room for 1000 canaries."""
    model, sites = inject(encoder("bert"), modules_of("bert"), None, rank, float(rank))
    head = LinearHead(torch.zeros(CLASSES, WIDTH), True, None).requires_grad_(False)
    held = {f"head.{name}": value for name, value in head.named_parameters()}
    adapted = AdaptedModel(model, sites, held)
    values = {"steps": STEPS, "learning_rate": 0.2, "head_learning_rate": 0.1}
    public = settings(**(values | {"physical_batch": 512} | changes))
    data = rows([5, 3, 7, 2] * (OWN // 4))
    parts = adapted.read(frozenset({Role.A, Role.B, Role.HEAD}))
    return LocalTrainer(Classifier(model, head).eval(), adapted, data, public, CPU), parts


def policy(epsilon: float) -> SitePolicy:
    """The policy of a site whose noise is calibrated for ``epsilon``."""
    return SitePolicy(
        client="client-000",
        mode="dp",
        declared_size=OWN,
        expected_batch=BATCH,
        clip_norm=CLIP,
        head_share=None,
        noise_multiplier=noise_multiplier(epsilon, DELTA, RATE, ROUNDS * STEPS, "rdp"),
        delta=DELTA,
        epsilon=epsilon,
        unit="example",
        max_joins=ROUNDS,
        accountant="rdp",
        public_seed=0,
    )


def audited(epsilon: float, folder: Path, rounds: int = ROUNDS) -> Report:
    """Audit a site that claims ``epsilon``, at 95 % confidence."""
    real, parts = trainer()
    planted = CanaryTrainer(real)
    coins = toss(CANARIES)
    units = CanaryUnits.join(UNITS, coins, planted.shortest_row)
    ledger = folder / "ledger.sqlite"
    site = Site(policy(epsilon), units, planted, SqliteLedger(ledger), PROVENANCE)
    job = Job("run", 0, 0, "none", TRAINED, TRAINED, parts, PROVENANCE)
    found = attack(Subject(site, planted, job, rounds, CLIP, RATE), coins)
    return judge(found, claim_of(ledger, DELTA, "rdp"))

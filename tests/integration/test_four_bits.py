"""A federation on a base in 4 bits, from the first round to what others load."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from client.site import Site
from fedlr.adapters.quantised import missing_package
from fedlr.cli.export import load_run
from fedlr.cli.main import main
from fedlr.report.records import read_rounds, read_summary
from fedlr.restore import logits
from tests.cli.small import small
from tests.models import encoder
from tests.test_build import saved
from tests.test_restore import in_a_fresh_process

pytestmark = pytest.mark.skipif(
    missing_package() is not None, reason="bitsandbytes is in the extra '4bit'"
)
TEXTS = ["a b c", "d", "e e a b a b c d e"]
NF4 = ("model.precision=nf4", "privacy=dry", "data.public=true", "adapter.layers=[-1]")


def simulate(folder: Path, *words: str, status: int = 0) -> Path:
    """Three rounds without noise; returns the run folder."""
    folder.mkdir()
    # Rows of 64 and 128: bitsandbytes' own product, in the loader, is wrong for shorter ones.
    model = saved(encoder("bert", hidden_size=64, intermediate_size=128), folder / "wide")
    assert main(["simulate", *small(folder), *NF4, f"model.name={model}", *words]) == status
    (found,) = (folder / "runs").rglob("run.json")
    return found.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(tmp_path_factory.mktemp("whole") / "four-bits")


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run that Ctrl-C stopped in its second round."""
    calls = iter(range(1000))
    complete = Site._complete

    def stopped(site: Site, *given: Any) -> Any:
        if next(calls) == 3:  # two clients a round
            raise KeyboardInterrupt
        return complete(site, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Site, "_complete", stopped)
        yield simulate(tmp_path_factory.mktemp("part") / "four-bits", status=130)


def test_three_rounds_and_a_reader_is_told(run: Path) -> None:
    summary = read_summary(run / "summary.json")
    assert summary.rounds == 3
    assert any("4 bits" in notice for notice in summary.notices)
    text = (run / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "in 4 bits (NF4)" in text
    assert "BitsAndBytesConfig" in text


def test_a_resumed_run_ends_as_an_uninterrupted_one(run: Path, interrupted: Path) -> None:
    assert main(["simulate", f"resume={interrupted}"]) == 0
    assert len(read_rounds(interrupted / "rounds.jsonl")) == 3
    (_, left), (_, right) = load_run(run), load_run(interrupted)
    assert left.parts.keys() == right.parts.keys()
    for key, value in left.parts.items():
        assert torch.allclose(value, right.parts[key], rtol=0, atol=1e-5), key


def test_the_exports_compute_what_the_run_did(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, checkpoint = load_run(run)
    wanted = logits(model, checkpoint.parts, TEXTS)
    base = model.base.name
    orders = []
    for form in ((), ("--merge",)):
        out = tmp_path / ("merged" if form else "adapter")
        assert main(["export", str(run), *form, "--output", str(out)]) == 0
        orders.append(
            {
                "folder": str(out),
                "base": None if form else base,
                "texts": [TEXTS],
                "examples": ["a text to classify"],
            }
        )
    assert "BitsAndBytesConfig" not in (tmp_path / "merged" / "README.md").read_text("utf-8")
    adapter, merged = in_a_fresh_process(orders, tmp_path)
    assert torch.allclose(merged, wanted, rtol=0, atol=1e-4)
    # bitsandbytes' own product, in bfloat16 on some processors.
    assert float((adapter - wanted).norm() / wanted.norm()) <= 0.05
    capfd.readouterr()
    assert main(["predict", str(run), *TEXTS]) == 0
    labels = [line.split("\t")[0] for line in capfd.readouterr().out.splitlines()]
    assert labels == [model.label_names[i] for i in wanted.argmax(1).tolist()]

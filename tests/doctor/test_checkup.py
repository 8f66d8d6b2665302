"""The short form that begins every private run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlr.adapters.quantised import missing_package
from fedlr.build import Workbench, build
from fedlr.config import from_mapping
from fedlr.doctor.checkup import quick
from fedlr.doctor.kernels import in_use
from fedlr.errors import DoctorError
from fedlr.kernels.clipped_sum import naive
from fedlr.methods.method import MODEL_ROLES
from fedlr.privacy.gradients import GRADIENTS, AutogradGradients
from fedlr.privacy.noise import Stream
from tests.models import LONGEST, encoder
from tests.test_build import saved

NAMES = ["per-unit gradients", "clip bound", "noise", "base unchanged"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """A private run on a tiny model."""
    return built(tmp_path_factory.mktemp("bench"))


def built(folder: Path, precision: str = "float32") -> Workbench:
    lines = [
        {"text": "a b c d e"[: 1 + 2 * (i % 5)], "label": ["no", "yes"][i % 2]} for i in range(30)
    ]
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    values: dict[str, Any] = {
        "model": {
            "name": saved(encoder("bert"), folder / "model"),
            "max_length": LONGEST,
            "precision": precision,
            "head": {"kind": "linear", "trained": True},
        },
        "data": {"kind": "file", "path": str(folder), "label_names": ["no", "yes"]},
        "adapter": {"rank": 2, "modules": ["query", "value"], "layers": [-1]},
        "federation": {"clients": 2, "clients_per_round": 2, "rounds": 2},
        "privacy": {"accountant": "rdp"},
        "optimizer": {"expected_batch": 4, "steps": 1},
        "kernels": {"device": "cpu"},
    }
    return build(from_mapping(values))


def test_a_sound_machine_passes_and_the_model_is_left_as_it_was(bench: Workbench) -> None:
    before, state = bench.adapted.read(MODEL_ROLES), torch.get_rng_state()
    findings = quick(bench)
    assert [finding.name for finding in findings] == NAMES
    assert all(finding.passed for finding in findings)
    after = bench.adapted.read(MODEL_ROLES)
    assert all(torch.equal(before[key], value) for key, value in after.items())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.skipif(missing_package() is not None, reason="bitsandbytes is in the extra '4bit'")
def test_a_base_in_four_bits_passes(tmp_path: Path) -> None:
    four_bits = built(tmp_path, "nf4")
    assert all(finding.passed for finding in quick(four_bits))
    assert in_use(four_bits.config).detail.count("stored in 4 bits") == 1


def test_neither_rows_nor_trainer_of_the_run_are_used(bench: Workbench) -> None:
    units = replace(bench.clients[0], units=None)  # type: ignore[arg-type]
    stripped: dict[str, Any] = {"trainer": None, "data": LabelsOnly, "evaluator": None}
    assert len(quick(replace(bench, clients=(units,), **stripped))) == len(NAMES)


class LabelsOnly:
    """All that is asked of the data."""

    label_names = ("no", "yes")


@pytest.mark.parametrize("mode", ["dry", "none"])
def test_a_run_that_claims_nothing_is_not_examined(mode: Any, bench: Workbench) -> None:
    config = replace(bench.config, privacy=replace(bench.config.privacy, mode=mode))
    assert quick(replace(bench, config=config)) == ()


def test_a_failure_stops_the_run_with_measure_bound_and_way_out(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(naive, "clip_factors", lambda squared, _: torch.ones_like(squared))
    real = Stream.gaussian
    monkeypatch.setattr(Stream, "gaussian", lambda self, shape, sd: 0.5 * real(self, shape, sd))
    before = bench.adapted.read(MODEL_ROLES)
    with pytest.raises(DoctorError) as caught:
        quick(bench)
    message = str(caught.value)
    assert caught.value.exit_code == 10
    assert "does not hold on this machine (cpu)" in message
    assert "clip bound: one unit changes the sum by at most" in message
    assert "bound 1.00001 C" in message
    assert "kernels=reference" in message
    assert "noise: deviation 0." in message
    assert "per-unit gradients" not in message
    after = bench.adapted.read(MODEL_ROLES)
    assert all(torch.equal(before[key], value) for key, value in after.items())


def test_the_configured_gradient_path_is_the_one_examined(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(AutogradGradients):
        def __call__(self, *given: Any) -> Any:
            return {key: -value for key, value in super().__call__(*given).items()}

    monkeypatch.setitem(GRADIENTS, "opacus", Wrong)
    quick(bench)
    other = replace(bench.config, kernels=replace(bench.config.kernels, gradients="opacus"))
    with pytest.raises(DoctorError, match=r"largest error 2\.0e\+00 .*\(opacus, 6 units\)"):
        quick(replace(bench, config=other))

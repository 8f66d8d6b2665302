"""What a run records of its updates: every completed round, nothing of the model changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlr.lowrank.factors import AdapterSite, Factors
from fedlr.methods.effective import update_of
from fedlr.methods.method import GlobalState, PartKey, Role
from fedlr.report.lines import read_lines
from fedlr.report.spectra import SPECTRA_FILE, SpectrumRecord
from server import spectra
from server.hooks import Hooks
from server.spectra import SpectrumRecorder, intruders_of, spectrum_of
from server.strategy import FederatedStrategy
from tests.server.toys import (
    LAYOUT,
    PROVENANCE,
    assert_same_parts,
    config,
    first_state,
    grid_of,
    method,
    run,
    toy_sites,
)


def recorded(folder: Path, name: str) -> tuple[GlobalState, tuple[SpectrumRecord, ...]]:
    """Return the last state and the spectra of a run of three rounds."""
    start = first_state(name)
    hooks = Hooks(recorder=SpectrumRecorder(folder / SPECTRA_FILE, start.parts))
    strategy = FederatedStrategy(config(), method(name), start, PROVENANCE, hooks)
    state = strategy.run(grid_of(toy_sites())).state
    return state, read_lines(folder / SPECTRA_FILE, SpectrumRecord).records


@pytest.mark.parametrize("name", ["fedsvd", "ffa_lora", "fedavg_lora", "two_phase", "folding"])
def test_every_completed_round_is_recorded_and_the_run_is_the_same(
    tmp_path: Path, name: str
) -> None:
    state, records = recorded(tmp_path, name)
    assert [record.round for record in records] == [1, 2, 3]
    assert_same_parts(state.parts, run(toy_sites(), config(), name).state.parts)
    for site, found in zip(LAYOUT.sites, records[-1].sites, strict=True):
        pair = update_of(site, state.parts)
        assert pair is not None
        dense = np.linalg.svd(pair.product().double().numpy(), compute_uv=False)
        kept = np.asarray(found.singular_values)
        np.testing.assert_allclose(kept, dense[: len(kept)], atol=1e-6)
        shares = kept[kept > 0] / kept.sum()
        expected = np.exp(-(shares * np.log(shares)).sum())
        assert found.effective_rank == pytest.approx(expected, rel=1e-6)


def test_a_method_that_trains_b_alone_never_leaves_its_subspace(tmp_path: Path) -> None:
    for name, stays in (("fedsvd", True), ("ffa_lora", True), ("fedavg_lora", False)):
        (tmp_path / name).mkdir()
        _, records = recorded(tmp_path / name, name)
        angles = [site.angle_rad for record in records for site in record.sites]
        assert None not in angles
        largest = max(angle for angle in angles if angle is not None)
        assert (largest < 1e-6) == stays


def test_a_residual_is_part_of_the_update() -> None:
    site = LAYOUT.sites[0]
    state = first_state()
    rest = Factors(torch.randn(6, 1), torch.randn(1, 8))
    parts = {
        **state.parts,
        PartKey(site.name, Role.RESIDUAL_B): rest.b,
        PartKey(site.name, Role.RESIDUAL_A): rest.a,
    }
    found = spectrum_of(replace(state, parts=parts, round=1), {}).sites[0]
    norm = float(rest.product().norm())
    assert found.singular_values[0] == pytest.approx(norm, rel=1e-5)
    assert found.effective_rank == pytest.approx(1.0, abs=1e-4)
    assert found.angle_rad is None


def test_a_site_that_is_not_finite_is_left_out() -> None:
    state = first_state()
    key = PartKey(LAYOUT.sites[0].name, Role.B)
    parts = {**state.parts, key: torch.full_like(state.parts[key], torch.nan)}
    found = spectrum_of(replace(state, parts=parts, round=1), state.parts)
    assert [site.site for site in found.sites] == [LAYOUT.sites[1].name]


def test_a_repeated_round_replaces_the_earlier_record(tmp_path: Path) -> None:
    state = first_state()
    for number in (1, 2, 2):
        recorder = SpectrumRecorder(tmp_path / SPECTRA_FILE, state.parts)
        recorder.record(replace(state, round=number))
    records = read_lines(tmp_path / SPECTRA_FILE, SpectrumRecord).records
    assert [record.round for record in records] == [1, 2]


def test_intruders_are_looked_for_where_weights_are_there() -> None:
    first = LAYOUT.sites[0]
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    parts = first_state().parts
    found = intruders_of(LAYOUT.sites, lambda site: weight if site == first else None, parts)
    assert found is not None
    assert [site.site for site in found.sites] == [first.name]
    assert found.of_sites == 2
    assert found.missing is not None
    # B = 0: the weight is the one it was.
    assert found.count(found.sites[0]) == 0


def test_only_the_weights_that_are_looked_at_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectra, "affordable", lambda shapes: [1])
    read: list[AdapterSite] = []

    def weight_of(site: AdapterSite) -> Tensor:
        read.append(site)
        return torch.eye(site.out_features, site.in_features)

    found = intruders_of(LAYOUT.sites, weight_of, first_state().parts)
    assert read == [LAYOUT.sites[1]]
    assert found is not None
    assert found.missing is not None
    assert "decompositions" in found.missing


def test_without_factors_there_is_nothing_to_look_at() -> None:
    parts = {PartKey("head", Role.HEAD): torch.zeros(2)}
    assert intruders_of(LAYOUT.sites, lambda site: pytest.fail("read"), parts) is None

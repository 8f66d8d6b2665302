"""A state of the server → the record of where its updates point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedlr.adapters.quantised import dense_weight
from fedlr.adapters.surgery import AdaptedModel
from fedlr.lowrank.factors import AdapterSite, Factors
from fedlr.lowrank.geometry import (
    LEADING,
    THRESHOLD,
    affordable,
    effective_rank,
    leading_similarity,
    principal_angles,
)
from fedlr.lowrank.svd import singular_values
from fedlr.methods.effective import update_of
from fedlr.methods.method import GlobalState, PartKey, Parts, Role
from fedlr.report.spectra import (
    Intruders,
    SiteSimilarity,
    SiteSpectrum,
    SpectrumLog,
    SpectrumRecord,
)

_KEPT = 64
"""Singular values of one site that are recorded."""


@dataclass(frozen=True)
class _Measured:
    """Numbers of the sites of one shape and scaling, the sites along the first axis."""

    sigma: Tensor
    rank: Tensor
    angle: Tensor | None


class SpectrumRecorder:
    """Writes one line per completed round.

    Args:
        path: ``spectra.jsonl`` of the run folder; continued where it exists.
        first: The parts before round 1: their A's are what later ones are compared with.

    Raises:
        RunError: The file cannot be written.
    """

    def __init__(self, path: Path, first: Parts) -> None:
        self._log = SpectrumLog(path)
        self._first = {key: value for key, value in first.items() if key.role is Role.A}

    def record(self, state: GlobalState) -> None:
        """Append the record of a state after a whole round; the state stays as it is.

        Raises:
            RunError: The line cannot be written.
        """
        self._log.append(spectrum_of(state, self._first))


def spectrum_of(state: GlobalState, first: Parts) -> SpectrumRecord:
    """Return where the updates of a state point.

    Args:
        state: After a whole round.
        first: A of every site before the first round; what is missing has no angle.
    """
    groups: dict[object, list[AdapterSite]] = {}
    for site in state.layout.sites:
        pair, before = update_of(site, state.parts), first.get(PartKey(site.name, Role.A))
        if pair is not None and _is_finite(pair):
            shape = None if before is None else before.shape
            key = (pair.b.shape, pair.a.shape, pair.scaling, shape)
            groups.setdefault(key, []).append(site)
    found: dict[str, SiteSpectrum] = {}
    for sites in groups.values():
        measured = _measure(sites, state.parts, first)
        for index, site in enumerate(sites):
            found[site.name] = SiteSpectrum(
                site=site.name,
                singular_values=tuple(measured.sigma[index, :_KEPT].tolist()),
                effective_rank=float(measured.rank[index]),
                angle_rad=None if measured.angle is None else float(measured.angle[index]),
            )
    kept = tuple(found[site.name] for site in state.layout.sites if site.name in found)
    return SpectrumRecord(round=state.round, sites=kept)


def intruders_of(
    sites: Sequence[AdapterSite], weight_of: Callable[[AdapterSite], Tensor | None], parts: Parts
) -> Intruders | None:
    """Return the intruder dimensions of a result against its base weights.

    Args:
        sites: All adapted layers, in model order.
        weight_of: Returns the base weight of one, shape (m, n), or None where it cannot be
            had. Called for the layers that are looked at alone, one after the other: out
            of 4 bits, all of them would be the whole model in float32.
        parts: The result.

    Returns:
        None where no layer has an update that could have directions.
    """
    pairs = [(site, pair) for site in sites if (pair := update_of(site, parts)) is not None]
    if not pairs:
        return None
    usable = [(site, pair) for site, pair in pairs if _is_finite(pair)]
    chosen = affordable([(site.out_features, site.in_features) for site, _ in usable])
    looked = (
        (site, _similarity(weight_of(site), pair)) for site, pair in (usable[i] for i in chosen)
    )
    found = tuple(
        SiteSimilarity(site=site.name, similarity=similarity)
        for site, similarity in looked
        if similarity is not None
    )
    missing = None
    if len(usable) < len(sites) or len(found) < len(chosen):
        missing = (
            "Layers whose update is not finite, or whose base weight is not here, are left out."
        )
    elif len(chosen) < len(usable):
        missing = (
            f"Layers are left out: two decompositions of the base weight are needed for each, "
            f"and for all {len(sites)} they would hold up the end of the run."
        )
    return Intruders(
        leading=LEADING, threshold=THRESHOLD, sites=found, of_sites=len(sites), missing=missing
    )


def base_weight(model: AdaptedModel, site: AdapterSite) -> Tensor | None:
    """Return the frozen weight of a site, shape (m, n), 4 bits read out.

    None where the layer keeps it in another form.
    """
    layer = model.encoder.get_submodule(f"base_model.model.{site.name}")
    weight = dense_weight(layer.get_submodule("base_layer"))
    if getattr(layer, "fan_in_fan_out", False):  # GPT-2's layers are transposed
        weight = weight.mT
    fits = weight.shape == (site.out_features, site.in_features)
    return weight if fits and weight.is_floating_point() else None


def _similarity(weight: Tensor | None, pair: Factors) -> tuple[float, ...] | None:
    return None if weight is None else tuple(leading_similarity(weight, pair).tolist())


def _measure(sites: Sequence[AdapterSite], parts: Parts, first: Parts) -> _Measured:
    """Measure sites of one shape and scaling in one batch: QRs of factors, no m × n product."""
    pairs = [pair for site in sites if (pair := update_of(site, parts)) is not None]
    batch = Factors(
        b=torch.stack([pair.b for pair in pairs]),
        a=torch.stack([pair.a for pair in pairs]),
        scaling=pairs[0].scaling,
    )
    sigma = singular_values(batch)
    keys = [PartKey(site.name, Role.A) for site in sites]
    before = [first[key].float() for key in keys if key in first]
    angle = None
    if len(before) == len(keys):
        now, then = torch.stack([parts[key].float() for key in keys]), torch.stack(before)
        if now.shape[-2] > then.shape[-2]:
            now, then = then, now
        angle = principal_angles(now, then)[..., -1]
    return _Measured(sigma, effective_rank(sigma), angle)


def _is_finite(pair: Factors) -> bool:
    return bool(torch.isfinite(pair.b).all() and torch.isfinite(pair.a).all())

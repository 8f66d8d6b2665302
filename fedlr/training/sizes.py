"""How large arrays may be: beyond it rounding couples rows, and a clipped sum moves by more than C.

A row's gradient is independent of its companions up to float32 rounding. Huge factors
amplify that rounding until the sum's sensitivity exceeds C.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedlr.adapters.residual import product_norm, residual_of
from fedlr.adapters.surgery import AdaptedModel
from fedlr.methods.method import MODEL_ROLES, PartKey, Parts, Role

LARGEST_UPDATE = 30.0
"""Largest s·‖B‖·‖A‖ + ‖R_b·R_a‖ that a step starts from, in units of ‖W‖ (Frobenius)."""

LARGEST_HEAD = 1000.0
"""Largest Frobenius norm of a head array that a step starts from."""


class SizeLimits:
    """What arrays may be at the start of a step: those of a broadcast, and those trained since.

    The broadcast alone would not do: from B = 0, a core 0 or a small head one noised step
    leads to whatever the other, huge arrays make of it.

    Args:
        adapted: The model; its base weights count without a residual.
    """

    def __init__(self, adapted: AdaptedModel) -> None:
        self._limits = {site: LARGEST_UPDATE * norm for site, norm in adapted.base_norms().items()}
        self._cored = frozenset(key.site for key in adapted.parameters() if key.role is Role.CORE)

    def norms(self, parts: Parts) -> dict[PartKey, float]:
        """Return the norm that counts of each array of ``parts`` that is the model's own.

        ‖·‖ (Frobenius); of A and B beside a core, which are bases with Frobenius norms √r
        whatever the core is, ‖·‖₂. Arrays are floating, all on one device.
        """
        own = {key: value.detach() for key, value in parts.items() if key.role in MODEL_ROLES}
        found = [self._norm(key, value) for key, value in own.items()]
        return dict(zip(own, torch.stack(found).tolist() if found else [], strict=True))

    def _norm(self, key: PartKey, value: Tensor) -> Tensor:
        wide = value.double()
        if key.site not in self._cored or key.role not in (Role.A, Role.B):
            frobenius: Tensor = wide.norm()
            return frobenius
        # The root of the largest eigenvalue of r × r: all of its bits that matter are right.
        gram = wide @ wide.mT if key.role is Role.A else wide.mT @ wide
        largest: Tensor = torch.linalg.eigvalsh(gram)[-1]
        return largest.clamp_min(0.0).sqrt()

    def added(self, parts: Parts) -> dict[str, float]:
        """Return ‖R_b·R_a‖ of every site that has a residual in ``parts``, by its name."""
        residuals = {site.name: residual_of(site, parts) for site in self._limits}
        return {name: product_norm(rest) for name, rest in residuals.items() if rest is not None}

    def check(self, norms: Mapping[PartKey, float], added: Mapping[str, float]) -> None:
        """Refuse arrays that are too large.

        Args:
            norms: `norms` of every array of the model.
            added: `added` of the same broadcast.

        Raises:
            ValueError: s·‖B‖·‖A‖, with a core R s·‖B‖₂·‖R‖·‖A‖₂, and the residual are
                together above `LARGEST_UPDATE`·‖W‖ at a site, or a head array is above
                `LARGEST_HEAD`; NaN is too large.
        """
        for site, limit in self._limits.items():
            b, a = (norms[PartKey(site.name, role)] for role in (Role.B, Role.A))
            size = site.scaling * b * a * norms.get(PartKey(site.name, Role.CORE), 1.0)
            rest = added.get(site.name, 0.0)
            if not size + rest <= limit:
                raise ValueError(
                    f"{site.name}: s·‖B‖·‖A‖ = {size:.3g} and a residual of norm {rest:.3g} must "
                    f"be ≤ {limit:.3g} together, {LARGEST_UPDATE:g} times the norm of the base "
                    "weight"
                )
        for key, norm in norms.items():
            if key.role is Role.HEAD and not norm <= LARGEST_HEAD:
                raise ValueError(f"{key.site}: ‖head‖ = {norm:.3g} must be ≤ {LARGEST_HEAD:g}")

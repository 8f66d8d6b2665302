"""Where the first A comes from: the row space a federation trains in.

With B trained alone, row(B·A) ⊆ row(A) in every round, so this choice, and
not the refactorisation, decides what the adapter can learn (package README).
All policies here are data-independent and cost no privacy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlr.lowrank.factors import AdapterSite

Draw = Callable[[AdapterSite, torch.Generator], Tensor]
"""(site, generator) → A of shape (r, n), or a basis of shape (m, r); float32.

Draws from the generator only, and lies on its device, so sites in the same order and an
equally seeded generator give the same A on one machine; across machines send A itself.
"""


@dataclass(frozen=True)
class Subspace:
    """One policy.

    Attributes:
        name: Name in the configuration.
        rows: A of a site, shape (r, n).
        columns: Orthonormal columns for the output side of a site, shape (m, r), for the
            methods that train a core between two fixed bases (Fed-SB).
    """

    name: str
    rows: Draw
    columns: Draw

    def __call__(self, site: AdapterSite, generator: torch.Generator) -> Tensor:
        """Return A of ``site``: `rows`."""
        return self.rows(site, generator)


def kaiming_rows(site: AdapterSite, generator: torch.Generator) -> Tensor:
    """Return A with independent entries from U(−1/√n, 1/√n), PEFT's default.

    Kaiming-uniform with a = √5 has bound √(2 / (1 + a²)) · √(3 / n) = 1/√n, so
    a row has expected squared norm n · (1/3n) = 1/3: rows of norm ≈ 0.58.

    Args:
        site: Gives r and n.
        generator: Source of the draws; advanced.

    Returns:
        Shape (r, n), float32.

    Reference:
        He et al., arXiv 1502.01852, section 2.2; LoRA, arXiv 2106.09685, section 4.1.
    """
    bound = 1.0 / math.sqrt(site.in_features)
    shape = (site.rank, site.in_features)
    uniform = torch.rand(shape, generator=generator, device=generator.device)
    return uniform.mul_(2.0).sub_(1.0).mul_(bound)


def orthonormal_rows(site: AdapterSite, generator: torch.Generator) -> Tensor:
    """Return A with A·Aᵀ = I, its row space uniform on the Grassmannian.

    Q of the QR of an n × r Gaussian, with the sign of each column fixed by the
    diagonal of R: then Q is Haar-distributed (Mezzadri, arXiv math-ph/0609050,
    section 5). PEFT's ``"orthogonal"`` initialisation is something else: its A
    does not have orthonormal rows.

    Args:
        site: Gives r and n.
        generator: Source of the draws; advanced.

    Returns:
        Shape (r, n), float32; A·Aᵀ = I up to float32 rounding (computed in float64).

    Example:
        >>> site = AdapterSite("q", out_features=4, in_features=6, rank=3, scaling=1.0)
        >>> a = orthonormal(site, torch.Generator().manual_seed(0))
        >>> bool(torch.allclose(a @ a.T, torch.eye(3), atol=1e-6))
        True
    """
    return _orthonormal(site.in_features, site.rank, generator).mT.contiguous()


def orthonormal_columns(site: AdapterSite, generator: torch.Generator) -> Tensor:
    """Return a basis with orthonormal columns, shape (m, r), float32, drawn likewise."""
    return _orthonormal(site.out_features, site.rank, generator)


def _orthonormal(size: int, rank: int, generator: torch.Generator) -> Tensor:
    """Haar-distributed orthonormal columns, shape (size, rank), float32."""
    gaussian = torch.randn(
        (size, rank), generator=generator, device=generator.device, dtype=torch.float64
    )
    basis, triangle = torch.linalg.qr(gaussian)
    sign = torch.where(triangle.diagonal() < 0, -1.0, 1.0)
    columns: Tensor = basis * sign
    return columns.float()


kaiming = Subspace("kaiming", kaiming_rows, orthonormal_columns)
orthonormal = Subspace("orthonormal", orthonormal_rows, orthonormal_columns)

SUBSPACES: Mapping[str, Subspace] = {"kaiming": kaiming, "orthonormal": orthonormal}
"""The policies that need nothing but a generator, by their configuration name."""

"""A frozen residual in a live layer: W + R_b·R_a in the place of W, and W back again.

The base weight is never written to: runs of one process share it. The layer gets another
parameter, and the one that it had is put aside.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedlr import checks
from fedlr.lowrank.factors import AdapterSite, Factors
from fedlr.methods.method import PartKey, Parts, Role

from .quantised import dense_weight, is_quantised

_FOLDED = "_fedlr_folded"


@dataclass(frozen=True, eq=False)
class _Folded:
    """What a layer had before, and the residual that is in its weight now."""

    original: nn.Parameter
    residual: Factors


def residual_of(site: AdapterSite, parts: Parts) -> Factors | None:
    """Return the residual R_b·R_a that ``parts`` hold for a site.

    Args:
        site: The adapted layer.
        parts: Arrays by (site, role).

    Returns:
        R_b (m, q) and R_a (q, n), float32 on the CPU; None where there is none or q is 0.

    Raises:
        ValueError: Half a residual, or shapes that do not fit the layer or each other.
    """
    b, a = (parts.get(PartKey(site.name, role)) for role in (Role.RESIDUAL_B, Role.RESIDUAL_A))
    if b is None and a is None:
        return None
    if b is None or a is None:
        raise ValueError(f"{site.name} has half a residual; give residual_a and residual_b")
    rank = a.shape[0] if a.ndim else 0
    checks.same_shape(f"{site.name}: residual_a", a.shape, (rank, site.in_features))
    checks.same_shape(f"{site.name}: residual_b", b.shape, (site.out_features, rank))
    if rank == 0:
        return None
    return Factors(b.detach().to("cpu", torch.float32), a.detach().to("cpu", torch.float32))


def fold(layer: nn.Module, residual: Factors | None) -> None:
    """Make a linear layer compute with W + R_b·R_a, or with its own W where there is none.

    Args:
        layer: The layer below an adapter, with a float32 weight of shape (m, n).
        residual: R_b (m, q) and R_a (q, n) with their scaling; None takes it out again.

    Guarantees:
        The sum is taken in float64 and rounded once, from W itself and not from the
        residual before. W is not written to; without a residual the layer has the very
        parameter that it had at first. The same residual again costs a comparison.

    Raises:
        ValueError: As `check_foldable`.
    """
    held: _Folded | None = vars(layer).get(_FOLDED)
    if residual is None:
        if held is not None:
            layer.register_parameter("weight", held.original)
            del vars(layer)[_FOLDED]
        return
    if held is not None and _same(held.residual, residual):
        return
    check_foldable(layer)
    original = layer.get_parameter("weight") if held is None else held.original
    b, a = (value.to(original.device, torch.float64) for value in (residual.b, residual.a))
    folded = torch.addmm(original.detach().double(), b, a, alpha=residual.scaling).float()
    layer.register_parameter("weight", nn.Parameter(folded, requires_grad=False))
    kept = Factors(residual.b.clone(), residual.a.clone(), residual.scaling)
    vars(layer)[_FOLDED] = _Folded(original, kept)


def check_foldable(layer: nn.Module) -> None:
    """Raise ValueError where a weight has too few bits to hold W + R_b·R_a."""
    if is_quantised(layer) or layer.get_parameter("weight").dtype is not torch.float32:
        raise ValueError(
            "a residual is added to base weights, which need float32 for it; set "
            "model.precision=float32"
        )


def original_weight(layer: nn.Module) -> Tensor:
    """Return W of a linear layer, shape (m, n), without any residual; float32 out of 4 bits."""
    held: _Folded | None = vars(layer).get(_FOLDED)
    return dense_weight(layer) if held is None else held.original.detach()


def product_norm(pair: Factors) -> float:
    """Return ‖s·B·A‖, Frobenius, of factors (m, q) and (q, n), with what rounding may add to it.

    Forms m × n only where q is not the smallest of the three: ‖BA‖ = ‖R₁R₂ᵀ‖ of B = Q₁R₁
    and Aᵀ = Q₂R₂. Not tr(BᵀB·AAᵀ): where large columns cancel, squares lose the product.

    Guarantees:
        In float64, and not less than the norm of the product that `fold` adds to W: what
        rounding makes of ‖B‖·‖A‖ is counted, at most (m + n)·q units of the last place.

    Example:
        >>> pair = Factors(torch.tensor([[3.0], [4.0]]), torch.tensor([[1.0, 1.0]]), 2.0)
        >>> round(product_norm(pair), 9)
        14.142135624
    """
    b, a = pair.b.double(), pair.a.double()
    left, right = b, a
    if pair.rank < min(b.shape[0], a.shape[1]):
        left, right = (torch.linalg.qr(b, mode="r").R, torch.linalg.qr(a.mT, mode="r").R.mT)
    unit = torch.finfo(torch.float64).eps
    rounding = unit * (b.shape[0] + a.shape[1]) * pair.rank * float(b.norm()) * float(a.norm())
    return pair.scaling * (float((left @ right).norm()) + rounding)


def _same(one: Factors, other: Factors) -> bool:
    return (
        one.scaling == other.scaling and torch.equal(one.b, other.b) and torch.equal(one.a, other.a)
    )

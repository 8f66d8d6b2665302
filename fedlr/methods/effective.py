"""What the parts of a state do to each base weight, whatever the method keeps them as."""

from __future__ import annotations

from fedlr.lowrank.factors import AdapterSite, Factors, stack
from fedlr.methods.method import PartKey, Parts, Role


def update_of(site: AdapterSite, parts: Parts) -> Factors | None:
    """Return the whole update of a site's weight as one pair.

    s·B·A; s·B·R·A where the parts hold a core R; with a residual R_b·R_a stacked
    onto it, and the scaling 1 then.

    Args:
        site: The adapted layer.
        parts: Arrays by (site, role), floating, each of its own rank where B, A and
            the core agree.

    Returns:
        float32 factors, B of shape (m, q) and A of shape (q, n), on the device of
        ``parts``; None where the parts hold no A and B of the site.

    Raises:
        ValueError: Half a residual, or shapes that do not fit.
    """
    b, a, core, rest_b, rest_a = (
        parts.get(PartKey(site.name, role))
        for role in (Role.B, Role.A, Role.CORE, Role.RESIDUAL_B, Role.RESIDUAL_A)
    )
    if (rest_b is None) != (rest_a is None):
        raise ValueError(f"{site.name} has half a residual; give residual_a and residual_b")
    if b is None or a is None:
        return None
    left = b.float() if core is None else b.float() @ core.float()
    pair = Factors(b=left, a=a.float(), scaling=site.scaling)
    if rest_b is None or rest_a is None or rest_a.shape[0] == 0:
        return pair
    return stack([pair, Factors(b=rest_b.float(), a=rest_a.float())])

"""The only list of methods: configuration name → class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol

from fedlr.errors import ConfigError
from fedlr.lowrank.subspace import Subspace
from fedlr.methods.combine import Combiner, weighted_mean
from fedlr.methods.consensus import Consensus
from fedlr.methods.fed_sb import FedSB
from fedlr.methods.fedask import FedASK
from fedlr.methods.fedavg_lora import FedAvgLoRA
from fedlr.methods.fedex_lora import FedExLoRA
from fedlr.methods.fedsvd import FedSVD
from fedlr.methods.ffa_lora import FFALoRA
from fedlr.methods.flexlora import FlexLoRA
from fedlr.methods.flora import FLoRA
from fedlr.methods.head_only import HeadOnly
from fedlr.methods.hetlora import HetLoRA
from fedlr.methods.method import Facts, Method
from fedlr.methods.rolora import RoLoRA


class Builder(Protocol):
    """The class of a method."""

    facts: Facts

    def __call__(self, subspace: Subspace, combine: Combiner = ...) -> Method:
        """Return the method with the settings that are its own at their defaults."""
        ...


METHODS: Mapping[str, Builder] = {
    "fedsvd": FedSVD,
    "ffa_lora": FFALoRA,
    "fedask": FedASK,
    "fed_sb": FedSB,
    "rolora": RoLoRA,
    "fedavg_lora": FedAvgLoRA,
    "fedex_lora": FedExLoRA,
    "flora": FLoRA,
    "flexlora": FlexLoRA,
    "hetlora": HetLoRA,
    "head_only": HeadOnly,
}
"""Every method by its configuration name."""


@dataclass(frozen=True)
class Options:
    """Settings that only some methods have, as fields of the same name.

    Attributes:
        downlink: ``rotation`` sends B and an r × r rotation in the place of A, which goes
            down once (`fedlr.methods.fedsvd`).
        norm_weighting: Weigh clients by the norm of what they send (`fedlr.methods.hetlora`).
        pruning: γ in (0, 1), share of its rank that a client keeps where the rest of its
            update shrinks; None prunes nobody (`fedlr.methods.hetlora`).
    """

    downlink: Literal["full", "rotation"] = "full"
    norm_weighting: bool = True
    pruning: float | None = None


DEFAULTS = Options()


def build(
    name: str,
    subspace: Subspace,
    combine: Combiner = weighted_mean,
    options: Options = DEFAULTS,
) -> Method:
    """Return the method called ``name``.

    Args:
        name: A key of `METHODS`.
        subspace: Where the first A comes from.
        combine: How the clients' arrays become one.
        options: What only some methods have.

    Raises:
        ConfigError: ``name`` is unknown, ``combine`` does not compose with it, or it has
            not a setting that is not at its default; the message lists what there is.

    Example:
        >>> from fedlr.lowrank.subspace import orthonormal
        >>> build("fedsvd", orthonormal).name
        'fedsvd'
    """
    inner = combine.inner if isinstance(combine, Consensus) else combine
    if problems := problems_of(name, inner.name, options, consensus=combine is not inner):
        raise ConfigError(problems)
    method: Any = METHODS[name](subspace, combine)
    own = {field.name for field in fields(method)}
    chosen = {f.name: getattr(options, f.name) for f in fields(options) if f.name in own}
    built: Method = replace(method, **chosen)
    return built


def problems_of(
    name: str, combine: str, options: Options = DEFAULTS, consensus: bool = False
) -> list[str]:
    """Return what is wrong with a choice of method, combiner and options; one sentence each.

    Args:
        name: Name of the method.
        combine: Name of the combiner, without its filter.
        options: What only some methods have.
        consensus: Whether a consensus filter is around the combiner.
    """
    if name not in METHODS:
        known = ", ".join(sorted(METHODS))
        return [f"method.name = {name!r} is unknown; choose one of {known}"]
    problems = []
    facts, kind = METHODS[name].facts, METHODS[name]
    if combine != weighted_mean.name and not facts.combiners:
        able = ", ".join(key for key, value in METHODS.items() if value.facts.combiners)
        problems.append(
            f"combine.kind = {combine} but method.name = {name} needs the weighted mean; set "
            f"combine=weighted_mean, or one of {able}"
        )
    if consensus and not facts.consensus:
        able = ", ".join(key for key, value in METHODS.items() if value.facts.consensus)
        problems.append(
            f"combine.consensus is set but not all that method.name = {name} averages is filtered "
            f"by it; set combine.consensus=null, or one of {able}"
        )
    own = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name not in own and value != field.default:
            usual = "null" if field.default is None else str(field.default).lower()
            problems.append(
                f"method.{field.name} = {str(value).lower()} but method.name = {name} has no such "
                f"setting; leave it at {usual}"
            )
    return problems

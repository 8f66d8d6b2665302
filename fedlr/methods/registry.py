"""The only list of methods: configuration name → builder."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedlr.errors import ConfigError
from fedlr.lowrank.subspace import Subspace
from fedlr.methods.combine import Combiner, weighted_mean
from fedlr.methods.fedavg_lora import FedAvgLoRA
from fedlr.methods.fedsvd import FedSVD
from fedlr.methods.ffa_lora import FFALoRA
from fedlr.methods.head_only import HeadOnly
from fedlr.methods.method import Method

Builder = Callable[[Subspace, Combiner], Method]
"""(subspace, combine) → method."""

METHODS: Mapping[str, Builder] = {
    "fedsvd": FedSVD,
    "ffa_lora": FFALoRA,
    "fedavg_lora": FedAvgLoRA,
    "head_only": HeadOnly,
}
"""Every method by its configuration name."""


def build(name: str, subspace: Subspace, combine: Combiner = weighted_mean) -> Method:
    """Return the method called ``name``.

    Args:
        name: A key of `METHODS`.
        subspace: Where the first A comes from.
        combine: How the clients' arrays become one.

    Raises:
        ConfigError: ``name`` is unknown; the message lists the known ones.

    Example:
        >>> from fedlr.lowrank.subspace import orthonormal
        >>> build("fedsvd", orthonormal).name
        'fedsvd'
    """
    if name not in METHODS:
        known = ", ".join(sorted(METHODS))
        raise ConfigError([f"method = {name!r} is unknown; choose one of {known}."])
    return METHODS[name](subspace, combine)

"""A square core between A and B, for methods whose clients train R alone in s·B·R·A.

PEFT computes lora_B(lora_A(x))·s. Where a method needs a core, what is called lora_A is
A and R one after the other: each is an ``nn.Linear`` of its own, so that whatever
captures gradients at linear layers sees R's inputs and outputs, and A's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedlr.lowrank.factors import AdapterSite
from fedlr.methods.method import Role

from .inject import ADAPTER


class Cored(nn.Module):
    """x → R·(A·x), in the place of PEFT's A.

    Args:
        projection: The linear layer that holds A, shape (r, n); kept, not copied.

    Attributes:
        projection: It.
        core: The linear layer that holds R, shape (r, r), in A's dtype and on its device;
            the identity at first, which leaves s·B·A what it is.
    """

    def __init__(self, projection: nn.Linear) -> None:
        super().__init__()
        rank, like = projection.out_features, projection.weight
        self.projection = projection
        # On "meta" no initial weight is drawn: that would move torch's global generator.
        self.core = nn.Linear(rank, rank, bias=False, device="meta")
        identity = torch.eye(rank, dtype=like.dtype, device=like.device)
        self.core.weight = nn.Parameter(identity, requires_grad=False)
        self.train(projection.training)

    @property
    def weight(self) -> nn.Parameter:
        """A: PEFT reads its dtype, to which it casts x."""
        return self.projection.get_parameter("weight")

    def forward(self, x: Tensor) -> Tensor:
        """Return x·Aᵀ·Rᵀ, shape (..., r)."""
        output: Tensor = self.core(self.projection(x))
        return output


def add_cores(encoder: nn.Module, sites: Sequence[AdapterSite]) -> None:
    """Put a core between A and B of every site of ``encoder``, in place.

    Args:
        encoder: What `fedlr.adapters.inject.inject` returned.
        sites: Its sites.

    Guarantees:
        Every core is the identity: the model computes what it computed before.
    """
    for site in sites:
        layer: Any = encoder.get_submodule(f"base_model.model.{site.name}")
        layer.lora_A[ADAPTER] = Cored(layer.lora_A[ADAPTER])


def has_core(layer: nn.Module) -> bool:
    """Whether a layer that PEFT adapted has a core between A and B."""
    return isinstance(layer.get_submodule(f"lora_A.{ADAPTER}"), Cored)


def linear_layers(layer: nn.Module) -> dict[Role, nn.Linear]:
    """Return the linear layers that hold A, B and, where there is one, the core.

    Args:
        layer: A layer that PEFT adapted.
    """
    first: Any = layer.get_submodule(f"lora_A.{ADAPTER}")
    second: Any = layer.get_submodule(f"lora_B.{ADAPTER}")
    if isinstance(first, Cored):
        return {Role.A: first.projection, Role.B: second, Role.CORE: first.core}
    return {Role.A: first, Role.B: second}

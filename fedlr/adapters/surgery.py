"""Read and write factors in a live model, and choose which arrays train."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedlr import checks
from fedlr.lowrank.factors import AdapterSite
from fedlr.methods.method import PartKey, Parts, Role

from .inject import ADAPTER
from .quantised import dense_weight


@dataclass(frozen=True)
class AdaptedModel:
    """A frozen base with adapters and a head: the arrays a federation moves.

    Attributes:
        encoder: The PEFT model.
        sites: Its adapted layers.
        head: The trained head parameters by name; empty where the head is frozen.
    """

    encoder: nn.Module
    sites: tuple[AdapterSite, ...]
    head: Mapping[str, nn.Parameter]

    def parameters(self) -> dict[PartKey, nn.Parameter]:
        """Return every movable array: A and B of each site, then the trained head."""
        found: dict[PartKey, nn.Parameter] = {}
        for site in self.sites:
            layer = self.encoder.get_submodule(f"base_model.model.{site.name}")
            found[PartKey(site.name, Role.A)] = _weight(layer, "lora_A")
            found[PartKey(site.name, Role.B)] = _weight(layer, "lora_B")
        found.update({PartKey(name, Role.HEAD): value for name, value in self.head.items()})
        return found

    def base_norms(self) -> dict[AdapterSite, float]:
        """Return ‖W‖, the Frobenius norm of the frozen base weight, of every site."""
        norms = {}
        for site in self.sites:
            layer = self.encoder.get_submodule(f"base_model.model.{site.name}")
            norms[site] = float(dense_weight(layer.get_submodule("base_layer")).float().norm())
        return norms

    def read(self, roles: Collection[Role]) -> dict[PartKey, Tensor]:
        """Return copies of the arrays of ``roles``: float32 on the CPU."""
        return {
            key: value.detach().to("cpu", torch.float32, copy=True)
            for key, value in self.parameters().items()
            if key.role in roles
        }

    def check(self, parts: Parts) -> None:
        """Raise ValueError for an unknown (site, role) or a wrong shape."""
        parameters = self.parameters()
        for key, value in parts.items():
            if key not in parameters:
                raise ValueError(f"the model has no array {key.site}/{key.role}")
            checks.same_shape(f"{key.site}/{key.role}", value.shape, parameters[key].shape)

    def write(self, parts: Parts) -> None:
        """Copy ``parts`` into the model in place; the other arrays stay.

        Raises:
            ValueError: As `check`. Nothing is written then.
        """
        self.check(parts)
        parameters = self.parameters()
        with torch.no_grad():
            for key, value in parts.items():
                parameters[key].copy_(value)

    def select_trained(self, roles: Collection[Role]) -> dict[PartKey, nn.Parameter]:
        """Make exactly the arrays of ``roles`` require a gradient, and return them."""
        parameters = self.parameters()
        for key, value in parameters.items():
            value.requires_grad_(key.role in roles)
            value.grad = None
        return {key: value for key, value in parameters.items() if key.role in roles}


def _weight(layer: nn.Module, name: str) -> nn.Parameter:
    weight: nn.Parameter = layer.get_submodule(f"{name}.{ADAPTER}").get_parameter("weight")
    return weight

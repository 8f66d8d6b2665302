"""Read and write factors in a live model, fold residuals, and choose which arrays train."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedlr import checks
from fedlr.lowrank.factors import AdapterSite
from fedlr.methods.method import RESIDUAL_ROLES, PartKey, Parts, Role

from .core import linear_layers
from .residual import check_foldable, fold, original_weight, residual_of

_RANK_AXES: Mapping[Role, tuple[int, ...]] = {Role.A: (0,), Role.B: (1,), Role.CORE: (0, 1)}
"""Dimensions of an array that are the rank of its site."""


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
        """Return every movable array: A, B and a core of each site, then the trained head.

        A's, B's and cores are the parameters until the next `write`, which may bring
        arrays of another rank.
        """
        found: dict[PartKey, nn.Parameter] = {}
        for site in self.sites:
            for role, linear in linear_layers(self._layer(site)).items():
                found[PartKey(site.name, role)] = linear.get_parameter("weight")
        found.update({PartKey(name, Role.HEAD): value for name, value in self.head.items()})
        return found

    def base_norms(self) -> dict[AdapterSite, float]:
        """Return ‖W‖, the Frobenius norm of the frozen base weight, of every site.

        Of W itself: a residual that is folded into it does not count.
        """
        return {
            site: float(original_weight(self._base_layer(site)).float().norm())
            for site in self.sites
        }

    def base_bytes(self) -> int:
        """Return the bytes of all sites' base weights: what folding a residual takes beside."""
        weights = (self._base_layer(site).get_parameter("weight") for site in self.sites)
        return sum(weight.numel() * weight.element_size() for weight in weights)

    def read(self, roles: Collection[Role]) -> dict[PartKey, Tensor]:
        """Return copies of the arrays of ``roles``: float32 on the CPU."""
        return {
            key: value.detach().to("cpu", torch.float32, copy=True)
            for key, value in self.parameters().items()
            if key.role in roles
        }

    def check(self, parts: Parts) -> None:
        """Check that ``parts`` fit the model.

        Args:
            parts: Arrays by (site, role): parameters of the model and residuals. A (k, n),
                B (m, k) and a core (k, k) may have a rank 1 ≤ k ≤ r, the same for all
                arrays of a site, the model's own where ``parts`` has none.

        Raises:
            ValueError: An unknown (site, role), a wrong shape, ranks of a site that
                differ, half a residual, or one on a base weight in fewer bits than
                float32.
        """
        parameters = self.parameters()
        ranks = {site.name: site.rank for site in self.sites}
        for key, value in parts.items():
            if key.role in RESIDUAL_ROLES and key.site in ranks:
                continue
            if key not in parameters:
                raise ValueError(f"the model has no array {key.site}/{key.role}")
            shape = list(parameters[key].shape)
            for axis in _RANK_AXES.get(key.role, ()):
                largest = ranks[key.site]
                own = value.shape[axis] if value.ndim == len(shape) else largest
                shape[axis] = own if 1 <= own <= largest else largest
            checks.same_shape(f"{key.site}/{key.role}", value.shape, shape)
        for site in self.sites:
            _check_ranks(site, {**parameters, **parts})
            if residual_of(site, parts) is not None:
                check_foldable(self._base_layer(site))

    def write(self, parts: Parts) -> None:
        """Put ``parts`` into the model: the arrays it holds are copied, the others stay.

        Args:
            parts: See `check`. A, B and a core of rank k < r make the site one of rank k
                until the next `write` of its arrays: k columns exist, train, are clipped
                and get noise; the scaling stays that of the site.

        Guarantees:
            A site computes with W + R_b·R_a where ``parts`` has its residual, and with W
            itself, the very parameter, where it has none. W is never written to.

        Raises:
            ValueError: As `check`. Nothing is written then.
        """
        self.check(parts)
        with torch.no_grad():
            for site in self.sites:
                for role, linear in linear_layers(self._layer(site)).items():
                    if (value := parts.get(PartKey(site.name, role))) is not None:
                        _write_weight(linear, value)
                fold(self._base_layer(site), residual_of(site, parts))
            for name, parameter in self.head.items():
                if (value := parts.get(PartKey(name, Role.HEAD))) is not None:
                    parameter.copy_(value)

    def select_trained(self, roles: Collection[Role]) -> dict[PartKey, nn.Parameter]:
        """Make exactly the arrays of ``roles`` require a gradient, and return them."""
        parameters = self.parameters()
        for key, value in parameters.items():
            value.requires_grad_(key.role in roles)
            value.grad = None
        return {key: value for key, value in parameters.items() if key.role in roles}

    def _layer(self, site: AdapterSite) -> nn.Module:
        return self.encoder.get_submodule(f"base_model.model.{site.name}")

    def _base_layer(self, site: AdapterSite) -> nn.Module:
        return self._layer(site).get_submodule("base_layer")


def _check_ranks(site: AdapterSite, arrays: Parts) -> None:
    """Raise ValueError unless a site's A, B and core have one rank."""
    found = {
        role: arrays[key].shape[axis]
        for role, axes in _RANK_AXES.items()
        for axis in axes
        if (key := PartKey(site.name, role)) in arrays
    }
    core = arrays.get(PartKey(site.name, Role.CORE))
    if len(set(found.values())) > 1 or (core is not None and core.shape[0] != core.shape[1]):
        told = ", ".join(f"{role.value} of rank {rank}" for role, rank in found.items())
        raise ValueError(f"{site.name} has {told}; send all its arrays cut to the same rank")


def _write_weight(linear: nn.Linear, value: Tensor) -> None:
    own = linear.weight
    if own.shape == value.shape:
        own.copy_(value)
        return
    # A new parameter: autograd remembers the shape of one that it has differentiated.
    copied = value.detach().to(own.device, own.dtype, copy=True)
    linear.weight = nn.Parameter(copied, requires_grad=own.requires_grad)
    linear.out_features, linear.in_features = value.shape

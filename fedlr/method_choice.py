"""The method of a configuration, with everything that composes with it."""

from __future__ import annotations

from fedlr.config import RunConfig
from fedlr.lowrank.subspace import SUBSPACES
from fedlr.methods.method import Method
from fedlr.methods.registry import Options, build, problems_of


def method_of(config: RunConfig) -> Method:
    """Return the method that ``config`` describes.

    Raises:
        ConfigError: What `method_problems` tells.
    """
    subspace = SUBSPACES[config.subspace.kind]
    return build(config.method.name, subspace, options=_options(config))


def method_problems(config: RunConfig) -> list[str]:
    """Return why the method, combiner and subspace of ``config`` do not go together."""
    return problems_of(config.method.name, config.combine.kind, _options(config))


def _options(config: RunConfig) -> Options:
    method = config.method
    return Options(method.downlink, method.norm_weighting, method.pruning)

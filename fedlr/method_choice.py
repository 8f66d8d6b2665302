"""The method of a configuration, with everything that composes with it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache, partial
from typing import TypeVar, cast

import torch

from fedlr.adapters.surgery import AdaptedModel
from fedlr.config import RunConfig
from fedlr.data.batching import TokenisedDataset, tokenise
from fedlr.data.public import load_public
from fedlr.data.spec import SourceSpec
from fedlr.errors import ConfigError
from fedlr.lowrank.subspace import (
    SUBSPACES,
    Directions,
    Subspace,
    ordered,
    principal_directions,
    singular_directions,
)
from fedlr.methods import combiners
from fedlr.methods.combine import Combiner
from fedlr.methods.method import Facts, Method, Role
from fedlr.methods.refresh import Alternating, AveragesB, Merging
from fedlr.methods.registry import METHODS, Options, build, problems_of
from fedlr.reuse import NOTHING_SHARED, Reuse, base_key
from fedlr.training.base import BaseModel
from fedlr.training.classifier import Classifier
from fedlr.training.public import PublicModel, base_weights, input_moments, mean_gradients


@dataclass(frozen=True)
class Start:
    """The model before its first round, and the run's data source: what a subspace may look at.

    Attributes:
        base: The frozen encoder and its tokenizer.
        classifier: Adapted encoder with head, on its device.
        adapted: Its movable arrays, as they start: B is 0.
        spec: Columns and public seed; none of its rows is read here.
        label_names: The run's label list.
    """

    base: BaseModel
    classifier: Classifier
    adapted: AdaptedModel
    spec: SourceSpec
    label_names: tuple[str, ...]


def method_of(config: RunConfig, start: Start, reuse: Reuse = NOTHING_SHARED) -> Method:
    """Return the method that ``config`` describes.

    Directions of weights, inputs or gradients are computed when the first A is drawn, by
    the process that draws it, and never where A is received.

    Args:
        config: A checked configuration.
        start: The model that will run.
        reuse: Where directions are shared between runs of one process.

    Raises:
        ConfigError: What `method_problems` tells; and, at the first draw, fewer directions
            than ``adapter.rank``.
        DataError: At the first draw: ``subspace.public`` cannot be read.
    """
    if problems := method_problems(config):
        raise ConfigError(problems)
    subspace, choice = _subspace(config, start, reuse), config.subspace
    method = build(config.method.name, subspace, _combiner(config), _options(config))
    if choice.refresh == "none":
        return method
    # Its facts say that it refreshes, and methods that do have a combiner.
    inner = cast(AveragesB, method)
    if choice.refresh == "alternate":
        return Alternating(inner)
    return Merging(inner, subspace, choice.refresh_every)


def method_problems(config: RunConfig) -> list[str]:
    """Return why the method, combiner and subspace of ``config`` do not go together."""
    combine, clients = config.combine, config.federation.clients_per_round
    settings = (combine.kind, combine.malicious, combine.bound, combine.consensus)
    return [
        *combiners.problems_of(*settings, clients),
        *problems_of(
            config.method.name, combine.kind, _options(config), combine.consensus is not None
        ),
        *_refresh_problems(config),
        *folding_problems(config),
        *_rank_problems(config),
    ]


def _rank_problems(config: RunConfig) -> list[str]:
    facts, ranks = _facts(config), config.adapter.rank_by_client or ()
    if facts is None or facts.mixed_ranks or all(own == config.adapter.rank for own in ranks):
        return []
    able = ", ".join(key for key, value in METHODS.items() if value.facts.mixed_ranks)
    return [
        f"adapter.rank_by_client = {list(ranks)} but method.name = {config.method.name} needs "
        f"every column of every client; set adapter.rank_by_client=null, or one of {able}"
    ]


def _combiner(config: RunConfig) -> Combiner:
    combine = config.combine
    return combiners.build(combine.kind, combine.malicious, combine.bound, combine.consensus)


def _refresh_problems(config: RunConfig) -> list[str]:
    refresh, name, facts = config.subspace.refresh, config.method.name, _facts(config)
    if refresh == "none" or facts is None:
        return []
    problems = []
    if not facts.refreshes:
        able = ", ".join(key for key, value in METHODS.items() if value.facts.refreshes)
        problems.append(
            f"subspace.refresh = {refresh} but method.name = {name} has no fixed subspace to move; "
            f"set subspace.refresh=none, or one of {able}"
        )
    if config.method.downlink != "full":
        problems.append(
            f"subspace.refresh = {refresh} but method.downlink = {config.method.downlink} sends A "
            "once and for all; set method.downlink=full, or subspace.refresh=none"
        )
    return problems


def _subspace(config: RunConfig, start: Start, reuse: Reuse) -> Subspace:
    """The policy of ``config``; one of ordered directions finds them at its first draw."""
    kind = config.subspace.kind
    if kind in SUBSPACES:
        return SUBSPACES[kind]
    device = next(start.adapted.encoder.parameters()).device
    model = PublicModel.of(start.classifier, start.adapted, device)
    key = (*base_key(config, device), *_directions_key(config, start))
    found = cache(lambda: reuse.get("directions", key, lambda: _directions(config, start, model)))
    return ordered(kind, found)


def _directions_key(config: RunConfig, start: Start) -> tuple[Hashable, ...]:
    """All that decides the directions, the frozen base aside; ranks and sites among it."""
    text = (start.spec, start.label_names, config.model.head, config.seed)
    asked = (config.subspace.kind, config.subspace.public, _kept(config), torch.get_num_threads())
    return (*asked, start.adapted.sites, text if config.subspace.public is not None else None)


def _kept(config: RunConfig) -> int:
    """Most directions of a site that the rounds can ask for, r at a time."""
    every = config.subspace.refresh_every if config.subspace.refresh == "merge" else 1
    turns = 1 + (config.federation.rounds // every if folds(config) else 0)
    return config.adapter.rank * turns


def _directions(config: RunConfig, start: Start, model: PublicModel) -> dict[str, Directions]:
    kind, rank, keep = config.subspace.kind, config.adapter.rank, _kept(config)
    if config.subspace.public is None:
        matrices = base_weights(model.adapted)
        one = partial(singular_directions, rank=rank, keep=keep, minor=kind == "minor")
        way_out = "lower adapter.rank, or choose another subspace"
        return {name: _found(config, name, one, matrices[name], way_out) for name in matrices}
    tokens = _public_tokens(config, start)
    way_out = f"give more text than these {len(tokens)} rows of subspace.public, or lower the rank"
    if kind == "gradient":
        gradients = mean_gradients(model, tokens)
        one = partial(singular_directions, rank=rank, keep=keep)
        return {name: _found(config, name, one, gradients[name], way_out) for name in gradients}
    moments = input_moments(model, tokens)
    top = partial(principal_directions, rank=rank, keep=keep)
    return {name: _found(config, name, top, moments[name], way_out) for name in moments}


T = TypeVar("T")


def _found(
    config: RunConfig, name: str, directions: Callable[[T], Directions], of: T, way_out: str
) -> Directions:
    """The directions of one site; ConfigError with its name where there are too few."""
    try:
        return directions(of)
    except ValueError as error:
        told = f"subspace.kind = {config.subspace.kind} of {name}: {error}; {way_out}"
        raise ConfigError([told]) from error


def _public_tokens(config: RunConfig, start: Start) -> TokenisedDataset:
    """The public text of ``subspace.public``, with labels where a gradient needs them."""
    labelled = config.subspace.kind == "gradient"
    text = load_public(str(config.subspace.public), start.spec, start.label_names, labelled)
    return tokenise(start.base.tokenizer, text, config.model.max_length)


def trains_cores(config: RunConfig) -> bool:
    """Whether the model of ``config`` needs a core between A and B."""
    facts = _facts(config)
    return facts is not None and Role.CORE in facts.trains


def folds(config: RunConfig) -> bool:
    """Whether rounds of ``config`` add a residual to the base weights."""
    facts = _facts(config)
    return (facts is not None and facts.folds) or config.subspace.refresh == "merge"


def folding_problems(config: RunConfig) -> list[str]:
    """Return why the base weights of ``config`` cannot hold the residual that is added to them."""
    precision, facts = config.model.precision, _facts(config)
    if precision == "float32" or not folds(config):
        return []
    what, way_out = "subspace.refresh = merge", "subspace.refresh=none"
    if facts is not None and facts.folds:
        what, way_out = f"method.name = {config.method.name}", "a method that folds nothing"
    return [
        f"{what} adds a residual to the base weights, which model.precision = {precision} rounds "
        f"away; set model.precision=float32, or {way_out}"
    ]


def _facts(config: RunConfig) -> Facts | None:
    """Return what is known of the method; None where there is none of that name."""
    kind = METHODS.get(config.method.name)
    return None if kind is None else kind.facts


def _options(config: RunConfig) -> Options:
    method = config.method
    return Options(method.downlink, method.norm_weighting, method.pruning)

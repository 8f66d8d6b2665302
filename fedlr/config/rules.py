"""What values may be, alone and together; every broken rule is one sentence."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedlr import checks
from fedlr.config.schema import RunConfig

_WANTED = {
    "model.name": "model=encoder needs model.name=<hub name or local folder>",
    "data.path": "data=file needs data.path=<folder or file>",
    "data.name": "data=hub needs data.name=<data set>, e.g. data.name=stanfordnlp/sst2",
}

_HINTS = {"privacy.epsilon": "; to train without any guarantee set privacy=none"}


def missing(name: str, kind: str) -> str:
    """Say that a setting has no value, and what it wants; ``kind`` is e.g. ``an integer``."""
    return f"{name} is missing; {_WANTED.get(name) or f'give {name}=<{kind}>'}"


def _patience_tests(config: RunConfig) -> list[tuple[Callable[..., Any], str, tuple[Any, ...]]]:
    """Return how a run bears with clients that fail, to be held against its ranges."""
    federation = config.federation
    return [
        (checks.at_least, "federation.spare_clients", (federation.spare_clients, 0)),
        (checks.at_least, "federation.retries", (federation.retries, 0)),
        (checks.non_negative, "federation.retry_wait_s", (federation.retry_wait_s,)),
        (checks.at_least, "federation.longest_pause", (federation.longest_pause, 0)),
    ]


def range_problems(config: RunConfig) -> list[str]:
    """Fields that are outside their own range."""
    model, privacy, optimizer = config.model, config.privacy, config.optimizer
    federation = config.federation
    tests: list[tuple[Callable[..., Any], str, tuple[Any, ...]]] = [
        (checks.at_least, "seed", (config.seed, 0)),
        (checks.at_least, "model.max_length", (model.max_length, 3)),
        (checks.positive, "model.head.label_scale", (model.head.label_scale,)),
        (checks.at_least, "adapter.rank", (config.adapter.rank, 1)),
        (checks.positive, "adapter.alpha", (config.adapter.alpha,)),
        (checks.positive, "privacy.epsilon", (privacy.epsilon,)),
        # Below, norms are lost in float32 (`fedlr.kernels.clipped_sum.naive.SMALLEST_BOUND`).
        (checks.in_range, "privacy.clip_norm", (privacy.clip_norm, 1e-6, 1e6)),
        (checks.positive, "optimizer.learning_rate", (optimizer.learning_rate,)),
        (checks.in_range, "optimizer.momentum", (optimizer.momentum, 0.0, 0.999)),
        (checks.at_least, "optimizer.steps", (optimizer.steps, 1)),
        (checks.at_least, "optimizer.expected_batch", (optimizer.expected_batch, 1)),
        (checks.at_least, "federation.clients", (federation.clients, 1)),
        (checks.at_least, "federation.clients_per_round", (federation.clients_per_round, 1)),
        (checks.at_least, "federation.rounds", (federation.rounds, 1)),
        (checks.at_least, "federation.min_clients", (federation.min_clients, 1)),
        (checks.at_least, "federation.evaluate_every", (federation.evaluate_every, 1)),
        (checks.at_least, "federation.average_rounds", (federation.average_rounds, 1)),
        (checks.positive, "federation.start_timeout_s", (federation.start_timeout_s,)),
        *_patience_tests(config),
        (checks.at_least, "federation.cpus_per_client", (federation.cpus_per_client, 1)),
        (checks.non_negative, "federation.gpus_per_client", (federation.gpus_per_client,)),
        (checks.at_least, "subspace.refresh_every", (config.subspace.refresh_every, 1)),
        (checks.at_least, "kernels.prefix_cache_mb", (config.kernels.prefix_cache_mb, 0)),
        (checks.in_range, "data.validation_fraction", (config.data.validation_fraction, 0.01, 0.9)),
    ]
    optional: list[tuple[Callable[..., Any], str, Any, tuple[Any, ...]]] = [
        (checks.positive, "model.head.feature_scale", model.head.feature_scale, ()),
        (checks.positive, "partition.alpha", config.partition.alpha, ()),
        (checks.positive, "method.update_norm_bound", config.method.update_norm_bound, ()),
        (checks.in_range, "method.pruning", config.method.pruning, (0.01, 0.99)),
        (checks.at_least, "combine.malicious", config.combine.malicious, (1,)),
        (checks.positive, "combine.bound", config.combine.bound, ()),
        (checks.in_range, "combine.consensus", config.combine.consensus, (0.0, 1.0)),
        (checks.in_range, "privacy.delta", privacy.delta, (1e-15, 0.5)),
        (checks.in_range, "privacy.head_share", privacy.head_share, (0.001, 0.999)),
        (checks.at_least, "privacy.max_joins", privacy.max_joins, (1,)),
        (checks.at_least, "privacy.rows_per_user", privacy.rows_per_user, (1,)),
        (checks.positive, "optimizer.head_learning_rate", optimizer.head_learning_rate, ()),
        (checks.at_least, "data.max_examples", config.data.max_examples, (1,)),
        (checks.positive, "federation.round_timeout_s", federation.round_timeout_s, ()),
        (checks.at_least, "kernels.physical_batch", config.kernels.physical_batch, (1,)),
        (checks.at_least, "kernels.threads", config.kernels.threads, (1,)),
        (checks.at_least, "kernels.tokens_per_batch", config.kernels.tokens_per_batch, (1,)),
        (checks.at_least, "kernels.fused_clients", config.kernels.fused_clients, (1,)),
    ]
    tests.extend((check, name, (v, *rest)) for check, name, v, rest in optional if v is not None)
    problems = []
    for check, name, arguments in tests:
        try:
            check(name, *arguments)
        except ValueError as error:
            problems.append(f"{error}{_HINTS.get(name, '')}")
    return problems


def cross_problems(config: RunConfig) -> list[str]:
    """Contradictions between fields, each with the way out."""
    rules = [
        *(*_cohort_rules(config), *_engine_rules(config), *_data_rules(config)),
        *(*_subspace_rules(config), *_combine_rules(config), *_model_rules(config)),
        *(*_tracking_rules(config), *_rank_rules(config)),
    ]
    return [message for broken, message in rules if broken]


def _cohort_rules(config: RunConfig) -> list[tuple[bool, str]]:
    federation = config.federation
    asked = federation.clients_per_round + federation.spare_clients
    return [
        (
            federation.spare_clients > 0 and asked > federation.clients,
            f"federation.spare_clients = {federation.spare_clients} beside a cohort of "
            f"{federation.clients_per_round} must be ≤ federation.clients = {federation.clients}; "
            "lower one of them",
        ),
        (
            federation.clients_per_round > federation.clients,
            f"federation.clients_per_round = {federation.clients_per_round} must be ≤ "
            f"federation.clients = {federation.clients}; lower it or add clients",
        ),
        (
            federation.min_clients > federation.clients_per_round,
            f"federation.min_clients = {federation.min_clients} must be ≤ "
            f"federation.clients_per_round = {federation.clients_per_round}; lower it",
        ),
        (
            federation.average_rounds > federation.rounds,
            f"federation.average_rounds = {federation.average_rounds} must be ≤ "
            f"federation.rounds = {federation.rounds}; lower it",
        ),
    ]


def _engine_rules(config: RunConfig) -> list[tuple[bool, str]]:
    federation = config.federation
    deployed = federation.engine == "deploy"
    return [
        (
            deployed and config.privacy.policies is not None,
            "privacy.policies is set but federation.engine = deploy asks real sites, whose "
            "operators keep their own; set privacy.policies=null",
        ),
        (
            deployed and config.adapter.rank_by_client is not None,
            "adapter.rank_by_client is set but federation.engine = deploy asks real sites, whose "
            "operators set max_rank; set adapter.rank_by_client=null",
        ),
        (
            federation.address is not None and federation.engine != "ray",
            f"federation.address = {federation.address!r} but federation.engine = "
            f"{federation.engine} uses no cluster; add federation=ray, or leave the address out",
        ),
        (
            federation.address is not None and not re.fullmatch(r".+:\d{1,5}", federation.address),
            f"federation.address = {federation.address!r} must be host:port of a Ray cluster's "
            "head, e.g. 10.0.0.1:6379",
        ),
    ]


def _data_rules(config: RunConfig) -> list[tuple[bool, str]]:
    data = config.data
    return [
        (
            config.partition.kind == "dirichlet" and config.partition.alpha is None,
            "partition.alpha is missing; partition=dirichlet needs it, e.g. partition.alpha=0.5",
        ),
        (
            data.kind == "file" and not data.path,
            missing("data.path", "a text"),
        ),
        (
            data.kind == "hub" and not data.name,
            missing("data.name", "a text"),
        ),
        (
            not 1 <= len(data.text_columns) <= 2,
            f"data.text_columns = {list(data.text_columns)} must name one or two columns",
        ),
        (
            data.label_names is not None and len(set(data.label_names)) < 2,
            f"data.label_names = {list(data.label_names or ())} must list two or more labels",
        ),
        (
            config.privacy.rows_per_user is not None and config.privacy.unit != "user",
            f"privacy.rows_per_user is set but privacy.unit = {config.privacy.unit}; set "
            "privacy.unit=user, or privacy.rows_per_user=null",
        ),
        (
            config.privacy.mode == "dry" and not (data.public or data.kind == "stdlib"),
            "privacy.mode = dry runs without noise and is refused on data that is not declared "
            "public; set data.public=true if it is, or privacy.mode=dp",
        ),
    ]


_ALIKE = ("coordinate_median", "trimmed_mean", "krum", "flag")
"""Combiners that count every client alike."""

_BEARS = ("trimmed_mean", "krum", "multi_krum")
"""Combiners that are built for a number of malicious clients."""


def _combine_rules(config: RunConfig) -> list[tuple[bool, str]]:
    combine, weights = config.combine, config.method.weights
    return [
        (
            combine.malicious is not None and combine.kind not in _BEARS,
            f"combine.malicious is set but combine.kind = {combine.kind} has no such setting; set "
            f"combine.malicious=null, or combine.kind to one of {', '.join(_BEARS)}",
        ),
        (
            combine.bound is not None and combine.kind != "norm_bounded_mean",
            f"combine.bound is set but combine.kind = {combine.kind} has no such setting; set "
            "combine.bound=null, or combine=norm_bounded_mean",
        ),
        (
            combine.kind in _ALIKE and weights != "uniform",
            f"method.weights = {weights} but combine.kind = {combine.kind} counts every client "
            "alike; set method.weights=uniform",
        ),
    ]


def _rank_rules(config: RunConfig) -> list[tuple[bool, str]]:
    ranks, rank = config.adapter.rank_by_client, config.adapter.rank
    clients = config.federation.clients
    return [
        (
            ranks is not None and len(ranks) != clients,
            f"adapter.rank_by_client has {len(ranks or ())} ranks for federation.clients = "
            f"{clients}; give one rank a client, or null",
        ),
        (
            ranks is not None and not all(1 <= own <= rank for own in ranks),
            f"adapter.rank_by_client = {list(ranks or ())} must be in [1, {rank}], up to "
            "adapter.rank; lower what is larger, or raise adapter.rank",
        ),
    ]


def _model_rules(config: RunConfig) -> list[tuple[bool, str]]:
    adapter, head = config.adapter, config.model.head
    return [
        (
            not adapter.modules,
            "adapter.modules is empty; name one or more linear layers, e.g. [query,value]",
        ),
        (
            adapter.layers is not None and not adapter.layers,
            "adapter.layers is empty; list layer indices, or top:k for the k top ones, or null "
            "for all",
        ),
        (
            config.model.precision == "bfloat16" and config.kernels.tokens_per_batch is not None,
            f"kernels.tokens_per_batch is set but model.precision = {config.model.precision} "
            "computes each row in a shape of its own; set kernels.tokens_per_batch=null and lower "
            "kernels.physical_batch",
        ),
        (
            config.kernels.implementation == "triton" and config.kernels.gradients != "captured",
            f"kernels.implementation = triton but kernels.gradients = {config.kernels.gradients} "
            "does not use the kernels; set kernels.gradients=captured or kernels.implementation="
            "auto",
        ),
        (
            head.kind == "random_cls" and head.trained,
            "model.head.trained = true but model.head.kind = random_cls is the frozen head of the "
            "paper; set model.head.trained=false or model.head.kind=linear",
        ),
        (
            head.kind == "linear" and not head.trained,
            "model.head.trained = false but model.head.kind = linear starts at zero, so nothing "
            "could be learned; set model.head.trained=true or another model.head.kind",
        ),
        (
            head.kind == "label_text" and head.feature_scale is None,
            "model.head.feature_scale is missing; model.head.kind = label_text needs normalised "
            "features, e.g. model.head.feature_scale=4.47",
        ),
        (
            config.method.name == "head_only" and not head.trained,
            "method.name = head_only but model.head.trained = false, so nothing would be learned; "
            "set model/head=linear",
        ),
        (
            config.privacy.head_share is not None and not head.trained,
            "privacy.head_share is set but model.head.trained = false; set "
            "privacy.head_share=null, or model/head=linear",
        ),
    ]


_ON_PUBLIC_TEXT = ("activations", "gradient")


def _subspace_rules(config: RunConfig) -> list[tuple[bool, str]]:
    subspace, data = config.subspace, config.data
    kind, public = subspace.kind, subspace.public
    return [
        (
            kind in _ON_PUBLIC_TEXT and public is None,
            f"subspace.kind = {kind} needs public text; set subspace.public=<file or folder>, or "
            "stdlib. Private text is refused: its directions would be a release that no ledger "
            "books",
        ),
        (
            kind not in _ON_PUBLIC_TEXT and public is not None,
            f"subspace.public = {public!r} but subspace.kind = {kind} reads no text; set "
            "subspace.public=null, or subspace=activations or gradient",
        ),
        (
            public is not None and not data.public and _overlap(public, _place(config)),
            f"subspace.public = {public!r} is, holds or lies in the data of the run, which are not "
            "declared public; name text that is public, or set data.public=true if they are",
        ),
        (
            kind == "gradient" and config.model.head.kind == "linear",
            "subspace.kind = gradient but model.head.kind = linear starts at zero, so that no "
            "gradient reaches the layers; set model/head=label_text, or subspace=activations",
        ),
        (
            kind == "gradient" and public == "stdlib" and data.kind != "stdlib",
            "subspace.public = stdlib has labels of its own, which subspace.kind = gradient cannot "
            f"use with data.kind = {data.kind}; name a file of public text with the run's labels, "
            "or set subspace=activations",
        ),
        (
            subspace.refresh_every > 1 and subspace.refresh != "merge",
            f"subspace.refresh_every = {subspace.refresh_every} but subspace.refresh = "
            f"{subspace.refresh} has no merges; set subspace.refresh=merge, or "
            "subspace.refresh_every=1",
        ),
    ]


def _place(config: RunConfig) -> str | None:
    """Where the run's rows may lie on this machine; a hub's data set may be a folder."""
    return {"file": config.data.path, "hub": config.data.name}.get(config.data.kind)


def _overlap(one: str, other: str | None) -> bool:
    """Whether one place is the other, or in it, links resolved."""
    if other is None:
        return False
    left, right = (Path(os.path.realpath(place)) for place in (one, other))
    return left.is_relative_to(right) or right.is_relative_to(left)


_ADDRESSES = {"mlflow": r"sqlite:///.+|https?://.+", "wandb": r"https?://.+"}
"""What ``tracking.uri`` may be, by tool."""


def _tracking_rules(config: RunConfig) -> list[tuple[bool, str]]:
    tracking = config.tracking
    kind, uri = tracking.kind, tracking.uri
    secret = uri is not None and re.match(r"[^/]+://[^/]*@", uri) is not None
    shown = "tracking.uri" if secret else f"tracking.uri = {uri!r}"
    return [
        (
            uri is not None and kind not in _ADDRESSES,
            f"{shown} but tracking.kind = {kind} has no address; set tracking.uri=null, or "
            "tracking=mlflow",
        ),
        (
            uri is not None
            and kind in _ADDRESSES
            and not re.fullmatch(_ADDRESSES[kind], uri, flags=re.DOTALL),
            f"{shown} must be "
            + ("sqlite:///<file> or " if kind == "mlflow" else "")
            + f"http(s)://<server> for tracking={kind}",
        ),
        (
            secret,
            "tracking.uri holds a user or a password, and the configuration is kept in the run "
            "folder; give them in the tool's environment variables",
        ),
        (
            tracking.mode == "online" and kind != "wandb",
            f"tracking.mode = online but tracking.kind = {kind} has one mode; set "
            "tracking.mode=offline, or tracking=wandb",
        ),
        (
            not re.fullmatch(r"[\w.-]{1,100}", tracking.project),
            f"tracking.project = {tracking.project!r} must be 1 to 100 letters, digits, '.', '_' "
            "or '-'",
        ),
    ]

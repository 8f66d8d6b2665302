"""Every rule on values, alone and together, is broken once."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlr.config import RunConfig, from_mapping, rules
from fedlr.errors import ConfigError


def nested(path: str, value: Any) -> dict[str, Any]:
    """``a.b.c`` and a value → {"a": {"b": {"c": value}}}."""
    for name in reversed(path.split(".")):
        value = {name: value}
    found: dict[str, Any] = value
    return found


def merged(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: merged(left[key], right[key]) if isinstance(left[key], dict) else right[key]
        for key in left.keys() & right.keys()
    }
    return {**left, **right, **both}


def problems(*settings: tuple[str, Any]) -> tuple[str, ...]:
    values: dict[str, Any] = {}
    for path, value in settings:
        values = merged(values, nested(path, value))
    try:
        from_mapping(values)
    except ConfigError as error:
        return error.problems
    return ()


LOWEST: dict[str, int] = {
    "seed": 0,
    "model.max_length": 3,
    "adapter.rank": 1,
    "optimizer.steps": 1,
    "optimizer.expected_batch": 1,
    "federation.clients": 1,
    "federation.clients_per_round": 1,
    "federation.rounds": 1,
    "federation.min_clients": 1,
    "federation.evaluate_every": 1,
    "federation.average_rounds": 1,
    "federation.cpus_per_client": 1,
    "federation.spare_clients": 0,
    "federation.retries": 0,
    "federation.longest_pause": 0,
    "kernels.physical_batch": 1,
    "kernels.prefix_cache_mb": 0,
    "privacy.max_joins": 1,
    "privacy.rows_per_user": 1,
    "data.max_examples": 1,
    "kernels.threads": 1,
    "kernels.tokens_per_batch": 1,
    "kernels.fused_clients": 1,
    "subspace.refresh_every": 1,
    "combine.malicious": 1,
}

POSITIVE = (
    *("model.head.label_scale", "adapter.alpha", "privacy.epsilon"),
    *("optimizer.learning_rate", "model.head.feature_scale", "partition.alpha"),
    *("method.update_norm_bound", "optimizer.head_learning_rate", "combine.bound"),
    *("federation.start_timeout_s", "federation.round_timeout_s"),
)

NON_NEGATIVE = ("federation.gpus_per_client", "federation.retry_wait_s")

WITHIN: dict[str, tuple[float, float]] = {
    "optimizer.momentum": (0.0, 0.999),
    "data.validation_fraction": (0.01, 0.9),
    "privacy.delta": (1e-15, 0.5),
    "privacy.head_share": (0.001, 0.999),
    "privacy.clip_norm": (1e-6, 1e6),
    "method.pruning": (0.01, 0.99),
    "combine.consensus": (0.0, 1.0),
}

RANGES = [
    *((path, low - 1) for path, low in LOWEST.items()),
    *((path, value) for path in POSITIVE for value in (0.0, -1.0, math.nan, math.inf)),
    *((path, value) for path in NON_NEGATIVE for value in (-0.5, math.nan, math.inf)),
    *((path, low - 1e-3 * max(low, 1)) for path, (low, _) in WITHIN.items()),
    *((path, high + 1e-3) for path, (_, high) in WITHIN.items()),
    *((path, math.nan) for path in WITHIN),
]


@pytest.mark.parametrize(("path", "value"), RANGES)
def test_a_value_out_of_its_range_is_named(path: str, value: float) -> None:
    found = [text for text in problems((path, value)) if text.startswith(f"{path} = {value} ")]
    assert len(found) == 1


# What an accepted extreme needs beside it to contradict nothing.
COMPANY: dict[str, tuple[tuple[str, Any], ...]] = {
    "federation.clients": (("federation.clients_per_round", 1),),
    "privacy.head_share": (("model.head.trained", True),),
    "privacy.rows_per_user": (("privacy.unit", "user"),),
    "combine.malicious": (("combine.kind", "trimmed_mean"),),
    "combine.bound": (("combine.kind", "norm_bounded_mean"),),
}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *LOWEST.items(),
        *((path, 1e-12) for path in POSITIVE),
        *((path, 0.0) for path in NON_NEGATIVE),
        *((path, end) for path, ends in WITHIN.items() for end in ends),
    ],
)
def test_the_ends_of_a_range_are_accepted(path: str, value: float) -> None:
    assert problems((path, value), *COMPANY.get(path, ())) == ()


def test_every_field_with_a_range_is_in_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each checker of `range_problems` is called for exactly the names tested above."""
    seen: list[str] = []

    class Spy:
        def __getattr__(self, _: str) -> Any:
            return lambda name, *_: seen.append(name)

    optional = [
        ("method.pruning", 0.5),
        ("combine.consensus", 0.5),
        *(("model.head.feature_scale", 1.0), ("partition.alpha", 1.0)),
        *(("method.update_norm_bound", 1.0), ("privacy.delta", 0.1), ("privacy.head_share", 0.5)),
        *(("privacy.max_joins", 1), ("optimizer.head_learning_rate", 1.0)),
        *(("data.max_examples", 1), ("kernels.threads", 1), ("model.head.trained", True)),
        ("kernels.tokens_per_batch", 1),
        ("kernels.fused_clients", 1),
        *(("federation.round_timeout_s", 1.0), ("privacy.rows_per_user", 1)),
        ("privacy.unit", "user"),
    ]
    values: dict[str, Any] = {}
    for path, value in optional:
        values = merged(values, nested(path, value))
    config = from_mapping(values)
    # No combiner has both settings.
    config = replace(config, combine=replace(config.combine, malicious=1, bound=1.0))
    monkeypatch.setattr(rules, "checks", Spy())
    assert rules.range_problems(config) == []
    assert sorted(seen) == sorted([*LOWEST, *POSITIVE, *NON_NEGATIVE, *WITHIN])


CONTRADICTIONS: list[tuple[tuple[tuple[str, Any], ...], str]] = [
    ((("federation.clients_per_round", 7),), "federation.clients_per_round = 7"),
    (
        (("kernels.implementation", "triton"), ("kernels.gradients", "opacus")),
        "kernels.implementation = triton but kernels.gradients = opacus",
    ),
    ((("federation.min_clients", 7),), "federation.min_clients = 7"),
    ((("federation.average_rounds", 9),), "federation.average_rounds = 9"),
    ((("federation.spare_clients", 1),), "federation.spare_clients = 1 beside a cohort of 6"),
    (
        (("federation.engine", "deploy"), ("privacy.policies", "x")),
        "privacy.policies is set but federation.engine = deploy",
    ),
    (
        (("federation.engine", "deploy"), ("adapter.rank_by_client", [1] * 6)),
        "adapter.rank_by_client is set but federation.engine = deploy",
    ),
    ((("federation.address", "head:6379"),), "federation.address = 'head:6379' but"),
    (
        (("federation.engine", "ray"), ("federation.address", "head")),
        "federation.address = 'head' must be host:port",
    ),
    ((("partition.kind", "dirichlet"),), "partition.alpha is missing"),
    ((("data.kind", "file"),), "data.path is missing"),
    ((("data.kind", "hub"),), "data.name is missing"),
    ((("data.text_columns", []),), "data.text_columns = []"),
    ((("data.label_names", ["a", "a"]),), "data.label_names = ['a', 'a']"),
    ((("privacy.rows_per_user", 2),), "privacy.rows_per_user is set but"),
    (
        (("privacy.mode", "dry"), ("data.kind", "file"), ("data.path", "x")),
        "privacy.mode = dry",
    ),
    (
        (("combine.malicious", 2), ("combine.kind", "flag")),
        "combine.malicious is set but combine.kind = flag",
    ),
    (
        (("combine.bound", 1.0), ("combine.kind", "krum")),
        "combine.bound is set but combine.kind = krum",
    ),
    (
        (("method.weights", "declared"), ("combine.kind", "coordinate_median")),
        "method.weights = declared but combine.kind = coordinate_median",
    ),
    (
        (("federation.clients", 6), ("adapter.rank_by_client", [8, 2])),
        "adapter.rank_by_client has 2 ranks for federation.clients = 6",
    ),
    (
        (("adapter.rank", 4), ("adapter.rank_by_client", [4, 4, 4, 1, 0, 4])),
        "adapter.rank_by_client = [4, 4, 4, 1, 0, 4] must be in [1, 4]",
    ),
    ((("adapter.modules", []),), "adapter.modules is empty"),
    ((("adapter.layers", []),), "adapter.layers is empty"),
    (
        (("model.head.kind", "random_cls"), ("model.head.trained", True)),
        "model.head.trained = true",
    ),
    ((("model.head.kind", "linear"),), "model.head.trained = false"),
    ((("model.head.feature_scale", None),), "model.head.feature_scale is missing"),
    ((("method.name", "head_only"),), "method.name = head_only"),
    ((("privacy.head_share", 0.5),), "privacy.head_share is set"),
    (
        (("model.precision", "bfloat16"), ("kernels.tokens_per_batch", 512)),
        "kernels.tokens_per_batch is set but model.precision = bfloat16",
    ),
    ((("subspace.kind", "activations"),), "subspace.kind = activations needs public text"),
    ((("subspace.public", "x"),), "subspace.public = 'x' but subspace.kind = orthonormal"),
    (
        (
            *(("subspace.kind", "activations"), ("subspace.public", "x/public.csv")),
            *(("data.kind", "file"), ("data.path", "x")),
        ),
        "subspace.public = 'x/public.csv' is, holds or lies in the data",
    ),
    (
        (
            *(("subspace.kind", "gradient"), ("subspace.public", "x")),
            *(("model.head.kind", "linear"), ("model.head.trained", True)),
        ),
        "subspace.kind = gradient but model.head.kind = linear",
    ),
    (
        (
            *(("subspace.kind", "gradient"), ("subspace.public", "stdlib")),
            *(("data.kind", "file"), ("data.path", "x")),
        ),
        "subspace.public = stdlib has labels of its own",
    ),
    ((("subspace.refresh_every", 2),), "subspace.refresh_every = 2 but subspace.refresh = none"),
    ((("tracking.uri", "https://x"),), "tracking.uri = 'https://x' but tracking.kind = none"),
    (
        (("tracking.kind", "wandb"), ("tracking.uri", "sqlite:///x.db")),
        "tracking.uri = 'sqlite:///x.db' must be http",
    ),
    (
        (("tracking.kind", "mlflow"), ("tracking.uri", "https://me:secret@host")),
        "tracking.uri holds a user or a password",
    ),
    (
        (("tracking.kind", "mlflow"), ("tracking.mode", "online")),
        "tracking.mode = online but tracking.kind = mlflow",
    ),
    ((("tracking.project", "a/b"),), "tracking.project = 'a/b' must be"),
]


@pytest.mark.parametrize(("settings", "start"), CONTRADICTIONS, ids=[c[1] for c in CONTRADICTIONS])
def test_a_contradiction_is_one_sentence_with_a_way_out(
    settings: tuple[tuple[str, Any], ...], start: str
) -> None:
    (found,) = problems(*settings)
    assert found.startswith(start)
    assert "\n" not in found


def test_every_cross_rule_is_in_the_table() -> None:
    plain = RunConfig()
    groups = (
        *(rules._cohort_rules, rules._engine_rules, rules._data_rules, rules._combine_rules),
        *(rules._subspace_rules, rules._model_rules, rules._tracking_rules, rules._rank_rules),
    )
    assert sum(len(group(plain)) for group in groups) == len(CONTRADICTIONS)
    assert rules.cross_problems(plain) == []


CONSISTENT: list[tuple[tuple[str, Any], ...]] = [
    (("federation.clients_per_round", 6), ("federation.min_clients", 6)),
    (("federation.average_rounds", 8),),
    (("federation.clients_per_round", 5), ("federation.spare_clients", 1)),
    (("federation.engine", "deploy"),),
    (("partition.kind", "dirichlet"), ("partition.alpha", 0.5)),
    (("data.kind", "file"), ("data.path", "x")),
    (("data.kind", "hub"), ("data.name", "x")),
    (("data.text_columns", ["a", "b"]),),
    (("data.label_names", ["a", "b"]),),
    (("privacy.mode", "dry"),),
    (("privacy.mode", "dry"), ("data.kind", "file"), ("data.path", "x"), ("data.public", True)),
    (("model.head.kind", "random_cls"),),
    (("model.head.kind", "linear"), ("model.head.trained", True)),
    (("model.head.trained", True),),
    (("method.name", "head_only"), ("model.head.trained", True)),
    (("privacy.head_share", 0.5), ("model.head.trained", True)),
    (("model.precision", "bfloat16"), ("kernels.physical_batch", None)),
    (("model.precision", "nf4"), ("kernels.tokens_per_batch", 512)),
    (("subspace.kind", "gradient"), ("subspace.public", "stdlib")),
    (
        *(("subspace.kind", "activations"), ("subspace.public", "stdlib")),
        *(("data.kind", "file"), ("data.path", "x")),
    ),
    (
        *(("subspace.kind", "gradient"), ("subspace.public", "x")),
        *(("data.kind", "file"), ("data.path", "x"), ("data.public", True)),
    ),
    (("subspace.refresh", "merge"), ("subspace.refresh_every", 3)),
    (("tracking.kind", "mlflow"), ("tracking.uri", "sqlite:////tmp/x.db")),
    (("tracking.kind", "mlflow"), ("tracking.uri", "http://127.0.0.1:5000")),
    (
        *(("tracking.kind", "wandb"), ("tracking.mode", "online")),
        ("tracking.uri", "https://own.example"),
    ),
    (("tracking.kind", "trackio"), ("tracking.project", "ward_7.b-2")),
    *((("combine.kind", kind), ("combine.malicious", 2)) for kind in rules._BEARS),
    (("combine.kind", "norm_bounded_mean"), ("combine.bound", 0.1), ("method.weights", "declared")),
    (("combine.kind", "geometric_median"), ("method.weights", "inverse_variance")),
]


@pytest.mark.parametrize("settings", CONSISTENT)
def test_what_fits_together_is_accepted(settings: tuple[tuple[str, Any], ...]) -> None:
    assert problems(*settings) == ()


@pytest.mark.parametrize("kind", ["none", "mlflow", "wandb"])
def test_a_password_in_an_address_is_not_repeated(kind: str) -> None:
    found = problems(("tracking.kind", kind), ("tracking.uri", "ftp://me:secret@host"))
    assert len(found) == 2
    assert "secret" not in "".join(found)


@pytest.mark.parametrize(
    ("public", "own", "same"),
    [
        ("rows", "rows", True),
        ("rows/public.csv", "rows", True),
        ("rows", "rows/train.csv", True),
        ("rows/../rows", "./rows", True),
        ("link", "rows", True),
        ("rows2", "rows", False),
        ("other/rows", "rows", False),
    ],
)
@pytest.mark.parametrize("kind", ["file", "hub"])
def test_private_rows_are_not_public_text_under_another_name(
    public: str, own: str, same: bool, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    (tmp_path / "link").symlink_to("rows")
    settings = [("subspace.kind", "activations"), ("subspace.public", public), ("data.kind", kind)]
    found = problems(*settings, ("data.path" if kind == "file" else "data.name", own))
    assert len(found) == same
    assert all("not declared public" in text for text in found)

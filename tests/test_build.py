"""The composition root: a tiny model from a folder, and what it must not accept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedlr.build import Workbench, build, check_names, provenance
from fedlr.config import RunConfig, from_mapping
from fedlr.errors import ConfigError, ModelError
from fedlr.methods.method import Role
from fedlr.privacy.noise import public_stream
from fedlr.training.base import BaseModel
from fedlr.training.local import LocalTask
from tests.data.helpers import word_tokenizer
from tests.models import LONGEST, PAD, VOCABULARY, WIDTH, encoder


def saved(model: nn.Module, folder: Path) -> str:
    saving: Any = model
    saving.save_pretrained(str(folder))
    word_tokenizer().save_pretrained(str(folder))
    return str(folder)


def config(name: str, **sections: dict[str, Any]) -> RunConfig:
    values: dict[str, dict[str, Any]] = {
        "model": {
            "name": name,
            "max_length": LONGEST,
            "head": {"kind": "linear", "trained": True, "feature_scale": None},
        },
        "data": {"max_examples": 60},
        "adapter": {"rank": 2, "modules": ["query", "value"], "layers": None},
        "federation": {"clients": 3, "clients_per_round": 3},
        "privacy": {"mode": "dry"},
        "optimizer": {"expected_batch": 8, "steps": 2},
    }
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes}
    return from_mapping(values)


@pytest.fixture
def name(tmp_path: Path) -> str:
    return saved(encoder("bert", layers=3), tmp_path / "bert")


def test_clients_share_the_rows_and_the_layout_is_what_moves(name: str) -> None:
    bench = build(config(name))
    assert [plan.name for plan in bench.clients] == [f"client-{i:03d}" for i in range(3)]
    mine = [set(plan.units.rows.tolist()) for plan in bench.clients]
    assert set.union(*mine) == set(range(60))
    assert sum(map(len, mine)) == 60
    assert {key.site for key in bench.adapted.parameters() if key.role is Role.HEAD} == (
        bench.layout.head.keys()
    )
    assert bench.layout.sites == bench.adapted.sites


def train(bench: Workbench) -> dict[Any, torch.Tensor]:
    state = bench.method.init(bench.layout, torch.Generator().manual_seed(0))
    task = LocalTask(
        parts=state.parts,
        train=frozenset({Role.B, Role.HEAD}),
        sample_rate=1.0,
        mechanism=None,
        sampling=public_stream("t"),
        noise=public_stream("t"),
    )
    return bench.trainer.train(task, bench.clients[0].units)


def test_the_prefix_cache_changes_nothing(name: str) -> None:
    upper = {"layers": [-1]}
    kept = build(config(name, adapter=upper))
    none = build(config(name, adapter=upper, kernels={"prefix_cache_mb": 0}))
    left, right = train(kept), train(none)
    assert left.keys() == right.keys()
    for key in left:
        assert torch.allclose(left[key], right[key], rtol=0, atol=1e-5)


def test_noise_is_calibrated_to_the_declared_size(name: str) -> None:
    bench = build(config(name, privacy={"mode": "dp", "epsilon": 4.0, "accountant": "rdp"}))
    assert all(plan.noise_multiplier > 0.3 for plan in bench.clients)
    tighter = build(config(name, privacy={"mode": "dp", "epsilon": 1.0, "accountant": "rdp"}))
    for one, other in zip(bench.clients, tighter.clients, strict=True):
        assert other.noise_multiplier > one.noise_multiplier


def test_a_delta_of_one_in_n_is_refused(name: str) -> None:
    """Each of the three clients has 20 rows: δ must be below 1/20."""
    build(config(name, privacy={"mode": "dp", "delta": 0.04, "accountant": "rdp"}))
    with pytest.raises(ConfigError, match=r"privacy\.delta = 0\.06 must be < 1/N = 0\.05"):
        build(config(name, privacy={"mode": "dp", "delta": 0.06, "accountant": "rdp"}))


def test_a_model_whose_rows_feel_each_other_is_refused(tmp_path: Path) -> None:
    import transformers

    library: Any = transformers
    settings = library.FNetConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=4 * LONGEST,
        pad_token_id=PAD,
    )
    mixing = saved(library.FNetModel(settings), tmp_path / "fnet")
    with pytest.raises(ModelError, match="computes a row differently"):
        build(config(mixing, adapter={"modules": ["intermediate.dense"]}))


def test_a_row_that_the_model_cannot_hold_is_refused_before_data_are_read(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BERT here has 48 positions."""
    monkeypatch.setattr("fedlr.build.load", lambda _: pytest.fail("the data were read"))
    with pytest.raises(ConfigError, match=r"model\.max_length = 49 must be ≤ 48"):
        build(config(name, model={"max_length": 49}))


def test_no_user_is_in_both_parts_where_a_user_is_the_unit(name: str) -> None:
    by_row = build(config(name)).data
    by_user = build(config(name, privacy={"unit": "user"})).data
    assert set(by_row.train.users or ()) & set(by_row.validation.users or ())
    assert set(by_user.train.users or ()).isdisjoint(by_user.validation.users or ())


def test_a_method_of_cores_has_them_in_its_model_and_others_have_none(name: str) -> None:
    for method, wanted in (("fed_sb", True), ("fedsvd", False)):
        # A kernel that multiplies by A and B alone runs where there is no core.
        bench = build(config(name, method={"name": method}))
        state = bench.method.init(bench.layout, torch.Generator().manual_seed(0))
        keys = {key for key in bench.adapted.parameters() if key.role is Role.CORE}
        assert len(keys) == (len(bench.layout.sites) if wanted else 0)
        bench.trainer.check(state.parts, bench.method.plan(state).phases[0].train)
        bench.evaluator(state.parts)
        for site in bench.layout.sites:
            layer = bench.adapted.encoder.get_submodule(f"base_model.model.{site.name}")
            assert ("forward" in vars(layer)) is not wanted
    with pytest.raises(ConfigError, match="core between A and B"):
        check_names(config(name, method={"name": "fed_sb"}, kernels={"implementation": "triton"}))


@pytest.mark.parametrize("precision", ["bfloat16", "nf4"])
@pytest.mark.parametrize(
    ("sections", "way_out"),
    [
        ({"method": {"name": "flora"}}, "a method that folds nothing"),
        ({"subspace": {"refresh": "merge"}}, r"subspace\.refresh=none"),
    ],
)
def test_a_base_in_fewer_bits_takes_no_residual(
    precision: str, sections: dict[str, dict[str, Any]], way_out: str
) -> None:
    if precision == "nf4":
        pytest.importorskip("bitsandbytes", reason="4-bit weights are in the extra '4bit'")
    told = rf"adds a residual .* model\.precision=float32, or {way_out}"
    few = {"model": {"precision": precision}}
    with pytest.raises(ConfigError, match=told) as caught:
        check_names(config("some/model", **sections, **few))
    assert len(caught.value.problems) == 1
    check_names(config("some/model", **few))
    check_names(config("some/model", **sections))


def test_memory_for_the_folded_weights_is_kept_free(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    monkeypatch.setattr("fedlr.build.rows_that_fit", lambda *given: (kept.append(given[-1]), 8)[1])
    free = {"kernels": {"physical_batch": None}}
    for sections in ({}, {"method": {"name": "flora"}}, {"subspace": {"refresh": "merge"}}):
        build(config(name, **free, **sections))
    assert kept == [0, 6 * 4 * WIDTH * WIDTH, 6 * 4 * WIDTH * WIDTH]


MEANINGS: list[dict[str, dict[str, Any]]] = [
    {},
    {"adapter": {"alpha": 3.0}},
    {"adapter": {"rank": 3}},
    {"adapter": {"modules": ["query"]}},
    {"adapter": {"layers": [-1]}},
    {"model": {"max_length": LONGEST - 1}},
    {"model": {"random_weights": True}},
    {"model": {"head": {"kind": "linear", "trained": True, "feature_scale": 2.0}}},
    {"model": {"head": {"kind": "random_cls", "trained": False}}},
    *(
        {"model": {"head": {"kind": "label_text", "label_texts": texts, **changes}}}
        for texts, changes in (
            (None, {}),
            (["no", "yes"], {}),
            (["no", "yes!"], {}),
            (["no", "yes"], {"feature_scale": 2.0}),
            (["no", "yes"], {"label_scale": 2.0}),
            (["no", "yes"], {"trained": True}),
        )
    ),
]


def test_the_digest_is_of_settings_and_every_one_that_gives_arrays_meaning_is_in_it() -> None:
    base = BaseModel(nn.Identity(), word_tokenizer(), "b", "t", "some/model")

    def digest(sections: dict[str, dict[str, Any]], labels: tuple[str, ...] = ("n", "y")) -> str:
        found = provenance(config("some/model", **sections), base, labels)
        assert (found.base, found.tokenizer) == ("b", "t")
        return found.labels

    digests = [digest(sections) for sections in MEANINGS]
    assert digests == [digest(sections) for sections in MEANINGS]
    assert len(set(digests)) == len(MEANINGS)
    assert digest({}, ("n", "Y")) != digests[0]
    # A method is no meaning of its own: what it sends says by its roles what it is.
    for same in ({"method": {"name": "fed_sb"}}, {"subspace": {"refresh": "merge"}}):
        assert digest(same) == digests[0]


def test_the_seed_is_in_the_digest_only_where_weights_are_drawn_from_it() -> None:
    base = BaseModel(nn.Identity(), word_tokenizer(), "b", "t", "some/model")

    def differs(sections: dict[str, dict[str, Any]]) -> bool:
        one = config("some/model", **sections)
        other = replace(one, seed=one.seed + 1)
        return provenance(one, base, ("n", "y")) != provenance(other, base, ("n", "y"))

    assert not differs({})
    assert differs({"model": {"random_weights": True}})
    assert differs({"model": {"head": {"kind": "random_cls", "trained": False}}})

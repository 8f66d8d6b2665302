"""From a configuration to a method: where A comes from, when that is computed, and how it moves."""

from __future__ import annotations

import json
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedlr.method_choice as choice
from fedlr.build import Workbench, build, source_spec
from fedlr.config import CombineConfig, RunConfig, rules
from fedlr.data.batching import tokenise
from fedlr.data.dataset import TextDataset
from fedlr.data.public import load_public
from fedlr.errors import ConfigError, DataError
from fedlr.lowrank.subspace import Directions, principal_directions, singular_directions
from fedlr.method_choice import method_problems
from fedlr.methods.combiners import COMBINERS
from fedlr.methods.fedsvd import FedSVD
from fedlr.methods.method import GlobalState, PartKey, Role
from fedlr.methods.refresh import Alternating, Merging
from fedlr.reuse import Reuse
from fedlr.training.public import PublicModel, input_moments, mean_gradients
from tests.data.helpers import WORDS
from tests.models import CPU, encoder
from tests.test_build import config, saved

RANK = 2
LABELS = ("no", "yes")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(encoder("bert", layers=2), tmp_path_factory.mktemp("model"))


def written(folder: Path, count: int = 40, split: str = "train", words: int = 6) -> Path:
    """Rows of the words that the tokenizer knows, two labels, in ``folder``."""
    folder.mkdir(exist_ok=True)
    known = WORDS[4:]
    rows = (
        {
            "text": " ".join(known[(row * row + 3 * at) % len(known)] for at in range(words)),
            "label": row % 2,
        }
        for row in range(count)
    )
    text = "\n".join(json.dumps(row) for row in rows) + "\n"
    (folder / f"{split}.jsonl").write_text(text)
    (folder / "labels.json").write_text(json.dumps(LABELS))
    return folder


@pytest.fixture
def settings(model: str, tmp_path: Path) -> Any:
    """Makes a configuration on private rows, with public ones elsewhere."""
    private = written(tmp_path / "private")

    def made(subspace: dict[str, Any], **sections: Any) -> RunConfig:
        values: dict[str, Any] = {
            "data": {"kind": "file", "path": str(private), "max_examples": None},
            "privacy": {"mode": "none"},
            # Words that the tokenizer knows: equal texts would make a head of zeros.
            "model": {"head": {"kind": "label_text", "trained": False, "label_texts": ["a", "b"]}},
            "subspace": subspace,
        }
        return config(model, **(values | sections))

    return made


def first(bench: Workbench, seed: int = 0) -> GlobalState:
    return bench.method.init(bench.layout, torch.Generator().manual_seed(seed))


def rows_of(bench: Workbench, seed: int = 0) -> dict[str, Tensor]:
    """A of every site before the first round."""
    parts = first(bench, seed).parts
    return {site.name: parts[PartKey(site.name, Role.A)] for site in bench.layout.sites}


def assert_same(bench: Workbench, wanted: dict[str, Directions]) -> None:
    found = rows_of(bench)
    assert found.keys() == wanted.keys()
    for name, a in found.items():
        assert torch.equal(a, wanted[name].rows)
        torch.testing.assert_close(a @ a.mT, torch.eye(RANK), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["principal", "minor"])
def test_rows_are_singular_vectors_of_each_base_weight(settings: Any, kind: str) -> None:
    bench = build(settings({"kind": kind}))
    wanted = {}
    for site in bench.layout.sites:
        layer = bench.adapted.encoder.get_submodule(f"base_model.model.{site.name}.base_layer")
        assert isinstance(layer, nn.Linear)
        wanted[site.name] = singular_directions(layer.weight, RANK, RANK, kind == "minor")
    assert_same(bench, wanted)
    assert first(bench, 1).parts.keys() == first(bench).parts.keys()
    assert all(torch.equal(rows_of(bench, 1)[name], a) for name, a in rows_of(bench).items())


def test_a_head_that_says_nothing_gives_no_gradient(settings: Any, tmp_path: Path) -> None:
    place = written(tmp_path / "public", count=9)
    silent = {"head": {"kind": "label_text", "trained": False, "label_texts": ["x", "y"]}}
    bench = build(settings({"kind": "gradient", "public": str(place)}, model=silent))
    with pytest.raises(ConfigError, match=r"kind = gradient of .*rank = 2 must be ≤ 0"):
        first(bench)


@pytest.mark.parametrize("kind", ["activations", "gradient"])
def test_rows_are_directions_of_what_the_public_text_does(
    settings: Any, kind: str, tmp_path: Path
) -> None:
    place = written(tmp_path / "public", count=9)
    bench = build(settings({"kind": kind, "public": str(place)}))
    text = load_public(str(place), source_spec(bench.config), LABELS, labelled=True)
    tokens = tokenise(bench.base.tokenizer, text, bench.config.model.max_length)
    assert len(tokens) == 9
    public = PublicModel.of(bench.trainer.classifier, bench.adapted, CPU)
    if kind == "gradient":
        found = mean_gradients(public, tokens)
        assert_same(bench, {k: singular_directions(v, RANK, RANK) for k, v in found.items()})
    else:
        moments = input_moments(public, tokens)
        assert_same(bench, {k: principal_directions(v, RANK, RANK) for k, v in moments.items()})


def test_of_the_private_rows_nothing_is_looked_at(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = written(tmp_path / "public", count=9)
    seen: list[TextDataset] = []

    def noted(tokenizer: Any, text: TextDataset, longest: int) -> Any:
        seen.append(text)
        return tokenise(tokenizer, text, longest)

    monkeypatch.setattr(choice, "tokenise", noted)
    wanted = {"kind": "activations", "public": str(place)}
    one = build(settings(wanted))
    before = rows_of(one)
    assert [len(text) for text in seen] == [9]
    written(tmp_path / "private", count=70, words=3)
    other = build(settings(wanted))
    assert len(other.data.train) != len(one.data.train)
    assert all(torch.equal(a, before[name]) for name, a in rows_of(other).items())


def test_a_process_that_draws_no_a_needs_no_public_text(settings: Any, tmp_path: Path) -> None:
    bench = build(settings({"kind": "activations", "public": str(tmp_path / "absent")}))
    with pytest.raises(DataError, match=r"subspace\.public = .*absent' cannot be read"):
        first(bench)


def test_too_little_text_for_the_rank_is_told_with_the_layer(settings: Any, tmp_path: Path) -> None:
    place = tmp_path / "one.jsonl"
    place.write_text('{"text": "", "label": 0}\n')  # [CLS] and [SEP]: one direction
    wanted = {"kind": "activations", "public": str(place)}
    with pytest.raises(ConfigError, match=r"layer\.0\.attention.*rank = 2 must be ≤ 1.*1 rows"):
        first(build(settings(wanted)))


def test_a_label_outside_the_run_s_list_is_told(settings: Any, tmp_path: Path) -> None:
    place = tmp_path / "odd.jsonl"
    place.write_text('{"text": "a b", "label": "maybe"}\n')
    with pytest.raises(DataError, match="label 'maybe' is not in the label list"):
        first(build(settings({"kind": "gradient", "public": str(place)})))


def test_runs_of_one_process_share_what_they_have_in_common(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counted(*arguments: Any, **named: Any) -> Directions:
        calls.append(1)
        return singular_directions(*arguments, **named)

    monkeypatch.setattr(choice, "singular_directions", counted)
    reuse = Reuse()
    one = build(settings({"kind": "principal"}), reuse=reuse)
    assert calls == []
    before = rows_of(one)
    once = len(one.layout.sites)
    assert len(calls) == once
    rows_of(one)
    same = build(settings({"kind": "principal"}, optimizer={"learning_rate": 3.0}), reuse=reuse)
    assert all(torch.equal(a, before[name]) for name, a in rows_of(same).items())
    assert len(calls) == once
    minor = build(settings({"kind": "minor"}), reuse=reuse)
    assert not any(torch.equal(a, before[name]) for name, a in rows_of(minor).items())
    assert len(calls) == 2 * once


@pytest.mark.parametrize(
    ("rounds", "every", "blocks"), [(1, 1, 2), (4, 2, 3), (100, 1, 8)], ids=str
)
def test_as_many_directions_are_kept_as_merges_ask_for(
    settings: Any, rounds: int, every: int, blocks: int
) -> None:
    """Of layers of 16 × 16 there are 16 / r at most; then they come again."""
    refresh = {"kind": "principal", "refresh": "merge", "refresh_every": every}
    made = settings(refresh, federation={"clients": 3, "clients_per_round": 3, "rounds": rounds})
    bench = build(made)
    assert isinstance(bench.method, Merging)
    site, generator = bench.layout.sites[0], torch.Generator()
    drawn = [bench.method.subspace.redraw(site, generator, turn) for turn in range(blocks + 1)]
    stacked = torch.cat(drawn[:-1])
    torch.testing.assert_close(stacked @ stacked.mT, torch.eye(len(stacked)), atol=1e-5, rtol=0)
    assert torch.equal(drawn[-1], drawn[0])


def test_a_refresh_wraps_the_method(settings: Any) -> None:
    plain, merged, turned = (
        build(settings({"refresh": refresh})).method for refresh in ("none", "merge", "alternate")
    )
    assert isinstance(plain, FedSVD)
    assert isinstance(merged, Merging)
    assert isinstance(turned, Alternating)
    assert merged.inner == turned.inner == plain
    assert merged.name == turned.name == "fedsvd"


def test_the_combiner_of_the_configuration_is_the_method_s(settings: Any) -> None:
    bench = build(settings({"refresh": "alternate"}, combine={"kind": "coordinate_median"}))
    assert isinstance(bench.method, Alternating)
    assert bench.method.inner.combine.name == "coordinate_median"


@pytest.mark.parametrize(
    ("subspace", "sections", "message"),
    [
        (
            {"refresh": "merge"},
            {"method": {"name": "fedavg_lora"}},
            r"subspace\.refresh = merge but method\.name = fedavg_lora has no fixed subspace to "
            r"move; set subspace\.refresh=none, or one of fedsvd, ffa_lora",
        ),
        (
            {"refresh": "alternate"},
            {"method": {"downlink": "rotation"}},
            r"subspace\.refresh = alternate but method\.downlink = rotation sends A once",
        ),
        (
            {"refresh": "merge"},
            {"model": {"precision": "nf4"}},
            r"subspace\.refresh = merge adds a residual",
        ),
        (
            {},
            {"combine": {"kind": "krum", "malicious": 2}},
            r"combine\.kind = krum with combine\.malicious = 2 needs 7 clients",
        ),
        (
            {},
            {"method": {"name": "fedask"}, "combine": {"consensus": 0.5}},
            r"combine\.consensus is set but not all that method\.name = fedask averages is "
            r"filtered by it; set combine\.consensus=null, or one of fedsvd,",
        ),
    ],
)
def test_what_does_not_go_together_is_one_sentence_with_a_way_out(
    settings: Any, subspace: dict[str, Any], sections: dict[str, Any], message: str
) -> None:
    (found,) = method_problems(settings(subspace, **sections))
    assert re.match(message, found), found
    assert method_problems(settings({})) == []


def test_the_rules_of_a_configuration_and_the_combiners_tell_the_same() -> None:
    """`fedlr.config` imports no method, so what it says of combiners is written there too."""
    kinds = typing.get_args(typing.get_type_hints(CombineConfig)["kind"])
    assert sorted(kinds) == sorted(COMBINERS)
    unweighted = [name for name, facts in COMBINERS.items() if not facts.weighted]
    assert sorted(rules._ALIKE) == sorted(unweighted)
    bearing = [name for name, facts in COMBINERS.items() if facts.malicious]
    assert sorted(rules._BEARS) == sorted(bearing)
    assert [name for name, facts in COMBINERS.items() if facts.bounded] == ["norm_bounded_mean"]

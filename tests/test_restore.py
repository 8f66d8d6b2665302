"""A run's model without its data, and its folders read by a process without fedlr."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlr.adapters.export import LARGEST_RANK
from fedlr.build import Workbench, build
from fedlr.config import RunConfig, from_mapping
from fedlr.errors import RunError
from fedlr.methods.method import PartKey, Parts, Role
from fedlr.report.facts import RunFacts
from fedlr.restore import RunModel, logits, restore, save_result
from fedlr.training.base import weights_digest
from fedlr.training.classifier import Classifier
from server.session import facts_of
from tests.models import LONGEST, encoder
from tests.report.samples import SUMMARY
from tests.test_build import saved

LABELS = ("no", "yes", 'it\'s "so"')
TEXTS = ("a b c", "d", "e e a b x a b c d e a b c d e", "c c d")

HEADS: Mapping[str, Mapping[str, Any]] = {
    "linear": {"kind": "linear", "trained": True, "feature_scale": None},
    "linear_scaled": {"kind": "linear", "trained": True, "feature_scale": 2.5},
    "label_text": {"kind": "label_text", "trained": False},
    "label_text_trained": {"kind": "label_text", "trained": True, "feature_scale": 3.0},
    "random_cls": {"kind": "random_cls", "trained": False, "feature_scale": None},
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny model, data of one text and of pairs of texts, in folders."""
    folder = tmp_path_factory.mktemp("places")
    for name, columns in (("one", ("text",)), ("two", ("text", "other"))):
        (folder / name).mkdir()
        lines = [
            {**{column: TEXTS[(i + len(column)) % 4] for column in columns}, "label": LABELS[i % 3]}
            for i in range(24)
        ]
        for split in ("train", "validation"):
            text = "\n".join(map(json.dumps, lines))
            (folder / name / f"{split}.jsonl").write_text(text + "\n", encoding="utf-8")
    saved(encoder("bert", layers=3), folder / "model")
    return {name: str(folder / name) for name in ("one", "two", "model")}


def config(places: dict[str, str], head: str = "linear", **sections: dict[str, Any]) -> RunConfig:
    values: dict[str, dict[str, Any]] = {
        "model": {"name": places["model"], "max_length": LONGEST, "head": HEADS[head]},
        "data": {
            "kind": "file",
            "path": places["one"],
            "public": True,
            "label_names": list(LABELS),
        },
        "adapter": {"rank": 2, "alpha": 6.0, "modules": ["query", "value"], "layers": [-2, -1]},
        "federation": {"clients": 2, "clients_per_round": 2},
        "privacy": {"mode": "dry"},
        "kernels": {"device": "cpu"},
    }
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes}
    return from_mapping(values)


@dataclass(frozen=True)
class Run:
    """A workbench, a result that no round made, and what the server would compute with it."""

    bench: Workbench
    parts: Parts

    @property
    def facts(self) -> RunFacts:
        return facts_of(self.bench, "run")

    def logits(self) -> Tensor:
        """Validation logits by the server's own evaluator."""
        self.bench.evaluator(self.parts)
        evaluator: Any = self.bench.evaluator
        data = evaluator._data
        with torch.no_grad():
            found: Tensor = evaluator._classifier(data.batch(np.arange(len(data))))
        return found


def trained(bench: Workbench) -> Run:
    draws = torch.Generator().manual_seed(3)
    shapes = {key: value.shape for key, value in bench.adapted.parameters().items()}
    return Run(bench, {k: 0.5 * torch.randn(shape, generator=draws) for k, shape in shapes.items()})


@pytest.fixture(scope="module")
def make(places: dict[str, str]) -> Callable[..., Run]:
    """Return the trained run of some settings; equal ones are built once."""
    known: dict[str, Run] = {}

    def run(head: str = "linear", **sections: dict[str, Any]) -> Run:
        key = json.dumps([head, sections])
        if key not in known:
            known[key] = trained(build(config(places, head, **sections)))
        return known[key]

    return run


def validation(run: Run) -> list[str]:
    data = run.bench.data.validation
    columns = [data.texts] if data.pairs is None else [data.texts, data.pairs]
    return ["\t".join(row) for row in zip(*columns, strict=True)]


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal to 1e-4, and to 1 % of how much the rows differ where that is less."""
    spread = float(expected.std(dim=0).max())
    assert torch.allclose(found, expected, rtol=0, atol=min(1e-4, 0.01 * spread))


def again(run: Run) -> RunModel:
    return restore(run.bench.config, run.facts, run.bench.whole_head)


@pytest.mark.parametrize("head", HEADS)
def test_a_restored_model_computes_the_servers_logits(
    make: Callable[..., Run], head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(head)
    expected = run.logits()
    monkeypatch.setattr("fedlr.build.load", lambda _: pytest.fail("the data were read"))
    model = again(run)
    assert model.layout.sites == run.bench.layout.sites
    assert model.layout.head.keys() == run.bench.layout.head.keys()
    before = weights_digest(model.adapted.encoder)
    found = logits(model, run.parts, validation(run))
    assert_same(found, expected)
    assert weights_digest(model.adapted.encoder) == before
    assert logits(model, run.parts, []).shape == (0, len(LABELS))


def test_cores_are_restored_and_exported(make: Callable[..., Run], tmp_path: Path) -> None:
    """Fed-SB: the server's logits, restored, merged, and by PEFT with B·R and A."""
    import peft
    import transformers

    run = make("linear", method={"name": "fed_sb"})
    assert {key.role for key in run.parts} == {Role.A, Role.B, Role.CORE, Role.HEAD}
    expected, model = run.logits(), again(run)
    assert_same(logits(model, run.parts, validation(run)), expected)
    without = {key: value for key, value in run.parts.items() if key.role is not Role.CORE}
    assert not torch.allclose(logits(model, without, validation(run)), expected, rtol=0, atol=1e-2)
    save_result(model, run.parts, summary_of(run), tmp_path)
    library, adapters = cast(Any, transformers), cast(Any, peft)
    base = library.AutoModel.from_pretrained(run.bench.config.model.name)
    loaded = adapters.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    classifier = Classifier(loaded, run.bench.head).eval()
    run.bench.evaluator(run.parts)  # the head is the server's own
    data = cast(Any, run.bench.evaluator)._data
    with torch.no_grad():
        assert_same(classifier(data.batch(np.arange(len(data)))), expected)


def residual(run: Run, rank: int) -> Parts:
    draws = torch.Generator().manual_seed(9)
    found: dict[PartKey, Tensor] = dict(run.parts)
    for site in run.bench.layout.sites:
        for role, shape in (
            (Role.RESIDUAL_B, (site.out_features, rank)),
            (Role.RESIDUAL_A, (rank, site.in_features)),
        ):
            found[PartKey(site.name, role)] = torch.randn(shape, generator=draws) / rank**0.5
    return found


LOADER = """
import json, pathlib, re, sys
import torch
answers = []
for order in json.loads(sys.stdin.read()):
    text = (pathlib.Path(order["folder"]) / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\\n(.*?)```", text, re.S)
    if order["base"]:
        code, count = re.subn(r"(?m)^base = .*$", f"base = {order['base']!r}", code)
        assert count == 1
    code = code.replace('folder = "."', f"folder = {order['folder']!r}")
    for column, example in zip(order["texts"], order["examples"], strict=True):
        assert f'["{example}"]' in code
        code = code.replace(f'["{example}"]', repr(column))
    names = {}
    exec(code, names)
    answers.append(names["logits"].tolist())
assert not [name for name in sys.modules if name.split(".")[0] in ("fedlr", "server", "client")]
print(json.dumps(answers))
"""


def in_a_fresh_process(orders: list[dict[str, Any]], folder: Path) -> list[Tensor]:
    """Run the cards' own lines in one process; return the logits of each."""
    found = subprocess.run(
        [sys.executable, "-c", LOADER],
        input=json.dumps(orders),
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return [torch.tensor(answer) for answer in json.loads(found.stdout.splitlines()[-1])]


def test_the_cards_own_lines_give_the_servers_logits_without_fedlr(
    make: Callable[..., Run], places: dict[str, str], tmp_path: Path
) -> None:
    """Every head, adapter and merged, pairs of texts, random weights, and a residual."""
    drawn = {"model": {"name": places["model"], "max_length": LONGEST, "random_weights": True}}
    drawn["model"]["head"] = HEADS["label_text"]
    pairs = {"data": {"path": places["two"], "text_columns": ["text", "other"]}}
    runs = [make(head) for head in HEADS]
    runs += [make("label_text", **drawn), make("random_cls", **pairs)]
    orders, expected = [], []
    for number, run in enumerate(runs):
        model, data = again(run), run.bench.data.validation
        digest = weights_digest(model.adapted.encoder)
        columns = [data.texts] if data.pairs is None else [data.texts, data.pairs]
        examples = ["a text to classify"]
        if data.pairs is not None:
            examples = ["a first text", "its second text"]
        for merged in (False, True):
            folder = tmp_path / f"{number}-{merged}"
            form = save_result(model, run.parts, summary_of(run), folder, merged)
            assert form == ("merged" if merged else "adapter")
            base = None if merged else places["model"]
            orders.append(
                {"folder": str(folder), "base": base, "texts": columns, "examples": examples}
            )
            expected.append(run.logits())
        assert weights_digest(model.adapted.encoder) == digest
    whole = make("linear")
    folder = tmp_path / "residual"
    parts = residual(whole, 5)
    save_result(RunModel.of(whole.bench), parts, summary_of(whole), folder)
    texts = validation(whole)
    orders.append({**orders[0], "folder": str(folder), "texts": [texts]})
    expected.append(logits(again(whole), parts, texts))
    assert not torch.allclose(expected[-1], whole.logits(), rtol=0, atol=1e-2)
    for found, wanted in zip(in_a_fresh_process(orders, tmp_path), expected, strict=True):
        assert_same(found, wanted)


def summary_of(run: Run) -> Any:
    return replace(SUMMARY, model=run.bench.base.name, label_names=LABELS)


def test_a_residual_of_a_large_rank_is_merged_and_replaces_an_adapter(
    make: Callable[..., Run], tmp_path: Path
) -> None:
    run = make("linear")
    model, out = RunModel.of(run.bench), tmp_path / "adapter"
    summary, rank = summary_of(run), LARGEST_RANK - 2
    assert save_result(model, residual(run, rank), summary, out) == "adapter"
    assert (out / "adapter_config.json").is_file()
    parts = residual(run, rank + 1)
    assert save_result(model, parts, summary, out) == "merged"
    assert not (out / "adapter_config.json").exists()  # it would be read before config.json
    assert not (out / "adapter_model.safetensors").exists()
    (code,) = (out / "README.md").read_text(encoding="utf-8").split("```python\n")[1:]
    assert "peft" not in code
    order = {
        "folder": str(out),
        "base": None,
        "texts": [validation(run)],
        "examples": ["a text to classify"],
    }
    (found,) = in_a_fresh_process([order], tmp_path)
    assert_same(found, logits(model, parts, validation(run)))


def test_another_model_tokenizer_or_meaning_is_refused(make: Callable[..., Run]) -> None:
    run = make("linear")
    for name in ("base", "tokenizer", "labels"):
        facts = replace(run.facts, **{name: "0" * 64})
        with pytest.raises(RunError, match=f"another {name} than"):
            restore(run.bench.config, facts, run.bench.whole_head)
    other = replace(run.bench.config.adapter, alpha=1.0)  # config.json was edited
    with pytest.raises(RunError, match="another labels than"):
        restore(replace(run.bench.config, adapter=other), run.facts, run.bench.whole_head)


def test_a_head_that_does_not_fit_is_refused(make: Callable[..., Run]) -> None:
    run = make("linear")
    head = run.bench.whole_head
    for damaged in (
        {"head.output.bias": head["head.output.bias"]},
        {**head, "head.output.bias": torch.zeros(1)},
        {**head, "head.dense.weight": torch.zeros(1)},
        {**head, "head.output.weight": torch.zeros(3)},
    ):
        with pytest.raises(RunError, match="the head of the run is damaged"):
            restore(run.bench.config, run.facts, damaged)


def test_a_place_that_cannot_be_written_is_a_sentence(
    make: Callable[..., Run], tmp_path: Path
) -> None:
    run = make("linear")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        save_result(
            RunModel.of(run.bench), run.parts, summary_of(run), tmp_path / "file" / "adapter"
        )


def test_a_diverged_model_gives_no_labels(make: Callable[..., Run]) -> None:
    run = make("linear")
    parts = {key: value * float("nan") for key, value in run.parts.items()}
    with pytest.raises(RunError, match="diverged"):
        logits(again(run), parts, ["a"])


def test_half_a_pair_is_refused(make: Callable[..., Run], places: dict[str, str]) -> None:
    pairs = {"data": {"path": places["two"], "text_columns": ["text", "other"]}}
    run = make("random_cls", **pairs)
    with pytest.raises(RunError, match="two texts with one tab"):
        logits(again(run), run.parts, ["a\tb", "a"])

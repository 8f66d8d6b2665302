"""The model card: a promise with all its numbers, and a loader that is Python."""

from __future__ import annotations

import ast
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import yaml

from fedlr.report.card import Loading, card, loader
from tests.report.samples import SUMMARY

LOADING = Loading(
    form="adapter",
    revision=None,
    random_seed=None,
    head="label_text",
    feature_scale=4.4721,
    max_length=64,
    pairs=False,
    padding=True,
    rounds=4,
)
CHOICES: dict[str, tuple[Any, ...]] = {
    "form": ("adapter", "merged"),
    "revision": (None, "v1'\"#"),
    "random_seed": (None, 3),
    "head": ("linear", "label_text", "random_cls"),
    "feature_scale": (None, 4.4721),
    "pairs": (False, True),
    "padding": (False, True),
    "four_bit": (False, True),
}
NAMES = ("no", 'a "quoted" \\ label', "two\nlines", "größer; drop", "```", "\u2028")


def front_matter(text: str) -> Any:
    empty, front, _ = text.split("---\n", maxsplit=2)
    assert empty == ""
    return yaml.safe_load(front)


@pytest.mark.parametrize("base", ["owner/model", 'a "folder": #1', "C:\\models\\größe", "yes"])
def test_the_front_matter_is_yaml(base: str) -> None:
    found = front_matter(card(replace(SUMMARY, model=base), LOADING))
    assert found["library_name"] == "peft"
    assert found["base_model"] == base
    assert "differential-privacy" in found["tags"]
    plain = replace(SUMMARY, privacy_mode="none", epsilon_max=None, delta=None)
    found = front_matter(card(plain, replace(LOADING, form="merged")))
    assert found["library_name"] == "transformers"
    assert "differential-privacy" not in found["tags"]


def test_every_loader_is_python_of_ten_statements_that_names_what_it_must() -> None:
    for values in itertools.product(*CHOICES.values()):
        loading = replace(LOADING, **dict(zip(CHOICES, values, strict=True)))
        summary = replace(SUMMARY, model='it\'s "here"\\n', label_names=NAMES)
        code = loader(summary, loading)
        body = ast.parse(code).body
        steps = [node for node in body if not isinstance(node, ast.Import | ast.ImportFrom)]
        assert len(steps) <= 10, loading
        assigned = {
            ast.unparse(node.targets[0]): node.value
            for node in steps
            if isinstance(node, ast.Assign)
        }
        assert tuple(ast.literal_eval(assigned["labels"])) == NAMES
        assert ("base" in assigned) is (loading.form == "adapter")
        if loading.form == "adapter":
            assert ast.literal_eval(assigned["base"]) == summary.model
            revision = loading.revision
            assert code.count("revision=") == (0 if revision is None else 2)
        imported = {(n.module or "") for n in body if isinstance(n, ast.ImportFrom)}
        assert imported <= {"peft", "safetensors.torch", "torch.nn.functional", "transformers"}
        assert f"```python\n{code}\n```" in card(summary, loading)


def test_a_private_run_tells_the_whole_promise() -> None:
    text = card(SUMMARY, LOADING)
    for said in ("≤ 1.25", "1e-05", "adding or removing one training example", "`prv`"):
        assert said in text
    assert "largest over the sites" in text
    assert "noise was added at the site" in text
    assert "this run, its resumes included" in text
    assert "all rows of one user" in card(replace(SUMMARY, unit="user"), LOADING)
    assert "75.0 %" in text
    assert "37.5 %" in text
    assert "4 of 4 rounds" in text
    assert SUMMARY.data_sha256 in text
    assert SUMMARY.notices[0] in text


def test_epsilon_is_never_rounded_down() -> None:
    assert "≤ 1.24," in card(replace(SUMMARY, epsilon_max=1.2301), LOADING)


@pytest.mark.parametrize("mode", ["none", "dry"])
def test_a_run_without_noise_promises_nothing(mode: str) -> None:
    given = {"epsilon_max": None, "delta": None} if mode == "none" else {"epsilon_max": math.inf}
    text = card(replace(SUMMARY, privacy_mode=mode, **given), LOADING)  # type: ignore[arg-type]
    assert f"None: {'the' if mode == 'none' else 'ε = ∞'}" in text
    assert f"privacy.mode={mode}" in text
    assert "differentially private" not in text
    assert "Not covered by ε" not in text


def test_random_weights_and_an_early_end_are_said_plainly() -> None:
    drawn = replace(LOADING, random_seed=5)
    text = card(SUMMARY, drawn)
    assert "random weights**, drawn from seed 5" in text
    assert "cannot be loaded by name" in text
    assert "cannot be loaded by name" not in card(SUMMARY, replace(drawn, form="merged"))
    assert "random weights" not in card(SUMMARY, LOADING)
    assert "stopped after 4 of 9 rounds" in card(SUMMARY, replace(LOADING, rounds=9))
    assert "stopped after" not in text


def test_names_from_elsewhere_cannot_move_a_cursor_or_break_a_line() -> None:
    text = card(replace(SUMMARY, label_names=("a\x1b[2J", "b\nc")), LOADING)
    assert "\x1b" not in text
    assert "`a?[2J`, `b?c`" in text


def test_an_accuracy_that_was_not_measured_is_not_invented() -> None:
    text = card(replace(SUMMARY, accuracy=None), LOADING)
    assert "not measured (a constant answer scores 37.5 %)" in text

"""``fedlr predict``: a label a text, from words or from standard input."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedlr.cli.export import load_run
from fedlr.cli.main import main
from fedlr.restore import logits
from tests.cli.small import LABELS, simulate


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose data are gone."""
    folder = tmp_path_factory.mktemp("run")
    found = simulate(folder)
    shutil.rmtree(folder / "data")
    return found


def test_each_text_gets_its_most_probable_label(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    texts = ["a b c", "d", "größe \x1b[2J", "e e a b a b c d e"]
    assert main(["predict", str(run), *texts]) == 0
    plain = capfd.readouterr().out.splitlines()
    assert main(["predict", str(run), "--json", *texts]) == 0
    answers = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [answer["text"] for answer in answers] == texts
    model, checkpoint = load_run(run)
    expected = logits(model, checkpoint.parts, texts).softmax(dim=1)
    for line, answer, row in zip(plain, answers, expected, strict=True):
        assert tuple(answer["probabilities"]) == LABELS
        found = torch.tensor(list(answer["probabilities"].values()))
        assert torch.allclose(found, row, rtol=0, atol=1e-6)
        assert answer["label"] == LABELS[int(row.argmax())]
        assert line == f"{answer['label']}\t{float(row.max()):.4f}"


def test_texts_come_from_standard_input_one_a_line(
    run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a b\r\n\nc c d"))
    assert main(["predict", str(run), "--json"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["a b", "", "c c d"]


def test_a_text_that_looks_like_an_option_follows_two_dashes(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(run), "a", "--json", "b", "--", "--json", "-x", "--"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["a", "b", "--json", "-x", "--"]


def test_a_mistake_meets_a_sentence(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    latin = io.TextIOWrapper(io.BytesIO("größe".encode("latin-1")), encoding="utf-8")
    for words, given, status, says in (
        ([], io.StringIO(), 2, "required: <run>"),
        ([str(run), "--nonsense", "a"], io.StringIO(), 2, "--nonsense"),
        ([str(run)], io.StringIO(), 2, "no text is given"),
        ([str(run)], Terminal("a"), 2, "no text is given"),
        ([str(run)], latin, 2, "is not utf-8 text"),
        ([str(tmp_path), "a"], io.StringIO(), 7, "is no run folder"),
    ):
        monkeypatch.setattr("sys.stdin", given)
        assert main(["predict", *words]) == status, words
        said = capfd.readouterr()
        assert says in said.err
        assert said.out == ""


def test_help_of_both_verbs_loads_no_framework() -> None:
    code = (
        "import sys; from fedlr.cli.main import main;"
        "assert main(['export', '--help']) == main(['predict', '-h']) == 0;"
        "print([m for m in ('torch','flwr','hydra','peft','transformers') if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout.splitlines()[-1] == "[]"
    assert "usage: fedlr export" in found.stdout
    assert "usage: fedlr predict" in found.stdout

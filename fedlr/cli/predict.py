"""``fedlr predict``: labels for texts, by the model of a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from fedlr.cli.arguments import Parser
from fedlr.cli.export import load_run
from fedlr.errors import ConfigError
from fedlr.report.facts import read_facts
from fedlr.report.units import printable

_ABOUT = """\
Classify texts with the model of a run, finished or interrupted. One line a text: its
label and the label's probability. Texts come from standard input, one a line, where
none are given; one that begins with a dash follows --. Where the run was trained on
pairs of texts, a tab separates the two."""


def run(words: Sequence[str]) -> int:
    """Run the verb.

    Args:
        words: A run folder and texts, and ``--json`` or ``--help``.

    Returns:
        0; errors are raised as `fedlr.errors.FedlrError`.
    """
    parser = Parser("predict", _ABOUT)
    parser.add_argument("run", metavar="<run>", type=Path, help="the run folder")
    parser.add_argument("texts", metavar='"text"', nargs="*", default=[], help="texts to classify")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object a text, with every label"
    )
    # Cut by hand: releases of argparse differ in what they do with "--" between positionals.
    end = list(words).index("--") if "--" in words else len(words)
    given = parser.parse(words[:end])
    if given is None:
        return 0
    read_facts(given.run)  # before texts are waited for: is it a run at all?
    # An argument that is no UTF-8 arrives with lone surrogates, which no tokenizer takes.
    named = [*given.texts, *words[end + 1 :]]
    texts = [text.encode(errors="replace").decode() for text in named] or _lines()
    for text, probabilities in zip(texts, predict(given.run, texts), strict=True):
        label = max(probabilities, key=probabilities.__getitem__)
        if given.json:
            found = {"text": text, "label": label, "probabilities": probabilities}
            print(json.dumps(found, ensure_ascii=False, allow_nan=False))
        else:
            print(f"{printable(label)}\t{probabilities[label]:.4f}")
    return 0


def predict(folder: Path, texts: Sequence[str]) -> list[dict[str, float]]:
    """Return each text's probabilities by label, in the order of the logits.

    Args:
        folder: A run folder with one finished round or more.
        texts: N ≥ 0 texts.

    Raises:
        FedlrError: As `fedlr.cli.export.load_run` and `fedlr.restore.logits`.
    """
    model, checkpoint = load_run(folder)
    from fedlr.restore import logits

    shares = logits(model, checkpoint.parts, texts).double().softmax(dim=1)
    return [dict(zip(model.label_names, row, strict=True)) for row in shares.tolist()]


def _lines() -> list[str]:
    """Return the lines of standard input; ConfigError where there is nothing to classify."""
    try:
        lines = [] if sys.stdin.isatty() else [line.rstrip("\r\n") for line in sys.stdin]
    except UnicodeDecodeError as error:
        raise ConfigError([f"standard input is not {error.encoding} text; convert it"]) from error
    if not lines:
        raise ConfigError(
            ['no text is given; write `fedlr predict <run> "text"`, or pipe texts in, one a line']
        )
    return lines

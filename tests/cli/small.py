"""A run of seconds, for the verbs that need one: a tiny model and few rows, in this process."""

from __future__ import annotations

import json
from pathlib import Path

from fedlr.cli.main import main
from tests.models import LONGEST, encoder
from tests.test_build import saved

LABELS = ("no", "yes")
TEXTS = ("a b c", "d", "e e a b a b c d e", "c c d")


def small(folder: Path, rows: int = 40) -> list[str]:
    """Put data and a model into ``folder``; return the overrides of three private rounds."""
    lines = [{"text": TEXTS[i % 4], "label": LABELS[i % 3 % 2]} for i in range(rows)]
    (folder / "data").mkdir()
    for split in ("train", "validation"):
        text = "\n".join(map(json.dumps, lines)) + "\n"
        (folder / "data" / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return [
        *("model=encoder", f"model.name={saved(encoder('bert'), folder / 'model')}"),
        *("data=file", f"data.path={folder / 'data'}", f"data.label_names=[{','.join(LABELS)}]"),
        *("adapter=query_value", "adapter.rank=2", f"model.max_length={LONGEST}"),
        *("federation.clients=2", "federation.clients_per_round=2", "federation.rounds=3"),
        *("federation.evaluate_every=1", "optimizer.steps=1", "optimizer.expected_batch=4"),
        *("privacy.accountant=rdp", "kernels.device=cpu", f"output={folder / 'runs'}"),
    ]


def simulate(folder: Path, *words: str, status: int = 0) -> Path:
    """Run three private rounds in ``folder`` and return the run folder."""
    assert main(["simulate", *small(folder), *words]) == status
    (found,) = (folder / "runs").rglob("run.json")
    return found.parent


def policies(folder: Path, **texts: str) -> str:
    """Write policy files, by client with an underscore, and return the override."""
    folder.mkdir(parents=True)
    for name, text in texts.items():
        (folder / f"{name.replace('_', '-')}.toml").write_text(text, encoding="utf-8")
    return f"privacy.policies={folder}"

"""A script that plays Flower's command line: what it answers, and what it was called with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FLWR = """\
#!{python}
import json, os, pathlib, shutil, sys, time
here = pathlib.Path({folder!r})
words = sys.argv[1:]
with (here / "calls").open("a") as file:
    told = {{"words": words, "home": os.environ.get("FLWR_HOME"), "telemetry": os.environ.get(
        "FLWR_TELEMETRY_ENABLED")}}
    if words[0] == "run":
        told["run_config"] = pathlib.Path(words[words.index("--run-config") + 1]).read_text()
        told["files"] = sorted(p.name for p in pathlib.Path(words[1]).rglob("*") if p.is_file())
    file.write(json.dumps(told) + chr(10))
if words[0] == "log":
    print("round 1/3", flush=True)
    time.sleep(60)
answers = json.loads((here / "answers").read_text())
found = answers[words[0] if words[0] != "supernode" else f"supernode {{words[1]}}"]
if isinstance(found, list):
    left = found[1:] or found
    answers[words[0]] = left
    (here / "answers").write_text(json.dumps(answers))
    found = found[0]
if isinstance(found, str):
    print(found, file=sys.stderr)
    sys.exit(1)
print("a line of Flower's own")
print(json.dumps(found))
"""


@dataclass
class Flower:
    """The script, what it answers, and what it was called with."""

    folder: Path

    def answers(self, **given: Any) -> None:
        named = {name.replace("_", " "): answer for name, answer in given.items()}
        path = self.folder / "answers"
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | named))

    @property
    def calls(self) -> list[dict[str, Any]]:
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def words(self) -> list[list[str]]:
        return [call["words"] for call in self.calls]

"""Planted rows: nothing of their text or tokens is in anything that a run leaves or sends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import client.app
from fedlr.cli.main import main
from fedlr.training.base import load_base
from tests.models import LONGEST, encoder
from tests.test_build import saved

LABELS = ("no", "yes")
# Words of the tiny tokenizer, in an order that no other row has; and one it does not know.
PLANTED = "e a d b c a e d b a c"
STRANGER = "quxotroph"


def rows(folder: Path) -> None:
    folder.mkdir()
    public = [{"text": "a b c", "label": LABELS[i % 2]} for i in range(20)]
    private = [{"text": f"{PLANTED} {STRANGER}{i}", "label": LABELS[i % 2]} for i in range(40)]
    for name, lines in (("train", private), ("validation", public)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)


def needles(model: str) -> list[bytes]:
    """The planted text, and its tokens as numbers in every form they could be stored in."""
    tokenizer: Any = load_base(model, None, None, None).tokenizer
    ids = tokenizer(PLANTED, add_special_tokens=False)["input_ids"]
    assert len(set(ids)) > 3
    dense = [np.array(ids, dtype=kind).tobytes() for kind in ("<i2", "<i4", "<i8", "<f4", "<f8")]
    spelled = [sep.join(map(str, ids)).encode() for sep in (",", ", ", " ")]
    return [PLANTED.encode(), STRANGER.encode(), *dense, *spelled]


@pytest.mark.parametrize("broken", [False, True], ids=["whole", "broken"])
def test_nothing_of_a_row_leaves(
    broken: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows(tmp_path / "data")
    model = saved(encoder("bert"), tmp_path / "model")
    searched = needles(model)
    sent: list[bytes] = []
    real = client.app._content

    def content(arrays: Any, header: Any) -> Any:
        sent.extend(np.ascontiguousarray(array).tobytes() for array in arrays.values())
        sent.append(json.dumps(header).encode())
        return real(arrays, header)

    monkeypatch.setattr(client.app, "_content", content)
    if broken:

        def fail(*_: Any) -> None:
            raise RuntimeError(f"cannot train on {PLANTED} {STRANGER}")

        monkeypatch.setattr("client.site.Site._complete", fail)
    words = [
        *("model=encoder", f"model.name={model}", f"model.max_length={LONGEST}"),
        *("data=file", f"data.path={tmp_path / 'data'}", "data.label_names=[no,yes]"),
        *("adapter=query_value", "adapter.rank=2", "federation.clients=2"),
        *("federation.clients_per_round=2", "federation.rounds=2", "optimizer.steps=1"),
        *("optimizer.expected_batch=4", "privacy.accountant=rdp", "kernels.device=cpu"),
        f"output={tmp_path / 'runs'}",
    ]
    assert main(["simulate", *words]) == (7 if broken else 0)
    said = capfd.readouterr()
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert len(files) > 8
    assert len(sent) >= 4
    # The traceback of the failed round is for the site's own console, and there alone.
    heaps = [path.read_bytes() for path in files] + sent + [said.out.encode()]
    if not broken:
        heaps.append(said.err.encode())
    for needle in searched:
        assert not any(needle in heap for heap in heaps), needle
    # The search finds what is there.
    assert any(PLANTED.encode() in path.read_bytes() for path in (tmp_path / "data").iterdir())

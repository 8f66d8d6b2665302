"""The benchmarks for a GPU run on a CPU, every one of them: tiny shapes, interpreted kernels."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedlr.adapters.quantised import missing_package

from . import gpu
from .conftest import JSON_VARIABLE
from .machine import ROOT, describe, line
from .ratios import CLOCK_VARIABLE, PAIRS_VARIABLE, Side, alternate
from .report import Report

FILES = ("test_gpu.py", "test_gpu_kernels.py")


def expected() -> Iterator[tuple[str, str]]:
    """(setting, ratio) of every line; Triton's interpreter has no bfloat16."""
    for precision, ours in product(("float32", "bfloat16"), ("naive", "triton")):
        if (precision, ours) == ("bfloat16", "triton"):
            continue
        step = f"step 4 × 8 {precision}"
        yield step, f"private {ours} / ordinary"
        yield step, f"private {ours} / ordinary, peak memory"
        if ours == "triton":
            yield step, "private naive / private triton"
        for theirs in ("Opacus hooks", "Opacus ghost"):
            yield step, f"{theirs} / private {ours}"
            if ours == "naive":
                yield step, f"{theirs} / ordinary, peak memory"
        yield f"a row in company, {precision} {ours}", "effect of other rows"
        if ours == "naive":
            yield f"noise, {step}", "secret noise / ordinary"
    yield "2 clients x 2 rows x 8 float32", "one by one / fused"
    for ratio in ("naive / triton", "formed once / triton", "triton / plain copy, bandwidth"):
        yield "clipped_sum 4 × 8 float32, 4 sites", ratio
    for ratio in ("naive / triton", "merged / triton"):
        yield "lora_linear 4 × 8 float32", ratio
    if missing_package() is None:
        yield "a row in company, nf4 naive", "effect of other rows"
        for ratio in ("ordinary nf4", "private float32", "float32, peak memory"):
            yield "step 4 × 8 nf4", f"private nf4 / {ratio}"


@pytest.mark.slow  # 17 s: a process of its own, and every kernel interpreted
def test_every_line_of_the_table_comes_out(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    settings = {
        "FEDLR_BENCH_GPU": "dry",
        "TRITON_INTERPRET": "1",
        PAIRS_VARIABLE: "1",
        CLOCK_VARIABLE: "wall",
        JSON_VARIABLE: str(tmp_path / "bench.json"),
    }
    files = [f"tests/benchmarks/{name}" for name in FILES]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "bench", "-rs", *files],
        cwd=ROOT,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    lines = [(row["setting"], row["quantity"]) for row in found["rows"]]
    assert sorted(lines) == sorted(expected())
    assert found["withheld"] == []
    for row in found["rows"]:
        assert row["parity"] <= row["parity_bound"]
        assert math.isfinite(row["found"]["median"])
        assert row["found"]["median"] > 0


def test_the_clock_waits_for_the_device_before_and_after() -> None:
    said: list[str] = []
    side = Side("side", lambda: said.append("call"), repeats=2, wait=lambda: said.append("wait"))
    alternate(side, Side("other", lambda: None), 1)
    assert said == ["call", "wait", "call", "call", "wait"]


def test_the_machine_line_names_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert describe()["gpu"] is None
    card = SimpleNamespace(name="Some GPU", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    assert " · Some GPU, 80 GiB, CUDA " in line(describe())
    assert "Some GPU" in Report().table(describe())[0]


def test_peak_memory_is_of_a_warm_call_and_of_that_side_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held, most = [100], [100]

    def make() -> Callable[[], None]:
        held[0] += 7  # the model stays

        def side() -> None:
            most[0] = max(most[0], held[0] + (5 if most[0] == 100 else 3))

        return side

    def reset() -> None:
        most[0] = held[0]

    fakes = {
        "memory_allocated": lambda: held[0],
        "max_memory_allocated": lambda: most[0],
        "reset_peak_memory_stats": reset,
        "synchronize": lambda: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(gpu, "STAGE", gpu.LARGE)
    assert gpu.peak(make) == 10

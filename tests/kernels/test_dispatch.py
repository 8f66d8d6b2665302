"""Which implementation is taken, and what a user reads where it is not."""

from __future__ import annotations

import importlib.util
import shutil

import pytest
import torch

from fedlr.errors import ConfigError
from fedlr.kernels import dispatch
from fedlr.kernels.clipped_sum import naive as naive_sum
from fedlr.kernels.dispatch import Call, choose, explain
from fedlr.kernels.lora_linear import merged
from fedlr.kernels.lora_linear import naive as naive_linear
from tests.kernels.execution import Machine

CPU, GPU = Call(torch.device("cpu")), Call(torch.device("cuda"))


@pytest.fixture
def fine_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine that looks as if Triton ran on it."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    return monkeypatch


@pytest.mark.parametrize("kernel", dispatch.KERNELS)
@pytest.mark.parametrize("interpret", ["", "1"])
def test_auto_on_the_cpu_never_interprets(
    monkeypatch: pytest.MonkeyPatch, kernel: str, interpret: str
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    expected = {"clipped_sum": "naive", "lora_linear": "merged"}[kernel]
    assert choose(kernel, CPU).implementation == expected
    assert choose(kernel, CPU, "naive").implementation == "naive"
    assert choose(kernel, Call(CPU.device, torch.bfloat16)).implementation == "naive"
    assert choose(kernel, Call(CPU.device, quantised=True)).implementation == "naive"


def test_the_twin_is_handed_out() -> None:
    for override in ("auto", "naive"):
        assert dispatch.clipped_sum(CPU, override) is naive_sum
    assert dispatch.lora_linear(CPU, "naive") is naive_linear
    assert dispatch.lora_linear(CPU) is merged


@pytest.mark.parametrize("kernel", dispatch.KERNELS)
def test_a_gpu_that_can_runs_the_kernel_when_asked(
    fine_gpu: pytest.MonkeyPatch, kernel: str
) -> None:
    assert choose(kernel, GPU, "triton").implementation == "triton"
    assert choose(kernel, GPU, "naive").implementation == "naive"
    assert choose(kernel, GPU) == (kernel, "naive", dispatch.UNMEASURED)


def test_the_kernel_is_handed_out(fine_gpu: pytest.MonkeyPatch) -> None:
    kernel = pytest.importorskip("fedlr.kernels.clipped_sum.triton")
    layer = pytest.importorskip("fedlr.kernels.lora_linear.triton")
    assert dispatch.clipped_sum(GPU, "triton") is kernel
    assert dispatch.lora_linear(GPU, "triton") is layer


OBSTACLES = {
    "rank 129 is above 128": (lambda patch: None, Call(GPU.device, rank=129)),
    "dtype float64 is none of float32, float16, bfloat16": (
        lambda patch: None,
        Call(GPU.device, torch.float64),
    ),
    "A is trained": (lambda patch: None, Call(GPU.device, trains_a=True)),
    "the frozen weight is stored in 4 bits": (
        lambda patch: None,
        Call(GPU.device, quantised=True),
    ),
    "triton is not installed": (
        lambda patch: patch.setattr(importlib.util, "find_spec", lambda name: None),
        GPU,
    ),
    "only on NVIDIA GPUs": (lambda patch: patch.setattr(torch.version, "hip", "6.2"), GPU),
    "no Triton kernel was tested on mps": (lambda patch: None, Call(torch.device("mps"))),
    "no CUDA device is visible": (
        lambda patch: patch.setattr(torch.cuda, "is_available", lambda: False),
        GPU,
    ),
    "compute capability 7.5 is below 8.0": (
        lambda patch: patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5)),
        GPU,
    ),
    "install gcc or clang": (
        lambda patch: (
            patch.setattr(shutil, "which", lambda name: None),
            patch.delenv("CC", raising=False),
        ),
        GPU,
    ),
    "TRITON_INTERPRET is set": (lambda patch: patch.setenv("TRITON_INTERPRET", "1"), GPU),
    "TRITON_INTERPRET=1 is not set": (lambda patch: None, CPU),
    "wrongly in bfloat16": (
        lambda patch: patch.setenv("TRITON_INTERPRET", "1"),
        Call(CPU.device, torch.bfloat16),
    ),
}


@pytest.mark.parametrize("reason", OBSTACLES)
def test_an_obstacle_is_told_and_insisting_is_an_error(
    fine_gpu: pytest.MonkeyPatch, reason: str
) -> None:
    arrange, call = OBSTACLES[reason]
    arrange(fine_gpu)
    declined = choose("lora_linear", call)
    assert declined.implementation != "triton"
    if call.device.type != "cpu":
        assert reason in declined.reason
    with pytest.raises(ConfigError) as refused:
        choose("lora_linear", call, "triton")
    message = str(refused.value)
    assert message.startswith("kernels.implementation = triton, but lora_linear cannot run it: ")
    assert reason in message
    assert message.endswith("set kernels.implementation=auto or naive")


def test_only_the_layer_minds_that_a_is_trained(fine_gpu: pytest.MonkeyPatch) -> None:
    call = Call(GPU.device, trains_a=True)
    assert choose("clipped_sum", call, "triton").implementation == "triton"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="'cuda' must be one of auto, naive, triton"):
        choose("clipped_sum", CPU, "cuda")
    with pytest.raises(ValueError, match="kernel = 'gemm' must be one of"):
        choose("gemm", CPU)


def test_every_kernel_is_explained() -> None:
    told = explain(CPU.device)
    assert [choice.kernel for choice in told] == list(dispatch.KERNELS)
    assert "interpreter for tests" in told[0].reason
    assert "one product" in told[1].reason


def test_the_interpreter_is_taken_when_asked_for(machine: Machine) -> None:
    if machine.device.type != "cpu":
        pytest.skip("there is an interpreter on the CPU only")
    assert machine.run("cpu_choice", "float32", "triton")
    assert not machine.run("cpu_choice", "float32", "auto")


def test_an_interpreter_wanted_too_late_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = pytest.importorskip("fedlr.kernels.clipped_sum.triton")
    monkeypatch.setattr(kernel, "INTERPRETED", False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ConfigError, match="imported before TRITON_INTERPRET=1 was set"):
        choose("clipped_sum", CPU, "triton")


def test_a_private_round_by_the_kernels_is_the_one_by_torch(machine: Machine) -> None:
    """Both kernels in their places: the clip acts, units span batches, a head trains."""
    if machine.device.type != "cpu":
        pytest.skip("the tiny model of this test is on the CPU")
    expected = machine.run("private_round", "naive")
    found = machine.run("private_round", "triton")
    assert bool(expected.isfinite().all())
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())

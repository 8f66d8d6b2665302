"""Which implementation of a kernel runs, and why not the other one.

Device, dtype, shape and the user's override decide; what the GPU does at that
moment does not, so that one configuration gives one result. Nothing here loads
triton unless a kernel of it is chosen or asked for by name.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from fedlr import checks
from fedlr.errors import ConfigError

KERNELS = ("clipped_sum", "lora_linear")
NAIVE, MERGED, TRITON = "naive", "merged", "triton"
OVERRIDES = ("auto", NAIVE, TRITON)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_RANK = 128
"""A tile spans the whole rank; beyond this it no longer fits into registers."""
LEAST_CAPABILITY = (8, 0)
UNMEASURED = (
    "the kernels were tested under Triton's interpreter, and compiled for NVIDIA GPUs, but not yet "
    "measured on one; kernels.implementation=triton takes them"
)


@dataclass(frozen=True)
class Call:
    """What a choice depends on.

    Attributes:
        device: Where the arrays live.
        dtype: Of delta, or of x; the other arrays may be float32 beside it.
        rank: r.
        trains_a: Whether ``lora_linear`` must differentiate for A too.
        quantised: Whether W is stored in 4 bits (`fedlr.adapters.quantised`).
        cored: Whether a core is between A and B (`fedlr.adapters.core`).
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    rank: int = 8
    trains_a: bool = False
    quantised: bool = False
    cored: bool = False


class Choice(NamedTuple):
    """A decision: the kernel's name, its implementation's, and the reason in words."""

    kernel: str
    implementation: str
    reason: str


class ClippedSum(Protocol):
    """The two passes over (delta, z); see `fedlr.kernels.clipped_sum.naive`."""

    def unit_squared_norms(
        self, delta: Tensor, z: Tensor, unit_index: Tensor, units: int
    ) -> Tensor:
        """Return ‖G_u‖², shape (U,)."""
        ...

    def weighted_sum(self, delta: Tensor, z: Tensor, unit_index: Tensor, factors: Tensor) -> Tensor:
        """Return Σ_u factor_u · G_u, shape (m, r)."""
        ...


class LoraLinear(Protocol):
    """A frozen linear map with a low-rank update; see `fedlr.kernels.lora_linear.naive`."""

    def lora_linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
    ) -> tuple[Tensor, Tensor]:
        """Return (y, z)."""
        ...


def clipped_sum(call: Call, override: str = "auto") -> ClippedSum:
    """Return the implementation of the clipped sum for ``call``.

    Raises:
        ConfigError, ValueError: As `choose`.
    """
    return cast(ClippedSum, _load(choose("clipped_sum", call, override)))


def lora_linear(call: Call, override: str = "auto") -> LoraLinear:
    """Return the implementation of the LoRA layer for ``call``; see `clipped_sum`."""
    return cast(LoraLinear, _load(choose("lora_linear", call, override)))


def choose(kernel: str, call: Call, override: str = "auto") -> Choice:
    """Decide between the twin, the merged product and the Triton kernel.

    Args:
        kernel: One of `KERNELS`.
        call: What is to be computed, and where.
        override: ``naive`` takes the twin, ``triton`` the kernel, ``auto`` what was
            measured to pay: in float32 on a CPU one merged product, else the twin. On a
            GPU nothing was measured yet, for want of one.

    Raises:
        ConfigError: ``override`` is unknown, or is ``triton`` where it cannot run.
        ValueError: ``kernel`` is unknown.

    Example:
        >>> choose("clipped_sum", Call(torch.device("cpu"))).implementation
        'naive'
    """
    checks.one_of("kernel", kernel, KERNELS)
    if override not in OVERRIDES:
        raise ConfigError(
            [f"kernels.implementation = {override!r} must be one of {', '.join(OVERRIDES)}"]
        )
    if override == NAIVE:
        return Choice(kernel, NAIVE, "kernels.implementation = naive asks for it")
    obstacle = _shape_obstacle(kernel, call) or _machine_obstacle(call, override == TRITON)
    if override == "auto" and kernel == "lora_linear" and _is_merged(call):
        return Choice(kernel, MERGED, "one product with W + s·B·A: float32 on a CPU")
    if override == "auto":
        return Choice(kernel, NAIVE, obstacle or UNMEASURED)
    if obstacle is None:
        return Choice(kernel, TRITON, f"{call.device} runs it, and it was asked for")
    raise ConfigError(
        [
            f"kernels.implementation = triton, but {kernel} cannot run it: {obstacle}; "
            "set kernels.implementation=auto or naive"
        ]
    )


def explain(device: torch.device) -> list[Choice]:
    """Return what ``auto`` takes on ``device`` for float32 and a common rank, per kernel.

    Example:
        >>> [tuple(choice)[:2] for choice in explain(torch.device("cpu"))]
        [('clipped_sum', 'naive'), ('lora_linear', 'merged')]
    """
    return [choose(kernel, Call(device)) for kernel in KERNELS]


def _is_merged(call: Call) -> bool:
    if call.trains_a or call.quantised or call.cored:
        return False
    return call.device.type == "cpu" and call.dtype is torch.float32


def _shape_obstacle(kernel: str, call: Call) -> str | None:
    """Return why no machine runs this call with Triton, or None."""
    if call.dtype not in DTYPES:
        known = ", ".join(_name(dtype) for dtype in DTYPES)
        return f"dtype {_name(call.dtype)} is none of {known}"
    if call.rank > MAX_RANK:
        return f"rank {call.rank} is above {MAX_RANK}"
    if kernel == "lora_linear" and call.trains_a:
        return "A is trained, and the kernel has no gradient for it"
    if kernel == "lora_linear" and call.quantised:
        return "the frozen weight is stored in 4 bits, and the kernel reads a whole one"
    if kernel == "lora_linear" and call.cored:
        return "the method has a core between A and B, and the kernel multiplies by these alone"
    return None


def _machine_obstacle(call: Call, insisted: bool) -> str | None:
    """Return why this machine does not run Triton for ``call``, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if call.device.type == "cpu":
        return _interpreter_obstacle(call, insisted)
    if call.device.type != "cuda" or torch.version.hip is not None:
        return f"no Triton kernel was tested on {call.device.type}, only on NVIDIA GPUs"
    if _interpreter_wanted():
        return "TRITON_INTERPRET is set, which sends kernels to the CPU; unset it"
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    if (found := torch.cuda.get_device_capability(call.device)) < LEAST_CAPABILITY:
        return f"compute capability {_dotted(found)} is below {_dotted(LEAST_CAPABILITY)}"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton needs a C compiler to start a kernel: install gcc or clang, or set CC"
    return None


def _interpreter_obstacle(call: Call, insisted: bool) -> str | None:
    if not insisted:
        return "the device is the CPU, where Triton only has an interpreter for tests"
    if not _interpreter_wanted():
        return (
            "the device is the CPU, and the kernels need an NVIDIA GPU (for tests, "
            "TRITON_INTERPRET=1 is not set)"
        )
    if call.dtype is torch.bfloat16:
        return "triton's interpreter computes wrongly in bfloat16"
    if not importlib.import_module("fedlr.kernels.clipped_sum.triton").INTERPRETED:
        return "triton was imported before TRITON_INTERPRET=1 was set"
    return None


def _interpreter_wanted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")


def _load(choice: Choice) -> object:
    return importlib.import_module(f"fedlr.kernels.{choice.kernel}.{choice.implementation}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"

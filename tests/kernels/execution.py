"""Where Triton kernels run in tests: a process that interprets them, or a GPU.

Triton decides when it is first imported whether kernels are interpreted, and PEFT
imports it: hence a process of its own.

Both places are hostile. Memory from ``torch.empty`` is full of NaN, and so is what
lies before and behind every array: an element that nobody wrote, or a read past an
end, shows up as NaN.
"""

from __future__ import annotations

import importlib
import io
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GUARD = 64  # elements: keeps the alignment an allocator gives


@dataclass(frozen=True)
class Machine:
    """One place to run kernels.

    Attributes:
        device: Where they compute.
        dtypes: What they are tested with there.
        run: (operation of `OPERATIONS`, its arguments on the CPU) → its results, there too.
    """

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    run: Callable[..., Any]


def gpu() -> Machine:
    """Return the GPU of this process."""
    device = torch.device("cuda")

    def run(name: str, *arguments: Any) -> Any:
        return execute(name, arguments, device)

    return Machine(device, (torch.float32, torch.float16, torch.bfloat16), run)


@contextmanager
def interpreter() -> Iterator[Machine]:
    """Start a process with triton's interpreter."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _interpret) as pool:

        def run(name: str, *arguments: Any) -> Any:
            return _unpack(pool.submit(_serve, name, _pack(arguments)).result(timeout=120))

        yield Machine(torch.device("cpu"), (torch.float32, torch.float16), run)


def execute(name: str, arguments: tuple[Any, ...], device: torch.device) -> Any:
    """Run one operation on guarded copies of ``arguments``, with poisoned memory."""
    there = [_guarded(v, device) if isinstance(v, Tensor) else v for v in arguments]
    with poisoned_memory():
        found = OPERATIONS[name](*there)
    return tuple(v.cpu() for v in found) if isinstance(found, tuple) else found.cpu()


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what ``torch.empty`` returns with NaN."""
    empty = torch.empty

    def poisoned(*arguments: Any, **keywords: Any) -> Tensor:
        memory = empty(*arguments, **keywords)
        return memory.fill_(torch.nan) if memory.is_floating_point() else memory

    torch.empty = poisoned
    try:
        yield
    finally:
        torch.empty = empty


def norms(delta: Tensor, z: Tensor, unit_index: Tensor, units: int) -> Tensor:
    """First pass."""
    found: Tensor = _triton("clipped_sum").unit_squared_norms(delta, z, unit_index, units)
    return found


def sums(delta: Tensor, z: Tensor, unit_index: Tensor, factors: Tensor) -> Tensor:
    """Second pass."""
    found: Tensor = _triton("clipped_sum").weighted_sum(delta, z, unit_index, factors)
    return found


def linear(cotangent: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Return y, z and the gradients of x and B for ``cotangent`` at y."""
    return differentiate(_triton("lora_linear").lora_linear, cotangent, *arguments)


def differentiate(
    layer: Callable[..., tuple[Tensor, Tensor]], cotangent: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """Return y, z and the gradients of x and B through ``layer``."""
    x, weight, bias, a, b, scaling = arguments
    x, b = (value.detach().requires_grad_() for value in (x, b))
    y, z = layer(x, weight, bias, a, b, scaling)
    return (y.detach(), z, *torch.autograd.grad(y, (x, b), cotangent))


def uninitialised(size: int) -> Tensor:
    """Return memory as a kernel's host code gets it."""
    return torch.empty(size)


def transposed(delta: Tensor, z: Tensor, unit_index: Tensor, units: int) -> Tensor:
    """First pass over views with other strides and the same values."""
    return norms(
        *(v.transpose(0, 2).contiguous().transpose(0, 2) for v in (delta, z)), unit_index, units
    )


def cpu_choice(*arguments: str) -> Tensor:
    """Return 1 if ``kernels.implementation=triton`` is taken on the CPU of this process."""
    from fedlr.kernels import dispatch

    call = dispatch.Call(torch.device("cpu"), getattr(torch, arguments[0]))
    return torch.tensor(
        dispatch.choose("clipped_sum", call, arguments[1]).implementation == "triton"
    )


def private_round(implementation: str) -> Tensor:
    """Return what a client releases after two steps without noise, all arrays in one."""
    from fedlr.adapters.forward import use_kernel
    from fedlr.kernels import dispatch
    from fedlr.methods.method import Role
    from tests.models import rows, tiny, units_of
    from tests.training.test_local import task

    call, model, chosen = dispatch.Call(torch.device("cpu")), tiny(), None
    if implementation == "triton":
        chosen = dispatch.clipped_sum(call, "triton")
        layer = dispatch.lora_linear(call, "triton")
        use_kernel(model.adapted.encoder, model.adapted.sites, layer)
    trainer = model.trainer(rows([5, 3, 7, 2, 9, 4]), steps=2, physical_batch=4, kernel=chosen)
    found = trainer.train(task(model, frozenset({Role.B, Role.HEAD})), units_of([1, 2, 1, 2]))
    return torch.cat([found[key].flatten() for key in sorted(found)])


OPERATIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (norms, sums, linear, uninitialised, transposed, cpu_choice, private_round)
}


def _triton(kernel: str) -> Any:
    return importlib.import_module(f"fedlr.kernels.{kernel}.triton")


def _guarded(array: Tensor, device: torch.device) -> Tensor:
    if not array.is_floating_point():
        return array.to(device)
    size = array.numel()
    memory = torch.full((size + 2 * GUARD,), torch.nan, dtype=array.dtype, device=device)
    inside = memory[GUARD : GUARD + size].view(array.shape)
    return inside.copy_(array)


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


def _serve(name: str, packed: bytes) -> bytes:
    return _pack(execute(name, _unpack(packed), torch.device("cpu")))


def _pack(value: Any) -> bytes:
    memory = io.BytesIO()
    torch.save(value, memory)
    return memory.getvalue()


def _unpack(packed: bytes) -> Any:
    return torch.load(io.BytesIO(packed), weights_only=True)

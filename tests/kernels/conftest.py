"""The places where every kernel is compared with its twin."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.kernels import execution


@pytest.fixture(scope="session", params=["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest) -> Iterator[execution.Machine]:
    """Triton's interpreter, and the GPU where there is one."""
    pytest.importorskip("triton", reason="triton is not installed")
    if request.param == "interpreter":
        with execution.interpreter() as place:
            yield place
    elif torch.cuda.is_available():
        yield execution.gpu()
    else:
        pytest.skip("no CUDA device")


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest, machine: execution.Machine) -> torch.dtype:
    """Every dtype that the machine computes in."""
    found: torch.dtype = getattr(torch, request.param)
    if found not in machine.dtypes:
        pytest.skip(f"triton's interpreter computes wrongly in {request.param}")
    return found

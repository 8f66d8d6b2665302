"""What only a GPU can show: RoBERTa-large shapes, and addresses beyond 32 bits."""

from __future__ import annotations

import pytest
import torch

from fedlr.kernels.clipped_sum.naive import clip_factors
from tests.kernels.execution import execute
from tests.kernels.parity import layer, rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
CUDA = torch.device("cuda")


@DTYPES
@pytest.mark.parametrize("rank", [8, 16, 128])
def test_the_passes_at_the_size_of_roberta_large(dtype: torch.dtype, rank: int) -> None:
    case = rows((32, 128, 1024, rank), 24, dtype)
    squared = execute("norms", (case.delta, case.z, case.unit_index, 24), CUDA)
    case.check_norms(squared)
    case.check_sum(execute("sums", (case.delta, case.z, case.unit_index, case.factors), CUDA))


@DTYPES
@pytest.mark.parametrize("rank", [8, 16, 128])
def test_the_layer_at_the_size_of_roberta_large(dtype: torch.dtype, rank: int) -> None:
    case = layer((32, 128), (1024, 1024, rank), dtype)
    case.check(execute("linear", (case.cotangent, *case.arguments), CUDA), CUDA)


@DTYPES
@pytest.mark.parametrize("rank", [8, 16, 128])
def test_both_passes_form_the_same_gradient(dtype: torch.dtype, rank: int) -> None:
    """Terms that cancel leave rounding alone: measured and summed, it must be the same."""
    case = rows((1, 64, 1024, rank), 1, dtype)
    delta, z = torch.cat([case.delta, -case.delta], 1), torch.cat([case.z, case.z], 1)
    delta[0, 64:] *= 1 + 4 * torch.finfo(dtype).eps
    squared = execute("norms", (delta, z, case.unit_index, 1), CUDA)
    bound = float(squared.sqrt()) / 3
    factors = clip_factors(squared, bound)
    found = execute("sums", (delta, z, case.unit_index, factors), CUDA)
    assert float(found.double().norm()) == pytest.approx(bound, rel=1e-5)


@DTYPES
def test_a_result_does_not_change_from_call_to_call(dtype: torch.dtype) -> None:
    case = rows((32, 128, 768, 8), 24, dtype)
    arguments = (case.delta, case.z, case.unit_index, case.factors)
    assert torch.equal(execute("sums", arguments, CUDA), execute("sums", arguments, CUDA))


def test_an_address_beyond_32_bits() -> None:
    """The last of 2200 rows of 1024 × 1024 numbers begins past element 2³¹."""
    n, tokens, features = 2200, 1024, 1024
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of free GPU memory")
    from fedlr.kernels.clipped_sum import triton as kernel

    delta = torch.zeros(n, tokens, features, dtype=torch.float16, device=CUDA)
    z = torch.ones(n, tokens, 8, dtype=torch.float16, device=CUDA)
    delta[-1] = 1
    units = torch.arange(n, device=CUDA)
    squared = kernel.unit_squared_norms(delta, z, units, n)
    # Every element of the last unit's gradient is a sum of 1024 ones.
    assert squared.sum() == squared[-1] == 1024**2 * features * 8
    total = kernel.weighted_sum(delta, z, units, torch.ones(n, device=CUDA))
    assert (total == 1024).all()

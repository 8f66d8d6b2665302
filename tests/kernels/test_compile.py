"""The kernels compile for GPUs that need not be there: the interpreter accepts more."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from fedlr.kernels.dispatch import LEAST_CAPABILITY, MAX_RANK

LEAST = LEAST_CAPABILITY[0] * 10 + LEAST_CAPABILITY[1]
SHARED_MEMORY = 99 * 1024  # bytes a block may use on capability 8.6, the least from 8.0 on

# Pointers and numbers of each kernel; {x} and {w} are the narrow and the wide dtype.
SIGNATURES = {
    ("clipped_sum", "_norms_kernel"): "*{x} *{w} *i64 *i64 *fp32 i32 i32 i32",
    ("clipped_sum", "_sum_kernel"): "*{x} *{w} *i64 *i64 *fp32 *fp32 i32 i32 i32 i32",
    ("lora_linear", "_project_kernel"): "*{x} *{w} *fp32 i32 i32 i32 i32 i32",
    ("lora_linear", "_add_kernel"): "*{x} *fp32 *{w} fp32 i32 i32 i32 i32 i32",
}
CASES = [
    *product(SIGNATURES, [("fp32", "fp32", LEAST, 8), ("bf16", "fp32", 90, 8)]),
    *product(list(SIGNATURES)[:2], [("fp16", "fp16", LEAST, 8)]),
    (("lora_linear", "_project_kernel"), ("fp32", "fp32", LEAST, MAX_RANK)),
]


@pytest.mark.parametrize(("kernel", "variant"), CASES, ids=str)
def test_it_compiles(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    kernel: tuple[str, str],
    variant: tuple[str, str, int, int],
) -> None:
    triton = pytest.importorskip("triton", reason="triton is not installed")
    module = pytest.importorskip(f"fedlr.kernels.{kernel[0]}.triton")
    if module_interprets(triton, getattr(module, kernel[1])):
        pytest.skip("TRITON_INTERPRET is set")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x, w, capability, rank = variant
    compiled = compile_kernel(
        getattr(module, kernel[1]),
        SIGNATURES[kernel].format(x=x, w=w).split(),
        {"block_t": 32, "block_m": 64, "block_n": 64, "block_r": module.padded(rank)},
        capability,
    )
    assert "tf32" not in compiled.asm["ptx"]
    assert ("mma" in compiled.asm["ptx"]) == (w == "fp16")
    assert 0 < compiled.metadata.shared <= SHARED_MEMORY


def module_interprets(triton: Any, kernel: Any) -> bool:
    """Return whether ``kernel`` was built for the interpreter."""
    return not isinstance(kernel, triton.JITFunction)


def compile_kernel(kernel: Any, types: list[str], tiles: dict[str, int], capability: int) -> Any:
    """Compile down to machine code, which needs neither a GPU nor its driver."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names, rest = kernel.arg_names, iter(types)
    source = ASTSource(
        kernel,
        signature={name: "constexpr" if name in tiles else next(rest) for name in names},
        constexprs={(i,): tiles[name] for i, name in enumerate(names) if name in tiles},
    )
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"enable_fp_fusion": True})

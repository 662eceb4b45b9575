"""The Triton kernels of quant.py through the compiler for an H200, which needs no GPU.

The interpreter of test_kernels.py takes what a compiler does not, and hides what it makes of it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import quant

pytest.importorskip("triton.compiler")

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import quant

pointers = quant._Pointers("*u8", "*u8", "*fp32", "*fp32", "*fp32", "*fp32")
x_to_y = {"q": pointers, "x_ptr": "*bf16", "y_ptr": "*bf16", "rows": "i32", "n_out": "i32"}
flat = {"q": pointers, "w_ptr": "*bf16", "n": "i32", "n_bytes": "i32"}
for kernel, types, sizes in (
    (quant._unpack_kernel, flat, {}),
    (quant._multiply_kernel, x_to_y, {"K": 1024, "M": 16, "BLOCKS": 8}),
):
    source = ASTSource(kernel, types | dict.fromkeys(sizes, "constexpr"), sizes)
    options = {"num_warps": 1, "enable_fp_fusion": kernel is not quant._unpack_kernel}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    print(kernel.__name__, "shfl.sync.idx" in ptx, "mma.sync" in ptx, "fma.rn" in ptx)
"""


def test_kernels_compile_for_a_gpu(tmp_path):
    """The H200's compiler takes them: levels go through shuffles, products through tensor cores.

    And unpacking has no fused multiply-add, which would not round as PyTorch does.
    """
    root = Path(quant.__file__).parent
    env = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", COMPILE]
    run = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "_unpack_kernel True False False",
        "_multiply_kernel True True True",
    ]

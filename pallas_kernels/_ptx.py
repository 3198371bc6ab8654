"""Programs in PTX inside of a kernel, for what Mosaic GPU has no form for. `tests/ptx_warp.py` runs them on a CPU."""

from __future__ import annotations

from typing import Any

from pallas_kernels import _plgpu as plgpu


def run_ptx(program: str, *refs) -> None:
    """`program` by every thread that comes here; $0, $1, ... of it are the addresses of `refs` in global memory."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
    def emit(_: Any, *refs: Any):
        from jax.experimental.mosaic.gpu import utils as mgpu_utils  # late: see _plgpu
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import llvm

        i64 = ir.IntegerType.get_signless(64)
        pointers = [llvm.ptrtoint(i64, mgpu_utils.memref_ptr(ref)) for ref in refs]
        llvm.inline_asm(None, pointers, program, ",".join("l" * len(refs)), has_side_effects=True)

    emit(*refs)

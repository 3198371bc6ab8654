"""Loads from global memory whose rows do not lie one behind the other, or not all of them there.

Other loads into registers read whatever lies behind an array, and an array that suits them XLA would write in a kernel
of its own, in every layer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import _plgpu as plgpu


class Places(NamedTuple):
    """Row i is read from row stride * i + offset, modulo `period`; past the end of the array from its last one."""

    stride: int = 1
    offset: int = 0
    period: int | None = None


IN_ORDER = Places()


def load_rows(
    ref, shape: tuple[int, ...], layout, *, first: Any = 0, places: Places = IN_ORDER, interpret: bool
) -> jax.Array:
    """float32 [rows, ...] in `layout`: rows first, first + 1, ... of `places` in ref, float32 in global memory."""
    if interpret:
        i = places.stride * (first + jnp.arange(shape[0])) + places.offset
        i = i if places.period is None else i % places.period
        return ref[...][jnp.minimum(i, ref.shape[0] - 1)]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout),
    )
    def load(_: Any, ref: Any, first: Any):
        from jax.experimental.mosaic.gpu import fragmented_array  # late: see _plgpu
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, memref, vector

        index, (rows, *_) = ir.IndexType.get(), ir.MemRefType(ref.type).shape

        def constant(value):
            return arith.constant(index, value)

        def value(row, *columns):
            i = arith.addi(start, row)
            i = arith.addi(arith.muli(i, constant(places.stride)), constant(places.offset))
            i = i if places.period is None else arith.remui(i, constant(places.period))
            return memref.load(ref, [arith.minui(i, constant(rows - 1)), *columns])

        held = layout.to_mgpu()
        element = held.registers_element_type(ir.F32Type.get())
        start = arith.index_castui(index, first.registers.item())
        registers = np.empty(held.registers_shape(shape), dtype=object)
        for at, (*outer, last) in zip(np.ndindex(registers.shape), held.thread_idxs(shape), strict=True):
            values = [value(*outer, arith.addi(last, constant(n))) for n in range(element.shape[0])]
            registers[at] = vector.from_elements(element, values)
        return fragmented_array.FragmentedArray(_registers=registers, _layout=held, _is_signed=None)

    return load(ref, jnp.asarray(first, jnp.int32))

"""Vectors from global memory whose elements do not lie one behind the other, or not all of them there.

XLA would write such a vector in a kernel of its own, in every layer, for the kernel that reads it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pallas_kernels import _plgpu as plgpu


class Places(NamedTuple):
    """Element i lies at stride * i + offset, modulo `period`, and from `last` on there."""

    stride: int = 1
    offset: int = 0
    period: int | None = None
    last: int | None = None


def load_at(ref, places: Places, size: int, layout, *, first=0, interpret: bool):
    """float32 [size] in `layout`: elements first, first + 1, ... of `places` in ref, float32 [n] in global memory."""
    if interpret:
        i = places.stride * (first + jnp.arange(size)) + places.offset
        i = i if places.period is None else i % places.period
        return ref[...][i if places.last is None else jnp.minimum(i, places.last)]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())),
        return_type=plgpu.ShapeDtypeStruct((size,), jnp.float32, layout=layout),
    )
    def load(_: Any, ref: Any, first: Any):
        from jax.experimental.mosaic.gpu import fragmented_array  # late: see _plgpu
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, memref, vector

        index = ir.IndexType.get()

        def constant(value):
            return arith.constant(index, value)

        def value(i):
            i = arith.addi(arith.muli(i, constant(places.stride)), constant(places.offset))
            i = i if places.period is None else arith.remui(i, constant(places.period))
            return memref.load(ref, [i if places.last is None else arith.minui(i, constant(places.last))])

        held = layout.to_mgpu()
        kind = held.registers_element_type(ir.F32Type.get())
        first = arith.index_castui(index, first.registers.item())
        registers = np.empty(held.registers_shape((size,)), dtype=object)
        for at, (i,) in zip(np.ndindex(registers.shape), held.thread_idxs((size,)), strict=True):
            start = arith.addi(first, i)
            values = [value(arith.addi(start, constant(n))) for n in range(kind.shape[0])]
            registers[at] = vector.from_elements(kind, values)
        return fragmented_array.FragmentedArray(_registers=registers, _layout=held, _is_signed=None)

    return load(ref, jnp.asarray(first, jnp.int32))

"""What the kernels on mma.sync share: the product, its operands in shared memory and in registers.

One switch, `interpret`, separates what the interpreter runs from what the hardware runs, and it lives here: the
interpreter has neither mma.sync nor registers.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels import _plgpu as plgpu


def shared(shape, dtype):
    """Shared memory in tiles of 8 rows, swizzled so that ldmatrix meets no bank conflict."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = min(128, shape[-1] * itemsize)
    # Pallas declares both classes abstract, and makes instances of them.
    tiling: Any = plgpu.TilingTransform
    swizzling: Any = plgpu.SwizzleTransform
    return plgpu.SMEM(shape, dtype, transforms=(tiling((8, swizzle // itemsize)), swizzling(swizzle)))


def mma(total, a, b, interpret):
    """total + a @ b. The interpreter has no mma.sync: there, and only there, the product is XLA's."""
    if not interpret:
        return plgpu.mma(total, a, b)
    if a.dtype == jnp.float8_e4m3fn:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return total + lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=total.dtype)


def in_operand_order(v):
    """[n, l, d]: e4m3 keys in the order of `left_operand`'s columns (`_hopper.FP8_ORDER`), 16-bit ones as they come."""
    if v.dtype != jnp.float8_e4m3fn:
        return v
    n, length, dim = v.shape
    return jnp.swapaxes(v.reshape(n, length // 16, 2, 4, 2, dim), 2, 3).reshape(n, length, dim)


def left_operand(p, dtype, interpret):
    """A float32 product as the left operand of the next one, its columns in `_hopper.FP8_ORDER` where dtype is e4m3.

    Each thread's registers become its own operand registers; the interpreter, which has none, moves the columns.
    """
    if interpret:
        return in_operand_order(p.T.astype(dtype)[None])[0].T
    from jax.experimental.mosaic import gpu as mgpu  # late: see _plgpu
    from jax.experimental.mosaic.gpu import fragmented_array as fa

    from pallas_kernels._hopper import _repack

    shape, fp8 = p.shape, dtype == jnp.float8_e4m3fn
    if not fp8:
        p = p.astype(dtype)
    operand = plgpu.ShapeDtypeStruct(shape, dtype, layout=plgpu.Layout.MMA_LHS(dtype))

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.MMA_ACC(jnp.int8),), return_type=operand)
    def convert(_, x):
        layout = mgpu.MMALayouts(dtype).lhs
        registers = (_repack(x) if fp8 else x).registers.reshape(layout.registers_shape(shape))
        return fa.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return convert(p)  # pyright: ignore[reportCallIssue]  (the decorator binds the context)

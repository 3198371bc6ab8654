"""Pairs of columns in registers, as rotary embedding turns them, on Hopper.

In the layout of wgmma's accumulators a thread has both columns (2j, 2j + 1) of a pair: taking them apart moves nothing.
The interpreter has no registers; what is here for it is the same in plain JAX.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector

from pallas_kernels._hopper import TILE, lane

PAIRS = plgpu.Layout.TILED(
    fa.Tiling(((64, 4), (16, 4), (8, 4), (1,))), warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1
)
"""One value for each pair of columns of a TILE, in the thread that has the pair."""


def split_pairs(x: jax.Array, *, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """The first and the second columns [m, n / 2] of the pairs of a TILE [m, n] in float32, laid out as PAIRS."""
    m, n = x.shape
    if interpret:
        pairs = x.reshape(m, n // 2, 2)
        return pairs[..., 0], pairs[..., 1]
    half = plgpu.ShapeDtypeStruct((m, n // 2), jnp.float32, layout=PAIRS)

    @plgpu.inline_mgpu(arg_types=(TILE,), return_type=(half, half))
    def split(_, x):
        pairs = x.registers.reshape(PAIRS.to_mgpu().registers_shape((m, n // 2)))
        alone = ir.VectorType.get((1,), ir.F32Type.get())

        def column(i):
            registers = np.empty(pairs.shape, dtype=object)
            for at in np.ndindex(pairs.shape):
                registers[at] = vector.broadcast(alone, lane(pairs[at], i))
            return fa.FragmentedArray(_registers=registers, _layout=PAIRS.to_mgpu(), _is_signed=None)

        return column(0), column(1)

    return split(x)  # pyright: ignore[reportCallIssue]  (the decorator binds the context)


def join_pairs(first: jax.Array, second: jax.Array, *, interpret: bool) -> jax.Array:
    """Inverse of `split_pairs`."""
    m, pairs = first.shape
    shape = (m, 2 * pairs)
    if interpret:
        return jnp.stack([first, second], axis=-1).reshape(shape)

    @plgpu.inline_mgpu(arg_types=(PAIRS, PAIRS), return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=TILE))
    def join(_, first, second):
        layout, pair = fa.WGMMA_LAYOUT, ir.VectorType.get((2,), ir.F32Type.get())
        registers = np.empty(first.registers.shape, dtype=object)
        for at in np.ndindex(registers.shape):
            registers[at] = vector.from_elements(pair, [lane(x.registers[at], 0) for x in (first, second)])
        registers = registers.reshape(layout.registers_shape(shape))
        return fa.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return join(first, second)  # pyright: ignore[reportCallIssue]  (the decorator binds the context)

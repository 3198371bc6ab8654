"""The key blocks with the largest scores without sorting them: what SLA's routing needs on long videos.

The k-th largest score of a row is found bit by bit, by counting; what is above it is selected. XLA sorts for
`lax.top_k`: at 75,600 tokens and 40 heads (23,640 rows of 1,182) that took 1.8 ms a layer on H100, of 64 in all.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.quantize_kernels import WARPGROUP, row_layout

SMALLEST, POSITIVE = -(2**31), 0x7FFFFFFF
# Counts of two kinds in one number: exact in float32 for up to 2^11 columns.
SECOND = 2048


def kth_largest(scores: Float[Array, "rows width"], k: int, count: int, *, interpret: bool) -> Float[Array, "rows"]:
    """The k-th largest of the first `count` numbers of each float32 row; width is a multiple of 128."""
    rows, width = scores.shape
    layout = row_layout(width)

    def body(scores, found):
        row = lax.axis_index("row")
        bits = lax.bitcast_convert_type(plgpu.load(scores.at[row], layout=layout, optimized=False), jnp.int32)
        # As integers in the order of the numbers.
        keys = jnp.where(bits < 0, bits ^ POSITIVE, bits)
        column = plgpu.broadcasted_iota(jnp.int32, (width,), 0, layout=layout)
        keys = jnp.where(column < count, keys, SMALLEST)

        def reached(bound):
            return jnp.sum(jnp.where(keys >= bound, 1.0, 0.0)) >= k

        def refine(_, carry):
            bound, step = carry
            return jnp.where(reached(bound + step), bound + step, bound), lax.div(step, jnp.int32(2))

        bound = jnp.where(reached(jnp.int32(0)), jnp.int32(0), jnp.int32(SMALLEST))
        found[row] = lax.fori_loop(0, 31, refine, (bound, jnp.int32(2**30)))[0]

    body.__name__ = "kth_largest"
    bound = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows,), jnp.int32),
        grid=(rows,),
        grid_names=("row",),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else False,
    )(scores)
    return lax.bitcast_convert_type(jnp.where(bound < 0, bound ^ POSITIVE, bound), jnp.float32)


def top_blocks(scores: Float[Array, "rows width"], k: int, count: int, *, interpret: bool) -> Int32[Array, "rows {k}"]:
    """The columns of the k largest of the first `count` numbers of each row, rising: the set that `lax.top_k` gives.

    Of equal scores the lower column comes first. width: a multiple of 128 of at most 2,048 columns; the others of a
    row may hold anything finite.
    """
    rows, width = scores.shape
    bound = kth_largest(scores, k, count, interpret=interpret)[:, None]
    here = jnp.arange(width) < count
    above, equal = here & (scores > bound), here & (scores == bound)
    wanted = k - jnp.sum(above, axis=1, dtype=jnp.int32, keepdims=True)
    # Running counts of both, by the tensor cores.
    marks = jnp.where(above, 1.0, jnp.where(equal, float(SECOND), 0.0)).astype(jnp.bfloat16)
    upto = jnp.asarray(np.triu(np.ones((width, width))), jnp.bfloat16)  # a constant of the program, not a kernel
    counts = jnp.dot(marks, upto, preferred_element_type=jnp.float32).astype(jnp.int32)
    selected = counts % SECOND + jnp.minimum(counts // SECOND, wanted)
    # The first column that has s + 1 selected ones up to it, for s = 0 ... k - 1.
    target = jnp.broadcast_to(jnp.arange(1, k + 1, dtype=jnp.int32), (rows, k))
    low, size = jnp.zeros((rows, k), jnp.int32), 1 << (width - 1).bit_length()
    while size > 1:
        size //= 2
        probe = jnp.take_along_axis(selected, jnp.minimum(low + size, width) - 1, axis=1, mode="promise_in_bounds")
        low = jnp.where(probe < target, low + size, low)
    return low


def padded_width(count: int) -> int:
    return -(-count // WARPGROUP) * WARPGROUP

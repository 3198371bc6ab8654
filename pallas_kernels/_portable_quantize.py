"""INT8 queries and keys on any GPU from sm_80: the numbers of `_quantize_qkv.quantize_query_key`, in one pass each.

A block takes some rows of q or k, multiplies them by the Hadamard matrix (mma.sync; +-1 is exact in 16 bits, the sums
are float32), subtracts the rotated mean key, and rounds what it holds to one scale. XLA would write the rotated rows
in float32 and read them twice.

Bound by memory: q and k of 32,760 tokens and 12 heads of 128 are 0.20 GB read and 0.10 GB written, k once more for its
mean: 0.40 ms on an RTX 4090 (1.0 TB/s), 0.22 ms on an RTX 5090 (1.8), 0.20 ms on an A100 (2.0). The products are 1 GOP
for 12 MB, the matrix comes from L2 once for RUN tiles.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _hopper as hw
from pallas_kernels import _quantize_qkv as exact
from pallas_kernels._heads import heads_first
from pallas_kernels._portable_mma import mma, shared

TILE = plgpu.Layout.MMA_ACC(jnp.int8)  # of any dtype's product
ROWS, DEPTH = 64, 32
"""Of one product: rows, and columns of x that it sums over."""
RUN = 4
"""Tiles of a block, one after the other."""


def rotated_mean(k):
    """[b, l, h, d] to float32 [b * h, d]: what smoothing subtracts from the rotated keys."""
    return exact.rotate(jnp.mean(k, axis=1, dtype=jnp.float32).reshape(-1, k.shape[-1]))


def quantize_rows(x, mean, block, *, cp_async, interpret):
    """INT8 rows with a scale for each `block`, of x [b, l, h, d] in 16 bits, rotated, less `mean` [b * h, d] or None.

    Returns (int8 [b * h, l padded with zeros to blocks, d], float32 [b * h, blocks]).
    """
    whole = x.shape[1] // block * block
    if whole == x.shape[1]:
        return _whole_tiles(x, mean, block, cp_async, interpret)
    last = exact.rotate(heads_first(x[:, whole:])) - (0.0 if mean is None else mean[:, None])
    last8, last_scale = exact.quantize_rows(last, block)
    if whole == 0:
        return last8, last_scale
    x8, scale = _whole_tiles(x, mean, block, cp_async, interpret)
    # The barrier keeps XLA from taking the kernel's result for the operand of the update.
    return lax.optimization_barrier(x8).at[:, whole:].set(last8), scale.at[:, whole // block :].set(last_scale)


def _whole_tiles(x, mean, block, cp_async, interpret):
    """Rows past the last whole tile are left unwritten."""
    b, length, heads, dim = x.shape
    n, tiles, whole = b * heads, -(-length // block), length // block
    size = dim & -dim
    slices = exact.hadamard(dim).reshape(dim, dim // DEPTH, DEPTH).swapaxes(0, 1)
    inputs = {"x": x, "matrix": jnp.asarray(slices, x.dtype), "mean": mean}
    inputs = {name: array for name, array in inputs.items() if array is not None}

    def rotate(ref, head, rows):
        source = ref["x"].at[lax.div(head, heads), rows]

        def add(c, y):
            values = source.at[:, lax.rem(head, heads), pl.ds(c * DEPTH, DEPTH)]
            values = plgpu.load(values, layout=plgpu.Layout.MMA_LHS(x.dtype), optimized=False)
            # The matrix is symmetric: read as its transpose, it is K-major.
            matrix = plgpu.load(ref["m_smem"].at[c].transpose((1, 0)), layout=plgpu.Layout.MMA_RHS(x.dtype))
            return mma(y, values, matrix, interpret)

        # A loop, not its unrolled body: that would load the whole matrix first, and spill.
        y = plgpu.layout_cast(jnp.zeros((ROWS, dim), jnp.float32), TILE)
        y = lax.fori_loop(0, dim // DEPTH, add, y) * jnp.float32(size**-0.5)
        if mean is None:
            return y
        return y - hw.per_column(plgpu.load(ref["mean"].at[head], layout=TILE.reduce(0), optimized=False), y)

    def body(*refs):
        ref = dict(zip(names, refs, strict=True))
        head, first = lax.axis_index("head"), lax.axis_index("run") * RUN
        for c in range(len(slices)):
            source, target = ref["matrix"].at[c], ref["m_smem"].at[c]
            if cp_async:
                plgpu.copy_gmem_to_smem(source, target, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)
            else:
                plgpu.copy_gmem_to_smem(source, target, ref["full"])
        if cp_async:
            plgpu.wait_gmem_to_smem(0)
        else:
            plgpu.barrier_wait(ref["full"])

        @pl.loop(first, jnp.minimum(first + RUN, whole))
        def _(t):
            parts = [pl.ds(t * block + row, ROWS) for row in range(0, block, ROWS)]
            rotated = [rotate(ref, head, rows) for rows in parts]
            amax = functools.reduce(jnp.maximum, [jnp.max(jnp.max(jnp.abs(y), axis=1), axis=0) for y in rotated])
            scale = amax * jnp.float32(1 / 127.0) + 1e-7
            for rows, y in zip(parts, rotated, strict=True):
                y = y * (1.0 / scale)
                # Conversion to integers truncates: half away from zero.
                ref["x8"].at[head, rows][...] = (y + jnp.where(y < 0, -0.5, 0.5)).astype(jnp.int8)
            ref["scale"][head, t] = scale

    scratch: dict[str, Any] = {"m_smem": shared(slices.shape, x.dtype)}
    if not cp_async:
        scratch["full"] = plgpu.Barrier(num_arrivals=len(slices))
    names = [*inputs, "x8", "scale", *scratch]
    body.__name__ = "quantize_rows_portable"
    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((n, tiles * block, dim), jnp.int8),
            jax.ShapeDtypeStruct((n, tiles), jnp.float32),
        ),
        grid=(n, -(-whole // RUN)),
        grid_names=("head", "run"),
        scratch_types=list(scratch.values()),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else False,
    )
    return kernel(*inputs.values())

"""What INT8/FP8 attention reads, made from q, k, v in one pass each on Hopper: the numbers of `_quantize_qkv`.

Rows: a tile of q or k times the Hadamard matrix on the tensor cores (+-1 is exact in 16 bits, the sums float32),
minus the rotated mean key, one scale for the tile, INT8. Values: the tensor cores also transpose V, as V^T times the
identity, exactly; each thread then packs its registers to e4m3, which leaves the keys in `hw.FP8_ORDER`.

Bound by memory: on H100 (3.35 TB/s) at 32,760 tokens, 12 heads of 128, 0.30 GB read, 0.15 GB written, and k and v
once more for their mean and maximum, 0.20 GB: 0.19 ms. A block takes RUN tiles, the next ones in flight.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _hopper as hw
from pallas_kernels._quantize_qkv import hadamard

RUN = 8
"""Tiles that a block takes in turn, so that its constant matrix is loaded once for them."""
IN_SLOTS, OUT_SLOTS = 3, 2
KEYS = 64
"""Keys of one tile of V."""


def quantize_rows(x, mean, length, rows, block, *, interpret):
    """Rotated INT8 rows with a scale for each `block`: (x8 [b * h, rows, d], scale float32 [b * h, rows / block]).

    x [b, l, h, d] in 16 bits, l a multiple of 8 of which `length` rows count; the others become zeros, as do those up
    to `rows` (a multiple of block). mean float32 [b * h, d]: subtracted after the rotation, or None.
    """
    b, _, heads, dim = x.shape
    size = dim & -dim
    matrix = jnp.asarray(hadamard(dim), x.dtype)

    def tile(acc, head, first, *means):
        y = acc * jnp.float32(size**-0.5)
        if means:
            y = y - hw.per_column(plgpu.load(means[0].at[head], layout=hw.PER_COLUMN, optimized=False), y)
            row = plgpu.broadcasted_iota(jnp.int32, (block,), 0, layout=hw.PER_ROW)
            y = jnp.where(hw.per_row(row, y) < length - first, y, 0.0)
        scale = jnp.max(jnp.max(jnp.abs(y), axis=1), axis=0) * jnp.float32(1 / 127.0) + 1e-7
        y = y * (1.0 / scale)
        # Conversion to integers truncates: half away from zero.
        return (y + jnp.where(y < 0, -0.5, 0.5)).astype(jnp.int8), scale

    def body(x, matrix, *refs):
        *means, x8, scales, x_smem, m_smem, o_smem, full, matrix_full = refs
        head, run = lax.axis_index("head"), lax.axis_index("run")
        batch, h = head // heads, head % heads

        def consume(slot, t, out_slot):
            acc = hw.product(x_smem.at[slot], m_smem, (block, dim))

            def finish():
                y8, scale = tile(acc, head, t * block, *means)
                o_smem.at[out_slot][...] = y8
                scales[head, t] = scale
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(o_smem.at[out_slot], x8.at[head, pl.ds(t * block, block)])

            return finish

        plgpu.copy_gmem_to_smem(matrix, m_smem, matrix_full)
        _pipeline(
            lambda t: x.at[batch, pl.ds(t * block, block), h], x_smem, full, run, rows // block, consume,
            before=lambda: plgpu.barrier_wait(matrix_full),
        )  # fmt: skip

    n = b * heads
    operands = (x, matrix) if mean is None else (x, matrix, mean)
    body.__name__ = "quantize_rows"
    return _kernel(
        body,
        operands,
        (jax.ShapeDtypeStruct((n, rows, dim), jnp.int8), jax.ShapeDtypeStruct((n, rows // block), jnp.float32)),
        (n, pl.cdiv(rows // block, RUN)),
        ((block, dim), x.dtype),
        ((dim, dim), x.dtype),
        ((block, dim), jnp.int8),
        interpret,
    )


def quantize_values(v, inverse, rows, *, interpret):
    """e4m3 [b * h, d, rows]: V^T times `inverse` float32 [b * h, d], keys in `hw.FP8_ORDER`, zeros past the end of v.

    v [b, l, h, d] in 16 bits, l a multiple of 8; rows a multiple of KEYS.
    """
    b, _, heads, dim = v.shape
    identity = jnp.eye(KEYS, dtype=v.dtype)

    def body(v, identity, inverse, out, v_smem, i_smem, o_smem, full, identity_full):
        head, run = lax.axis_index("head"), lax.axis_index("run")
        batch, h = head // heads, head % heads
        factor = plgpu.load(inverse.at[head], layout=hw.PER_ROW, optimized=False)

        def consume(slot, t, out_slot):
            acc = hw.product(v_smem.at[slot].transpose((1, 0)), i_smem, (dim, KEYS))

            def finish():
                y8 = hw.to_fp8(acc * hw.per_row(factor, acc), o_smem.at[out_slot] if interpret else None)
                if not interpret:
                    o_smem.at[out_slot][...] = y8
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(o_smem.at[out_slot], out.at[head, :, pl.ds(t * KEYS, KEYS)])

            return finish

        plgpu.copy_gmem_to_smem(identity, i_smem, identity_full)
        _pipeline(
            lambda t: v.at[batch, pl.ds(t * KEYS, KEYS), h], v_smem, full, run, rows // KEYS, consume,
            before=lambda: plgpu.barrier_wait(identity_full),
        )  # fmt: skip

    n = b * heads
    body.__name__ = "quantize_values"
    return _kernel(
        body,
        (v, identity, inverse),
        jax.ShapeDtypeStruct((n, dim, rows), jnp.float8_e4m3fn),
        (n, pl.cdiv(rows // KEYS, RUN)),
        ((KEYS, dim), v.dtype),
        ((KEYS, KEYS), v.dtype),
        ((dim, KEYS), jnp.float8_e4m3fn),
        interpret,
    )


def _pipeline(source, slots, full, run, tiles, consume, *, before):
    """Tiles run * RUN ... of `tiles` through `slots`. consume(slot, tile, out_slot) reads the slot into registers and
    returns what is left to do with them, which runs with the next tile already on its way into the slot."""
    first = run * RUN
    count = jnp.minimum(RUN, tiles - first)

    def load(i):
        slot = lax.rem(i, IN_SLOTS)

        @pl.when(i < count)
        def _():
            plgpu.copy_gmem_to_smem(source(first + i), slots.at[slot], full.at[slot])

    for i in range(IN_SLOTS):
        load(jnp.int32(i))
    before()

    @pl.loop(0, count)
    def _(i):
        slot = lax.rem(i, IN_SLOTS)
        plgpu.barrier_wait(full.at[slot])
        # Of the copies out, all but the newest have left their slot.
        plgpu.wait_smem_to_gmem(OUT_SLOTS - 1, wait_read_only=True)
        finish = consume(slot, first + i, lax.rem(i, OUT_SLOTS))
        load(i + IN_SLOTS)
        finish()

    plgpu.wait_smem_to_gmem(0)


def _kernel(body, operands, out_type, grid, tile, constant, out_tile, interpret):
    """One warpgroup a block: the maximum of a tile crosses warps through memory that the block has once."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=grid,
        grid_names=("head", "run"),
        scratch_types=[
            plgpu.SMEM((IN_SLOTS, *tile[0]), tile[1]),
            plgpu.SMEM(*constant),
            plgpu.SMEM((OUT_SLOTS, *out_tile[0]), out_tile[1]),
            plgpu.Barrier(num_barriers=IN_SLOTS),
            plgpu.Barrier(),
        ],
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else False,
    )(*operands)


def mean_key(k: jax.Array) -> jax.Array:
    """float32 [b * h, d]"""
    return jnp.mean(k, axis=1, dtype=jnp.float32).reshape(-1, k.shape[-1])

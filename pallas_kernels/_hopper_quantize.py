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
import numpy as np
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
        return round_tile(y)

    def body(ref):
        head = lax.axis_index("head")
        batch, h = head // heads, head % heads
        means = [ref["mean"]] if mean is not None else []

        def consume(slot, t, out_slot):
            acc = hw.product(slot, ref["constant_smem"], (block, dim))

            def finish():
                y8, scale = tile(acc, head, t * block, *means)
                out_slot[...] = y8
                ref["scales"][head, t] = scale
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_slot, ref["x8"].at[head, pl.ds(t * block, block)])

            return finish

        _pipeline(ref, lambda t: ref["x"].at[batch, pl.ds(t * block, block), h], rows // block, consume)

    n, tiles = b * heads, rows // block
    inputs = {"x": x, "constant": matrix} | ({} if mean is None else {"mean": mean})
    outputs = {
        "x8": jax.ShapeDtypeStruct((n, rows, dim), jnp.int8),
        "scales": jax.ShapeDtypeStruct((n, tiles), jnp.float32),
    }
    return _launch(body, "quantize_rows", inputs, outputs, block, (block, dim), tiles, interpret)


def round_tile(y):
    """(INT8 of a float32 tile, its scale), half away from zero."""
    scale = jnp.max(jnp.max(jnp.abs(y), axis=1), axis=0) * jnp.float32(1 / 127.0) + 1e-7
    y = y * (1.0 / scale)
    # Conversion to integers truncates.
    return (y + jnp.where(y < 0, -0.5, 0.5)).astype(jnp.int8), scale


def quantize_values(v, inverse, rows, *, interpret):
    """e4m3 [b * h, d, rows]: V^T times `inverse` float32 [b * h, d], keys in `hw.FP8_ORDER`, zeros past the end of v.

    v [b, l, h, d] in 16 bits, l a multiple of 8; rows a multiple of KEYS.
    """
    b, _, heads, dim = v.shape
    identity = jnp.asarray(np.eye(KEYS), v.dtype)  # a constant of the program, not a kernel

    def body(ref):
        head = lax.axis_index("head")
        batch, h = head // heads, head % heads
        factor = plgpu.load(ref["inverse"].at[head], layout=hw.PER_ROW, optimized=False)

        def consume(slot, t, out_slot):
            acc = hw.product(slot.transpose((1, 0)), ref["constant_smem"], (dim, KEYS))

            def finish():
                y8 = hw.to_fp8(acc * hw.per_row(factor, acc), out_slot if interpret else None)
                if not interpret:
                    out_slot[...] = y8
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_slot, ref["out"].at[head, :, pl.ds(t * KEYS, KEYS)])

            return finish

        _pipeline(ref, lambda t: ref["v"].at[batch, pl.ds(t * KEYS, KEYS), h], rows // KEYS, consume)

    n = b * heads
    inputs = {"v": v, "constant": identity, "inverse": inverse}
    outputs = {"out": jax.ShapeDtypeStruct((n, dim, rows), jnp.float8_e4m3fn)}
    return _launch(body, "quantize_values", inputs, outputs, KEYS, (dim, KEYS), rows // KEYS, interpret)[0]


def _pipeline(ref, source, tiles, consume):
    """This block's run of `tiles` tiles, source(t) being the t-th. consume(slot, t, out_slot) reads the slot into
    registers and returns what is left to do with them, which runs with the next tile already on its way into it."""

    def fetch(t, slot, barrier):
        plgpu.copy_gmem_to_smem(source(t), ref["in_smem"].at[slot], barrier)

    plgpu.copy_gmem_to_smem(ref["constant"], ref["constant_smem"], ref["constant_full"])
    run = hw.start_run(fetch, ref["full"], IN_SLOTS, RUN, tiles, IN_SLOTS)
    plgpu.barrier_wait(ref["constant_full"])

    @pl.loop(0, run.count)
    def _(i):
        slot = lax.rem(i, IN_SLOTS)
        plgpu.barrier_wait(ref["full"].at[slot])
        # Of the copies out, all but the newest have left their slot.
        plgpu.wait_smem_to_gmem(OUT_SLOTS - 1, wait_read_only=True)
        finish = consume(ref["in_smem"].at[slot], run.first + i, ref["out_smem"].at[lax.rem(i, OUT_SLOTS)])
        run.load(i + IN_SLOTS)
        finish()

    plgpu.wait_smem_to_gmem(0)


def _launch(body, name, inputs, outputs, rows, out_tile, tiles, interpret):
    """inputs: the tensor [b, l, h, d] first, of which a tile has `rows` rows, then the `constant` that tiles are
    multiplied by; outputs: of `tiles` tiles of shape out_tile first."""
    (x, constant, *_), (out, *_) = inputs.values(), outputs.values()
    scratch = {
        "in_smem": plgpu.SMEM((IN_SLOTS, rows, x.shape[-1]), x.dtype),
        "constant_smem": plgpu.SMEM(constant.shape, constant.dtype),
        "out_smem": plgpu.SMEM((OUT_SLOTS, *out_tile), out.dtype),
        "full": plgpu.Barrier(num_barriers=IN_SLOTS),
        "constant_full": plgpu.Barrier(),
    }
    runs = pl.cdiv(tiles, RUN)
    return hw.by_runs(
        body, name, inputs, outputs, scratch, heads=out.shape[0], runs=runs, interpret=interpret, exact=True
    )


def mean_key(k: jax.Array) -> jax.Array:
    """float32 [b * h, d]"""
    return jnp.mean(k, axis=1, dtype=jnp.float32).reshape(-1, k.shape[-1])

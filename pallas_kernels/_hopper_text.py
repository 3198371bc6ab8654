"""Attention to a few keys that all queries share, on Hopper: the keys of one head stay in shared memory.

    S = Q K^T                       wgmma, all columns at once: no running maximum
    P = exp2(S f - max)             in float32, f a factor for each row; rounded to 16 bits in registers
    [O, sum] = P [w V, w]           wgmma, V^T K-major with its weights w as eight more rows

A block holds K and V of a head. Its two warpgroups each walk tiles of 64 queries through a ring of their own and send
for the next ones themselves: with two, each thread has 255 registers without taking any from a third, and one
multiplies while the other takes exponentials. The output goes where its queries were and from there to memory; when
it has been read, the slot is filled again.

Nothing is masked. Columns past the last key repeat it with weight 0, which leaves the maximum as it is. A key that
counts more than once has as many columns as its count has ones in binary, each with a power of two for its weight:
exact in 16 bits, as is V times it.

Bound by memory: on H100 (3.35 TB/s) at 32,760 queries, 12 heads of 128, 0.20 GB: 0.06 ms; wgmma takes 0.03 ms with 128
columns and 0.06 ms with 256.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _hopper as hw
from pallas_kernels._hopper_attention import SMEM_BYTES, whole_rows
from pallas_kernels._hopper_attention_kernel import SUM_ROWS
from pallas_kernels.dispatch import core_count

WARPGROUPS = 2
SLOTS = 4
"""Slots of a warpgroup's ring: one is worked on, one is stored, the others are on their way."""
COLUMN_STEP = 64  # 128 bytes of a row of V^T, the widest swizzle


def column_weights(keys: int, last_count: int) -> np.ndarray:
    """float32 [w], w a multiple of COLUMN_STEP: what each column weighs. Column j has key j, from keys - 1 on the last.

    Those of the last key sum to last_count; see the head of this file.
    """
    powers = [1 << bit for bit in range(last_count.bit_length()) if last_count >> bit & 1]
    weights = [1] * (keys - 1) + powers
    return np.asarray(weights + [0] * (-len(weights) % COLUMN_STEP), np.float32)


def text_columns(k, v, last_count):
    """k, v [b, s, h, d] -> (keys [b, w, h, d], values [b, h, d + SUM_ROWS, w]): what there is of each column.

    values: w V transposed, and SUM_ROWS times w under it.
    """
    b, keys, heads, _ = k.shape
    weight = jnp.asarray(column_weights(keys, last_count), v.dtype)
    width = len(weight)
    k, v = (jnp.pad(x, ((0, 0), (0, width - keys), (0, 0), (0, 0)), mode="edge") for x in (k, v))
    values = jnp.transpose(v * weight[:, None, None], (0, 2, 3, 1))
    return k, jnp.concatenate([values, jnp.broadcast_to(weight, (b, heads, SUM_ROWS, width))], axis=2)


def text_forward(q, keys, values, q_factor, *, scale, amax, interpret):
    """(o [b, l, h, d] in q's dtype, max |o| of each head and row float32 [b, h, l] or None).

    q in bfloat16, d = 128; keys and values: `text_columns`; q_factor float32 [b, l] or None: see `text_attention`.
    scale: of the softmax.
    """
    b, length, heads, dim = q.shape
    n, width = b * heads, keys.shape[1]
    q = whole_rows(q)
    tiles = pl.cdiv(q.shape[1], hw.ROWS)
    # The card is filled once: each block has its core to itself. The interpreter has one of a head walk all tiles.
    blocks = 1 if interpret else max(1, core_count() // n)
    run_tiles = pl.cdiv(tiles, blocks * WARPGROUPS)
    slots = ring_slots(width, dim)

    inputs = {"q": q, "k": keys, "v": values.reshape(n, dim + SUM_ROWS, width)}
    if q_factor is not None:
        # Loads into registers are not clipped.
        inputs["factor"] = jnp.pad(q_factor * (scale * hw.LOG2E), ((0, 0), (0, tiles * hw.ROWS - length)))

    def body(ref):
        head, wg = lax.axis_index("head"), lax.axis_index("wg")
        batch, h = head // heads, head % heads
        tile_smem, k_smem, v_smem = (ref[f"{name}_smem"] for name in ("tile", "k", "v"))

        @pl.when(wg == 0)
        def _():
            plgpu.copy_gmem_to_smem(ref["k"].at[batch, :, h], k_smem, ref["keys_full"])
            plgpu.copy_gmem_to_smem(ref["v"].at[head], v_smem, ref["keys_full"])

        def fetch(tile, slot, barrier):
            plgpu.copy_gmem_to_smem(ref["q"].at[batch, pl.ds(tile * hw.ROWS, hw.ROWS), h], tile_smem.at[slot], barrier)

        run = hw.start_run(fetch, ref["full"], slots, run_tiles, tiles, slots - 1, (wg, WARPGROUPS))
        plgpu.barrier_wait(ref["keys_full"])

        @pl.loop(0, run.count)
        def _(i):
            slot = wg * slots + lax.rem(i, slots)
            here = pl.ds((run.first + i) * hw.ROWS, hw.ROWS)
            factor = jnp.float32(scale * hw.LOG2E)
            if q_factor is not None:
                # In flight while the tile is awaited and multiplied.
                factor = plgpu.load(ref["factor"].at[batch, here], layout=hw.PER_ROW, optimized=False)
            plgpu.barrier_wait(ref["full"].at[slot])
            s = hw.product(tile_smem.at[slot], k_smem.transpose((1, 0)), (hw.ROWS, width))
            # The output of the tile before has been read by now; its slot is the next to fill.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            run.load(i + slots - 1)
            m = s.max(axis=1) * factor
            p = jnp.exp2(s * (factor if q_factor is None else hw.per_row(factor, s)) - hw.per_row(m, s))
            operand = hw.to_16bit(p, q.dtype, ref["p_smem"].at[wg] if interpret else None)
            acc = hw.product(operand, v_smem.transpose((1, 0)), (hw.ROWS, dim + SUM_ROWS))
            total = acc[:, dim:].max(axis=1)  # its columns are equal
            o = acc[:, :dim]
            o = o * hw.per_row(1.0 / total, o)
            tile_smem.at[slot][...] = o.astype(q.dtype)
            if amax:
                # Rounding keeps order: the maximum rounded is the maximum of what is rounded.
                top = jnp.abs(o).max(axis=1)
                ref["amax"].at[head, here][...] = top.astype(q.dtype).astype(jnp.float32)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile_smem.at[slot], ref["out"].at[batch, here, h])

        plgpu.wait_smem_to_gmem(0)

    outputs = {"out": jax.ShapeDtypeStruct(q.shape, q.dtype)}
    if amax:
        outputs["amax"] = jax.ShapeDtypeStruct((n, tiles * hw.ROWS), jnp.float32)
    scratch = {
        "k_smem": plgpu.SMEM((width, dim), keys.dtype),
        "v_smem": plgpu.SMEM((dim + SUM_ROWS, width), values.dtype),
        "tile_smem": plgpu.SMEM((WARPGROUPS * slots, hw.ROWS, dim), q.dtype),
        "keys_full": plgpu.Barrier(num_arrivals=2),
        "full": plgpu.Barrier(num_barriers=WARPGROUPS * slots),
    }
    if interpret:
        scratch["p_smem"] = plgpu.SMEM((WARPGROUPS, hw.ROWS, width), q.dtype)
    runs = pl.cdiv(tiles, run_tiles * WARPGROUPS)
    out, *rest = hw.by_runs(
        body, "text_attention", inputs, outputs, scratch, heads=n, runs=runs, interpret=interpret, warpgroups=WARPGROUPS
    )
    return out[:, :length], rest[0][:, :length].reshape(b, heads, length) if amax else None


def ring_slots(width: int, dim: int) -> int:
    """Slots of each warpgroup's ring that fit beside `width` columns of K and V^T, with 1 KiB for barriers."""
    keys = width * (2 * dim + SUM_ROWS) * 2 + 1024
    return min(SLOTS, (SMEM_BYTES - keys) // (WARPGROUPS * hw.ROWS * dim * 2))

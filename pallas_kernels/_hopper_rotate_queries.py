"""Queries as their product gave them, normed, turned and summed over blocks on Hopper, and to INT8, in one pass.

    y   = q * factor of the row * weight of the column, pairs of columns turned by the row's angles; 16 bits
    sum of y over each TILE rows          what routing needs
    INT8 of y times the Hadamard matrix   what the scores are made of (quantised only): `_hopper_quantize`

A block takes TILE rows and walks all heads: the angles, the same for every head, are read once and stay in registers,
32 cosines and 32 sines a thread at 128 columns. (Read again for each head they would be twice q's bytes out of L2.)
Both columns of a pair lie in one thread, so nothing is exchanged. A tile goes back to where it was loaded; from there
the tensor cores read it for both products, and TMA stores it.

Bound by memory: on H100 (3.35 TB/s) at 32,760 tokens, 12 heads of 128, 0.10 GB read, 0.15 GB written and 0.02 GB of
angles: 0.08 ms. In three passes, norm and rotation, sums, INT8, it is 0.45 GB.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _hopper as hw
from pallas_kernels._hopper_linear import COLUMNS
from pallas_kernels._hopper_pairs import PAIRS, join_pairs, split_pairs
from pallas_kernels._hopper_quantize import round_tile
from pallas_kernels._loads import load_rows
from pallas_kernels._quantize_qkv import hadamard
from pallas_kernels.rotary import Rotary

TILE = hw.ROWS
IN_SLOTS, OUT_SLOTS = 3, 2
"""Of q and of INT8. With three of q two blocks fit a core, each with its matrix: one computes while another waits."""


class RotatedQueries(NamedTuple):
    """q [b, l, h, d] in its dtype. sums: over each TILE rows, float32 [b * h, blocks, d]. q8: INT8 [b * h, q8_rows, d],
    and what its TILE rows each were divided by, times `score_scale`, float32 [b * h, q8_rows / TILE]; or None, both."""

    q: jax.Array
    sums: jax.Array
    q8: jax.Array | None = None
    q8_scale: jax.Array | None = None


def rotate_queries(
    q, rotary: Rotary, *, q8_rows: int | None = None, score_scale: float = 1.0, interpret: bool
) -> RotatedQueries:
    """q [b, l, h, d] in 16 bits, l a multiple of 8, zeros past the rows of rotary; they stay zeros.

    q8_rows: at least l, a multiple of TILE, the rest being zeros too; None: no INT8.
    """
    b, rows, heads, dim = q.shape
    quantized, blocks = q8_rows is not None, pl.cdiv(rows, TILE)
    tiles = blocks if q8_rows is None else q8_rows // TILE
    weight = rotary.weight.astype(jnp.float32).reshape(heads, dim)
    factor, cos, sin = (x.astype(jnp.float32) for x in (rotary.factor, rotary.cos, rotary.sin))

    def body(ref):
        batch, t = lax.axis_index("batch"), lax.axis_index("tile")
        here = pl.ds(t * TILE, TILE)
        q_smem = ref["q_smem"]

        def load(i):
            slot = lax.rem(i, IN_SLOTS)

            @pl.when(i < heads)
            def _():
                plgpu.copy_gmem_to_smem(ref["q"].at[batch, here, i], q_smem.at[slot], ref["full"].at[slot])

        for i in range(IN_SLOTS - 1):
            load(jnp.int32(i))
        plgpu.copy_gmem_to_smem(ref["ones"].at[pl.ds(0, COLUMNS)], ref["ones_smem"], ref["constants_full"])
        if quantized:
            plgpu.copy_gmem_to_smem(ref["matrix"], ref["matrix_smem"], ref["constants_full"])
        load_here = functools.partial(load_rows, first=t * TILE, interpret=interpret)
        cos, sin = (load_here(ref[angle], (TILE, dim // 2), PAIRS) for angle in ("cos", "sin"))
        factor = load_here(ref["factor"].at[batch], (TILE,), hw.PER_ROW)
        plgpu.barrier_wait(ref["constants_full"])
        ones = ref["ones_smem"].transpose((1, 0))

        @pl.loop(0, heads)
        def _(i):
            slot = q_smem.at[lax.rem(i, IN_SLOTS)]
            head = batch * heads + i
            weight = plgpu.load(ref["weight"].at[i], layout=hw.PER_COLUMN, optimized=False)
            plgpu.barrier_wait(ref["full"].at[lax.rem(i, IN_SLOTS)])
            y = plgpu.load(slot, layout=hw.TILE).astype(jnp.float32)
            y = y * hw.per_row(factor, y) * hw.per_column(weight, y)
            first, second = split_pairs(y, interpret=interpret)
            y = join_pairs(first * cos - second * sin, first * sin + second * cos, interpret=interpret)
            slot[...] = y.astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(slot, ref["out"].at[batch, here, i])

            def products(sums, *turned):
                plgpu.wgmma(sums, slot.transpose((1, 0)), ones)
                for acc in turned:
                    plgpu.wgmma(acc, slot, ref["matrix_smem"])
                return sums[...], *(acc[...] for acc in turned)

            accumulators = [plgpu.WGMMAAccumulatorRef((dim, COLUMNS), jnp.float32)]
            if quantized:
                accumulators.append(plgpu.WGMMAAccumulatorRef((TILE, dim), jnp.float32))
            # As in `hw.product`.
            sums, *rotated = lax.optimization_barrier(pl.run_scoped(products, *accumulators))
            # Of the copies out, those of the head before last have left their slots, and the tile of the last one has.
            plgpu.wait_smem_to_gmem(2 if quantized else 1, wait_read_only=True)
            load(i + IN_SLOTS - 1)
            ref["sums"].at[head, t][...] = sums.max(axis=1)  # its columns are equal
            for acc in rotated:
                out_slot = ref["q8_smem"].at[lax.rem(i, OUT_SLOTS)]
                out_slot[...], scale = round_tile(acc * jnp.float32((dim & -dim) ** -0.5))
                ref["q8_scale"][head, t] = scale * jnp.float32(score_scale)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_slot, ref["q8"].at[head, here])

        plgpu.wait_smem_to_gmem(0)

    n = b * heads
    inputs = {"q": q, "factor": factor, "weight": weight, "cos": cos, "sin": sin}
    inputs["ones"] = hw.ones(COLUMNS, TILE, q.dtype)
    outputs = {
        "out": jax.ShapeDtypeStruct(q.shape, q.dtype),
        "sums": jax.ShapeDtypeStruct((n, tiles, dim), jnp.float32),
    }
    scratch = {
        "q_smem": plgpu.SMEM((IN_SLOTS, TILE, dim), q.dtype),
        "ones_smem": plgpu.SMEM((COLUMNS, TILE), q.dtype),
        "full": plgpu.Barrier(num_barriers=IN_SLOTS),
        "constants_full": plgpu.Barrier(num_arrivals=2 if quantized else 1),
    }
    if quantized:
        inputs["matrix"] = jnp.asarray(hadamard(dim), q.dtype)
        outputs["q8"] = jax.ShapeDtypeStruct((n, q8_rows, dim), jnp.int8)
        outputs["q8_scale"] = jax.ShapeDtypeStruct((n, tiles), jnp.float32)
        scratch["matrix_smem"] = plgpu.SMEM((dim, dim), q.dtype)
        scratch["q8_smem"] = plgpu.SMEM((OUT_SLOTS, TILE, dim), jnp.int8)
    out, sums, *rest = hw.by_rows(
        body, "rotate_queries", inputs, outputs, scratch, batch=b, tiles=tiles, interpret=interpret
    )
    return RotatedQueries(out, sums[:, :blocks], *rest)

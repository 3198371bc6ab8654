"""Quantisation on any GPU from sm_80: rows with a scale each, or 128x128 tiles, after an optional LayerNorm.

Bound by memory: x is read once per row (twice in tiles, the second time from L2), its INT8 form written once.
Expected on H100 (3.35 TB/s) for 32,760 rows of bf16: 1,536 columns 0.15 GB, 0.045 ms; 5,120 columns 0.50 GB, 0.15 ms;
8,960 columns 0.88 GB, 0.26 ms. XLA reads x twice or three times and, unfused, writes the normalised bf16 as well.
Plain loads and stores only: no TMA, no tensor core, so one kernel serves every architecture.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _plgpu as plgpu
from pallas_kernels.rounding import AMAX_FLOOR, BLOCK, INT8_MAX_BLOCK, INT8_MAX_TOKEN

WARPGROUP = 128
ROWS = 8  # rows a block takes in turn, so that scale and shift are loaded once for them
TILE = BLOCK


def supports_rows(width: int) -> str | None:
    """Why `quantize_rows` cannot run rows of this width, or None if it can."""
    if width % WARPGROUP:
        return f"rows of {width} do not divide over {WARPGROUP} threads"
    if width > 2**14:
        return f"a row of {width} does not fit the registers of {WARPGROUP} threads"
    return None


def quantize_rows(x, scale=None, shift=None, *, eps: float = 1e-6, affine: bool = False, interpret: bool = False):
    """x [B, L, D] to (int8 [B, L, D], float32 [B, L]), amax / 127 a row; first LayerNorm and modulation by
    1 + scale (affine: scale), shift [B, D] if given. A row lives in one warpgroup's registers: three reductions, one
    read."""
    batch, length, width = x.shape
    layout = row_layout(width)
    operands = (x,) if scale is None else (x, scale, shift)

    def body(*refs):
        x, *modulation, q, q_scale = refs
        b = lax.axis_index("batch")
        modulation = [_load(ref.at[b], layout) for ref in modulation]
        first = lax.axis_index("rows") * ROWS

        def read(i):
            return plgpu.load(x.at[b, jnp.minimum(first + i, length - 1)], layout=layout, optimized=False)

        def step(i, values):
            ahead = read(jnp.minimum(i + 1, ROWS - 1))  # on its way during this row's reductions
            row = first + i

            @pl.when(row < length)
            def _():
                y = values.astype(jnp.float32)
                if modulation:
                    y = y - jnp.sum(y) * (1.0 / width)
                    y = y * lax.rsqrt(jnp.sum(y * y) * (1.0 / width) + eps)
                    y = y * (modulation[0] if affine else 1.0 + modulation[0]) + modulation[1]
                amax = jnp.maximum(jnp.max(jnp.abs(y)), AMAX_FLOOR)
                q.at[b, row][...] = rounded_to_int8(y * (INT8_MAX_TOKEN / amax))
                q_scale[b, row] = amax / INT8_MAX_TOKEN

            return ahead

        lax.fori_loop(0, ROWS, step, read(0))

    body.__name__ = "quantize_rows"
    return plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct(x.shape, jnp.int8), jax.ShapeDtypeStruct((batch, length), jnp.float32)),
        grid=(batch, pl.cdiv(length, ROWS)),
        grid_names=("batch", "rows"),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(*operands)


def rounded_to_int8(y):
    """int8 of y in [-127, 127], half to even: y + 1.5 * 2^23 has no place for a fraction, its low byte is y.

    Rounding, limiting and converting are four instructions, two of them at a fraction of the rate. Without the barrier
    (no instruction) the product that gave y may be fused with the sum, and a tie then falls as the unrounded y has it.
    """
    return lax.bitcast_convert_type(lax.optimization_barrier(y) + 1.5 * 2**23, jnp.int32).astype(jnp.int8)


def row_layout(width: int):
    """A row spread over a warpgroup in the widest pieces that cover it evenly (up to 8 elements)."""
    piece = next(size for size in (8, 4, 2, 1) if width % (WARPGROUP * size) == 0)
    return plgpu.Layout.WG_STRIDED((width,), vec_size=piece)


def supports_tiles(rows: int, width: int) -> str | None:
    """Why `quantize_tiles` cannot run this matrix, or None if it can."""
    if rows < TILE or width % TILE:
        return f"[{rows}, {width}] holds no whole tiles of {TILE}x{TILE} across its width"
    return None


def quantize_tiles(x, scale=None, shift=None, *, eps: float = 1e-6, affine: bool = False, interpret: bool = False):
    """x [M, D] to (int8 [M, D], float32 [M/128, D/128]), amax / 128 a tile; first LayerNorm and modulation by
    1 + scale (affine: scale), shift [D] if given. Only whole tiles of rows are written: the ragged end is the caller's.

    One warpgroup a block: the maximum over rows crosses warps through scratch memory that Mosaic GPU gives to the
    block, not to the warpgroup, so that two of them would overwrite each other's.
    """
    rows, width = x.shape
    tiles = width // TILE
    layout = plgpu.Layout.WGMMA

    def body(*refs):
        x, *modulation, q, q_scale = refs
        block = lax.axis_index("block")
        own = pl.ds(block * TILE, TILE)

        def tile(j):
            return _load(x.at[own, pl.ds(j * TILE, TILE)], layout)

        def row_statistics():
            """Mean and 1 / deviation of the rows, tile after tile, merged by Chan's formula: no cancellation."""

            def step(j, carry):
                mean, square = carry
                count = j.astype(jnp.float32)
                y = tile(j)
                tile_mean = jnp.sum(y, axis=1) * (1.0 / TILE)
                y = y - _across(tile_mean, 0)
                delta = tile_mean - mean
                square = square + jnp.sum(y * y, axis=1) + delta * delta * (TILE * count / (count + 1.0))
                return mean + delta / (count + 1.0), square

            zero = plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), layout.reduce(1))
            mean, square = lax.fori_loop(0, tiles, step, (zero, zero))
            return mean, lax.rsqrt(square * (1.0 / width) + eps)

        statistics = row_statistics() if modulation else None

        @pl.loop(0, tiles)
        def _(j):
            y = tile(j)
            if statistics is not None:
                columns = pl.ds(j * TILE, TILE)
                scale, shift = (_across(_load(ref.at[columns], layout.reduce(0)), 1) for ref in modulation)
                y = (y - _across(statistics[0], 0)) * _across(statistics[1], 0)
                y = y * (scale if affine else 1.0 + scale) + shift
            amax = jnp.maximum(jnp.max(jnp.max(jnp.abs(y), axis=1), axis=0), AMAX_FLOOR)
            y = jnp.minimum(jnp.round(y * (INT8_MAX_BLOCK / amax)), 127.0)
            q.at[own, pl.ds(j * TILE, TILE)][...] = y.astype(jnp.int8)
            q_scale[block, j] = amax / INT8_MAX_BLOCK

    body.__name__ = "quantize_tiles"
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(x.shape, jnp.int8),
            jax.ShapeDtypeStruct((pl.cdiv(rows, TILE), tiles), jnp.float32),
        ),
        grid=(rows // TILE,),
        grid_names=("block",),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(*(ref for ref in (x, scale, shift) if ref is not None))


def _load(ref, layout):
    return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)


def _across(vector, axis):
    return lax.broadcast_in_dim(vector, (TILE, TILE), [axis])

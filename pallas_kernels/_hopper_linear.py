"""The linear branch's sums over the keys on Hopper, the routing's, and the maxima of v, in one pass over k and v.

    f(k)^T v  and  sum f(k)   over all keys: what the linear branch needs of them
    sum of k over each BLOCK keys: what routing needs of them
    max |v| of each channel: what rounding v to FP8 needs of them

A block takes RUN tiles of 64 keys: f(k) in registers, to shared memory in 16 bits, and from there the tensor cores add
its product with v to an accumulator that stays in registers; ones in place of v give the sums. While they multiply,
the next tile's f(k) is taken.

Bound by memory: on H100 (3.35 TB/s) at 32,760 tokens, 12 heads of 128, 0.20 GB: 0.06 ms, as long as the tensor cores
take for 13 GFLOP at a third of their rate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _hopper as hw

BLOCK = 64
"""Keys of a tile and of one of the sums of k."""
RUN, SLOTS = 24, 2
SUM_RUN, SUM_SLOTS = 16, 4
COLUMNS = 8  # the narrowest right operand


def _softmax(x):
    e = jnp.exp2((x - hw.per_row(x.max(axis=1), x)) * hw.LOG2E)
    return e * hw.per_row(1.0 / e.sum(axis=1), e)


# As linear_attention.FEATURE_MAPS, of a float32 tile whose rows are tokens.
FEATURE_MAPS: dict[str, Callable] = {
    "softmax": _softmax,
    "elu": lambda x: jnp.where(x > 0, x + 1.0, jnp.exp2(x * hw.LOG2E)),
    "relu": lambda x: jnp.maximum(x, 0.0),
}


class KeyRuns(NamedTuple):
    """float32, of each run of up to RUN tiles. products: f(k)^T v [b * h, runs, d, d]. f_sum, k_total: sums of f(k) and
    of k [b * h, runs, d]. k_sums: of k over each BLOCK keys [b * h, runs * RUN, d], what is past the last block
    undefined. v_max: max |v| [b * h, runs, d], or None."""

    products: jax.Array
    f_sum: jax.Array
    k_total: jax.Array
    k_sums: jax.Array
    v_max: jax.Array | None


def summarize_keys(k, v, length, feature_map, *, v_max: bool = False, interpret) -> KeyRuns:
    """k, v [b, l, h, d] in 16 bits, l a multiple of 8, of which `length` rows count, the others of v being zeros; f(k)
    is rounded to their dtype. v_max: whether that is wanted."""
    b, _, heads, dim = k.shape
    tiles = -(-length // BLOCK)
    runs = -(-tiles // RUN)
    features = FEATURE_MAPS[feature_map]

    def body(ref):
        head = lax.axis_index("head")
        batch, h = head // heads, head % heads
        k_smem, v_smem, f_smem, sums_smem = (ref[f"{name}_smem"] for name in ("k", "v", "f", "sums"))

        def fetch(tile, slot, barrier):
            rows = pl.ds(tile * BLOCK, BLOCK)
            plgpu.copy_gmem_to_smem(ref["k"].at[batch, rows, h], k_smem.at[slot], barrier)
            plgpu.copy_gmem_to_smem(ref["v"].at[batch, rows, h], v_smem.at[slot], barrier)

        plgpu.copy_gmem_to_smem(ref["ones"].at[pl.ds(0, COLUMNS)], ref["ones_smem"], ref["ones_full"])
        run = hw.start_run(fetch, ref["full"], SLOTS, RUN, tiles, SLOTS - 1)
        plgpu.barrier_wait(ref["ones_full"])
        ones_right = ref["ones_smem"].transpose((1, 0))

        def over_tiles(products, sums):
            def step(i, tops):
                slot = lax.rem(i, SLOTS)
                plgpu.barrier_wait(ref["full"].at[slot])
                # Rows meet once, at the end of the run: until then two numbers take one instruction.
                tops = [jnp.maximum(top, jnp.abs(plgpu.load(v_smem.at[slot], layout=hw.TILE))) for top in tops]
                x = plgpu.load(k_smem.at[slot], layout=hw.TILE).astype(jnp.float32)
                f = features(x)
                row = plgpu.broadcasted_iota(jnp.int32, (BLOCK,), 0, layout=hw.PER_ROW)
                f = jnp.where(hw.per_row(row, f) < length - (run.first + i) * BLOCK, f, 0.0)
                plgpu.wgmma_wait(0)  # the products of the last tile have read f_smem and their slots
                f_smem[...] = f.astype(k_smem.dtype)
                plgpu.commit_smem()
                run.load(i + SLOTS - 1)
                block = hw.product(k_smem.at[slot].transpose((1, 0)), ones_right, (dim, COLUMNS))
                sums_smem.at[i][...] = block.max(axis=1)  # its columns are equal
                plgpu.wgmma(products, f_smem.transpose((1, 0)), v_smem.at[slot])
                plgpu.wgmma(sums, f_smem.transpose((1, 0)), ones_right)
                return tops

            tops = [plgpu.layout_cast(jnp.zeros((BLOCK, dim), v_smem.dtype), hw.TILE)] if v_max else []
            tops = lax.fori_loop(0, run.count, step, tops)
            return products[...], sums[...], tops

        products, f_sum, tops = pl.run_scoped(
            over_tiles,
            plgpu.WGMMAAccumulatorRef((dim, dim), jnp.float32),
            plgpu.WGMMAAccumulatorRef((dim, COLUMNS), jnp.float32),
        )
        number = lax.axis_index("run")
        ref["products"].at[head, number][...] = products
        ref["f_sum"].at[head, number][...] = f_sum.max(axis=1)
        # From shared memory, as the loop has no registers left for it.
        ref["k_total"].at[head, number][...] = lax.fori_loop(
            0,
            run.count,
            lambda i, total: total + plgpu.load(sums_smem.at[i], layout=hw.PER_ROW, optimized=False),
            hw.full((dim,), 0.0, hw.PER_ROW),
        )
        for top in tops:
            ref["v_max"].at[head, number][...] = top.max(axis=0).astype(jnp.float32)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(sums_smem, ref["k_sums"].at[head, pl.ds(run.first, RUN)])
        plgpu.wait_smem_to_gmem(0)

    n = b * heads
    inputs = {"k": k, "v": v, "ones": hw.ones(COLUMNS, BLOCK, k.dtype)}
    outputs = {
        "products": jax.ShapeDtypeStruct((n, runs, dim, dim), jnp.float32),
        "f_sum": jax.ShapeDtypeStruct((n, runs, dim), jnp.float32),
        "k_total": jax.ShapeDtypeStruct((n, runs, dim), jnp.float32),
        "k_sums": jax.ShapeDtypeStruct((n, runs * RUN, dim), jnp.float32),
    }
    if v_max:
        outputs["v_max"] = jax.ShapeDtypeStruct((n, runs, dim), jnp.float32)
    scratch = {
        "k_smem": plgpu.SMEM((SLOTS, BLOCK, dim), k.dtype),
        "v_smem": plgpu.SMEM((SLOTS, BLOCK, dim), v.dtype),
        "f_smem": plgpu.SMEM((BLOCK, dim), k.dtype),
        "ones_smem": plgpu.SMEM((COLUMNS, BLOCK), k.dtype),
        "sums_smem": plgpu.SMEM((RUN, dim), jnp.float32),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
        "ones_full": plgpu.Barrier(),
    }
    found = hw.by_runs(body, "summarize_keys", inputs, outputs, scratch, heads=n, runs=runs, interpret=interpret)
    return KeyRuns(*found, *(() if v_max else (None,)))


def sums_of_blocks(sums, block: int):
    """[n, blocks, d]: over `block` rows each, a multiple of BLOCK, of sums [n, parts, d] over BLOCK rows each."""
    n, parts, dim = sums.shape
    per_block = block // BLOCK
    return jnp.pad(sums, ((0, 0), (0, -parts % per_block), (0, 0))).reshape(n, -1, per_block, dim).sum(axis=2)


def block_sums(x, *, interpret):
    """Sums over each BLOCK rows, float32 [b * h, blocks, d], of x [b, l, h, d] in 16 bits, l a multiple of 8.

    The tensor cores multiply by ones. Bound by memory: 0.10 GB at 32,760 rows, 12 heads of 128, 0.03 ms on H100.
    """
    b, length, heads, dim = x.shape
    tiles = -(-length // BLOCK)
    runs = -(-tiles // SUM_RUN)

    def body(ref):
        head = lax.axis_index("head")
        batch, h = head // heads, head % heads
        x_smem, sums_smem = ref["x_smem"], ref["sums_smem"]

        def fetch(tile, slot, barrier):
            plgpu.copy_gmem_to_smem(ref["x"].at[batch, pl.ds(tile * BLOCK, BLOCK), h], x_smem.at[slot], barrier)

        plgpu.copy_gmem_to_smem(ref["ones"].at[pl.ds(0, COLUMNS)], ref["ones_smem"], ref["ones_full"])
        run = hw.start_run(fetch, ref["full"], SUM_SLOTS, SUM_RUN, tiles, SUM_SLOTS)
        plgpu.barrier_wait(ref["ones_full"])
        ones_right = ref["ones_smem"].transpose((1, 0))

        @pl.loop(0, run.count)
        def _(i):
            slot = lax.rem(i, SUM_SLOTS)
            plgpu.barrier_wait(ref["full"].at[slot])
            block = hw.product(x_smem.at[slot].transpose((1, 0)), ones_right, (dim, COLUMNS))
            run.load(i + SUM_SLOTS)
            sums_smem.at[i][...] = block.max(axis=1)  # its columns are equal

        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(sums_smem, ref["out"].at[head, pl.ds(run.first, SUM_RUN)])
        plgpu.wait_smem_to_gmem(0)

    n = b * heads
    outputs = {"out": jax.ShapeDtypeStruct((n, runs * SUM_RUN, dim), jnp.float32)}
    scratch = {
        "x_smem": plgpu.SMEM((SUM_SLOTS, BLOCK, dim), x.dtype),
        "ones_smem": plgpu.SMEM((COLUMNS, BLOCK), x.dtype),
        "sums_smem": plgpu.SMEM((SUM_RUN, dim), jnp.float32),
        "full": plgpu.Barrier(num_barriers=SUM_SLOTS),
        "ones_full": plgpu.Barrier(),
    }
    inputs = {"x": x, "ones": hw.ones(COLUMNS, BLOCK, x.dtype)}
    (sums,) = hw.by_runs(body, "block_sums", inputs, outputs, scratch, heads=n, runs=runs, interpret=interpret)
    return sums[:, :tiles]

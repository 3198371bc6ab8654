"""INT8/FP8 attention on Hopper (sm_90a): dense, or over a list of key blocks for each block of queries.

A block of three warpgroups: two multiply, 64 query rows each, a third streams K and V through a ring of shared
memory by TMA. Lists for 128 query rows are shared by the two (one ring); lists for 64 rows are private (two rings).

    S  = Q8 K8^T               wgmma s32 <- s8 x s8, both K-major in shared memory
    P  = 448 exp2(S sq sk - m)  in float32; m is the running maximum, never left out
    O  = O alpha + P8 V8       wgmma f32 <- e4m3 x e4m3, P from registers, V^T K-major

Each product P8 V8 starts from zero and is added in float32: a Hopper FP8 accumulator keeps about 22 bits.

Roofline on H100 (1,979 TOPS in INT8 and FP8, 16 exp2 a cycle and SM at 1.755 GHz, 3.35 TB/s), head_dim 128:
    32,760 tokens, 12 heads    6.6 TOP: 3.3 ms of wgmma    1.3e10 exp2: 3.5 ms    0.25 GB: 0.08 ms
    75,600 tokens, 40 heads    117 TOP: 59 ms              2.3e11 exp2: 62 ms     1.9 GB: 0.6 ms
Block lists at top-k 0.1 take a tenth. wgmma and exp2 bound it alike, and a scheduler issues about as many cycles
(523 instructions a warp for 64 x 128 scores), so what is reached depends on one warpgroup multiplying while the
other takes its softmax.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _hopper as hw
from pallas_kernels._heads import heads_first
from pallas_kernels._quantize_qkv import quantize_query_key, quantize_value

LOG2_E4M3_MAX = 8.807354922057604
WARPGROUPS = 2
TILE_Q = WARPGROUPS * hw.ROWS
SMEM_BYTES = 232_448
"""Shared memory that a block may have on sm_90."""


@dataclasses.dataclass(frozen=True)
class SageConfig:
    """block_k: keys of one step. stages: slots of a ring. shared: both warpgroups follow one list."""

    block_k: int
    stages: int
    shared: bool


def ring_stages(dim: int, block_k: int, rings: int) -> int:
    """Slots of each ring that fit in shared memory beside Q, the staged output and the barriers; 4 hide the latency."""
    fixed = TILE_Q * dim * (1 + 2) + 4 * TILE_Q + 1024
    return min(4, (SMEM_BYTES - fixed) // (rings * 2 * block_k * dim))


def sage_operands(q, k, v, block_index, *, scale, block_q, block_k, smooth_k):
    """What `hopper_sage` reads, from q, k, v [b, l, h, d] and block_index [b, h, nq, n] (None: dense)."""
    b, lq, h, dim = q.shape
    n, tiles = b * h, -(-lq // TILE_Q)
    flat_q, flat_k, flat_v = map(heads_first, (q, k, v))
    q8, q_scale, k8, k_scale = quantize_query_key(flat_q, flat_k, block_q, block_k, smooth_k)
    v8, v_scale = quantize_value(flat_v)
    # Transposed, the columns of each 16 in hw.FP8_ORDER: [.., half, pair, two] -> [.., pair, half, two].
    vt8 = _pad_axis(v8, 1, k8.shape[1]).reshape(n, -1, 2, 4, 2, dim)
    vt8 = jnp.transpose(vt8, (0, 5, 1, 3, 2, 4)).reshape(n, dim, k8.shape[1])
    # In halves of a tile, however many rows share a scale; padding up to whole tiles.
    q_scale = jnp.repeat(q_scale, block_q // hw.ROWS, axis=1) * (scale * hw.LOG2E)
    q_scale = _pad_axis(q_scale, 1, tiles * WARPGROUPS)
    q8 = _pad_axis(q8, 1, tiles * TILE_Q)
    index = None
    if block_index is not None:
        index = tail_first(block_index.reshape(n, *block_index.shape[2:]).astype(jnp.int32), k_scale.shape[1])
        index = _pad_axis(index, 1, tiles * TILE_Q // block_q)
        k_scale = jnp.take_along_axis(k_scale, index.reshape(n, -1), axis=1).reshape(index.shape)
    return q8, q_scale, k8, k_scale, vt8, v_scale, index


def sage_forward(q, k, v, block_index, *, scale, block_q, block_k, smooth_k, interpret):
    """Quantises and attends: q, k, v [b, l, h, d]; block_index [b, h, nq, n] or None for dense attention.

    Returns (output [b, lq, h, d] in q's dtype, natural log-sum-exp [b, h, lq] float32).
    """
    b, lq, h, dim = q.shape
    operands = sage_operands(q, k, v, block_index, scale=scale, block_q=block_q, block_k=block_k, smooth_k=smooth_k)
    shared = block_index is None or block_q == TILE_Q
    stages = 2 if interpret else ring_stages(dim, block_k, 1 if shared else WARPGROUPS)
    config = SageConfig(block_k=block_k, stages=stages, shared=shared)
    # TMA wants whole tiles of 8 rows in global memory.
    o, lse = hopper_sage(
        *operands, shape=(b, -(-lq // 8) * 8, h, dim), lk=k.shape[1], dtype=q.dtype, config=config, interpret=interpret
    )
    return o[:, :lq], lse[:, :lq].reshape(b, h, lq) * hw.LN2


def tail_first(index: jax.Array, blocks: int) -> jax.Array:
    """Lists with the ragged last block, where they have it, swapped to the front: only step 0 masks."""
    last = index == blocks - 1
    first = index[..., :1]
    swapped = jnp.where(last, first, index)
    return swapped.at[..., 0].set(jnp.where(jnp.any(last, axis=-1), blocks - 1, first[..., 0]))


def _pad_axis(x: jax.Array, axis: int, size: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def hopper_sage(q8, q_scale, k8, k_scale, vt8, v_scale, index, *, shape, lk, dtype, config: SageConfig, interpret):
    """Attention of [n, tiles * 128, d] INT8 queries.

    q_scale [n, tiles * 2]: of each 64 rows, times the softmax scale and log2(e).
    k8 [n, blocks * block_k, d], vt8 [n, d, blocks * block_k] e4m3 with columns in `hw.FP8_ORDER`.
    index int32 [n, lists, steps]: blocks in the order of the steps, the ragged last one (if there) first. None:
        all blocks, from the last to the first. lists is tiles if config.shared, else 2 * tiles.
    k_scale [n, lists, steps], or [n, blocks] when index is None. v_scale [n, d].
    shape: of the output, [b, lq, h, d]; lk: true number of keys.

    Returns (output in dtype, log2-sum-exp2 of the scaled scores [n, tiles * 128] float32).
    """
    n, rows, dim = q8.shape
    tiles, bk, stages = rows // TILE_Q, config.block_k, config.stages
    heads = shape[2]
    blocks = k8.shape[1] // bk
    steps = blocks if index is None else index.shape[2]
    rings = 1 if config.shared else WARPGROUPS
    tail = lk - (blocks - 1) * bk  # keys of the last block

    def body(*refs):
        ref = dict(zip(names, refs, strict=True))
        head, tile, wg = lax.axis_index("head"), lax.axis_index("tile"), lax.axis_index("wg")

        def block(row, i):
            return (blocks - 1) - i if index is None else ref["index"][head, row, i]

        def produce(ring):
            row = tile * rings + ring

            def load(i, j):
                slot = lax.rem(i, stages)
                bar = ring * stages + slot

                @pl.when(i >= stages)
                def _():
                    plgpu.barrier_wait(ref["k_empty"].at[bar])

                keys = pl.ds(j * bk, bk)
                plgpu.copy_gmem_to_smem(ref["k"].at[head, keys], ref["k_smem"].at[ring, slot], ref["k_full"].at[bar])

                @pl.when(i >= stages)
                def _():
                    plgpu.barrier_wait(ref["v_empty"].at[bar])

                plgpu.copy_gmem_to_smem(
                    ref["vt"].at[head, :, keys], ref["v_smem"].at[ring, slot], ref["v_full"].at[bar]
                )
                return block(row, jnp.minimum(i + 1, steps - 1))

            lax.fori_loop(0, steps, load, block(row, 0))

            # Stay until every slot was read: a warpgroup must not leave while another one still multiplies.
            @pl.loop(max(0, steps - stages), steps)
            def _(i):
                bar = ring * stages + lax.rem(i, stages)
                plgpu.barrier_wait(ref["k_empty"].at[bar])
                plgpu.barrier_wait(ref["v_empty"].at[bar])

        def consume():
            plgpu.set_max_registers(232, action="increase")
            ring = 0 if config.shared else wg
            row = tile if config.shared else tile * WARPGROUPS + wg
            first = tile * TILE_Q + wg * hw.ROWS
            plgpu.copy_gmem_to_smem(
                ref["q"].at[head, pl.ds(first, hw.ROWS)], ref["q_smem"].at[wg], ref["q_full"].at[wg]
            )
            q_scale = ref["q_scale"][head, tile * WARPGROUPS + wg]

            def scale_of(i):
                i = jnp.minimum(i, steps - 1)
                k_scale = ref["k_scale"]
                return q_scale * (k_scale[head, block(row, i)] if index is None else k_scale[head, row, i])

            def step(i, carry, ragged=False):
                acc, m, total, scale = carry
                ahead = scale_of(i + 1)  # the load is in flight during this step
                slot = lax.rem(i, stages)
                bar = ring * stages + slot
                plgpu.barrier_wait(ref["k_full"].at[bar])
                s = hw.product(
                    ref["q_smem"].at[wg], ref["k_smem"].at[ring, slot].transpose((1, 0)), (hw.ROWS, bk), jnp.int32
                )
                plgpu.barrier_arrive(ref["k_empty"].at[bar])
                s = s.astype(jnp.float32)
                if ragged:
                    valid = jnp.where(block(row, i) == blocks - 1, tail, bk)
                    column = plgpu.broadcasted_iota(jnp.int32, (bk,), 0, layout=hw.PER_COLUMN)
                    s = jnp.where(hw.per_column(column, s) < valid, s, -jnp.inf)
                new_m = jnp.maximum(m, s.max(axis=1) * scale)
                alpha = jnp.exp2(m - new_m)
                p = jnp.exp2(s * scale - hw.per_row(new_m - LOG2_E4M3_MAX, s))
                total = total * alpha + p.sum(axis=1)
                p8 = hw.to_fp8(p, ref["p_smem"].at[wg] if interpret else None)
                plgpu.barrier_wait(ref["v_full"].at[bar])
                pv = hw.product(p8, ref["v_smem"].at[ring, slot].transpose((1, 0)), (hw.ROWS, dim))
                plgpu.barrier_arrive(ref["v_empty"].at[bar])
                return acc * hw.per_row(alpha, acc) + pv, new_m, total, ahead

            carry = (
                hw.full((hw.ROWS, dim), 0.0, hw.TILE),
                hw.full((hw.ROWS,), -jnp.inf, hw.PER_ROW),
                hw.full((hw.ROWS,), 0.0, hw.PER_ROW),
                scale_of(0),
            )
            plgpu.barrier_wait(ref["q_full"].at[wg])
            begin = 0
            if tail < bk:
                carry, begin = step(jnp.int32(0), carry, ragged=True), 1
            acc, m, total, _ = lax.fori_loop(begin, steps, step, carry)

            v_scale = plgpu.load(ref["v_scale"].at[head], layout=hw.PER_COLUMN, optimized=False)
            acc = acc * hw.per_row(1.0 / total, acc) * hw.per_column(v_scale, acc)
            ref["o_smem"].at[wg][...] = acc.astype(dtype)
            ref["lse_smem"].at[wg][...] = m + jnp.log2(total) - LOG2_E4M3_MAX
            plgpu.commit_smem()
            batch, h = head // heads, head % heads
            plgpu.copy_smem_to_gmem(ref["o_smem"].at[wg], ref["out"].at[batch, pl.ds(first, hw.ROWS), h])
            plgpu.copy_smem_to_gmem(ref["lse_smem"].at[wg], ref["lse"].at[head, pl.ds(first, hw.ROWS)])
            plgpu.wait_smem_to_gmem(0)

        pl.when(wg < WARPGROUPS)(consume)

        @pl.when(wg == WARPGROUPS)
        def _():
            plgpu.set_max_registers(40, action="decrease")
            if rings == 1:
                produce(0)
            else:

                @plgpu.warp_map
                def _(warp):
                    for ring in range(rings):
                        pl.when(warp == ring)(functools.partial(produce, ring))

    inputs = {"q": q8, "q_scale": q_scale, "k": k8, "k_scale": k_scale, "vt": vt8, "v_scale": v_scale}
    if index is not None:
        inputs["index"] = index
    slots = rings * stages
    arrivals = WARPGROUPS // rings
    scratch = {
        "q_smem": plgpu.SMEM((WARPGROUPS, hw.ROWS, dim), jnp.int8),
        "k_smem": plgpu.SMEM((rings, stages, bk, dim), jnp.int8),
        "v_smem": plgpu.SMEM((rings, stages, dim, bk), jnp.float8_e4m3fn),
        "o_smem": plgpu.SMEM((WARPGROUPS, hw.ROWS, dim), dtype),
        "lse_smem": plgpu.SMEM((WARPGROUPS, hw.ROWS), jnp.float32),
        "q_full": plgpu.Barrier(num_barriers=WARPGROUPS),
        "k_full": plgpu.Barrier(num_barriers=slots),
        "v_full": plgpu.Barrier(num_barriers=slots),
        "k_empty": plgpu.Barrier(num_arrivals=arrivals, num_barriers=slots),
        "v_empty": plgpu.Barrier(num_arrivals=arrivals, num_barriers=slots),
    }
    if interpret:
        scratch["p_smem"] = plgpu.SMEM((WARPGROUPS, hw.ROWS, bk), jnp.float8_e4m3fn)
    names = [*inputs, "out", "lse", *scratch]
    body.__name__ = "sage_dense" if index is None else "sage_sparse"
    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(shape, dtype),
            jax.ShapeDtypeStruct((n, tiles * TILE_Q), jnp.float32),
        ),
        grid=(n, tiles),
        grid_names=("head", "tile"),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        scratch_types=list(scratch.values()),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else False,
    )
    return kernel(*inputs.values())

"""Attention on Hopper (sm_90a), INT8/FP8 or 16-bit: dense, or over a list of key blocks for each block of queries.

A block of three warpgroups: two multiply, 64 query rows each, a third streams K and V through a ring of shared
memory by TMA. Lists for 128 query rows are shared by the two (one ring); lists for 64 rows are private (two rings).

    S  = Q8 K8^T               wgmma s32 <- s8 x s8, both K-major in shared memory
    P  = 448 exp2(S sq sk - m)  in float32; m is the running maximum, never left out
    O  = O alpha + P8 V8       wgmma f32 <- e4m3 x e4m3, P from registers, V^T K-major

In 16 bits Q, K, V and P stay bfloat16 or float16, without scales and with V as it is, and P V is added to O where it
lies, which leaves registers for 128 keys a step: of blocks of 64 two, where both warpgroups follow one list.

Scores run a step ahead: Q K(i)^T goes to the tensor cores with P(i-1) V(i-1), and the warpgroups take turns there.
With a linear branch the output gets f(q) times its matrix at the end, f(q) from the tile of Q.

Each product P8 V8 starts from zero and is added in float32: a Hopper FP8 accumulator keeps about 22 bits.

Roofline on H100 (1,979 TOPS in INT8 and FP8, 16 exp2 a cycle and SM at 1.755 GHz, 3.35 TB/s), head_dim 128:
    32,760 tokens, 12 heads    6.6 TOP: 3.3 ms of wgmma    1.3e10 exp2: 3.5 ms    0.25 GB: 0.08 ms
    75,600 tokens, 40 heads    117 TOP: 59 ms              2.3e11 exp2: 62 ms     1.9 GB: 0.6 ms
Block lists at top-k 0.1 take a tenth. wgmma and exp2 bound it alike, and a scheduler issues about as many cycles
(523 instructions a warp for 64 x 128 scores), so what is reached depends on one warpgroup multiplying while the
other takes its softmax. Reached: docs/h100.md; what was tried: docs/h100_attempts.md.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _hopper as hw
from pallas_kernels import _hopper_quantize as quantize
from pallas_kernels._hopper_linear import FEATURE_MAPS
from pallas_kernels._quantize_qkv import rotate, value_scale
from pallas_kernels.linear_attention import DENOMINATOR_EPS

LOG2_E4M3_MAX = 8.807354922057604
WARPGROUPS = 2
TILE_Q = WARPGROUPS * hw.ROWS
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24
"""A block has what it was started with, 3 times 168: with a sum above 504 the last warpgroup would wait for ever."""
TMA_ROWS = 8
"""Arrays in global memory have a multiple of so many rows. What lies past the end is read as zeros, never written."""
SMEM_BYTES = 232_448
"""Shared memory that a block may have on sm_90."""


@dataclasses.dataclass(frozen=True)
class AttentionTiles:
    """block_k: keys of a block. stages: slots of a ring. shared: both warpgroups follow one list. blocks: of one step
    and one slot, more than one in 16 bits only."""

    block_k: int
    stages: int
    shared: bool
    blocks: int = 1


class LinearBranch(NamedTuple):
    """What is added to the output: f(q) `combined` / (f(q) . f_sum + eps) + bias, f being `feature_map`.

    q: the queries [b, lq, h, d] where the kernel has INT8 ones, else None. combined: f(k)^T v and the projection
    multiplied, [n, d, d] in q's dtype. f_sum: float32 [n, d], sum of f(k). bias: float32 [d].
    """

    q: jax.Array | None
    combined: jax.Array
    f_sum: jax.Array
    bias: jax.Array
    feature_map: str


def ring_stages(dim: int, block_k: int, rings: int, itemsize: int, linear: bool = False) -> int:
    """Slots of each ring that fit in shared memory; 4 hide the latency.

    Beside them stand the staged output (in 16 bits in the place of Q), INT8 Q, the linear branch's matrix, and in
    4 KiB the log-sum-exp and the barriers.
    """
    fixed = TILE_Q * dim * (2 if itemsize == 2 else 3) + (2 * dim * dim if linear else 0) + 3584
    return min(4, (SMEM_BYTES - fixed) // (rings * 2 * block_k * dim * itemsize))


def step_blocks(block_k: int, shared: bool, itemsize: int) -> int:
    """Blocks of one step. In 16 bits two of 64 keys are one of 128, where shared memory has room for two such slots:
    half the rescaling, maxima and turns."""
    return 2 if itemsize == 2 and shared and block_k == hw.ROWS else 1


def sage_operands(q, k, v, block_index, *, scale, block_q, block_k, smooth_k, interpret, mean_k=None):
    """What `hopper_attention` reads, from q, k, v [b, l, h, d] and block_index [b, h, nq, n] (None: dense).

    mean_k: the mean key, float32 [b * h, d], where it is known already.
    """
    b, lq, h, _ = q.shape
    lk, n, tiles = k.shape[1], b * h, -(-lq // TILE_Q)
    keys = -(-lk // block_k) * block_k
    mean = None
    if smooth_k:
        mean = rotate(quantize.mean_key(k) if mean_k is None else mean_k)
    v_scale = value_scale(v).reshape(-1, v.shape[-1])
    q, k, v = map(whole_rows, (q, k, v))
    q8, q_scale = quantize.quantize_rows(q, None, lq, tiles * TILE_Q, block_q, interpret=interpret)
    k8, k_scale = quantize.quantize_rows(k, mean, lk, keys, block_k, interpret=interpret)
    vt8 = quantize.quantize_values(v, 1.0 / v_scale, keys, interpret=interpret)
    # In halves of a tile, however many rows share a scale.
    q_scale = jnp.repeat(q_scale, block_q // hw.ROWS, axis=1) * (scale * hw.LOG2E)
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
    sizes = {"block_q": block_q, "block_k": block_k}
    operands = sage_operands(q, k, v, block_index, scale=scale, smooth_k=smooth_k, interpret=interpret, **sizes)
    return attend(operands, q, k, block_q, block_k, None, interpret)


def sparse_operands(q, k, v, block_index, *, block_q, block_k):
    """What `hopper_attention` reads for 16-bit attention over block lists; arguments as for `sage_operands`."""
    b, lq, h, _ = q.shape
    tiles, blocks = -(-lq // TILE_Q), -(-k.shape[1] // block_k)
    index = tail_first(block_index.reshape(b * h, *block_index.shape[2:]).astype(jnp.int32), blocks)
    index = _pad_axis(index, 1, tiles * TILE_Q // block_q)
    return whole_rows(q), None, whole_rows(k), None, whole_rows(v), None, index


def sparse_forward(q, k, v, block_index, *, scale, block_q, block_k, interpret):
    """16-bit attention over block lists; arguments and results as for `sage_forward`."""
    operands = sparse_operands(q, k, v, block_index, block_q=block_q, block_k=block_k)
    return attend(operands, q, k, block_q, block_k, scale * hw.LOG2E, interpret)


def attend(operands, q, k, block_q, block_k, scale, interpret, linear: LinearBranch | None = None):
    """`hopper_attention` of these operands with the tiles that fit; results as of `sage_forward`."""
    b, lq, h, dim = q.shape
    shared = operands[-1] is None or block_q == TILE_Q
    rings = 1 if shared else WARPGROUPS
    itemsize = operands[0].dtype.itemsize
    blocks = step_blocks(block_k, shared, itemsize)
    stages = 2 if interpret else ring_stages(dim, blocks * block_k, rings, itemsize, linear is not None)
    config = AttentionTiles(block_k=block_k, stages=stages, shared=shared, blocks=blocks)
    shape = (b, -(-lq // TMA_ROWS) * TMA_ROWS, h, dim)
    o, lse = hopper_attention(
        *operands, shape=shape, lk=k.shape[1], dtype=q.dtype, scale=scale, config=config, interpret=interpret,
        linear=linear,
    )  # fmt: skip
    return o[:, :lq], lse[:, :lq].reshape(b, h, lq) * hw.LN2


def tail_first(index: jax.Array, blocks: int) -> jax.Array:
    """Lists with the ragged last block, where they have it, swapped to the front: only step 0 masks."""
    last = index == blocks - 1
    first = index[..., :1]
    swapped = jnp.where(last, first, index)
    return swapped.at[..., 0].set(jnp.where(jnp.any(last, axis=-1), blocks - 1, first[..., 0]))


def whole_rows(x: jax.Array) -> jax.Array:
    """[b, l, h, d], padded to the rows that TMA wants; a copy only where l is ragged."""
    return _pad_axis(x, 1, -(-x.shape[1] // TMA_ROWS) * TMA_ROWS)


def _pad_axis(x: jax.Array, axis: int, size: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def hopper_attention(
    q, q_scale, k, k_scale, v, v_scale, index, *, shape, lk, dtype, scale, config: AttentionTiles, interpret,
    linear: LinearBranch | None = None,
):  # fmt: skip
    """Attention of INT8 queries [n, tiles * 128, d], or of q in dtype as the model has it (then all scales are None).

    k [n, blocks * block_k, d] and v [n, d, blocks * block_k] e4m3, columns in `hw.FP8_ORDER`; or in dtype q
        [b, lq, h, d], k and v [b, lk, h, d], up to TMA_ROWS.
    q_scale [n, tiles * 2]: of each 64 rows, times the softmax scale and log2(e).
    scale: the softmax scale times log2(e) in 16 bits, None if q_scale holds it.
    index int32 [n, lists, steps]: blocks in the order of the steps, the ragged last one (if there) first. None:
        all blocks, from the last to the first. lists is tiles if config.shared, else 2 * tiles.
    k_scale [n, lists, steps], or [n, blocks] when index is None. v_scale [n, d].
    shape: of the output, [b, lq, h, d]; lk: true number of keys. linear: what to add to it, or None.

    Returns (output in dtype, log2-sum-exp2 of the scaled scores [n, tiles * 128] float32).
    """
    quantized = q.dtype == jnp.int8
    offset = LOG2_E4M3_MAX if quantized else 0.0
    batches, rows, heads, dim = shape
    n, tiles = batches * heads, -(-rows // TILE_Q)
    bk, stages, parts = config.block_k, config.stages, config.blocks
    width = parts * bk  # keys of a step
    blocks = -(-lk // bk)
    listed = blocks if index is None else index.shape[2]
    steps = -(-listed // parts)
    # Of the first step so many blocks are there only to fill it: copies of the first block, masked.
    filling = steps * parts - listed
    rings = 1 if config.shared else WARPGROUPS
    tail = lk - (blocks - 1) * bk  # keys of the last block
    score_dtype = jnp.int32 if quantized else jnp.float32

    def body(ref):
        head, tile, wg = lax.axis_index("head"), lax.axis_index("tile"), lax.axis_index("wg")
        batch, h = head // heads, head % heads

        def rows_of(name, rows):
            return ref[name].at[head, rows] if quantized else ref[name].at[batch, rows, h]

        def block(row, i):
            return (blocks - 1) - i if index is None else ref["index"][head, row, i]

        def entries(i):
            """Where in the list the blocks of step i stand."""
            return [jnp.clip(i * parts + part - filling, 0, listed - 1) for part in range(parts)]

        q_smem = ref["q_smem" if quantized else "tile_smem"]

        def produce(ring):
            row = tile * rings + ring
            if ring == 0 and linear is not None:
                plgpu.copy_gmem_to_smem(ref["combined"].at[head], ref["combined_smem"], ref["combined_full"])

            def load(i, found):
                slot = lax.rem(i, stages)
                bar = ring * stages + slot

                @pl.when(i >= stages)
                def _():
                    plgpu.barrier_wait(ref["k_empty"].at[bar])

                def slot_part(name, part):
                    whole = ref[name].at[ring, slot]
                    return whole if parts == 1 else whole.at[pl.ds(part * bk, bk)]

                for part, j in enumerate(found):
                    k_block = rows_of("k", pl.ds(j * bk, bk))
                    plgpu.copy_gmem_to_smem(k_block, slot_part("k_smem", part), ref["k_full"].at[bar])

                @pl.when(i >= stages)
                def _():
                    plgpu.barrier_wait(ref["v_empty"].at[bar])

                for part, j in enumerate(found):
                    keys = pl.ds(j * bk, bk)
                    values = ref["v"].at[head, :, keys] if quantized else rows_of("v", keys)
                    plgpu.copy_gmem_to_smem(values, slot_part("v_smem", part), ref["v_full"].at[bar])
                return tuple(block(row, entry) for entry in entries(i + 1))

            lax.fori_loop(0, steps, load, tuple(block(row, entry) for entry in entries(jnp.int32(0))))

            # Stay until every slot was read: a warpgroup must not leave while another one still multiplies.
            @pl.loop(max(0, steps - stages), steps)
            def _(i):
                bar = ring * stages + lax.rem(i, stages)
                plgpu.barrier_wait(ref["k_empty"].at[bar])
                plgpu.barrier_wait(ref["v_empty"].at[bar])

        def consume():
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            ring = 0 if config.shared else wg
            row = tile if config.shared else tile * WARPGROUPS + wg
            first = tile * TILE_Q + wg * hw.ROWS
            rows = pl.ds(first, hw.ROWS)
            plgpu.copy_gmem_to_smem(rows_of("q", rows), q_smem.at[wg], ref["q_full"].at[wg])
            if quantized and linear is not None:
                plgpu.copy_gmem_to_smem(
                    ref["raw_q"].at[batch, rows, h], ref["tile_smem"].at[wg], ref["raw_full"].at[wg]
                )
            q_scale = ref["q_scale"][head, tile * WARPGROUPS + wg] if quantized else None

            def scale_of(i):
                if not quantized:
                    return jnp.float32(scale)
                i = jnp.minimum(i, steps - 1)
                k_scale = ref["k_scale"]
                return q_scale * (k_scale[head, block(row, i)] if index is None else k_scale[head, row, i])

            def slot_of(i):
                slot = lax.rem(i, stages)
                return slot, ring * stages + slot

            # In 16 bits on hardware P V is added to what was summed before where that lies; elsewhere it starts from
            # zero: see the head of this file for FP8, and the interpreter cannot start from anything else.
            in_place = not quantized and not interpret

            def products(scores_of=None, values_of=None, p=None, acc=None, end_turn=True):
                """Q K^T of one step and acc + P V of another, issued together and awaited together.

                The barrier is needed: see `hw.product`.
                """
                accumulators = []
                if scores_of is not None:
                    k_slot, k_bar = slot_of(scores_of)
                    accumulators.append(plgpu.WGMMAAccumulatorRef((hw.ROWS, width), score_dtype))
                    plgpu.barrier_wait(ref["k_full"].at[k_bar])
                if values_of is not None:
                    v_slot, v_bar = slot_of(values_of)
                    accumulators.append(plgpu.WGMMAAccumulatorRef((hw.ROWS, dim), jnp.float32))
                    plgpu.barrier_wait(ref["v_full"].at[v_bar])

                def run(*sums):
                    if values_of is not None and in_place:
                        sums[-1][...] = acc
                    if scores_of is not None:
                        plgpu.wgmma(sums[0], q_smem.at[wg], ref["k_smem"].at[ring, k_slot].transpose((1, 0)))
                    if values_of is not None:
                        values = ref["v_smem"].at[ring, v_slot]
                        operand = ref["p_smem"].at[wg] if interpret else p
                        plgpu.wgmma(sums[-1], operand, values.transpose((1, 0)) if quantized else values)
                    if end_turn:
                        hw.pass_turn(wg, interpret)
                    return tuple(x[...] for x in sums)

                found = list(lax.optimization_barrier(pl.run_scoped(run, *accumulators)))
                if scores_of is not None:
                    plgpu.barrier_arrive(ref["k_empty"].at[k_bar])
                    found[0] = found[0].astype(jnp.float32)
                if values_of is not None:
                    plgpu.barrier_arrive(ref["v_empty"].at[v_bar])
                    if not in_place:
                        found[-1] = acc + found[-1]
                return found

            def softmax(s, factor, m, total):
                """The operand P of the next product, the factor on what was summed before, new maximum and total."""
                new_m = jnp.maximum(m, s.max(axis=1) * factor)
                alpha = jnp.exp2(m - new_m)
                p = jnp.exp2(s * factor - hw.per_row(new_m - offset, s))
                total = total * alpha + p.sum(axis=1)
                stage = ref["p_smem"].at[wg] if interpret else None
                p = hw.to_fp8(p, stage) if quantized else hw.to_16bit(p, dtype, stage)
                return () if interpret else p, alpha, new_m, total

            def first_step():
                hw.take_turn(wg, interpret)
                (s,) = products(scores_of=jnp.int32(0))
                if tail < bk or filling:  # the ragged block, where a list has it, is its first
                    valid = jnp.where(block(row, 0) == blocks - 1, tail, bk)
                    column = plgpu.broadcasted_iota(jnp.int32, (width,), 0, layout=hw.PER_COLUMN)
                    key = hw.per_column(column, s) - filling * bk
                    first_block = jnp.where(key < valid, s, -jnp.inf)
                    s = jnp.where(key < bk, first_block, s)
                    if filling:
                        s = jnp.where(key >= 0, s, -jnp.inf)
                m = hw.full((hw.ROWS,), -jnp.inf, hw.PER_ROW)
                return softmax(s, scale_of(0), m, hw.full((hw.ROWS,), 0.0, hw.PER_ROW))

            def step(i, carry):
                acc, m, total, p, alpha, factor = carry
                ahead = scale_of(i + 1)  # the load is in flight during this step
                hw.take_turn(wg, interpret)
                if quantized:
                    # Together, with a third tile of float32 for P V, the results do not fit the registers.
                    (acc,) = products(values_of=i - 1, p=p, acc=acc * hw.per_row(alpha, acc), end_turn=False)
                    (s,) = products(scores_of=i)
                    p, alpha, m, total = softmax(s, factor, m, total)
                else:
                    s, acc = products(scores_of=i, values_of=i - 1, p=p, acc=acc)
                    p, alpha, m, total = softmax(s, factor, m, total)
                    acc = acc * hw.per_row(alpha, acc)
                return acc, m, total, p, alpha, ahead

            hw.first_turn(wg, interpret)
            plgpu.barrier_wait(ref["q_full"].at[wg])
            p, alpha, m, total = first_step()
            carry = (hw.full((hw.ROWS, dim), 0.0, hw.TILE), m, total, p, alpha, scale_of(1))
            acc, m, total, p, alpha, _ = lax.fori_loop(1, steps, step, carry)
            hw.take_turn(wg, interpret)
            if quantized:
                acc = acc * hw.per_row(alpha, acc)
            (acc,) = products(values_of=jnp.int32(steps - 1), p=p, acc=acc)
            hw.last_turn(wg, interpret)

            def linear_branch(feature_map):
                """Its products and the output go where the queries were: nothing reads them any more."""
                tile = ref["tile_smem"].at[wg]
                if quantized:
                    plgpu.barrier_wait(ref["raw_full"].at[wg])
                f = FEATURE_MAPS[feature_map](plgpu.load(tile, layout=hw.TILE).astype(jnp.float32))
                f = f.astype(dtype).astype(jnp.float32)
                f_sum = plgpu.load(ref["f_sum"].at[head], layout=hw.PER_COLUMN, optimized=False)
                norm = (f * hw.per_column(f_sum, f)).sum(axis=1) + DENOMINATOR_EPS
                operand = hw.to_16bit(f, dtype, tile if interpret else None)
                plgpu.barrier_wait(ref["combined_full"])
                product = hw.product(operand, ref["combined_smem"], (hw.ROWS, dim))
                bias = plgpu.load(ref["bias"], layout=hw.PER_COLUMN, optimized=False)
                return product * hw.per_row(1.0 / norm, product) + hw.per_column(bias, product)

            acc = acc * hw.per_row(1.0 / total, acc)
            if quantized:
                v_scale = plgpu.load(ref["v_scale"].at[head], layout=hw.PER_COLUMN, optimized=False)
                acc = acc * hw.per_column(v_scale, acc)
            if linear is not None:
                acc = acc + linear_branch(linear.feature_map)
            ref["tile_smem"].at[wg][...] = acc.astype(dtype)
            ref["lse_smem"].at[wg][...] = m + jnp.log2(total) - offset
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(ref["tile_smem"].at[wg], ref["out"].at[batch, pl.ds(first, hw.ROWS), h])
            plgpu.copy_smem_to_gmem(ref["lse_smem"].at[wg], ref["lse"].at[head, pl.ds(first, hw.ROWS)])
            plgpu.wait_smem_to_gmem(0)

        pl.when(wg < WARPGROUPS)(consume)

        @pl.when(wg == WARPGROUPS)
        def _():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
            if rings == 1:
                produce(0)
            else:

                @plgpu.warp_map
                def _(warp):
                    for ring in range(rings):
                        pl.when(warp == ring)(functools.partial(produce, ring))

    inputs = {"q": q, "q_scale": q_scale, "k": k, "k_scale": k_scale, "v": v, "v_scale": v_scale, "index": index}
    if linear is not None:
        inputs |= {"raw_q": linear.q, "combined": linear.combined, "f_sum": linear.f_sum, "bias": linear.bias}
    inputs = {name: x for name, x in inputs.items() if x is not None}
    slots = rings * stages
    arrivals = WARPGROUPS // rings
    scratch = {
        "k_smem": plgpu.SMEM((rings, stages, width, dim), k.dtype),
        "v_smem": plgpu.SMEM((rings, stages, *((dim, width) if quantized else (width, dim))), v.dtype),
        "tile_smem": plgpu.SMEM((WARPGROUPS, hw.ROWS, dim), dtype),
        "lse_smem": plgpu.SMEM((WARPGROUPS, hw.ROWS), jnp.float32),
        "q_full": plgpu.Barrier(num_barriers=WARPGROUPS),
        "k_full": plgpu.Barrier(num_arrivals=parts, num_barriers=slots),
        "v_full": plgpu.Barrier(num_arrivals=parts, num_barriers=slots),
        "k_empty": plgpu.Barrier(num_arrivals=arrivals, num_barriers=slots),
        "v_empty": plgpu.Barrier(num_arrivals=arrivals, num_barriers=slots),
    }
    if quantized:
        scratch["q_smem"] = plgpu.SMEM((WARPGROUPS, hw.ROWS, dim), q.dtype)
    if linear is not None:
        scratch["combined_smem"] = plgpu.SMEM((dim, dim), dtype)
        scratch["combined_full"] = plgpu.Barrier()
        if quantized:
            scratch["raw_full"] = plgpu.Barrier(num_barriers=WARPGROUPS)
    if interpret:
        scratch["p_smem"] = plgpu.SMEM((WARPGROUPS, hw.ROWS, width), v.dtype)
    outputs = {
        "out": jax.ShapeDtypeStruct(shape, dtype),
        "lse": jax.ShapeDtypeStruct((n, tiles * TILE_Q), jnp.float32),
    }
    name = ("sage" if quantized else "attention") + ("_dense" if index is None else "_sparse")
    return hw.by_tiles(
        body, name, inputs, outputs, scratch, grid=(n, tiles), warpgroups=WARPGROUPS, interpret=interpret
    )

"""The Hopper (sm_90a) attention kernel, INT8/FP8 or 16-bit: dense, or over a list of key blocks for each block of
queries. What it reads, and how it is called: `_hopper_attention`.

A block of three warpgroups: two multiply, 64 query rows each, a third streams K and V through a ring of shared
memory by TMA. Lists for 128 query rows are shared by the two (one ring); lists for 64 rows are private (two rings).

    S  = Q8 K8^T               wgmma s32 <- s8 x s8, both K-major in shared memory
    P  = 448 exp2(S sq sk - m)  in float32; m is the running maximum, never left out
    O  = O alpha + P8 [V8, 1]  wgmma f16 <- e4m3 x e4m3, P from registers, V^T K-major

Scores run a step ahead: Q K(i)^T goes to the tensor cores with P(i-1) V(i-1), so K of a step lies in one slot of the
ring with V of the step before. The maximum of S is taken while P V is still multiplied, and P while what P V gave is
added to O.

Each product P8 V8 starts from zero in float16, half the registers of float32 (without which the two products would
not fit), and is added in float32; `value_max` keeps it in range. Eight more rows of V^T, all ones, make it sum P as
well: 64 additions of 570 instructions less, and O is normalised by the P that it was made from.

In 16 bits Q, K, V and P stay bfloat16 or float16, without scales and with V as it is, and P V is added to O where it
lies, which leaves registers for 128 keys a step: of blocks of 64 two, where both warpgroups follow one list.

With a linear branch the output gets f(q) times its matrix at the end, f(q) from the tile of Q.

Roofline on H100 (1,979 TOPS in INT8 and FP8, 16 exp2 a cycle and SM at 1.755 GHz, 3.35 TB/s), head_dim 128:
    32,760 tokens, 12 heads    6.6 TOP: 3.3 ms of wgmma    1.3e10 exp2: 3.5 ms    0.25 GB: 0.08 ms
    75,600 tokens, 40 heads    117 TOP: 59 ms              2.3e11 exp2: 62 ms     1.9 GB: 0.6 ms
Block lists at top-k 0.1 take a tenth. wgmma, exp2 and the schedulers (505 instructions a warp for 64 x 128 scores)
bound it alike. Reached: docs/h100.md; what was tried: docs/h100_attempts.md.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _hopper as hw
from pallas_kernels._hopper_linear import FEATURE_MAPS
from pallas_kernels.linear_attention import DENOMINATOR_EPS

LOG2_E4M3_MAX = 8.807354922057604
WARPGROUPS = 2
TILE_Q = WARPGROUPS * hw.ROWS
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24
"""A block has what it was started with, 3 times 168: with a sum above 504 the last warpgroup would wait for ever."""
SUM_ROWS = 8
"""Rows of ones under V^T in INT8: the fewest that wgmma takes."""


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
    multiplied, [n, d, d] in q's dtype. f_sum: float32 [n, d], sum of f(k). bias: [d], any float.
    """

    q: jax.Array | None
    combined: jax.Array
    f_sum: jax.Array
    bias: jax.Array
    feature_map: str


@dataclasses.dataclass(frozen=True)
class Call:
    """What is fixed when a kernel is made: loader and multipliers read it alike.

    listed: blocks of a list; dense: there are no lists. lk: true number of keys. scale: None if q_scale holds it.
    """

    quantized: bool
    dense: bool
    dim: int
    dtype: Any
    lk: int
    listed: int
    scale: float | None
    config: AttentionTiles
    interpret: bool

    @property
    def width(self) -> int:
        """Keys of a step."""
        return self.config.blocks * self.config.block_k

    @property
    def blocks(self) -> int:
        return -(-self.lk // self.config.block_k)

    @property
    def tail(self) -> int:
        """Keys of the last block."""
        return self.lk - (self.blocks - 1) * self.config.block_k

    @property
    def steps(self) -> int:
        return -(-self.listed // self.config.blocks)

    @property
    def filling(self) -> int:
        """Of the first step so many blocks are there only to fill it: copies of the first block, masked."""
        return self.steps * self.config.blocks - self.listed

    @property
    def rings(self) -> int:
        return 1 if self.config.shared else WARPGROUPS

    def barrier(self, ring, i):
        """Which of the barriers of all rings' slots step i of a ring has."""
        return ring * self.config.stages + lax.rem(i, self.config.stages)

    @property
    def offset(self) -> float:
        """log2 of what P is multiplied by."""
        return LOG2_E4M3_MAX if self.quantized else 0.0

    @property
    def sum_rows(self) -> int:
        return SUM_ROWS if self.quantized else 0


class Place(NamedTuple):
    """Where a warpgroup is: head counts those of all batches, h those of one; tile is of TILE_Q queries."""

    head: jax.Array
    batch: jax.Array
    h: jax.Array
    tile: jax.Array
    wg: jax.Array

    @property
    def queries(self) -> jax.Array:
        """The first of this warpgroup's."""
        return self.tile * TILE_Q + self.wg * hw.ROWS


def _rows_of(call: Call, ref, at: Place, name: str, rows):
    return ref[name].at[at.head, rows] if call.quantized else ref[name].at[at.batch, rows, at.h]


def _block(call: Call, ref, at: Place, row, i):
    """The i-th block of a list."""
    return (call.blocks - 1) - i if call.dense else ref["index"][at.head, row, i]


def _load(call: Call, ref, at: Place, ring: int):
    """Sends for what one ring's warpgroups multiply. K of a step and V of the one before lie in one slot."""
    bk, stages, parts = call.config.block_k, call.config.stages, call.config.blocks
    steps, first_full = call.steps, ref["first_full"].at[ring]
    row = at.tile * call.rings + ring
    if ring == 0 and "combined" in ref:
        plgpu.copy_gmem_to_smem(ref["combined"].at[at.head], ref["combined_smem"], ref["combined_full"])

    def blocks_of(i):
        entries = [jnp.clip(i * parts + part - call.filling, 0, call.listed - 1) for part in range(parts)]
        return tuple(_block(call, ref, at, row, entry) for entry in entries)

    def slot_part(memory, part):
        return memory if parts == 1 else memory.at[pl.ds(part * bk, bk)]

    def load_keys(found, slot, barrier):
        for part, j in enumerate(found):
            k_block = _rows_of(call, ref, at, "k", pl.ds(j * bk, bk))
            plgpu.copy_gmem_to_smem(k_block, slot_part(ref["k_smem"].at[ring, slot], part), barrier)

    def load_values(found, slot, barrier):
        if call.quantized:
            v_block = ref["v"].at[at.head, :, pl.ds(found[0] * bk, bk)]
            plgpu.copy_gmem_to_smem(v_block, ref["v_smem"].at[ring, slot, pl.ds(0, call.dim)], barrier)
            return
        for part, j in enumerate(found):
            v_block = _rows_of(call, ref, at, "v", pl.ds(j * bk, bk))
            plgpu.copy_gmem_to_smem(v_block, slot_part(ref["v_smem"].at[ring, slot], part), barrier)

    def wait_empty(i):
        plgpu.barrier_wait(ref["empty"].at[call.barrier(ring, i)])

    def step(i, found):
        slot, full = lax.rem(i, stages), ref["full"].at[call.barrier(ring, i)]
        before, now = found
        ahead = blocks_of(i + 1)
        pl.when(i >= stages)(lambda: wait_empty(i))
        load_keys(now, slot, full)
        load_values(before, slot, full)
        return now, ahead

    for slot in range(stages if call.quantized else 0):
        below = ref["v_smem"].at[ring, slot, pl.ds(call.dim, call.sum_rows)]
        plgpu.copy_gmem_to_smem(ref["ones"].at[pl.ds(0, call.sum_rows)], below, first_full)
    now = blocks_of(jnp.int32(0))
    load_keys(now, 0, first_full)
    before, _ = lax.fori_loop(1, steps, step, (now, blocks_of(jnp.int32(1))))
    if steps >= stages:
        wait_empty(jnp.int32(steps))
    load_values(before, steps % stages, ref["last_full"].at[ring])

    # Stay until every slot was read: a warpgroup must not leave while another one still multiplies.
    @pl.loop(max(0, steps + 1 - stages), steps + 1)
    def _(i):
        wait_empty(i)


def _attend(call: Call, ref, at: Place):
    """One warpgroup's queries against all its keys: (sums of P V [64, d], of P [64], maximum in log2 [64])."""
    quantized, stages, steps, interpret = call.quantized, call.config.stages, call.steps, call.interpret
    wg, bk, filling, tail = at.wg, call.config.block_k, call.filling, call.tail
    ring = 0 if call.config.shared else wg
    row = at.tile if call.config.shared else at.tile * WARPGROUPS + wg
    q_smem = ref["q_smem" if quantized else "tile_smem"]
    rows = pl.ds(at.queries, hw.ROWS)
    plgpu.copy_gmem_to_smem(_rows_of(call, ref, at, "q", rows), q_smem.at[wg], ref["q_full"].at[wg])
    if "raw_q" in ref:
        raw_q = ref["raw_q"].at[at.batch, rows, at.h]
        plgpu.copy_gmem_to_smem(raw_q, ref["tile_smem"].at[wg], ref["raw_full"].at[wg])
    q_scale = ref["q_scale"][at.head, at.tile * WARPGROUPS + wg] if quantized else None

    def scale_of(i):
        if not quantized:
            return jnp.float32(call.scale)
        i = jnp.minimum(i, steps - 1)
        place = (_block(call, ref, at, row, i),) if call.dense else (row, i)
        return q_scale * ref["k_scale"][at.head, *place]

    # In 16 bits on hardware P V is added to what was summed before where that lies; elsewhere it starts from
    # zero: see the head of this file for FP8, and the interpreter cannot start from anything else.
    in_place = not quantized and not interpret
    stage = ref["p_smem"].at[wg] if interpret else None
    # The next slot is awaited while this one is read: a ring of one would wait for ever.
    overlapped = stages > 1

    score_dtype = jnp.int32 if quantized else jnp.float32
    # The interpreter multiplies no e4m3 into float16.
    sum_dtype = jnp.float16 if quantized and not interpret else jnp.float32
    scores_ref = plgpu.WGMMAAccumulatorRef((hw.ROWS, call.width), score_dtype)
    sums_ref = plgpu.WGMMAAccumulatorRef((hw.ROWS, call.dim + call.sum_rows), sum_dtype)

    def multiply_keys(s, slot):
        plgpu.wgmma(s, q_smem.at[wg], ref["k_smem"].at[ring, slot].transpose((1, 0)))

    def multiply_values(pv, p, acc, slot):
        if in_place:
            pv[...] = acc
        v = ref["v_smem"].at[ring, slot]
        plgpu.wgmma(pv, stage if interpret else p, v.transpose((1, 0)) if quantized else v)

    def slot_read(i):
        plgpu.barrier_arrive(ref["empty"].at[call.barrier(ring, i)])

    # Reading an accumulator waits for the tensor cores, but nothing ties the registers to that wait: hence
    # the optimization barriers (see `hw.product`).

    def maximum(s, factor, m):
        """Scores in float32, the factor on what was summed before, the new maximum."""
        s = s.astype(jnp.float32)
        new_m = jnp.maximum(m, s.max(axis=1) * factor)
        return s, jnp.exp2(m - new_m), new_m

    def probabilities(s, factor, m) -> tuple[Any, Any]:
        """The operand P of the next product and the sum of its rows, where the product does not give it."""
        p = jnp.exp2(s * factor - hw.per_row(m - call.offset, s))
        total = () if quantized else p.sum(axis=1)
        p = hw.to_fp8(p, stage) if quantized else hw.to_16bit(p, call.dtype, stage)
        return () if interpret else p, total

    def add(acc, alpha, pv):
        return pv if in_place else acc * hw.per_row(alpha, acc) + pv.astype(jnp.float32)

    def first_step():
        plgpu.barrier_wait(ref["first_full"].at[ring])

        def run(s):
            multiply_keys(s, 0)
            return s[...]

        s = lax.optimization_barrier(pl.run_scoped(run, scores_ref)).astype(jnp.float32)
        slot_read(jnp.int32(0))
        if tail < bk or filling:  # the ragged block, where a list has it, is its first
            valid = jnp.where(_block(call, ref, at, row, 0) == call.blocks - 1, tail, bk)
            column = plgpu.broadcasted_iota(jnp.int32, (call.width,), 0, layout=hw.PER_COLUMN)
            key = hw.per_column(column, s) - filling * bk
            first_block = jnp.where(key < valid, s, -jnp.inf)
            s = jnp.where(key < bk, first_block, s)
            if filling:
                s = jnp.where(key >= 0, s, -jnp.inf)
        factor = scale_of(0)
        m = s.max(axis=1) * factor
        return m, *probabilities(s, factor, m)

    def step(i, ahead_full, carry):
        """Q K of step i with P V of the step before. ahead_full: barrier of what the next multiplies."""
        acc, m, total, p, alpha, factor = carry
        ahead = scale_of(i + 1)  # the load is in flight during this step
        slot = lax.rem(i, stages)

        def run(s, pv):
            multiply_keys(s, slot)
            multiply_values(pv, p, acc, slot)
            if not overlapped:
                return s[...], pv[...]
            s = lax.optimization_barrier(plgpu.wgmma_accumulator_load(s, wait_n=1))
            found = lax.optimization_barrier(maximum(s, factor, m))
            # A branch: without one ptxas moves the wait for P V in front of the maximum.
            plgpu.barrier_wait(ahead_full)
            return found, pv[...]

        found, pv = lax.optimization_barrier(pl.run_scoped(run, scores_ref, sums_ref))
        slot_read(i)
        s, new_alpha, new_m = found if overlapped else maximum(found, factor, m)
        acc = add(acc, alpha, pv)
        p, rows_sum = probabilities(s, factor, new_m)
        if in_place:
            acc = acc * hw.per_row(new_alpha, acc)
        if not quantized:
            total = total * new_alpha + rows_sum
        if not overlapped:
            plgpu.barrier_wait(ahead_full)
        return acc, new_m, total, p, new_alpha, ahead

    def last_product(acc, p, alpha):
        def run(pv):
            multiply_values(pv, p, acc, steps % stages)
            return pv[...]

        return add(acc, alpha, lax.optimization_barrier(pl.run_scoped(run, sums_ref)))

    def full_of(i):
        return ref["full"].at[call.barrier(ring, i)]

    last_full = ref["last_full"].at[ring]
    plgpu.barrier_wait(ref["q_full"].at[wg])
    m, p, total = first_step()
    alpha = hw.full((hw.ROWS,), 1.0, hw.PER_ROW)
    carry = (hw.full((hw.ROWS, call.dim + call.sum_rows), 0.0, hw.TILE), m, total, p, alpha, scale_of(1))
    plgpu.barrier_wait(full_of(jnp.int32(1)) if steps > 1 else last_full)
    if steps > 1:
        carry = lax.fori_loop(1, steps - 1, lambda i, carry: step(i, full_of(i + 1), carry), carry)
        carry = step(jnp.int32(steps - 1), last_full, carry)
    acc, m, total, p, alpha, _ = carry
    acc = last_product(acc, p, alpha)
    slot_read(jnp.int32(steps))
    if quantized:
        acc, total = acc[:, : call.dim], acc[:, call.dim :].max(axis=1)
    return acc, total, m


def _linear_branch(call: Call, ref, at: Place, feature_map: str):
    """Its products and the output go where the queries were: nothing reads them any more."""
    tile = ref["tile_smem"].at[at.wg]
    if call.quantized:
        plgpu.barrier_wait(ref["raw_full"].at[at.wg])
    f = FEATURE_MAPS[feature_map](plgpu.load(tile, layout=hw.TILE).astype(jnp.float32))
    f = f.astype(call.dtype).astype(jnp.float32)
    f_sum = plgpu.load(ref["f_sum"].at[at.head], layout=hw.PER_COLUMN, optimized=False)
    norm = (f * hw.per_column(f_sum, f)).sum(axis=1) + DENOMINATOR_EPS
    operand = hw.to_16bit(f, call.dtype, tile if call.interpret else None)
    plgpu.barrier_wait(ref["combined_full"])
    product = hw.product(operand, ref["combined_smem"], (hw.ROWS, call.dim))
    bias = plgpu.load(ref["bias"], layout=hw.PER_COLUMN, optimized=False).astype(jnp.float32)
    return product * hw.per_row(1.0 / norm, product) + hw.per_column(bias, product)


def _finish(call: Call, ref, at: Place, acc, total, m, feature_map: str | None):
    """Writes the output of one warpgroup's queries, the log-sum-exp and, where it has a place, the largest |output|."""
    tile, lse = ref["tile_smem"].at[at.wg], ref["lse_smem"].at[at.wg]
    acc = acc * hw.per_row(1.0 / total, acc)
    if call.quantized:
        v_scale = plgpu.load(ref["v_scale"].at[at.head], layout=hw.PER_COLUMN, optimized=False)
        acc = acc * hw.per_column(v_scale, acc)
    if feature_map is not None:
        acc = acc + _linear_branch(call, ref, at, feature_map)
    tile[...] = acc.astype(call.dtype)
    lse[...] = m + jnp.log2(total) - call.offset
    rows = pl.ds(at.queries, hw.ROWS)
    if "amax" in ref:
        # Rounding keeps order: the maximum rounded is the maximum of what is rounded.
        top = jnp.abs(acc).max(axis=1).astype(call.dtype)
        ref["amax"].at[at.head, rows][...] = top.astype(jnp.float32)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile, ref["out"].at[at.batch, rows, at.h])
    plgpu.copy_smem_to_gmem(lse, ref["lse"].at[at.head, rows])
    plgpu.wait_smem_to_gmem(0)


def hopper_attention(
    q, q_scale, k, k_scale, v, v_scale, index, *, shape, lk, dtype, scale, config: AttentionTiles, interpret,
    linear: LinearBranch | None = None, amax: bool = False,
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
    amax: whether the largest |output| of each row is wanted.

    Returns (output in dtype, log2-sum-exp2 of the scaled scores [n, tiles * 128] float32), and if `amax` the largest
    |output| [n, tiles * 128] float32.
    """
    quantized = q.dtype == jnp.int8
    _, rows, heads, dim = shape
    n, tiles = shape[0] * heads, -(-rows // TILE_Q)
    listed = -(-lk // config.block_k) if index is None else index.shape[2]
    call = Call(
        quantized=quantized, dense=index is None, dim=dim, dtype=dtype, lk=lk, listed=listed,
        scale=scale, config=config, interpret=interpret,
    )  # fmt: skip
    feature_map = None if linear is None else linear.feature_map

    def body(ref):
        head, tile, wg = lax.axis_index("head"), lax.axis_index("tile"), lax.axis_index("wg")
        at = Place(head, head // heads, head % heads, tile, wg)

        @pl.when(wg < WARPGROUPS)
        def _():
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            _finish(call, ref, at, *_attend(call, ref, at), feature_map)

        @pl.when(wg == WARPGROUPS)
        def _():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
            if call.rings == 1:
                _load(call, ref, at, 0)
            else:

                @plgpu.warp_map
                def _(warp):
                    for ring in range(call.rings):
                        pl.when(warp == ring)(functools.partial(_load, call, ref, at, ring))

    inputs = {"q": q, "q_scale": q_scale, "k": k, "k_scale": k_scale, "v": v, "v_scale": v_scale, "index": index}
    if linear is not None:
        inputs |= {"raw_q": linear.q, "combined": linear.combined, "f_sum": linear.f_sum, "bias": linear.bias}
    inputs = {name: x for name, x in inputs.items() if x is not None}
    if quantized:
        inputs["ones"] = hw.ones(call.sum_rows, call.width, v.dtype)
    stages, parts, rings = config.stages, config.blocks, call.rings
    slots = rings * stages
    v_tile = (dim + call.sum_rows, call.width) if quantized else (call.width, dim)
    scratch = {
        "k_smem": plgpu.SMEM((rings, stages, call.width, dim), k.dtype),
        "v_smem": plgpu.SMEM((rings, stages, *v_tile), v.dtype),
        "tile_smem": plgpu.SMEM((WARPGROUPS, hw.ROWS, dim), dtype),
        "lse_smem": plgpu.SMEM((WARPGROUPS, hw.ROWS), jnp.float32),
        "q_full": plgpu.Barrier(num_barriers=WARPGROUPS),
        "first_full": plgpu.Barrier(num_arrivals=parts + (stages if quantized else 0), num_barriers=rings),
        "full": plgpu.Barrier(num_arrivals=2 * parts, num_barriers=slots),
        "last_full": plgpu.Barrier(num_arrivals=parts, num_barriers=rings),
        "empty": plgpu.Barrier(num_arrivals=WARPGROUPS // rings, num_barriers=slots),
    }
    if quantized:
        scratch["q_smem"] = plgpu.SMEM((WARPGROUPS, hw.ROWS, dim), q.dtype)
    if linear is not None:
        scratch["combined_smem"] = plgpu.SMEM((dim, dim), dtype)
        scratch["combined_full"] = plgpu.Barrier()
        if quantized:
            scratch["raw_full"] = plgpu.Barrier(num_barriers=WARPGROUPS)
    if interpret:
        scratch["p_smem"] = plgpu.SMEM((WARPGROUPS, hw.ROWS, call.width), v.dtype)
    outputs = {
        "out": jax.ShapeDtypeStruct(shape, dtype),
        "lse": jax.ShapeDtypeStruct((n, tiles * TILE_Q), jnp.float32),
    }
    if amax:
        outputs["amax"] = jax.ShapeDtypeStruct((n, tiles * TILE_Q), jnp.float32)
    name = ("sage" if quantized else "attention") + ("_dense" if index is None else "_sparse")
    return hw.by_tiles(
        body, name, inputs, outputs, scratch, grid=(n, tiles), warpgroups=WARPGROUPS, interpret=interpret
    )

"""Gradients of 16-bit attention over block lists on Hopper (sm_90a): dQ over the lists, dK and dV over their transpose.

    P  = exp2(Q K^T scale log2(e) - lse)      lse as the forward pass returns it, in base 2 here
    dS = P (dO V^T - delta)                   delta = rowsum(dO O) less the cotangent of the log-sum-exp
    dQ = scale dS K     dK = scale dS^T Q     dV = P^T dO

One kernel does both, as each is the gradient of 64 rows that stay against tiles of 64 that stream by: for dQ the rows
are queries (Q and dO stay, K and V stream), for dK and dV they are keys (K and V stay, Q and dO stream). Transposed
scores come out of K Q^T with nothing to transpose, and P and dS go on as left operands from registers.

A block of three warpgroups: a third streams by TMA, two multiply, each every other tile of the list, and add up what
they found through shared memory at the end: a list may be of any length, and no sum depends on the order of arrival.

Roofline on H100 (989 TFLOP/s in bf16, 16 exp2 a cycle and SM at 1.755 GHz, 3.35 TB/s), head_dim 128, lists of a tenth
of the keys; 7 products of 64 x 64 x 128 a tile against the 5 of a dense backward pass (P is made twice):
    32,760 tokens, 12 heads    2.3 TFLOP: 2.3 ms of wgmma    2.6e9 exp2: 0.7 ms    1.3e6 tiles of 32 KiB from L2
    75,600 tokens, 40 heads    41 TFLOP: 41 ms               4.6e10 exp2: 12 ms    2.2e7 tiles
wgmma bounds it; with both operands in shared memory and 64 columns, S and dP run at the rate that shared memory feeds.
Measured on one H100 at the first shape: 4.0 ms, cuDNN's dense backward pass 30.4 ms.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32

from pallas_kernels import _hopper as hw

TILE = hw.ROWS
"""Rows that stay, and rows of a tile that streams by."""
WARPGROUPS = 2
STAGES = 4
"""Slots of the ring. Even, so that each slot is always the same warpgroup's: a barrier counts phases by waiter."""


def sparse_backward(
    arguments: tuple[Array, Array, Array, Array],
    results: tuple[Array, Array],
    cotangents: tuple[Array, Array],
    *,
    scale: float,
    block_q: int,
    block_k: int,
    interpret: bool,
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv) of `block_sparse_attention`.

    arguments: q [b, lq, h, d], k and v [b, lk, h, d] bfloat16, block_index int32 [b, h, nq, s].
    results: the output and its natural log-sum-exp [b, h, lq] float32; cotangents: of both.
    """
    (q, k, v, block_index), (o, lse), (do, dlse) = arguments, results, cotangents
    b, lq, h, _ = q.shape
    lk, n = k.shape[1], b * h
    delta = jnp.einsum("blhd,blhd->bhl", do, o, preferred_element_type=jnp.float32) - dlse
    rows = -lq % TILE
    # Rows of padding: P is exp2(-inf) there, so that they add nothing to dK and dV.
    lse = jnp.pad((lse * hw.LOG2E).reshape(n, lq), ((0, 0), (0, rows)), constant_values=math.inf)
    delta = jnp.pad(delta.reshape(n, lq), ((0, 0), (0, rows)))
    # TMA wants whole tiles of 8 rows in global memory; what lies behind the end it reads as zeros.
    q, k, v, do = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, 0))) for x in (q, k, v, do))
    index = block_index.reshape(n, *block_index.shape[2:]).astype(jnp.int32)
    options = {"lse": lse, "delta": delta, "scale": scale, "interpret": interpret}
    (dq,) = _gradients(
        q, do, k, v, *rows_of(index), lists=(block_q, block_k), keys=False, clamp=lk % block_k != 0, **options
    )
    # Here keys behind the last one spoil their own rows alone, which are cut off.
    dk, dv = _gradients(
        k, v, q, do, *transposed(index, -(-lk // block_k)), lists=(block_k, block_q), keys=True, clamp=False, **options
    )
    return dq[:, :lq], dk[:, :lk], dv[:, :lk]


def rows_of(index: Int32[Array, "n nq s"]) -> tuple[Int32[Array, "n nq+1"], Int32[Array, "n nnz"]]:
    """Lists of equal length as (where each begins, all of them one behind the other)."""
    n, nq, selected = index.shape
    begin = jnp.broadcast_to(jnp.arange(nq + 1, dtype=jnp.int32) * selected, (n, nq + 1))
    return begin, index.reshape(n, nq * selected)


def transposed(
    index: Int32[Array, "n nq s"], blocks: int
) -> tuple[Int32[Array, "n {blocks}+1"], Int32[Array, "n nnz"]]:
    """For each key block the query blocks whose lists hold it, rising: (where each begins, all of them)."""
    n, nq, _ = index.shape
    if blocks * nq >= 2**31:
        raise ValueError(f"{nq} query blocks of {blocks} key blocks: their pairs do not fit in int32")
    pairs = (index * nq + jnp.arange(nq, dtype=jnp.int32)[:, None]).reshape(n, -1)
    head = jnp.arange(n, dtype=jnp.int32)[:, None]
    counts = jnp.zeros((n, blocks), jnp.int32).at[head, index.reshape(n, -1)].add(1)
    begin = jnp.pad(jnp.cumsum(counts, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
    return begin, jnp.sort(pairs, axis=1) % nq


def _gradients(
    stay, stay2, stream, stream2, begin, entries, *, lse, delta, lists, keys: bool, clamp: bool, scale, interpret
):
    """Gradients of `stay` (and, for keys, of `stay2`): arrays like it.

    stay, stay2: Q and dO, or for keys K and V; stream, stream2: the other pair. All [b, l, h, d] bfloat16.
    begin int32 [n, nb + 1], entries int32 [n, nnz]: blocks of `stream` for each block of `stay`.
    lists: rows of a block of `stay` and of `stream`, multiples of TILE. lse, delta float32 [n, padded queries].
    clamp: `stream` has keys behind its end. They are zeros and add nothing as long as P stays finite.
    """
    b, length, heads, dim = stay.shape
    block, streamed = lists
    parts = streamed // TILE  # tiles of a block that streams
    outputs = 2 if keys else 1
    tiles = -(-length // TILE)

    def body(ref):
        head, tile, wg = lax.axis_index("head"), lax.axis_index("tile"), lax.axis_index("wg")
        batch, h = head // heads, head % heads
        row = lax.div(tile * TILE, jnp.int32(block))
        first = ref["begin"][head, row]
        steps = (ref["begin"][head, row + 1] - first) * parts
        here = pl.ds(tile * TILE, TILE)

        def statistics(rows, lse_smem, delta_smem, barrier):
            plgpu.copy_gmem_to_smem(ref["lse"].at[head, rows], lse_smem, barrier)
            plgpu.copy_gmem_to_smem(ref["delta"].at[head, rows], delta_smem, barrier)

        def produce():
            plgpu.copy_gmem_to_smem(ref["stay"].at[batch, here, h], ref["stay_smem"], ref["stay_full"])
            plgpu.copy_gmem_to_smem(ref["stay2"].at[batch, here, h], ref["stay2_smem"], ref["stay_full"])
            if not keys:
                statistics(here, ref["lse_smem"], ref["delta_smem"], ref["stay_full"])

            @pl.loop(0, steps)
            def _(i):
                slot = lax.rem(i, STAGES)

                @pl.when(i >= STAGES)
                def _():
                    plgpu.barrier_wait(ref["empty"].at[slot])

                entry = ref["entries"][head, first + lax.div(i, jnp.int32(parts))]
                there = pl.ds(entry * streamed + lax.rem(i, jnp.int32(parts)) * TILE, TILE)
                full = ref["full"].at[slot]
                plgpu.copy_gmem_to_smem(ref["stream"].at[batch, there, h], ref["stream_smem"].at[slot], full)
                plgpu.copy_gmem_to_smem(ref["stream2"].at[batch, there, h], ref["stream2_smem"].at[slot], full)
                if keys:
                    statistics(there, ref["lse_smem"].at[slot], ref["delta_smem"].at[slot], full)

            # Stay until every slot was read: a warpgroup must not leave while another one still multiplies.
            @pl.loop(jnp.maximum(0, steps - STAGES), steps)
            def _(i):
                plgpu.barrier_wait(ref["empty"].at[lax.rem(i, STAGES)])

        def consume():
            plgpu.set_max_registers(240, action="increase")  # 504 = 3 x 168 in all: more hangs
            plgpu.barrier_wait(ref["stay_full"])
            fixed = {} if keys else {name: _load(hw.PER_ROW, ref[name]) for name in ("lse_smem", "delta_smem")}

            def step(i, sums):
                slot = lax.rem(i, STAGES)
                plgpu.barrier_wait(ref["full"].at[slot])
                stream, stream2 = ref["stream_smem"].at[slot], ref["stream2_smem"].at[slot]

                def statistic(name, like):
                    """Of keys only where it is needed: both before the products would not fit the registers."""
                    if keys:
                        return hw.per_column(_load(hw.PER_COLUMN, ref[name].at[slot]), like)
                    return hw.per_row(fixed[name], like)

                def scores(s_acc, dp_acc):
                    plgpu.wgmma(s_acc, ref["stay_smem"], stream.transpose((1, 0)))
                    plgpu.wgmma(dp_acc, ref["stay2_smem"], stream2.transpose((1, 0)))
                    # The barriers are needed: see `hw.product`.
                    s = lax.optimization_barrier(plgpu.wgmma_accumulator_load(s_acc, wait_n=1))
                    exponent = s * (scale * hw.LOG2E) - statistic("lse_smem", s)
                    p = jnp.exp2(jnp.minimum(exponent, 0.0) if clamp else exponent)
                    dp = lax.optimization_barrier(plgpu.wgmma_accumulator_load(dp_acc, wait_n=0))
                    return p, p * (dp - statistic("delta_smem", dp))

                accumulator = plgpu.WGMMAAccumulatorRef((TILE, TILE), jnp.float32)
                p, ds = pl.run_scoped(scores, accumulator, accumulator)
                factors = [(ds, stream), (p, stream2)][:outputs]
                sums = _add_products(sums, factors, ref["left_smem"].at[wg] if interpret else None)
                plgpu.barrier_arrive(ref["empty"].at[slot])
                return sums

            mine = lax.div(steps - wg + WARPGROUPS - 1, jnp.int32(WARPGROUPS))
            zeros = (hw.full((TILE, dim), 0.0, hw.TILE),) * outputs
            sums = lax.fori_loop(0, mine, lambda i, sums: step(i * WARPGROUPS + wg, sums), zeros)

            @pl.when(wg == 1)
            def _():
                for i, found in enumerate(sums):
                    if i:
                        plgpu.barrier_wait(ref["taken"])
                    ref["sum_smem"][...] = found
                    plgpu.barrier_arrive(ref["given"])

            @pl.when(wg == 0)
            def _():
                for i, found in enumerate(sums):
                    plgpu.barrier_wait(ref["given"])
                    total = found + plgpu.load(ref["sum_smem"], layout=hw.TILE, optimized=False)
                    if i + 1 < outputs:
                        plgpu.barrier_arrive(ref["taken"])
                    # dV has no scale. Nobody reads the tiles that stayed any more.
                    staged = ref[("stay_smem", "stay2_smem")[i]]
                    staged[...] = (total * (1.0 if i else scale)).astype(stay.dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(staged, ref[f"out{i}"].at[batch, here, h])
                plgpu.wait_smem_to_gmem(0)

        pl.when(wg < WARPGROUPS)(consume)

        @pl.when(wg == WARPGROUPS)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            produce()

    def tile_smem(*count):
        return plgpu.SMEM((*count, TILE, dim), stay.dtype)

    inputs = {"stay": stay, "stay2": stay2, "stream": stream, "stream2": stream2}
    inputs |= {"lse": lse, "delta": delta, "begin": begin, "entries": entries}
    statistics_smem = plgpu.SMEM((STAGES, TILE) if keys else (TILE,), jnp.float32)
    scratch = {
        "stay_smem": tile_smem(),
        "stay2_smem": tile_smem(),
        "stream_smem": tile_smem(STAGES),
        "stream2_smem": tile_smem(STAGES),
        "lse_smem": statistics_smem,
        "delta_smem": statistics_smem,
        "sum_smem": plgpu.SMEM((TILE, dim), jnp.float32),
        "stay_full": plgpu.Barrier(num_arrivals=2 if keys else 4),
        "full": plgpu.Barrier(num_arrivals=4 if keys else 2, num_barriers=STAGES),
        "empty": plgpu.Barrier(num_barriers=STAGES),
        "given": plgpu.Barrier(),
        "taken": plgpu.Barrier(),
    }
    if interpret:
        scratch["left_smem"] = plgpu.SMEM((WARPGROUPS, outputs, TILE, TILE), stay.dtype)
    out = {f"out{i}": jax.ShapeDtypeStruct(stay.shape, stay.dtype) for i in range(outputs)}
    return hw.by_tiles(
        body,
        "attention_sparse_" + ("dk_dv" if keys else "dq"),
        inputs,
        out,
        scratch,
        grid=(b * heads, tiles),
        warpgroups=WARPGROUPS,
        interpret=interpret,
    )


def _load(layout, vector):
    return plgpu.load(vector, layout=layout, optimized=False)


def _add_products(sums, factors, stage):
    """sum + left @ right for each, left a float32 tile. Hardware adds in place, its left operands in registers."""
    if stage is None:

        def run(accumulators):
            for accumulator, (left, right) in zip(accumulators, factors, strict=True):
                plgpu.wgmma(accumulator, left.astype(right.dtype), right)

        return lax.optimization_barrier(pl.run_state(run)(tuple(plgpu.WGMMAAccumulatorRef.init(x) for x in sums)))
    out = []
    for i, (total, (left, right)) in enumerate(zip(sums, factors, strict=True)):
        left = hw.to_16bit(left, right.dtype, stage.at[i])
        out.append(total + hw.product(left, right, total.shape))
    return tuple(out)

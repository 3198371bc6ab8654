"""The INT8 product of `int8_linear` on Hopper: wgmma, TMA, a persistent grid of warp-specialised blocks.

A block computes tiles of [128, tile_n]: two warpgroups multiply, 64 rows each, while a third streams operands
through a ring of `stages` slots and runs ahead into the next tile during the epilogue. Two blocks may form a cluster
along M that shares each weight tile by multicast. Where the rows' maxima are known x may be bfloat16: three of the
loading warpgroup's warps then round it (`_hopper_round_ahead`).

Why these shapes (H100: 132 SMs, 4,096 INT8 multiply-adds a cycle and SM):
- a [128, 256] tile of 128 deep is 1,024 cycles of tensor core against 48 KiB from L2, 48 B a cycle and SM. L2 gives
  25 to 30, so the tile has to be this large, and the cluster (32 B) pays where both blocks stay in step;
- 64 x 256 INT32 sums are 128 registers a thread; twice that spills. Rescaling every 128 of K (`blocks`) holds a
  float32 sum beside them, hence its narrower tile.

Expected on H100 (1,979 TOPS dense INT8, 3.35 TB/s), M = 32,760:
    1536 -> 1536   155 GOP,  0.15 GB: 0.08 ms      5120 ->  5120  1.72 TOP, 0.53 GB: 0.87 ms
    1536 -> 8960   902 GOP,  0.65 GB: 0.46 ms      5120 -> 13824  4.64 TOP, 1.14 GB: 2.34 ms
All but the first (bytes: 0.05 ms) are bound by wgmma; bf16 takes at least twice as long.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from pallas_kernels import _plgpu as plgpu
from pallas_kernels._hopper_round_ahead import UNIT, fence_before_tma, round_rows
from pallas_kernels._loads import load_rows
from pallas_kernels.dispatch import core_count
from pallas_kernels.int8_epilogue import epilogue
from pallas_kernels.quantize_kernels import rounded_to_int8
from pallas_kernels.rounding import AMAX_FLOOR, BLOCK, INT8_MAX_TOKEN
from pallas_kernels.row_measures import MEASURES, Measure

WARPGROUPS = 2
ROWS = 64
TILE_M = WARPGROUPS * ROWS
TILE_K = 128
SLOTS = 2  # staging buffers a warpgroup: one is stored while the other is filled
PREFETCHED = 32  # steps from which on it pays to bring to L2 what the staging has no room for of the residual


@dataclasses.dataclass(frozen=True)
class HopperTiles:
    """tile_n: columns a block. stages: ring slots. cluster: blocks along M sharing weights (1 or 2).
    group: tiles of N that are walked together before M advances past them, so that weights stay in L2."""

    tile_n: int = 256
    stages: int = 4
    cluster: int = 1
    group: int = 8


class Registers(NamedTuple):
    """Of a thread that multiplies and of one that loads: a block has 3 times 168, two parts of the first."""

    multiplying: int
    loading: int


LOADING, ROUNDING = Registers(232, 40), Registers(200, 104)


def supports_hopper(n: int, k: int, dtype: DTypeLike) -> str | None:
    """Why this kernel cannot run a product of this shape, or None if it can."""
    columns = BLOCK // jnp.dtype(dtype).itemsize
    if k % BLOCK:
        return f"K = {k} is not a multiple of {BLOCK} (a tile in shared memory)"
    if n % columns:
        return f"N = {n} is not a multiple of {columns} (128 bytes of {jnp.dtype(dtype).name})"
    return None


def hopper_gemm(
    x, weight, x_scale, weight_scale, bias, residual, gate, *, activation, dtype, tiles: HopperTiles, interpret,
    x_amax=None, measure: Measure | None = None,
):  # fmt: skip
    """[M, K] int8 and [N, K] int8 to ([M, N] dtype, measure of each row of it: float32 [M] or None).

    x_scale [M] and weight_scale [N], or both in 128x128 blocks. With x_amax [M], the largest magnitudes of its rows, x
    is bfloat16, x_scale None, and the rows are rounded to INT8 while others of them are multiplied.
    """
    rows = x.shape[0]
    # Tiles in memory are 8 rows high. Every Wan shape is a multiple; others pay for a copy.
    padding = (0, -rows % 8), (0, 0)
    x, residual = jnp.pad(x, padding), None if residual is None else jnp.pad(residual, padding)
    (m, k), n = x.shape, weight.shape[0]
    # The interpreter has no semaphores: there the rows are rounded before.
    blocks, ahead = weight_scale.ndim == 2, x_amax is not None and not interpret
    tile_n, stages, cluster = tiles.tile_n, tiles.stages, 1 if interpret else tiles.cluster
    epilogue_n = BLOCK // jnp.dtype(dtype).itemsize  # a row of 128 bytes: the widest swizzle
    k_steps = pl.cdiv(k, TILE_K)
    m_tiles, n_tiles = pl.cdiv(m, TILE_M * cluster), pl.cdiv(n, tile_n)
    padded_n = n_tiles * tile_n
    bias = jnp.zeros((n,), jnp.float32) if bias is None else bias
    column_scale = jnp.ones((n,), jnp.float32) if blocks else weight_scale
    if gate is not None and not blocks and activation is None:
        # gate * (total * scale + bias) needs no third vector.
        column_scale, bias, gate = gate * column_scale, gate * bias, None
    # Vectors cover whole tiles: loads into registers are not clipped.
    columns = (0, padded_n - n)
    operands = {"x": x, "weight": weight, "bias": jnp.pad(bias, columns)}
    if x_amax is None:
        operands["x_scale"] = x_scale
    elif ahead:
        operands["x_amax"] = jnp.pad(x_amax, padding[0])
    else:
        amax = jnp.maximum(jnp.pad(x_amax, padding[0]), AMAX_FLOOR)
        operands["x_scale"] = amax / INT8_MAX_TOKEN
        operands["x"] = rounded_to_int8(x.astype(jnp.float32) * (INT8_MAX_TOKEN / amax)[:, None])
    operands |= {"weight_scale": weight_scale} if blocks else {"column_scale": jnp.pad(column_scale, columns)}
    if residual is not None:
        operands["residual"] = residual
    if gate is not None:
        operands["gate"] = jnp.pad(gate.astype(jnp.float32), columns)

    how: Any = None if measure is None else MEASURES[measure]
    registers = ROUNDING if ahead else LOADING
    vectors = ["bias"] if blocks else ["bias", "column_scale"]

    def body(*refs):
        ref = dict(zip([*operands, *outputs, *scratch], refs, strict=True))
        warpgroup = lax.axis_index("wg")
        integers = ref["integers" if ahead else "x"]
        finished = pl.get_global(plgpu.SemaphoreType.REGULAR((m_tiles,))) if ahead else None

        def tile_loop(f):
            """f(index, row, column): of this block's tiles the how-manieth, and its first row and column."""

            @plgpu.nd_loop((m_tiles * n_tiles,), collective_axes="cta")
            def _(loop):
                mi, ni = plgpu.planar_snake(loop.index[0], (m_tiles, n_tiles), 1, min(tiles.group, n_tiles))
                if cluster > 1:
                    mi = mi * cluster + lax.axis_index("cluster")
                f(loop.local_index, mi * TILE_M, ni * tile_n)

        def produce():
            def tile(index, row, column):
                if finished is not None:
                    units = jnp.minimum(TILE_M, m - row) // UNIT
                    plgpu.semaphore_wait(finished.at[row // TILE_M], units, decrement=False, memory_scope="gpu")
                    fence_before_tma()

                @pl.loop(0, k_steps)
                def _(i):
                    step = index * k_steps + i
                    slot = lax.rem(step, stages)

                    @pl.when(step >= stages)
                    def _():
                        plgpu.barrier_wait(ref["empty"].at[slot])

                    depth = pl.ds(i * TILE_K, TILE_K)
                    full = ref["full"].at[slot]
                    plgpu.copy_gmem_to_smem(integers.at[pl.ds(row, TILE_M), depth], ref["x_smem"].at[slot], full)
                    plgpu.copy_gmem_to_smem(
                        ref["weight"].at[pl.ds(column, tile_n), depth],
                        ref["w_smem"].at[slot],
                        full,
                        collective_axes="cluster" if cluster > 1 else None,
                    )

                    # The vectors wait for the last epilogue to be over: after the ring is full, not in front of it.
                    @pl.when(i == min(stages, k_steps - 1))
                    def _():
                        @pl.when(index > 0)
                        def _():
                            plgpu.barrier_wait(ref["vectors_free"])

                        for name in vectors:
                            source = ref[name].at[pl.ds(column, tile_n)]
                            plgpu.copy_gmem_to_smem(source, ref[f"{name}_smem"], ref["vectors_full"])

            tile_loop(tile)
            # Every release is awaited: the peer of a cluster may still be reading, and the interpreter insists.
            tiles_done = _local_tiles(m_tiles * n_tiles)
            total = tiles_done * k_steps

            @pl.when(tiles_done > 0)
            def _():
                plgpu.barrier_wait(ref["vectors_free"])

            @pl.loop(0, stages)
            def _(i):
                @pl.when(i < total)
                def _():
                    plgpu.barrier_wait(ref["empty"].at[lax.rem(jnp.maximum(total - stages, 0) + i, stages)])

        @pl.when(warpgroup == WARPGROUPS)
        def _fill():
            plgpu.set_max_registers(registers.loading, action="decrease")
            if not ahead:
                produce()
                return

            @plgpu.warp_map
            def _(warp):
                pl.when(warp == 0)(produce)

                @pl.when(warp > 0)
                def _():
                    round_rows(ref["x"], ref["x_amax"], ref["integers"], finished, tile=TILE_M)

        @pl.when(warpgroup < WARPGROUPS)
        def _multiply():
            plgpu.set_max_registers(registers.multiplying, action="increase")
            rows = pl.ds(warpgroup * ROWS, ROWS)

            def operands_of(slot):
                return ref["x_smem"].at[slot, rows], ref["w_smem"].at[slot].transpose((1, 0))

            def channels(row, column, first):
                # The last tile has rows that there are not; what they become is not written.
                source, layout = ref["x_amax" if ahead else "x_scale"], plgpu.Layout.WGMMA.reduce(1)
                row_scale = load_rows(source, (ROWS,), layout, first=row + warpgroup * ROWS, interpret=interpret)
                if ahead:
                    row_scale = jnp.maximum(row_scale, AMAX_FLOOR) * (1 / INT8_MAX_TOKEN)

                def accumulate(acc):
                    @pl.loop(0, k_steps)
                    def _(i):
                        slot = lax.rem(first + i, stages)
                        plgpu.barrier_wait(ref["full"].at[slot])
                        plgpu.wgmma(acc, *operands_of(slot))
                        plgpu.wgmma_wait(1)

                        @pl.when(i > 0)
                        def _():
                            plgpu.barrier_arrive(ref["empty"].at[lax.rem(first + i + stages - 1, stages)])

                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(ref["empty"].at[lax.rem(first + k_steps - 1, stages)])
                    return acc[...]

                return _awaited(accumulate, (ROWS, tile_n)), row_scale

            def rescaled(row, column, first):
                def step(i, acc):
                    slot = lax.rem(first + i, stages)
                    scale = (
                        ref["x_scale"][jnp.minimum(row // BLOCK, x_scale.shape[0] - 1), i]
                        * ref["weight_scale"][column // BLOCK, i]
                    )
                    plgpu.barrier_wait(ref["full"].at[slot])

                    def dot(part):
                        plgpu.wgmma(part, *operands_of(slot))
                        return part[...]

                    part = _awaited(dot, (ROWS, tile_n))
                    plgpu.barrier_arrive(ref["empty"].at[slot])
                    return acc + part.astype(jnp.float32) * scale

                zero = plgpu.layout_cast(jnp.zeros((ROWS, tile_n), jnp.float32), plgpu.Layout.WGMMA)
                return lax.fori_loop(0, k_steps, step, zero), None

            # Where one part is all the columns that there are, a copy of the next would not be clipped but
            # land on it: Mosaic GPU drops dimensions of one tile, and their index with them.
            parts = min(tile_n, n) // epilogue_n

            def tile(index, row, column):
                out_rows = pl.ds(row + warpgroup * ROWS, ROWS)

                def fetch(part):
                    """The part's residual, as soon as its slot was stored: during the product or the part before."""
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    slot, columns = warpgroup * SLOTS + part % SLOTS, pl.ds(column + part * epilogue_n, epilogue_n)
                    source, arrived = ref["residual"].at[out_rows, columns], ref["arrived"].at[slot]
                    plgpu.copy_gmem_to_smem(source, ref["staging"].at[slot], arrived)

                if residual is not None:
                    for part in range(min(SLOTS, parts)):
                        fetch(part)
                    if k_steps >= PREFETCHED and not interpret:
                        for part in range(SLOTS, parts):
                            columns = pl.ds(column + part * epilogue_n, epilogue_n)
                            plgpu.async_prefetch(ref["residual"].at[out_rows, columns])
                total, row_scale = (rescaled if blocks else channels)(row, column, index * k_steps)
                measured = []
                plgpu.barrier_wait(ref["vectors_full"])
                for part in range(parts):
                    slot = warpgroup * SLOTS + part % SLOTS
                    inside = pl.ds(part * epilogue_n, epilogue_n)
                    columns = pl.ds(column + part * epilogue_n, epilogue_n)
                    stage = ref["staging"].at[slot]
                    if residual is None:
                        plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)

                    def earlier(stage=stage, slot=slot):
                        plgpu.barrier_wait(ref["arrived"].at[slot])
                        return plgpu.load(stage, layout=plgpu.Layout.WGMMA)

                    y = epilogue(
                        total[:, part * epilogue_n : (part + 1) * epilogue_n],
                        row_scale=row_scale,
                        column_scale=None if blocks else _load(ref["column_scale_smem"].at[inside], 0),
                        bias=_load(ref["bias_smem"].at[inside], 0).astype(jnp.float32),
                        gate=_load(ref["gate"].at[columns], 0) if gate is not None else None,
                        residual=earlier if residual is not None else None,
                        activation=activation,
                        dtype=dtype,
                        layout=plgpu.Layout.WGMMA,
                    )
                    y = y.astype(dtype)
                    if how is not None:
                        measured.append(how.each(y))
                    stage[...] = y
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(stage, ref["out"].at[out_rows, columns])
                    if residual is not None and part + SLOTS < parts:
                        fetch(part + SLOTS)
                plgpu.barrier_arrive(ref["vectors_free"])
                if how is not None:
                    of_rows = how.reduce(functools.reduce(how.join, measured), axis=1)
                    ref["measured"].at[column // tile_n, out_rows][...] = of_rows.astype(jnp.float32)

            tile_loop(tile)
            plgpu.wait_smem_to_gmem(0)

    body.__name__ = f"int8_gemm_{'blocks' if blocks else 'channels'}" + "_rounding" * ahead
    ctas = min(core_count() // cluster, m_tiles * n_tiles)
    barrier = plgpu.Barrier
    if cluster > 1:
        empty = plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=WARPGROUPS, num_barriers=stages)
    else:
        empty = barrier(num_arrivals=WARPGROUPS, num_barriers=stages)
    scratch = {
        "x_smem": plgpu.SMEM((stages, TILE_M, TILE_K), jnp.int8),
        "w_smem": plgpu.SMEM((stages, tile_n, TILE_K), jnp.int8),
        "staging": plgpu.SMEM((WARPGROUPS * SLOTS, ROWS, epilogue_n), dtype),
        "full": barrier(num_arrivals=2, num_barriers=stages),
        "empty": empty,
        "arrived": barrier(num_barriers=WARPGROUPS * SLOTS),
        "vectors_full": barrier(num_arrivals=len(vectors)),
        "vectors_free": barrier(num_arrivals=WARPGROUPS),
    }
    scratch |= {f"{name}_smem": plgpu.SMEM((tile_n,), operands[name].dtype) for name in vectors}
    outputs = {"out": jax.ShapeDtypeStruct((m, n), dtype)}
    if how is not None:
        outputs["measured"] = jax.ShapeDtypeStruct((n_tiles, m_tiles * TILE_M * cluster), jnp.float32)
    if ahead:
        outputs["integers"] = jax.ShapeDtypeStruct((m, k), jnp.int8)
    out, *more = plgpu.kernel(
        body,
        out_type=tuple(outputs.values()),
        grid=(2 if interpret else ctas,),
        grid_names=("cta",),
        **({"cluster": (cluster,), "cluster_names": ("cluster",)} if cluster > 1 else {}),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        scratch_types=list(scratch.values()),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(*operands.values())
    # Cut first: XLA would copy what it cuts off a sum.
    return out[:rows], None if how is None else how.reduce(more[0][:, :rows], axis=0)


def _awaited(multiply, shape):
    """The INT32 sums of multiply(accumulator). Reading them waits for the tensor cores, but nothing ties the registers
    to that wait: without the barrier LLVM may move arithmetic on them in front of it."""
    accumulator = plgpu.ACC(shape, jnp.int32)  # pyright: ignore[reportPrivateImportUsage]
    return lax.optimization_barrier(pl.run_scoped(multiply, accumulator))


def _local_tiles(tiles: int):
    """How many of the tiles this block takes in a round over the grid."""
    cta, ctas = lax.axis_index("cta"), lax.axis_size("cta")
    return tiles // ctas + (cta < tiles % ctas).astype(jnp.int32)


def _load(ref, axis):
    """A vector from global memory in the layout of a [64, n] accumulator without its other axis."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(axis), optimized=False)

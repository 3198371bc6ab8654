"""The INT8 product of `int8_linear` on any GPU from sm_80: mma.sync over a ring that cp.async (TMA from sm_90) fills.

One warpgroup computes a tile of [128, tile_n]; two such blocks share an SM, so that one multiplies during the other's
epilogue. cp.async cannot clip, so the rows past the last whole tile are a product of their own.

Expected at M = 32,760 (dense INT8 peak; GDDR or HBM bandwidth):
                      RTX 4090 (660 TOPS, 1.0 TB/s)   RTX 5090 (838, 1.8)   A100 (624, 2.0)
    1536 ->  8960     1.37 ms                         1.08 ms               1.45 ms
    5120 -> 13824     7.03 ms                         5.53 ms               7.43 ms
All bound by mma.sync: a [128, 128] tile needs 16 KiB for 512 cycles of it on Ada (256 on Ampere), and reads 16 KiB of
shared memory in each 32 of K, 128 cycles.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from pallas_kernels import _plgpu as plgpu
from pallas_kernels._portable_mma import mma
from pallas_kernels.int8_epilogue import epilogue
from pallas_kernels.rounding import BLOCK

TILE_M = 128
TILE_K = 64
M_WARPS = 2  # four warps as 2 x 2: each reads half of either operand from shared memory


@dataclasses.dataclass(frozen=True)
class PortableTiles:
    """tile_n: columns a block (64 where two sums are held). stages: ring slots. group: tiles of N walked together."""

    tile_n: int = 128
    stages: int = 3
    group: int = 8


def supports_portable(n: int, k: int, dtype: DTypeLike) -> str | None:
    """Why this kernel cannot run a product of this shape, or None if it can."""
    if n % BLOCK or k % BLOCK:
        return f"N = {n} and K = {k} are not both multiples of {BLOCK}"
    return None


def portable_gemm(x, weight, x_scale, weight_scale, bias, residual, gate, *, interpret, **options):
    """[M, K] int8 and [N, K] int8 to [M, N]. x_scale [M] and weight_scale [N], or both in 128x128 blocks.
    options: activation, dtype, tiles and cp_async (fill the ring with cp.async, the only way before sm_90, not TMA)."""
    product = functools.partial(_whole_tiles, interpret=interpret, **options)
    m = x.shape[0]
    whole = m // TILE_M * TILE_M
    if whole == m:
        return product(x, weight, x_scale, weight_scale, bias, residual, gate)

    def last_rows(a):
        return None if a is None else jnp.pad(a[whole:], ((0, TILE_M - m + whole), *[(0, 0)] * (a.ndim - 1)))

    last_scale = x_scale[whole // BLOCK :] if weight_scale.ndim == 2 else last_rows(x_scale)
    tail = product(last_rows(x), weight, last_scale, weight_scale, bias, last_rows(residual), gate)[: m - whole]
    if whole == 0:
        return tail
    y = product(x, weight, x_scale, weight_scale, bias, residual, gate)
    # The barrier keeps XLA from taking y for the operand of the update ("DUS target must be a fusion parameter").
    return lax.optimization_barrier(y).at[whole:].set(tail)


def _whole_tiles(
    x,
    weight,
    x_scale,
    weight_scale,
    bias,
    residual,
    gate,
    *,
    activation,
    dtype,
    tiles: PortableTiles,
    cp_async,
    interpret,
):
    """Rows past the last whole tile are left unwritten."""
    (m, k), n = x.shape, weight.shape[0]
    blocks = weight_scale.ndim == 2
    tile_n, stages = tiles.tile_n, tiles.stages
    k_steps = k // TILE_K
    m_tiles, n_tiles = m // TILE_M, n // tile_n
    accumulator = plgpu.Layout.MMA_ACC(jnp.int8, m_warps=M_WARPS)
    operands = {"x": x, "weight": weight, "x_scale": x_scale, "weight_scale": weight_scale}
    for name, operand in (("bias", bias), ("residual", residual), ("gate", gate)):
        if operand is not None:
            operands[name] = operand if name == "residual" else operand.astype(jnp.float32)

    def body(*refs):
        ring = ["x_smem", "w_smem"] + ([] if cp_async else ["full"])
        ref = dict(zip([*operands, "out", *ring], refs, strict=True))
        mi, ni = plgpu.planar_snake(lax.axis_index("tile"), (m_tiles, n_tiles), 1, min(tiles.group, n_tiles))
        rows, columns = pl.ds(mi * TILE_M, TILE_M), pl.ds(ni * tile_n, tile_n)

        def fill(step):
            slot = lax.rem(step, stages)
            depth = pl.ds(step * TILE_K, TILE_K)
            for source, target in (
                (ref["x"].at[rows, depth], ref["x_smem"].at[slot]),
                (ref["weight"].at[columns, depth], ref["w_smem"].at[slot]),
            ):
                if cp_async:
                    plgpu.copy_gmem_to_smem(source, target, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)
                else:
                    plgpu.copy_gmem_to_smem(source, target, ref["full"].at[slot])

        def arrive(step):
            """Waits for the step's operands, and for every thread to have read the slot that is filled next."""
            if not cp_async:
                plgpu.barrier_wait(ref["full"].at[lax.rem(step, stages)])
                plgpu.commit_smem()
                return
            behind = step < k_steps - (stages - 2)

            @pl.when(behind)
            def _():
                plgpu.wait_gmem_to_smem(2 * (stages - 2))

            @pl.when(jnp.logical_not(behind))
            def _():
                plgpu.wait_gmem_to_smem(0)

        def multiply(step, total):
            arrive(step)

            @pl.when(step + stages - 1 < k_steps)
            def _():
                fill(step + stages - 1)

            slot = lax.rem(step, stages)
            a = plgpu.load(ref["x_smem"].at[slot], layout=plgpu.Layout.MMA_LHS(jnp.int8, m_warps=M_WARPS))
            b = plgpu.load(
                ref["w_smem"].at[slot].transpose((1, 0)), layout=plgpu.Layout.MMA_RHS(jnp.int8, m_warps=M_WARPS)
            )
            return mma(total, a, b, interpret)

        def zeros(dtype):
            return plgpu.layout_cast(jnp.zeros((TILE_M, tile_n), dtype), accumulator)

        def channels():
            return lax.fori_loop(0, k_steps, multiply, zeros(jnp.int32))

        def rescaled():
            def step(t, total):
                scale = ref["x_scale"][mi, t] * ref["weight_scale"][lax.div(ni * tile_n, BLOCK), t]
                part = zeros(jnp.int32)
                for half in range(BLOCK // TILE_K):
                    part = multiply(t * (BLOCK // TILE_K) + half, part)
                return total + part.astype(jnp.float32) * scale

            return lax.fori_loop(0, k // BLOCK, step, zeros(jnp.float32))

        for step in range(min(stages - 1, k_steps)):
            fill(jnp.int32(step))
        total = rescaled() if blocks else channels()

        def vector(name, index, axis):
            return plgpu.load(ref[name].at[index], layout=accumulator.reduce(axis), optimized=False)

        y = epilogue(
            total,
            row_scale=None if blocks else vector("x_scale", rows, 1),
            column_scale=None if blocks else vector("weight_scale", columns, 0),
            bias=vector("bias", columns, 0) if bias is not None else None,
            gate=vector("gate", columns, 0) if gate is not None else None,
            residual=(lambda: plgpu.load(ref["residual"].at[rows, columns], layout=accumulator, optimized=False))
            if residual is not None
            else None,
            activation=activation,
            dtype=dtype,
            layout=accumulator,
        )
        ref["out"].at[rows, columns][...] = y.astype(dtype)

    body.__name__ = f"int8_gemm_portable_{'blocks' if blocks else 'channels'}"
    # Pallas declares both classes abstract, and makes instances of them.
    tiling: Any = plgpu.TilingTransform
    swizzle: Any = plgpu.SwizzleTransform
    transforms = (tiling((8, TILE_K)), swizzle(TILE_K))
    scratch: list[Any] = [
        plgpu.SMEM((stages, size, TILE_K), jnp.int8, transforms=transforms) for size in (TILE_M, tile_n)
    ]
    if not cp_async:
        scratch.append(plgpu.Barrier(num_arrivals=2, num_barriers=stages))
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((m, n), dtype),
        grid=(m_tiles * n_tiles,),
        grid_names=("tile",),
        scratch_types=scratch,
        # Layout inference of the Warpgroup semantics knows four warps over M only.
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(*operands.values())

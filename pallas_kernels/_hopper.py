"""What the Hopper attention kernels share: tensor-core products, the FP8 repack, and the split into row streams.

One switch, `interpret`, separates what the interpreter runs from what the hardware runs, and it lives here: the
interpreter cannot feed wgmma from registers, so there the left operand is staged in shared memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
ROWS = 64
"""Rows of one warpgroup's wgmma. With head_dim 128, 128 rows do not fit in its registers."""

TILE = plgpu.Layout.WGMMA
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)

# Order of the columns of an 8-bit left operand whose registers were filled from an accumulator without exchanging
# values between threads: operand column c of each 16 holds accumulator column FP8_ORDER[c]. V^T is stored so.
FP8_ORDER = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)


def per_row(x: jax.Array, like: jax.Array) -> jax.Array:
    """[m] -> [m, n]"""
    return lax.broadcast_in_dim(x, like.shape, [0])


def per_column(x: jax.Array, like: jax.Array) -> jax.Array:
    """[n] -> [m, n]"""
    return lax.broadcast_in_dim(x, like.shape, [1])


def full(shape: tuple[int, ...], value: float, layout) -> jax.Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def ones(rows: int, columns: int, dtype) -> jax.Array:
    """An array for kernels whose first `rows` rows are ones. The others are zeros: an array of equal numbers XLA would
    write anew in every layer; this one is a constant of the program."""
    return jnp.asarray(np.repeat([1.0, 0.0], rows)[:, None].repeat(columns, axis=1), dtype)


def product(a, b, shape: tuple[int, int], dtype=jnp.float32) -> jax.Array:
    """a @ b of two SMEM refs, or of a register operand and an SMEM ref.

    The barrier is needed: reading the accumulator waits for the tensor cores, but nothing ties the registers to
    that wait, and LLVM may move arithmetic on them in front of it.
    """

    def body(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return lax.optimization_barrier(pl.run_scoped(body, plgpu.WGMMAAccumulatorRef(shape, dtype)))


def by_tiles(body, name: str, inputs, outputs, scratch, *, grid: tuple[int, int], warpgroups: int, interpret: bool):
    """Runs body(refs) for every head and tile of the grid, in `warpgroups` warpgroups and one more that loads.

    inputs: arrays; outputs: their shapes; scratch: memory and barriers, each by its name, as body finds them in refs.
    """
    axes = {"head": grid[0], "tile": grid[1]}
    threads = {"num_threads": warpgroups + 1, "thread_name": "wg"}
    return _launch(body, name, inputs, outputs, scratch, axes, interpret, threads)


class Run(NamedTuple):
    """Consecutive tiles that a block of `by_runs` takes in turn: `count` of them from `first` on.

    load(i) sends for the i-th of them, where there is one.
    """

    first: jax.Array
    count: jax.Array
    load: Callable[[jax.Array], None]


def by_runs(
    body, name: str, inputs, outputs, scratch, *, heads: int, runs: int, interpret: bool, exact: bool = False,
    warpgroups: int = 1,
):  # fmt: skip
    """Runs body(refs) for every head and run of tiles; arguments as for `by_tiles`.

    warpgroups: one where columns are reduced, as what that sends from warp to warp goes through memory that the block
    has once. exact: division and the like are not approximated.
    """
    threads = {} if warpgroups == 1 else {"num_threads": warpgroups, "thread_name": "wg"}
    return _launch(body, name, inputs, outputs, scratch, {"head": heads, "run": runs}, interpret, threads, exact)


def by_rows(body, name: str, inputs, outputs, scratch, *, batch: int, tiles: int, interpret: bool):
    """Runs body(refs) in one warpgroup for every tile of rows of every sample, division and the like not approximated;
    arguments as for `by_tiles`."""
    return _launch(
        body, name, inputs, outputs, scratch, {"batch": batch, "tile": tiles}, interpret, threads={}, exact=True
    )


def start_run(fetch, full, slots: int, length: int, tiles: int, ahead: int, share=(0, 1)) -> Run:
    """This block's run of up to `length` of all `tiles`, with the first `ahead` of them on their way.

    fetch(tile, slot, barrier) copies a tile into a slot of a ring of `slots`, whose barriers are `full`.
    share: (which, of how many), where each warpgroup of the block has a run and a ring of its own, one behind another.
    """
    which, shares = share
    first = (lax.axis_index("run") * shares + which) * length
    count = jnp.minimum(length, tiles - first)

    def load(i):
        slot = which * slots + lax.rem(i, slots)

        @pl.when(i < count)
        def _():
            fetch(first + i, slot, full.at[slot])

    for i in range(ahead):
        load(jnp.int32(i))
    return Run(first, count, load)


def _launch(body, name, inputs, outputs, scratch, grid, interpret, threads, exact=False):
    names = [*inputs, *outputs, *scratch]

    def named(*refs):
        body(dict(zip(names, refs, strict=True)))

    named.__name__ = name
    kernel = plgpu.kernel(
        named,
        out_type=tuple(outputs.values()),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        scratch_types=list(scratch.values()),
        compiler_params=plgpu.CompilerParams(approx_math=not exact),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else False,
        **threads,
    )
    return kernel(*inputs.values())


def to_fp8(p: jax.Array, stage):
    """float32 accumulator tile [m, n] to an e4m3 left operand, its columns in FP8_ORDER.

    stage: None on hardware, where each thread repacks its own registers; an SMEM ref [m, n] in the interpreter.
    """
    m, n = p.shape
    if stage is not None:
        p8 = p.astype(jnp.float8_e4m3fn).reshape(m, n // 16, 2, 4, 2)
        stage[...] = jnp.transpose(p8, (0, 1, 3, 2, 4)).reshape(m, n)
        plgpu.commit_smem()
        return stage

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA,),
        return_type=plgpu.ShapeDtypeStruct((m, n), jnp.float8_e4m3fn, layout=plgpu.Layout.WGMMA_8BIT),
    )
    def repack(_, x):
        return _repack(x)

    return repack(p)  # pyright: ignore[reportCallIssue]  (the decorator binds the context)


def to_16bit(p: jax.Array, dtype, stage):
    """float32 accumulator tile to a left operand in `dtype`: registers on hardware, `stage` in the interpreter."""
    p = p.astype(dtype)
    if stage is None:
        return p
    stage[...] = p
    plgpu.commit_smem()
    return stage


def lane(register: Any, i: int) -> ir.Value:
    return vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))


def _repack(x: fa.FragmentedArray) -> fa.FragmentedArray:
    """Registers of a float32 WGMMA tile to those of a WGMMA_8BIT tile: two pairs of floats to one word."""
    layout = fa.WGMMA_LAYOUT_8BIT
    shape = layout.registers_shape(x.shape)
    m, n = x.shape
    pairs = x.registers.reshape(m // 64, n // 8, 2)  # [.., 8 columns, row r or r + 8] of vectors of two
    words = np.empty((m // 64, n // 16, 2), dtype=object)
    i32, f8x4 = ir.IntegerType.get_signless(32), ir.VectorType.get((4,), ir.Float8E4M3FNType.get())

    for a, b, r in np.ndindex(*words.shape):
        low, high = pairs[a, 2 * b, r], pairs[a, 2 * b + 1, r]
        word = llvm.inline_asm(
            i32,
            [lane(low, 0), lane(low, 1), lane(high, 0), lane(high, 1)],
            "{ .reg .b16 lo, hi; cvt.rn.satfinite.e4m3x2.f32 lo, $2, $1; cvt.rn.satfinite.e4m3x2.f32 hi, $4, $3; "
            "mov.b32 $0, {lo, hi}; }",
            "=r,f,f,f,f",
            asm_dialect=0,
            has_side_effects=False,
        )
        words[a, b, r] = mgpu_utils.bitcast(word, f8x4)
    return fa.FragmentedArray(_registers=words.reshape(shape), _layout=layout, _is_signed=None)

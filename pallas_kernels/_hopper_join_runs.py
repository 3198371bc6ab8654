"""What each run over the keys found, joined to what attention and routing read, on Hopper.

    (sum of f(k)^T v) projection^T          16 bits: what attention multiplies f(q) by
    means of key blocks less the mean key   what routing multiplies q by
    sum of f(k); the mean key, rotated; scales of v

One kernel in place of seven of XLA, whose launches would be half of their time. A block has SLAB rows of one head's
products, and its share of the key blocks; one more has the vectors. Bound by latency, and by 17 MB of products that the
pass over the keys has left in L2: 11 us of an H100 at 32,760 tokens, 12 heads of 128, where the bytes take 4.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._hopper_linear import BLOCK, KeyRuns, sums_of_blocks
from pallas_kernels._quantize_qkv import E4M3_MAX, hadamard, rotate, scale_of_largest
from pallas_kernels.block_map import block_counts

WIDTH = 128
"""Columns of a head, one a thread."""
SLAB = 4
AHEAD = 32
"""Vectors that are loaded at a time: a block has nothing else to do while it waits."""


class KeyOperands(NamedTuple):
    """combined: [n, d, d] in 16 bits. f_sum: float32 [n, d]. centred: float32 [n, blocks, d]. mean: float32 [n, d], the
    mean key times the Hadamard matrix. v_scale, v_inverse: float32 [n, d], or None both."""

    combined: jax.Array
    f_sum: jax.Array
    centred: jax.Array
    mean: jax.Array
    v_scale: jax.Array | None
    v_inverse: jax.Array | None


def join_runs(runs: KeyRuns, proj_w, length: int, block_k: int, value_max: float, *, interpret: bool) -> KeyOperands:
    """runs of `length` keys. proj_w [d (out), d (in)] in 16 bits, as combined will be. block_k: keys of a block, a
    multiple of BLOCK. value_max: what the largest value of a channel becomes."""
    # Interpreting the kernel takes a minute, of an op that takes seconds: that is for its own test.
    join = join_runs_kernel if proj_w.shape[0] == WIDTH and not interpret else join_runs_xla
    return join(runs, proj_w, length, block_k, value_max)


def join_runs_xla(runs, proj_w, length, block_k, value_max) -> KeyOperands:
    """`join_runs` in plain JAX."""
    highest = lax.Precision.HIGHEST
    combined = jnp.einsum("nde,oe->ndo", runs.products.sum(axis=1), proj_w.astype(jnp.float32), precision=highest)
    mean = runs.k_total.sum(axis=1) / length
    sums = sums_of_blocks(runs.k_sums[:, : -(-length // BLOCK)], block_k)
    centred = sums / block_counts(length, block_k)[:, None] - mean[:, None]
    v_scale = inverse = None
    if runs.v_max is not None:
        v_scale = scale_of_largest(runs.v_max.max(axis=1)) * (E4M3_MAX / value_max)
        inverse = 1.0 / v_scale
    return KeyOperands(combined.astype(proj_w.dtype), runs.f_sum.sum(axis=1), centred, rotate(mean), v_scale, inverse)


def join_runs_kernel(runs, proj_w, length, block_k, value_max, *, interpret: bool = False) -> KeyOperands:
    """`join_runs` for heads of WIDTH."""
    n, count, dim, _ = runs.products.shape
    slabs, blocks, tiles, per_block = dim // SLAB, -(-length // block_k), -(-length // BLOCK), block_k // BLOCK
    inputs = {name: x for name, x in runs._asdict().items() if x is not None}
    inputs |= {"projection": proj_w.T, "matrix": jnp.asarray(hadamard(dim), proj_w.dtype)}
    vectors = jax.ShapeDtypeStruct((n, dim), jnp.float32)
    outputs = {
        "combined": jax.ShapeDtypeStruct((n, dim, dim), proj_w.dtype),
        "f_total": vectors,
        "centred": jax.ShapeDtypeStruct((n, blocks, dim), jnp.float32),
        "mean": vectors,
    }
    if runs.v_max is not None:
        outputs |= {"v_scale": vectors, "v_inverse": vectors}
    scratch = {"rows_smem": plgpu.SMEM((SLAB, dim), jnp.float32)}

    def body(*refs):
        ref = dict(zip([*inputs, *outputs, *scratch], refs, strict=True))
        head, slab = lax.axis_index("head"), lax.axis_index("slab")
        rows_smem = ref["rows_smem"]

        layout = plgpu.Layout.WG_STRIDED((dim,), vec_size=1)

        def load(source):
            return plgpu.load(source, layout=layout, optimized=False).astype(jnp.float32)

        def constant(value):
            return plgpu.layout_cast(jnp.full((dim,), value, jnp.float32), layout)

        def over_runs(sources, join, start):
            """For each of `sources`, which gives the vector of a run, all of them joined."""
            at_once = AHEAD // len(sources)

            def some(group, carry):
                places = [group * at_once + i for i in range(at_once)]
                found = [[source(jnp.minimum(run, count - 1)) for source in sources] for run in places]
                for run, vectors in zip(places, found, strict=True):
                    inside = run < count
                    carry = [join(old, jnp.where(inside, new, start)) for old, new in zip(carry, vectors, strict=True)]
                return carry

            return lax.fori_loop(0, pl.cdiv(count, at_once), some, [constant(start)] * len(sources))

        def times(matrix, rows):
            """Rows in shared memory times a matrix in memory."""

            def some(group, carry):
                first = group * AHEAD
                for i, row in enumerate([load(matrix.at[first + i]) for i in range(AHEAD)]):
                    carry = [old + rows_smem[r, first + i] * row for r, old in enumerate(carry)]
                return carry

            return lax.fori_loop(0, dim // AHEAD, some, [constant(0.0)] * rows)

        (mean,) = over_runs([lambda run: load(ref["k_total"].at[head, run])], jnp.add, 0.0)
        mean = mean * (1.0 / length)

        @pl.when(slab < slabs)
        def _products_and_blocks():
            rows = [slab * SLAB + r for r in range(SLAB)]
            sources = [lambda run, row=row: load(ref["products"].at[head, run, row]) for row in rows]
            for r, total in enumerate(over_runs(sources, jnp.add, 0.0)):
                rows_smem.at[r][...] = total
            for row, product in zip(rows, times(ref["projection"], SLAB), strict=True):
                ref["combined"].at[head, row][...] = product.astype(proj_w.dtype)

            @pl.loop(0, pl.cdiv(blocks, slabs))
            def _(i):
                block = i * slabs + slab

                @pl.when(block < blocks)
                def _():
                    places = [block * per_block + p for p in range(per_block)]
                    parts = [
                        jnp.where(place < tiles, load(ref["k_sums"].at[head, jnp.minimum(place, tiles - 1)]), 0.0)
                        for place in places
                    ]
                    keys = jnp.minimum(length - block * block_k, block_k).astype(jnp.float32)
                    ref["centred"].at[head, block][...] = sum(parts[1:], parts[0]) * (1.0 / keys) - mean

        @pl.when(slab == slabs)
        def _vectors():
            (f_sum,) = over_runs([lambda run: load(ref["f_sum"].at[head, run])], jnp.add, 0.0)
            ref["f_total"].at[head][...] = f_sum
            rows_smem.at[0][...] = mean
            ref["mean"].at[head][...] = times(ref["matrix"], 1)[0] * jnp.float32(dim**-0.5)
            if runs.v_max is not None:
                (top,) = over_runs([lambda run: load(ref["v_max"].at[head, run])], jnp.maximum, 0.0)
                scale = jnp.where(top > 0, top / E4M3_MAX, 1.0) * (E4M3_MAX / value_max)
                ref["v_scale"].at[head][...] = scale
                ref["v_inverse"].at[head][...] = 1.0 / scale

    body.__name__ = "join_runs"
    combined, f_sum, centred, mean, *values = plgpu.kernel(
        body,
        out_type=tuple(outputs.values()),
        grid=(n, slabs + 1),
        grid_names=("head", "slab"),
        scratch_types=list(scratch.values()),
        # Each load states its layout: nothing to solve for.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else False,
    )(*inputs.values())
    v_scale, v_inverse = values or (None, None)
    return KeyOperands(combined, f_sum, centred, mean, v_scale, v_inverse)

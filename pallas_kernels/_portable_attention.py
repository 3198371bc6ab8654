"""Attention on any GPU from sm_80 (A100, RTX 4090, RTX 5090): dense, or over a list of key blocks for each query block.

One warpgroup attends from 64 query rows, which stay in its registers, 64 keys a step; K and V^T stream through a ring
of shared memory that cp.async (TMA from sm_90) fills. Several such blocks share an SM, so that one multiplies while
another takes its softmax. Lists for 128 rows serve two of them, key blocks of 128 take two steps.

    S  = Q8 K8^T               mma.sync s32 <- s8 x s8, both K-major in shared memory
    P  = 448 exp2(S sq sk - m)  in float32; m is the running maximum, never left out
    O  = O alpha + P8 V8       mma.sync f32 <- e4m3 x e4m3 (sm_89, sm_120), P from registers, V^T K-major

sm_80 has no e4m3 product: there V stays in its own 16-bit dtype, and so does P, without a scale. 16-bit attention
has Q and K so too. The e4m3 products start from zero and are added in float32, as on Hopper: their sums keep about
22 bits.

Expected, of mma.sync alone (dense peaks: INT8, then e4m3 or bfloat16 with float32 sums), head_dim 128:
                                      RTX 4090 (661, 330, 165)  RTX 5090 (838, 419, 210)  A100 (624, -, 312)
    INT8 dense, 32,760 tokens, 12 heads    15 ms                     12 ms                     16 ms
    INT8 dense, 75,600 tokens, 40 heads    266 ms                    210 ms                    281 ms
    bf16 at top-k 0.1, 32,760, 12          4.0 ms                    3.1 ms                    2.1 ms
INT8 block lists at top-k 0.1 take a tenth of dense. A step of 64 x 64 scores needs 1,536 cycles of a 4090's tensor
cores (512 for Q K^T, 1,024 for P V: its e4m3 sums are exact to float32 at half the rate), 256 of its exp2 unit and
512 to read K and V from shared memory four times, once a warp: mma.sync bounds it. K and V come from the L2 cache
once for each 64 rows: 16 KiB a step, 3.4 TB/s over a 4090. The memory's own traffic is 0.25 GB and 1.9 GB. An A100
with 16-bit values is bound as much by shared memory: 768 cycles a step to read it, 768 of mma.sync.
The 16 rows of a warp stand in its way; 32 would need 128 registers for O alone. On a GeForce, e4m3 with float16 sums
would double P V, but Mosaic GPU's `mma` has float32 sums only.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _hopper as hw
from pallas_kernels import _portable_mma as pm
from pallas_kernels import _portable_quantize as quantize
from pallas_kernels._heads import heads_first
from pallas_kernels._hopper_attention import _pad_axis, listed, tail_first
from pallas_kernels._hopper_attention_kernel import LOG2_E4M3_MAX
from pallas_kernels._quantize_qkv import quantize_value
from pallas_kernels.dispatch import gpu_arch
from pallas_kernels.tuning import tiles

ROWS = 64
"""Query rows of a block: 16 a warp."""
KEYS = 64
"""Keys of a step; a multiple of them is a key block."""
TMA_ARCH = (9, 0)
FP8_ARCH = (8, 9)

TILE = plgpu.Layout.MMA_ACC(jnp.int8)  # of any dtype's product
PER_ROW = TILE.reduce(1)
PER_COLUMN = TILE.reduce(0)


@dataclasses.dataclass(frozen=True)
class PortableAttention:
    """blocks: query rows that share a list, keys of its blocks. stages: ring slots. cp_async: how the ring is
    filled, TMA otherwise."""

    blocks: tuple[int, int]
    stages: int
    cp_async: bool


def sage_forward(q, k, v, block_index, *, scale, block_q, block_k, smooth_k, interpret, fp8=None):
    """Quantises and attends: q, k, v [b, l, h, d]; block_index [b, h, nq, n] or None for dense attention.

    fp8: V in e4m3, else in v's dtype; None is what the GPU has.
    Returns (output [b, lq, h, d] in q's dtype, natural log-sum-exp [b, h, lq] float32).
    """
    copies = {"cp_async": _cp_async(interpret), "interpret": interpret}
    q8, q_scale = quantize.quantize_rows(q, None, block_q, **copies)
    k8, k_scale = quantize.quantize_rows(k, quantize.rotated_mean(k) if smooth_k else None, block_k, **copies)
    if gpu_arch() >= FP8_ARCH if fp8 is None else fp8:
        values, v_scale = quantize_value(heads_first(v))
    else:
        values, v_scale = heads_first(v), None
    q_scale = q_scale * (scale * hw.LOG2E)
    operands = q8, q_scale, k8, k_scale, values, v_scale, block_index
    return _forward(operands, q, k, (block_q, block_k), None, interpret)


def sparse_forward(q, k, v, block_index, *, scale, block_q, block_k, interpret):
    """16-bit attention over block lists; arguments and results as for `sage_forward`."""
    flat_q, flat_k, flat_v = map(heads_first, (q, k, v))
    operands = flat_q, None, flat_k, None, flat_v, None, block_index
    return _forward(operands, q, k, (block_q, block_k), scale * hw.LOG2E, interpret)


def _forward(operands, q, k, blocks, scale, interpret):
    flat_q, q_scale, flat_k, k_scale, flat_v, v_scale, index = operands
    (b, lq, h, dim), lk = q.shape, k.shape[1]
    n, block_k = b * h, blocks[1]
    rows, key_blocks = -(-lq // ROWS) * ROWS, -(-lk // block_k)
    if index is not None:
        index = tail_first(index.reshape(n, *index.shape[2:]), key_blocks)
        if k_scale is not None:
            k_scale = listed(k_scale, index)
    flat_q = _pad_axis(flat_q, 1, max(rows, flat_q.shape[1]))
    flat_k, flat_v = (_pad_axis(x, 1, key_blocks * block_k) for x in (flat_k, flat_v))
    flat_v = jnp.swapaxes(pm.in_operand_order(flat_v), 1, 2)
    # Two blocks share an SM: tuning.json has the stages that half of its shared memory holds.
    chosen = tiles("attention_portable", key_bytes=dim * (flat_k.dtype.itemsize + flat_v.dtype.itemsize))
    config = PortableAttention(blocks, cp_async=_cp_async(interpret), **chosen)
    o, lse = portable_attention(
        *(flat_q, q_scale, flat_k, k_scale, flat_v, v_scale, index),
        shape=(b, rows, h, dim),
        lk=lk,
        dtype=q.dtype,
        scale=scale,
        config=config,
        interpret=interpret,
    )
    return o[:, :lq], lse[:, :lq].reshape(b, h, lq) * hw.LN2


def _cp_async(interpret):
    """cp.async before TMA; the interpreter knows TMA only."""
    return gpu_arch() < TMA_ARCH and not interpret


def portable_attention(
    q, q_scale, k, k_scale, v, v_scale, index, *, shape, lk, dtype, scale, config: PortableAttention, interpret
):
    """Attention of the first tiles * 64 of q [n, rows, d], INT8 or in dtype (then q_scale and k_scale are None).

    q_scale [n, query blocks], times the softmax scale and log2(e).
    k [n, blocks * block_k, d]. v [n, d, blocks * block_k], in dtype or (with v_scale) in e4m3 and operand order.
    scale: the softmax scale times log2(e) in 16 bits, None if q_scale holds it.
    index int32 [n, query blocks, list]: blocks in the order of the steps, the ragged last one (if there) first.
        None: all blocks, from the last to the first.
    k_scale [n, query blocks, list], or [n, blocks] when index is None. v_scale [n, d].
    shape: of the output, [b, tiles * 64, h, d]; lk: true number of keys.

    Returns (output in dtype, log2-sum-exp2 of the scaled scores [n, tiles * 64] float32).
    """
    quantized, fp8 = q.dtype == jnp.int8, v_scale is not None
    offset = LOG2_E4M3_MAX if fp8 else 0.0
    batches, rows, heads, dim = shape
    n, stages = batches * heads, config.stages
    block_q, block_k = config.blocks
    parts, blocks = block_k // KEYS, k.shape[1] // block_k
    steps = parts * (blocks if index is None else index.shape[2])
    tail = lk - (blocks - 1) * block_k  # keys of the last block
    sums = jnp.int32 if quantized else jnp.float32

    def body(*refs):
        ref = dict(zip(names, refs, strict=True))
        head, tile = lax.axis_index("head"), lax.axis_index("tile")
        here = pl.ds(tile * ROWS, ROWS)
        row = lax.div(tile * ROWS, block_q)

        def block(i):
            return blocks - 1 - i if index is None else ref["index"][head, row, i]

        def first_key(t):
            t = jnp.minimum(t, steps - 1)
            return block(lax.div(t, parts)) * block_k + lax.rem(t, parts) * KEYS

        q_scale = ref["q_scale"][head, row] if quantized else None

        def scale_of(t):
            if not quantized:
                return jnp.float32(scale)
            i = lax.div(jnp.minimum(t, steps - 1), parts)
            k_scale = ref["k_scale"]
            return q_scale * (k_scale[head, block(i)] if index is None else k_scale[head, row, i])

        def fill(name, t, key):
            source = ref["k"].at[head, pl.ds(key, KEYS)] if name == "k" else ref["v"].at[head, :, pl.ds(key, KEYS)]
            slot = lax.rem(t, stages)
            target = ref[f"{name}_smem"].at[slot]
            if config.cp_async:
                plgpu.copy_gmem_to_smem(source, target, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)
            else:
                plgpu.copy_gmem_to_smem(source, target, ref[f"{name}_full"].at[slot])

        def refill(name, t, key):
            """With what step t + stages needs, once every warp has read what step t needed."""

            @pl.when(t + stages < steps)
            def _():
                if not config.cp_async:
                    plgpu.commit_smem()
                fill(name, t + stages, key)

        def arrive(name, t):
            if not config.cp_async:
                plgpu.barrier_wait(ref[f"{name}_full"].at[lax.rem(t, stages)])
                return
            # K and V are filled in turn: behind the copy that is waited for, 2 stages - 1 others are on their way.
            steady = t + stages < steps
            pl.when(steady)(lambda: plgpu.wait_gmem_to_smem(2 * stages - 1))
            pl.when(jnp.logical_not(steady))(lambda: plgpu.wait_gmem_to_smem(0))

        def zeros(columns, kind=jnp.float32):
            return plgpu.layout_cast(jnp.zeros((ROWS, columns), kind), TILE)

        for t in range(min(stages, steps)):
            key = first_key(jnp.int32(t))
            fill("k", jnp.int32(t), key)
            fill("v", jnp.int32(t), key)
        queries = plgpu.load(ref["q"].at[head, here], layout=plgpu.Layout.MMA_LHS(q.dtype), optimized=False)
        valid_keys = lk - first_key(jnp.int32(0))

        def masked(t, s):
            column = plgpu.broadcasted_iota(jnp.int32, (KEYS,), 0, layout=PER_COLUMN)
            return jnp.where(hw.per_column(column, s) < valid_keys - t * KEYS, s, -jnp.inf)

        def step(t, carry):
            acc, m, total, factor, upcoming = carry
            ahead = scale_of(t + 1), first_key(t + 1 + stages)  # the loads are in flight during this step
            slot = lax.rem(t, stages)
            arrive("k", t)
            keys = plgpu.load(ref["k_smem"].at[slot].transpose((1, 0)), layout=plgpu.Layout.MMA_RHS(k.dtype))
            s = pm.mma(zeros(KEYS, sums), queries, keys, interpret).astype(jnp.float32)
            refill("k", t, upcoming)
            if tail < block_k:
                s = lax.cond(t < parts, masked, lambda t, s: s, t, s)
            new_m = jnp.maximum(m, s.max(axis=1) * factor)
            alpha = jnp.exp2(m - new_m)
            p = jnp.exp2(s * factor - hw.per_row(new_m - offset, s))
            total = total * alpha + p.sum(axis=1)
            p = pm.left_operand(p, v.dtype, interpret)
            arrive("v", t)
            values = plgpu.load(ref["v_smem"].at[slot].transpose((1, 0)), layout=plgpu.Layout.MMA_RHS(v.dtype))
            acc = acc * hw.per_row(alpha, acc)
            if fp8:
                acc = acc + pm.mma(zeros(dim), p, values, interpret)
            else:
                acc = pm.mma(acc, p, values, interpret)
            refill("v", t, upcoming)
            return acc, new_m, total, *ahead

        carry = (
            zeros(dim),
            hw.full((ROWS,), -jnp.inf, PER_ROW),
            hw.full((ROWS,), 0.0, PER_ROW),
            scale_of(jnp.int32(0)),
            first_key(jnp.int32(stages)),
        )
        acc, m, total, *_ = lax.fori_loop(0, steps, step, carry)
        acc = acc * hw.per_row(1.0 / total, acc)
        if fp8:
            v_scale = plgpu.load(ref["v_scale"].at[head], layout=PER_COLUMN, optimized=False)
            acc = acc * hw.per_column(v_scale, acc)
        ref["out"].at[lax.div(head, heads), here, lax.rem(head, heads)][...] = acc.astype(dtype)
        ref["lse"].at[head, here][...] = m + jnp.log2(total) - offset

    inputs = {"q": q, "q_scale": q_scale, "k": k, "k_scale": k_scale, "v": v, "v_scale": v_scale, "index": index}
    inputs = {name: x for name, x in inputs.items() if x is not None}
    scratch: dict[str, Any] = {
        "k_smem": pm.shared((stages, KEYS, dim), k.dtype),
        "v_smem": pm.shared((stages, dim, KEYS), v.dtype),
    }
    if not config.cp_async:
        scratch |= {f"{name}_full": plgpu.Barrier(num_barriers=stages) for name in "kv"}
    names = [*inputs, "out", "lse", *scratch]
    body.__name__ = ("sage" if quantized else "attention") + ("_dense" if index is None else "_sparse") + "_portable"
    kernel = plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((n, rows), jnp.float32)),
        grid=(n, rows // ROWS),
        grid_names=("head", "tile"),
        scratch_types=list(scratch.values()),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else False,
    )
    return kernel(*inputs.values())

"""Attention on Hopper (sm_90a), INT8/FP8 or 16-bit, dense or over block lists: operands, tiles and the call of the
kernel in `_hopper_attention_kernel`."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _hopper as hw
from pallas_kernels import _hopper_quantize as quantize
from pallas_kernels._hopper_attention_kernel import (
    SUM_ROWS,
    TILE_Q,
    WARPGROUPS,
    AttentionTiles,
    LinearBranch,
    hopper_attention,
)
from pallas_kernels._hopper_top_blocks import listed
from pallas_kernels._quantize_qkv import E4M3_MAX, rotate, value_scale

TMA_ROWS = 8
"""Arrays in global memory have a multiple of so many rows. What lies past the end is read as zeros, never written."""
SMEM_BYTES = 232_448
"""Shared memory that a block may have on sm_90."""


def ring_stages(dim: int, block_k: int, rings: int, itemsize: int, linear: bool = False) -> int:
    """Slots of each ring that fit in shared memory; 4 hide the latency.

    Beside them stand the staged output (in 16 bits in the place of Q), INT8 Q, the linear branch's matrix, and in
    4 KiB the log-sum-exp and the barriers.
    """
    fixed = TILE_Q * dim * (2 if itemsize == 2 else 3) + (2 * dim * dim if linear else 0) + 3584
    sum_rows = SUM_ROWS if itemsize == 1 else 0
    return min(4, (SMEM_BYTES - fixed) // (rings * block_k * (2 * dim + sum_rows) * itemsize))


def step_blocks(block_k: int, shared: bool, itemsize: int) -> int:
    """Blocks of one step. In 16 bits two of 64 keys are one of 128, where shared memory has room for two such slots:
    half the rescaling, maxima and turns."""
    return 2 if itemsize == 2 and shared and block_k == hw.ROWS else 1


def value_max(keys: int) -> float:
    """Largest |v| in e4m3, so that P V over a step of `keys` stays within float16 (65,504) whatever P is. A power of
    two times 448: the numbers that 448 would give, but for those below 1/56 of their channel's largest."""
    return 112.0 / keys


class Operands(NamedTuple):
    """What `hopper_attention` reads, as it says. None: there is none in 16 bits, or of attention to all keys."""

    q: jax.Array
    q_scale: Any
    k: jax.Array
    k_scale: Any
    v: jax.Array
    v_scale: Any
    index: Any


def sage_operands(q, k, v, *, scale, block_q, block_k, smooth_k, interpret, queries=None, keys=None) -> Operands:
    """For dense attention in INT8 and FP8, from q, k, v [b, l, h, d].

    queries: what it reads of q, INT8 and scales, where that is made already; q is not read then.
    keys: KeyOperands, where the mean key, which is subtracted then, and the scales of v are known.
    """
    lq, lk = q.shape[1], k.shape[1]
    rows, key_rows = -(-lq // TILE_Q) * TILE_Q, -(-lk // block_k) * block_k
    if keys is None:
        mean = rotate(quantize.mean_key(k)) if smooth_k else None
        v_scale = value_scale(v).reshape(-1, v.shape[-1]) * (E4M3_MAX / value_max(block_k))
        v_inverse = 1.0 / v_scale
    else:
        mean, v_scale, v_inverse = keys.mean, keys.v_scale, keys.v_inverse
    q, k, v = map(whole_rows, (q, k, v))
    if queries is None:
        q8, q_scale = quantize.quantize_rows(q, None, lq, rows, block_q, interpret=interpret)
        # In halves of a tile, however many rows share a scale.
        queries = q8, jnp.repeat(q_scale, block_q // hw.ROWS, axis=1) * (scale * hw.LOG2E)
    k8, k_scale = quantize.quantize_rows(k, mean, lk, key_rows, block_k, interpret=interpret)
    vt8 = quantize.quantize_values(v, v_inverse, key_rows, interpret=interpret)
    q8, q_scale = queries
    return Operands(q8, q_scale, k8, k_scale, vt8, v_scale, None)


def over_lists(operands: Operands, index, k_scale, block_q) -> Operands:
    """The operands of dense attention for attention over lists: index int32 [b, h, nq, n], each list `tail_first`, and
    k_scale [b, h, nq, n] of its blocks, or None in 16 bits."""
    b, h, _, selected = index.shape
    lists = -(-operands.q.shape[1] // TILE_Q) * TILE_Q // block_q

    def whole_tiles(x):
        return None if x is None else _pad_axis(x.reshape(b * h, -1, selected), 1, lists)

    return operands._replace(k_scale=whole_tiles(k_scale), index=whole_tiles(index))


def sage_forward(q, k, v, block_index, *, scale, block_q, block_k, smooth_k, interpret):
    """Quantises and attends: q, k, v [b, l, h, d]; block_index [b, h, nq, n] or None for dense attention.

    Returns (output [b, lq, h, d] in q's dtype, natural log-sum-exp [b, h, lq] float32).
    """
    sizes = {"block_q": block_q, "block_k": block_k}
    operands = sage_operands(q, k, v, scale=scale, smooth_k=smooth_k, interpret=interpret, **sizes)
    if block_index is not None:
        index = tail_first(block_index, operands.k_scale.shape[1])
        operands = over_lists(operands, index, listed(operands.k_scale, index), block_q)
    return attend(operands, q, k, block_q, block_k, None, interpret)[:2]


def sparse_operands(q, k, v, index, block_q) -> Operands:
    """For 16-bit attention over lists: q, k, v [b, l, h, d]; index as of `over_lists`."""
    dense = Operands(whole_rows(q), None, whole_rows(k), None, whole_rows(v), None, None)
    return over_lists(dense, index, None, block_q)


def sparse_forward(q, k, v, block_index, *, scale, block_q, block_k, interpret):
    """16-bit attention over block lists; arguments and results as for `sage_forward`."""
    operands = sparse_operands(q, k, v, tail_first(block_index, -(-k.shape[1] // block_k)), block_q)
    return attend(operands, q, k, block_q, block_k, scale * hw.LOG2E, interpret)[:2]


def attend(operands, q, k, block_q, block_k, scale, interpret, linear: LinearBranch | None = None, amax=False):
    """`hopper_attention` of these operands with the tiles that fit; results as of `sage_forward`, and if `amax` (else
    None) the largest |output| of each token over heads and channels, float32 [b, lq]."""
    b, lq, h, dim = q.shape
    shared = operands[-1] is None or block_q == TILE_Q
    rings = 1 if shared else WARPGROUPS
    itemsize = operands[0].dtype.itemsize
    blocks = step_blocks(block_k, shared, itemsize)
    stages = ring_stages(dim, blocks * block_k, rings, itemsize, linear is not None)
    config = AttentionTiles(
        block_k=block_k, stages=min(2, stages) if interpret else stages, shared=shared, blocks=blocks
    )
    shape = (b, -(-lq // TMA_ROWS) * TMA_ROWS, h, dim)
    o, lse, *top = hopper_attention(
        *operands, shape=shape, lk=k.shape[1], dtype=q.dtype, scale=scale, config=config, interpret=interpret,
        linear=linear, amax=amax,
    )  # fmt: skip
    largest = top[0][:, :lq].reshape(b, h, lq).max(axis=1) if amax else None
    return o[:, :lq], lse[:, :lq].reshape(b, h, lq) * hw.LN2, largest


def tail_first(index: jax.Array, blocks: int) -> jax.Array:
    """Lists of int32 with the ragged last block, where they have it, swapped to the front: only step 0 masks."""
    index = index.astype(jnp.int32)
    last = index == blocks - 1
    first = index[..., :1]
    front = jnp.where(jnp.any(last, axis=-1, keepdims=True), blocks - 1, first)
    # Chosen and not written in place, which XLA does in a kernel of its own and slowly.
    return jnp.where(jnp.arange(index.shape[-1]) == 0, front, jnp.where(last, first, index))


def whole_rows(x: jax.Array) -> jax.Array:
    """[b, l, h, d], padded to the rows that TMA wants; a copy only where l is ragged."""
    return _pad_axis(x, 1, -(-x.shape[1] // TMA_ROWS) * TMA_ROWS)


def _pad_axis(x: jax.Array, axis: int, size: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)

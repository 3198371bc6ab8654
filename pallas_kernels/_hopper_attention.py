"""Attention on Hopper (sm_90a), INT8/FP8 or 16-bit, dense or over block lists: operands, tiles and the call of the
kernel in `_hopper_attention_kernel`."""

from __future__ import annotations

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
from pallas_kernels._quantize_qkv import E4M3_MAX, rotate, scale_of_largest, value_scale

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


def sage_operands(q, k, v, block_index, *, scale, block_q, block_k, smooth_k, interpret, mean_k=None, v_max=None,
                  queries=None):  # fmt: skip
    """What `hopper_attention` reads, from q, k, v [b, l, h, d] and block_index [b, h, nq, n] (None: dense).

    mean_k, v_max: the mean key and max |v| over the keys, float32 [b * h, d], where they are known already.
    queries: what it reads of q, INT8 and scales, where that is made already; q is not read then.
    """
    b, lq, h, _ = q.shape
    lk, n, tiles = k.shape[1], b * h, -(-lq // TILE_Q)
    keys = -(-lk // block_k) * block_k
    mean = None
    if smooth_k:
        mean = rotate(quantize.mean_key(k) if mean_k is None else mean_k)
    v_scale = value_scale(v).reshape(-1, v.shape[-1]) if v_max is None else scale_of_largest(v_max)
    v_scale = v_scale * (E4M3_MAX / value_max(block_k))
    q, k, v = map(whole_rows, (q, k, v))
    if queries is None:
        q8, q_scale = quantize.quantize_rows(q, None, lq, tiles * TILE_Q, block_q, interpret=interpret)
        # In halves of a tile, however many rows share a scale.
        queries = q8, jnp.repeat(q_scale, block_q // hw.ROWS, axis=1) * (scale * hw.LOG2E)
    k8, k_scale = quantize.quantize_rows(k, mean, lk, keys, block_k, interpret=interpret)
    vt8 = quantize.quantize_values(v, 1.0 / v_scale, keys, interpret=interpret)
    index = None
    if block_index is not None:
        index = tail_first(block_index.reshape(n, *block_index.shape[2:]).astype(jnp.int32), k_scale.shape[1])
        index = _pad_axis(index, 1, tiles * TILE_Q // block_q)
        k_scale = jnp.take_along_axis(k_scale, index.reshape(n, -1), axis=1, mode="promise_in_bounds")
        k_scale = k_scale.reshape(index.shape)
    return *queries, k8, k_scale, vt8, v_scale, index


def sage_forward(q, k, v, block_index, *, scale, block_q, block_k, smooth_k, interpret):
    """Quantises and attends: q, k, v [b, l, h, d]; block_index [b, h, nq, n] or None for dense attention.

    Returns (output [b, lq, h, d] in q's dtype, natural log-sum-exp [b, h, lq] float32).
    """
    sizes = {"block_q": block_q, "block_k": block_k}
    operands = sage_operands(q, k, v, block_index, scale=scale, smooth_k=smooth_k, interpret=interpret, **sizes)
    return attend(operands, q, k, block_q, block_k, None, interpret)[:2]


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
    """Lists with the ragged last block, where they have it, swapped to the front: only step 0 masks."""
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

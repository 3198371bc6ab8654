"""Routing of sparse-linear attention: which key blocks each query block attends to.

Source: SLA (arXiv 2509.24006) and `SLA/utils.py` of TurboDiffusion, with scores in float32: bfloat16 scores tie,
and ties move the map (+3.9% relative L2 of the output, measured upstream).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32


def num_selected(num_key_blocks: int, topk: float) -> int:
    """Key blocks that each query block keeps: int(topk * num_key_blocks), at least 1, at most all."""
    if not 0 < topk <= 1:
        raise ValueError(f"topk {topk} is a share of the key blocks: it must be in (0, 1]")
    return max(1, min(num_key_blocks, int(topk * num_key_blocks)))


def block_means(x: Float[Array, "b l h d"], block: int) -> Float[Array, "b h n d"]:
    """Mean of each block of `block` rows, float32; the ragged last block is divided by its own count."""
    b, length, h, d = x.shape
    blocks = -(-length // block)
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, blocks * block - length), (0, 0), (0, 0)))
    total = jnp.sum(x.reshape(b, blocks, block, h, d), axis=2)
    count = jnp.minimum(block, length - block * jnp.arange(blocks)).astype(jnp.float32)
    return jnp.swapaxes(total / count[:, None, None], 1, 2)


@functools.partial(jax.jit, static_argnames=("topk", "block_q", "block_k"))
def sla_block_map(
    q: Float[Array, "b lq h d"], k: Float[Array, "b lk h d"], *, topk: float, block_q: int, block_k: int
) -> Int32[Array, "b h nq s"]:
    """The key blocks with the largest pooled scores, for each query block.

    score[i, j] = mean(q in block i) . (mean(k in block j) - mean(k)), in float32 for any input dtype. The mean
    key shifts a row of scores by a constant: it changes no choice, only the rounding.

    Args:
        q, k: queries and keys, after RMS norm and rotary embedding.
        topk: share of the key blocks to keep, in (0, 1].
        block_q, block_k: rows of a query block and of a key block; the last ones may be ragged.

    Returns:
        int32 [B, heads, ceil(Lq / block_q), n], n = max(1, int(topk * ceil(Lk / block_k))): block indices in
        order of falling score; among equal scores the lower index comes first, as `jax.lax.top_k` has it.
        No gradient flows through the choice.
    """
    if block_q < 1 or block_k < 1:
        raise ValueError(f"block_q {block_q} and block_k {block_k} must be positive")
    q, k = lax.stop_gradient(q), lax.stop_gradient(k)
    selected = num_selected(-(-k.shape[1] // block_k), topk)
    pooled_q = block_means(q, block_q)
    mean_k = jnp.mean(k.astype(jnp.float32), axis=1)
    pooled_k = block_means(k, block_k) - mean_k[:, :, None]
    # HIGHEST: a GPU would otherwise round the float32 operands to TF32, as coarse as float16.
    scores = jnp.einsum("bhid,bhjd->bhij", pooled_q, pooled_k, precision=lax.Precision.HIGHEST)
    return lax.top_k(scores, selected)[1].astype(jnp.int32)

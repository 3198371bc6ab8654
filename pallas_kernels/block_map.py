"""Routing of sparse-linear attention: which key blocks each query block attends to.

Source: SLA (arXiv 2509.24006) and `SLA/utils.py` of TurboDiffusion, with scores in float32: bfloat16 scores tie,
and ties move the map (+3.9% relative L2 of the output, measured upstream).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
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
    whole = length // block * block
    # Cut, not padded: padding would write a float32 copy first.
    means = jnp.mean(x[:, :whole].reshape(b, -1, block, h, d), axis=2, dtype=jnp.float32)
    if whole < length:
        end = jnp.mean(x[:, whole:], axis=1, keepdims=True, dtype=jnp.float32)
        means = jnp.concatenate([means, end], axis=1)
    return jnp.swapaxes(means, 1, 2)


def block_counts(length: int, block: int) -> np.ndarray:
    """float32 [blocks]: rows in each block."""
    return np.minimum(block, length - block * np.arange(-(-length // block))).astype(np.float32)


def centred_means(pooled_k: Float[Array, "b h nk d"], length: int, block_k: int) -> Float[Array, "b h nk d"]:
    """Means of blocks of block_k keys, of `length` in all, less the mean of all keys."""
    count = block_counts(length, block_k)[:, None]
    return pooled_k - jnp.sum(pooled_k * count, axis=2, keepdims=True) / length


def block_scores(
    pooled_q: Float[Array, "b h nq d"], centred_k: Float[Array, "b h nk d"], *, in_parts: bool = False
) -> Float[Array, "b h nq nk"]:
    """How much each query block has to do with each key block, float32.

    in_parts: three products of TF32 numbers, by the tensor cores of a GPU, with an error no larger than float32's own.
    """
    # HIGHEST: a GPU would otherwise round the float32 operands to TF32, as coarse as float16.
    precision = lax.DotAlgorithmPreset.TF32_TF32_F32_X3 if in_parts else lax.Precision.HIGHEST
    return jnp.einsum("bhid,bhjd->bhij", pooled_q, centred_k, precision=precision)


def choose_blocks(
    pooled_q: Float[Array, "b h nq d"], pooled_k: Float[Array, "b h nk d"], length: int, topk: float, block_k: int
) -> Int32[Array, "b h nq s"]:
    """The key blocks with the largest scores of these means, of `length` keys in blocks of block_k: `sla_block_map`."""
    scores = block_scores(pooled_q, centred_means(pooled_k, length, block_k))
    return lax.top_k(scores, num_selected(pooled_k.shape[2], topk))[1].astype(jnp.int32)


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
    return choose_blocks(block_means(q, block_q), block_means(k, block_k), k.shape[1], topk, block_k)

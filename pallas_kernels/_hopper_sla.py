"""Sparse-linear attention on Hopper, forward: both branches and the routing in six passes over q, k, v.

    k, v -> f(k)^T v, sum f(k), sums of k over blocks, maxima of v (quantised only)    `_hopper_linear`
    q    -> sums over blocks                             `_hopper_linear`; scores and top-k of the means are small: XLA
    q, k, v -> INT8, FP8 (quantised only)                `_hopper_quantize`
            where q is still to be normed and turned, that, its sums and its INT8 are one pass: `_hopper_rotate_queries`
    attention over the lists; its epilogue adds f(q) times the product of f(k)^T v and the projection

so that no f(q), f(k) and no output of the linear branch is ever written. Expected on H100 at 32,760 tokens, 12 heads of
128, top-k 0.1: 0.07 + 0.05 (+ 0.19) ms of memory, 0.04 of top-k, and the attention kernel.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _hopper as hw
from pallas_kernels._hopper_attention import TILE_Q, LinearBranch, attend, sage_operands, sparse_operands, whole_rows
from pallas_kernels._hopper_linear import BLOCK, block_sums, summarize_keys
from pallas_kernels._hopper_rotate_queries import RotatedQueries, rotate_queries
from pallas_kernels._hopper_top_blocks import padded_width, top_blocks
from pallas_kernels.block_map import block_counts, block_scores, centred_means, num_selected

SORTED, COUNTED = 255, 1920
"""Up to the first number of key blocks their scores are sorted; up to the second `top_blocks` can count."""


def sla_forward(
    q, k, v, proj_w, proj_b, rotary=None, *, topk, block_q, block_k, quantized, feature_map, scale, amax, interpret
) -> tuple[jax.Array, jax.Array | None]:
    """(o [b, l, h, d] in q's dtype, 16 bits; if `amax`, the largest |o| of each token, float32 [b, l], else None).

    Arguments as of `sparse_linear_attention`.
    """
    b, length_q, h, dim = q.shape
    length = k.shape[1]
    if rotary is None:
        queries = RotatedQueries(whole_rows(q), block_sums(whole_rows(q), interpret=interpret))
    else:
        # With a scale for 64 rows each, as attention reads them, where blocks of 128 rows would share one.
        queries = rotate_queries(
            whole_rows(q),
            rotary,
            q8_rows=-(-length_q // TILE_Q) * TILE_Q if quantized else None,
            score_scale=scale * hw.LOG2E,
            interpret=interpret,
        )
    summary = summarize_keys(whole_rows(k), whole_rows(v), length, feature_map, v_max=quantized, interpret=interpret)

    def by_blocks(sums, block):
        """[b, h, blocks, d] of sums over BLOCK rows each."""
        per_block = block // BLOCK
        sums = jnp.pad(sums, ((0, 0), (0, -sums.shape[1] % per_block), (0, 0)))
        return sums.reshape(b, h, -1, per_block, dim).sum(axis=3)

    sums = by_blocks(summary.k_sums, block_k)
    pooled_k = sums / block_counts(length, block_k)[:, None]
    pooled_q = by_blocks(queries.sums, block_q) / block_counts(length_q, block_q)[:, None]
    index = route(pooled_q, centred_means(pooled_k, length, block_k), topk, interpret=interpret)

    combined = jnp.einsum("nde,oe->ndo", summary.products, proj_w.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    linear = LinearBranch(
        q=queries.q if quantized else None,
        combined=combined.astype(q.dtype),
        f_sum=summary.f_sum,
        bias=proj_b.astype(jnp.float32),
        feature_map=feature_map,
    )
    sizes = {"block_q": block_q, "block_k": block_k}
    if quantized:
        mean_k = sums.sum(axis=2).reshape(b * h, dim) / length
        operands = sage_operands(
            q, k, v, index, scale=scale, smooth_k=True, interpret=interpret, mean_k=mean_k, v_max=summary.v_max,
            queries=None if rotary is None else (queries.q8, queries.q8_scale), **sizes
        )  # fmt: skip
    else:
        operands = sparse_operands(queries.q, k, v, index, **sizes)
    factor = None if quantized else scale * hw.LOG2E
    o, _, largest = attend(operands, q, k, block_q, block_k, factor, interpret, linear, amax)
    return o, largest


def route(pooled_q, centred_k, topk, *, interpret):
    """The same blocks as `choose_blocks`; where they are many, in rising order."""
    b, h, count, _ = centred_k.shape
    selected = num_selected(count, topk)
    if not SORTED < count <= COUNTED:
        return lax.top_k(block_scores(pooled_q, centred_k), selected)[1].astype(jnp.int32)
    columns = (0, padded_width(count) - count)
    scores = block_scores(pooled_q, jnp.pad(centred_k, ((0, 0), (0, 0), columns, (0, 0))))
    index = top_blocks(scores.reshape(-1, scores.shape[-1]), selected, count, interpret=interpret)
    return index.reshape(b, h, -1, selected)

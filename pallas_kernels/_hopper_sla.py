"""Sparse-linear attention on Hopper, forward: both branches and the routing in six passes over q, k, v.

    k, v -> f(k)^T v, sum f(k), sums of k over blocks, maxima of v (quantised only)    `_hopper_linear`
            joined to means, scales and the projected product                          `_hopper_join_runs`
    q    -> sums over blocks                                                           `_hopper_linear`
    q, k, v -> INT8, FP8 (quantised only)                                              `_hopper_quantize`
            where q is still to be normed and turned, that, its sums and its INT8 are one pass: `_hopper_rotate_queries`
    sums of q times means of k, by XLA -> lists of key blocks                          `_hopper_top_blocks`
    attention over the lists; its epilogue adds f(q) times the product of f(k)^T v and the projection

so that no f(q), f(k) and no output of the linear branch is ever written. Expected on H100 at 32,760 tokens, 12 heads of
128, top-k 0.1: 0.07 + 0.05 (+ 0.19) ms of memory, 0.02 of what is small, and the attention kernel.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _hopper as hw
from pallas_kernels._hopper_attention import (
    TILE_Q,
    LinearBranch,
    attend,
    over_lists,
    sage_operands,
    sparse_operands,
    tail_first,
    value_max,
    whole_rows,
)
from pallas_kernels._hopper_join_runs import join_runs
from pallas_kernels._hopper_linear import block_sums, summarize_keys, sums_of_blocks
from pallas_kernels._hopper_rotate_queries import RotatedQueries, rotate_queries
from pallas_kernels._hopper_top_blocks import MOST, listed, top_blocks
from pallas_kernels.block_map import block_scores, num_selected


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
    runs = summarize_keys(whole_rows(k), whole_rows(v), length, feature_map, v_max=quantized, interpret=interpret)
    keys = join_runs(runs, proj_w.astype(q.dtype), length, block_k, value_max(block_k), interpret=interpret)
    # Sums of q in place of means: a row of scores keeps its order.
    sums_q = sums_of_blocks(queries.sums, block_q).reshape(b, h, -1, dim)
    centred_k = keys.centred.reshape(b, h, -1, dim)
    linear = LinearBranch(
        q=queries.q if quantized else None,
        combined=keys.combined,
        f_sum=keys.f_sum,
        bias=proj_b,
        feature_map=feature_map,
    )
    if quantized:
        dense = sage_operands(
            q, k, v, scale=scale, block_q=block_q, block_k=block_k, smooth_k=True, keys=keys,
            queries=None if rotary is None else (queries.q8, queries.q8_scale), interpret=interpret,
        )  # fmt: skip
        index, k_scale = route(sums_q, centred_k, topk, dense.k_scale, interpret=interpret)
        operands = over_lists(dense, index, k_scale, block_q)
    else:
        index, _ = route(sums_q, centred_k, topk, interpret=interpret)
        operands = sparse_operands(queries.q, k, v, index, block_q)
    factor = None if quantized else scale * hw.LOG2E
    o, _, largest = attend(operands, q, k, block_q, block_k, factor, interpret, linear, amax)
    return o, largest


def route(queries, centred_k, topk, k_scale=None, *, interpret):
    """The blocks that `choose_blocks` takes, each list in an order that attention likes (`tail_first`), and what
    k_scale float32 [b * h, nk] has for them, or None.

    queries [b, h, nq, d]: means of query blocks, or sums. centred_k [b, h, nk, d].
    """
    b, h, count, _ = centred_k.shape
    selected = num_selected(count, topk)
    scores = block_scores(queries, centred_k, in_parts=not interpret)
    if count > MOST:
        index = tail_first(lax.top_k(scores, selected)[1].astype(jnp.int32), count)
        return index, None if k_scale is None else listed(k_scale, index)
    index, scale = top_blocks(scores.reshape(-1, count), selected, k_scale, interpret=interpret)
    shape = b, h, -1, selected
    return index.reshape(shape), None if scale is None else scale.reshape(shape)

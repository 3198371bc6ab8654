"""Attention over a list of key blocks for each block of queries.

Source: the sparse branch of SLA (arXiv 2509.24006; `SLA/kernel.py` of TurboDiffusion) and, quantised, of SageSLA.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels._attention_kernels import attention_kernels
from pallas_kernels._attention_xla import block_sparse_xla, default_scale
from pallas_kernels._derivatives import derivative_of, forward_only
from pallas_kernels._heads import check_block_index, check_blocks, check_qkv, heads_first, heads_last
from pallas_kernels._refusals import attention_refusal
from pallas_kernels.dispatch import dispatch, gpu_arch


@functools.partial(
    jax.jit, static_argnames=("block_q", "block_k", "quantized", "scale", "return_lse", "implementation")
)
def block_sparse_attention(
    q: Float[Array, "b lq h d"],
    k: Float[Array, "b lk h d"],
    v: Float[Array, "b lk h d"],
    block_index: Int32[Array, "b h nq s"],
    *,
    block_q: int,
    block_k: int,
    quantized: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "b lq h d"] | tuple[Float[Array, "b lq h d"], Float[Array, "b h lq"]]:
    """softmax(scale q k^T) v, where each query sees the keys of its block's list only.

    Args:
        block_index: int32 [B, heads, ceil(Lq / block_q), n]: key blocks of each query block, each in
            [0, ceil(Lk / block_k)) and at most once in a list (a repeated block counts twice). Not checked.
        block_q, block_k: rows of a query block and of a key block; the last ones may be ragged.
        quantized: INT8 scores and FP8 values as in `sage_attention` (scales for each block_q and block_k
            rows); has no derivative. Otherwise differentiable in q, k and v, in reverse and forward mode.
        scale: factor on the scores; None is 1 / sqrt(head_dim).
        return_lse: also return the natural log-sum-exp of the scaled scores, float32 [B, heads, Lq]. Quantised on
            Hopper it is of the probabilities as e4m3 rounds them, by 1/16 at most: o was divided by their sum.
            Quantised, it is that of the smoothed keys: shifted by scale * q . mean(k).
        implementation: None, "xla", "mosaic_gpu" or "interpret".

    Raises:
        ValueError: shapes that do not fit together, or an implementation that cannot run, with the reason.
        NotImplementedError: a derivative of the quantised op was asked for.
    """
    name = "block_sparse_attention"
    check_qkv(name, q, k, v)
    check_blocks(name, block_q, block_k)
    check_block_index(name, q, k, block_index, block_q, block_k)
    scale = default_scale(q.shape[-1]) if scale is None else scale
    b, lq, h, _ = q.shape

    def xla(q, k, v, block_index):
        index = block_index.reshape(b * h, *block_index.shape[2:])
        o, lse = block_sparse_xla(
            heads_first(q), heads_first(k), heads_first(v), index, scale, block_q, block_k, quantized
        )
        return heads_last(o, q.shape), lse.reshape(b, h, lq)

    def kernel(q, k, v, block_index, interpret):
        kernels = attention_kernels()
        sizes = {"scale": scale, "block_q": block_q, "block_k": block_k, "interpret": interpret}
        if quantized:
            return kernels.sage_forward(q, k, v, block_index, smooth_k=True, **sizes)
        # The interpreter's callbacks have an order, which a derivative's linear_call cannot carry: there XLA goes back.
        op = None if interpret else _backward_kernel(q)
        backward = op and functools.partial(op, **sizes)
        return derivative_of(xla, functools.partial(kernels.sparse_forward, **sizes), backward)(q, k, v, block_index)

    unsupported = attention_refusal(q, implementation, scale, block_q, block_k)
    if quantized:
        q, k, v = forward_only(name, q, k, v)
    o, lse = dispatch(name, implementation, (q, k, v, block_index), xla=xla, kernel=kernel, unsupported=unsupported)
    return (o, lse) if return_lse else o


def _backward_kernel(q: Array) -> Callable[..., Any] | None:
    """Hopper's; None where XLA goes backwards: on other GPUs, and in float16, in which dS may vanish."""
    if gpu_arch() != (9, 0) or q.dtype != jnp.bfloat16:
        return None
    from pallas_kernels._hopper_backward import sparse_backward  # late: see _plgpu

    return sparse_backward

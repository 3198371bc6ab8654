"""Exact attention: cuDNN on a GPU that has it, bounded-memory XLA elsewhere."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels._attention_xla import default_scale, dense_xla
from pallas_kernels._dense_whole import dense_whole
from pallas_kernels._heads import check_qkv, heads_first, heads_last

# Up to this size, float32 scores are held whole; beyond it, in chunks.
WHOLE_BYTES = 64 << 20


def cudnn_refusal(q: Array, k: Array) -> str | None:
    """Why cuDNN's attention cannot run here, or None."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN attention takes bfloat16 or float16, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"cuDNN attention takes a head_dim of at most 128 in steps of 8, not {q.shape[-1]}"
    if jax.default_backend() != "gpu":
        return "cuDNN is asked for its version while tracing, and this process has no GPU"
    return None


@functools.partial(jax.jit, static_argnames=("scale", "implementation"))
def dense_attention(
    q: Float[Array, "b lq h d"],
    k: Float[Array, "b lk h d"],
    v: Float[Array, "b lk h d"],
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "b lq h d"]:
    """softmax(scale q k^T) v with float32 scores.

    Args:
        scale: factor on the scores; None is 1 / sqrt(head_dim).
        implementation: "xla" (any dtype, bounded memory, reverse and forward mode), "cudnn"
            (bf16/fp16, reverse mode only), or None: cuDNN where the process has a GPU and the dtype allows it.

    Raises:
        ValueError: shapes that do not fit together, or an implementation that cannot run, with the reason.
    """
    check_qkv("dense_attention", q, k, v)
    scale = default_scale(q.shape[-1]) if scale is None else scale

    def xla(q, k, v) -> Any:
        if 4 * q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1] <= WHOLE_BYTES:
            return dense_whole(q, k, v, scale)
        return heads_last(dense_xla(heads_first(q), heads_first(k), heads_first(v), scale), q.shape)

    def cudnn(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn")

    if implementation == "xla":
        return xla(q, k, v)
    if implementation not in (None, "cudnn"):
        raise ValueError(f"dense_attention: implementation {implementation!r} is unknown; choose None, 'xla', 'cudnn'")
    refusal = cudnn_refusal(q, k)
    if implementation == "cudnn":
        if refusal is not None:
            raise ValueError(f"dense_attention: implementation 'cudnn' cannot run: {refusal}; use None or 'xla'")
        return cudnn(q, k, v)
    if refusal is not None:
        return xla(q, k, v)
    return lax.platform_dependent(q, k, v, cuda=cudnn, default=xla)

"""What the attention ops share: shape checks, maxima, and layout changes [B, L, heads, d] <-> [B * heads, L, d]."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32


def heads_first(x: Float[Array, "b l h d"]) -> Float[Array, "b*h l d"]:
    b, length, h, d = x.shape
    return jnp.swapaxes(x, 1, 2).reshape(b * h, length, d)


def heads_last(x: Float[Array, "{like[0]}*{like[2]} l d"], like: tuple[int, ...]) -> Float[Array, "b l h d"]:
    """Inverse of heads_first, for an array of shape `like` = (b, l, h, d)."""
    b, length, h, d = like
    return jnp.swapaxes(x.reshape(b, h, length, d), 1, 2)


def with_largest(o: Float[Array, "b l h d"]) -> tuple[Float[Array, "b l h d"], Float32[Array, "b l"]]:
    """(o, max |o| of each token over its heads).

    The barrier keeps XLA from computing o again beside the maximum: it could leave out that o is rounded, and the
    derivative, which looks for the maximum in o, would find it nowhere and be NaN.
    """
    o = lax.optimization_barrier(o)
    return o, jnp.max(jnp.abs(o), axis=(2, 3)).astype(jnp.float32)


def check_qkv(name: str, q: Array, k: Array, v: Array) -> None:
    for label, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name}: {label} has shape {x.shape}; expected [batch, length, heads, head_dim]")
        if 0 in x.shape:
            raise ValueError(f"{name}: {label} has shape {x.shape}: an empty axis has no attention")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name}: {label} is {x.dtype}; expected a floating dtype")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"{name}: q {q.shape}, k {k.shape} and v {v.shape} do not fit together")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{name}: q is {q.dtype}, k {k.dtype} and v {v.dtype}; cast them to one dtype")


def check_blocks(name: str, block_q: int, block_k: int) -> None:
    if block_q < 1 or block_k < 1:
        raise ValueError(f"{name}: block_q {block_q} and block_k {block_k} must be positive")


def check_block_index(name: str, q: Array, k: Array, block_index: Array, block_q: int, block_k: int) -> None:
    nq, nk = -(-q.shape[1] // block_q), -(-k.shape[1] // block_k)
    want = (q.shape[0], q.shape[2], nq)
    if block_index.ndim != 4 or block_index.shape[:3] != want or not 1 <= block_index.shape[3] <= nk:
        raise ValueError(
            f"{name}: block_index has shape {block_index.shape}; expected [B, heads, query blocks, n] = "
            f"{[*want, 'n']} with 1 <= n <= {nk}"
        )
    if not jnp.issubdtype(block_index.dtype, jnp.integer):
        raise ValueError(f"{name}: block_index is {block_index.dtype}; expected int32")

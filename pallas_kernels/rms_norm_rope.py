"""RMSNorm over the full width and 3-D rotary embedding in one pass: what stands between q, k and attention."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.dispatch import dispatch


def rms_norm_rope(
    x: Float[Array, "B L H D"],
    weight: Float[Array, "H*D"],
    cos: Float[Array, "L D/2"],
    sin: Float[Array, "L D/2"],
    *,
    eps: float = 1e-6,
    implementation: str | None = None,
) -> Float[Array, "B L H D"]:
    """RMSNorm over all heads together (x * rsqrt(mean(x^2) + eps) * weight), then RoPE on interleaved pairs.

    Pair j of a head is its elements (2j, 2j+1): out[2j] = a cos - b sin, out[2j+1] = a sin + b cos, the angle of
    token l and pair j, the same for all heads. Everything in float32, rounded once to x's dtype.
    Source: wan/modules/model.py (WanRMSNorm, rope_apply) of Wan2.1.
    """
    _, length, heads, dim = x.shape
    if weight.shape != (heads * dim,):
        raise ValueError(f"rms_norm_rope: weight {list(weight.shape)} is not the full width [{heads * dim}]")
    if cos.shape != (length, dim // 2) or sin.shape != cos.shape:
        raise ValueError(
            f"rms_norm_rope: cos {list(cos.shape)} and sin {list(sin.shape)} should be {[length, dim // 2]}"
        )
    return dispatch(
        "rms_norm_rope",
        implementation,
        (x, weight, cos, sin),
        xla=partial(_xla, eps=eps),
        kernel=None,
        unsupported="the kernel is not written yet",
    )


def _xla(x, weight, cos, sin, *, eps):
    batch, length, heads, dim = x.shape
    flat = x.reshape(batch, length, heads * dim).astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(flat), axis=-1, keepdims=True)
    y = flat * lax.rsqrt(mean_square + eps) * weight.astype(jnp.float32)
    return apply_rope(y.reshape(x.shape), cos, sin).astype(x.dtype)


def apply_rope(x: Float[Array, "B L H D"], cos: Array, sin: Array) -> Float[Array, "B L H D"]:
    """x * c + swap(x) * s with c = [cos, cos], s = [-sin, sin] on each pair: 3x faster on a CPU than slicing."""
    c = jnp.repeat(cos.astype(jnp.float32), 2, axis=-1)[:, None]
    s = jnp.stack([-sin, sin], axis=-1).astype(jnp.float32).reshape(c.shape)
    swapped = x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)
    return x * c + swapped * s

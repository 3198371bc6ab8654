"""LayerNorm, modulation and INT8 quantisation in one pass: what stands before every W8A8 GEMM of the DiT."""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8

from pallas_kernels.dispatch import dispatch
from pallas_kernels.quantize import quantize_blockwise, quantize_per_token

Granularity = Literal["token", "block"]


def norm_modulate_quantize(
    x: Float[Array, "B L D"],
    scale: Float[Array, "..."],
    shift: Float[Array, "..."],
    *,
    eps: float = 1e-6,
    granularity: Granularity = "token",
    implementation: str | None = None,
) -> tuple[Int8[Array, "B L D"], Float[Array, "..."]]:
    """INT8 of LayerNorm(x) * (1 + scale) + shift, with its float32 scales, as `int8_linear` takes them.

    x: any float dtype. scale, shift: broadcast against x: [B, 1, D] (modulation), [D] (an affine LayerNorm, scale
        being its weight - 1) or [B, L, D] (a timestep per token). Mean, biased variance, modulation and rounding
        are float32 with nothing rounded to x's dtype between (the reference rounds twice to bf16 on the way).
    Returns (q, scales): scales [B, L] for "token" (amax / 127); [ceil(B*L/128), ceil(D/128)] for "block"
        (amax / 128, tiles over the flattened rows), as in `quantize`.
    """
    if granularity not in ("token", "block"):
        raise ValueError(f"norm_modulate_quantize: granularity={granularity!r} is unknown; take 'token' or 'block'")
    return dispatch(
        "norm_modulate_quantize",
        implementation,
        (x, scale, shift),
        xla=partial(_xla, eps=eps, granularity=granularity),
        kernel=None,
        unsupported="the kernel is not written yet",
    )


def _xla(x, scale, shift, *, eps, granularity):
    y = norm_modulate(x, scale, shift, eps)
    if granularity == "token":
        return quantize_per_token(y)
    q, scales = quantize_blockwise(y.reshape(-1, x.shape[-1]))
    return q.reshape(x.shape), scales


def norm_modulate(x: Array, scale: Array, shift: Array, eps: float) -> Float[Array, "B L D"]:
    """LayerNorm(x) * (1 + scale) + shift in float32; the two-pass variance, since x carries outlier channels."""
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    y = centred * lax.rsqrt(variance + eps)
    return y * (1.0 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)

"""LayerNorm, modulation and INT8 quantisation in one pass: what stands before every W8A8 GEMM of the DiT."""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8

from pallas_kernels.dispatch import dispatch
from pallas_kernels.quantize import rows_xla, tiles_xla, with_ragged_tiles
from pallas_kernels.quantize_kernels import quantize_rows, quantize_tiles, supports_rows, supports_tiles

Granularity = Literal["token", "block"]


@partial(jax.jit, static_argnames=("eps", "granularity", "affine", "implementation"))
def norm_modulate_quantize(
    x: Float[Array, "B L D"],
    scale: Float[Array, "..."],
    shift: Float[Array, "..."],
    *,
    eps: float = 1e-6,
    granularity: Granularity = "token",
    affine: bool = False,
    implementation: str | None = None,
) -> tuple[Int8[Array, "B L D"], Float[Array, "..."]]:
    """INT8 of LayerNorm(x) * (1 + scale) + shift, with its float32 scales, as `int8_linear` takes them.

    x: any float dtype. scale, shift: broadcast against x: [B, 1, D] (modulation), [D] or [B, L, D] (a timestep per
        token). Mean, biased variance, modulation and rounding are float32 with nothing rounded to x's dtype between
        (the reference rounds twice to bf16 on the way).
    affine: LayerNorm(x) * scale + shift instead, as of a norm with weights of its own.
    Returns (q, scales): scales [B, L] for "token" (amax / 127); [ceil(B*L/128), ceil(D/128)] for "block"
        (amax / 128, tiles over the flattened rows), as in `quantize`.
    """
    if granularity not in ("token", "block"):
        raise ValueError(f"norm_modulate_quantize: granularity={granularity!r} is unknown; take 'token' or 'block'")
    width = x.shape[-1]
    unsupported = _modulation_per_row(x, scale) or _modulation_per_row(x, shift)
    if granularity == "block":
        unsupported = unsupported or supports_tiles(x.size // width, width)
        if x.shape[0] > 1 and (scale.size > width or shift.size > width):
            unsupported = unsupported or "a tile may straddle batch items of different modulation"
    else:
        unsupported = unsupported or supports_rows(width)
    return dispatch(
        "norm_modulate_quantize",
        implementation,
        (x, scale, shift),
        xla=partial(_xla, eps=eps, granularity=granularity, affine=affine),
        kernel=partial(_kernel, eps=eps, granularity=granularity, affine=affine),
        unsupported=unsupported,
    )


def _modulation_per_row(x, modulation) -> str | None:
    if modulation.ndim == 3 and modulation.shape[1] != 1:
        return f"modulation {list(modulation.shape)} differs from token to token"
    return None


def _kernel(x, scale, shift, *, eps, granularity, affine, interpret):
    batch, _, width = x.shape
    if granularity == "token":
        scale, shift = (_per_batch(m, batch, width) for m in (scale, shift))
        return quantize_rows(x, scale, shift, eps=eps, affine=affine, interpret=interpret)
    flat = x.reshape(-1, width)
    scale, shift = (_per_batch(m, 1, width)[0] for m in (scale, shift))
    q, scales = with_ragged_tiles(
        quantize_tiles(flat, scale, shift, eps=eps, affine=affine, interpret=interpret),
        flat,
        lambda rows: tiles_xla(norm_modulate(rows, scale, shift, eps, affine)),
    )
    return q.reshape(x.shape), scales


def _per_batch(modulation, batch, width):
    return jnp.broadcast_to(modulation.astype(jnp.float32).reshape(-1, width), (batch, width))


def _xla(x, scale, shift, *, eps, granularity, affine):
    # Written once: XLA would compute it again for the maximum and for the rounding.
    y = lax.optimization_barrier(norm_modulate(x, scale, shift, eps, affine))
    if granularity == "token":
        return rows_xla(y)
    q, scales = tiles_xla(y.reshape(-1, x.shape[-1]))
    return q.reshape(x.shape), scales


def norm_modulate(
    x: Float[Array, "*rows D"], scale: Array, shift: Array, eps: float, affine: bool = False
) -> Float[Array, "*rows D"]:
    """LayerNorm(x) * (1 + scale) + shift in float32, scale itself where affine; the two-pass variance, since x carries
    outlier channels."""
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    y = centred * lax.rsqrt(variance + eps)
    scale = scale.astype(jnp.float32)
    return y * (scale if affine else 1.0 + scale) + shift.astype(jnp.float32)

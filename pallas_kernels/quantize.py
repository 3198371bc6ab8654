"""INT8 quantisation: the reference's 128x128 tiles, and the scales per row that our own weights use.

Two granularities run through the W8A8 path:

`block`  one scale for a 128x128 tile, as TurboDiffusion's checkpoints hold them (ops/quant/quant.hpp). The divisor
         is 128, not 127: +amax becomes 128 and saturates to 127, -amax is exact. Needed to load those files.
`token`  one scale for a row (a token of the activations, an output channel of the weights). The divisor is 127, so
         nothing saturates, and the scale leaves the sum over K: INT32 accumulation runs through the whole of K.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8

BLOCK = 128
AMAX_FLOOR = 1e-8
INT8_MAX_BLOCK = 128.0
INT8_MAX_TOKEN = 127.0


def quantize_blockwise(x: Float[Array, "M K"]) -> tuple[Int8[Array, "M K"], Float[Array, "Mb Kb"]]:
    """INT8 values and one float32 scale for each 128x128 tile: x ~ q * scale[m // 128, k // 128].

    amax = max(1e-8, max|tile|) in float32; q = saturate(rint(x * (128 / amax))), half to even; scale = amax / 128.
    Ragged edge tiles take their maximum over what is there. x: any float dtype. Source: ops/quant/quant.hpp of
    TurboDiffusion.
    """
    if x.ndim != 2:
        raise ValueError(f"quantize_blockwise takes a matrix [M, K], got shape {x.shape}")
    m, k = x.shape
    padded = jnp.pad(x.astype(jnp.float32), ((0, -m % BLOCK), (0, -k % BLOCK)))
    tiles = padded.reshape(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    amax = jnp.maximum(jnp.max(jnp.abs(tiles), axis=(1, 3)), AMAX_FLOOR)
    q = to_int8(tiles * (INT8_MAX_BLOCK / amax)[:, None, :, None])
    return q.reshape(padded.shape)[:m, :k], amax / INT8_MAX_BLOCK


def quantize_per_token(x: Float[Array, "*batch K"]) -> tuple[Int8[Array, "*batch K"], Float[Array, "*batch"]]:
    """INT8 values and one float32 scale for each row of the last axis: x ~ q * scale[..., None].

    amax = max(1e-8, max|row|) in float32; q = rint(x * (127 / amax)), half to even; scale = amax / 127.
    """
    x = x.astype(jnp.float32)
    amax = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), AMAX_FLOOR)
    return to_int8(x * (INT8_MAX_TOKEN / amax)[..., None]), amax / INT8_MAX_TOKEN


def quantize_per_channel(
    weight: Float[Array, "*stack N K"],
) -> tuple[Int8[Array, "*stack N K"], Float[Array, "*stack N"]]:
    """Weights [N (out), K (in)] to INT8 with one float32 scale for each output channel (stacked layers in front)."""
    return quantize_per_token(weight)


def to_int8(x: Float[Array, "..."]) -> Int8[Array, "..."]:
    """Round half to even, then saturate to [-128, 127]."""
    return lax.clamp(-128.0, jnp.round(x), 127.0).astype(jnp.int8)

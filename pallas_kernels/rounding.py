"""The constants and the rounding that every INT8 path shares."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8

BLOCK = 128
AMAX_FLOOR = 1e-8
INT8_MAX_BLOCK = 128.0
INT8_MAX_TOKEN = 127.0


def to_int8(x: Float[Array, "..."]) -> Int8[Array, "..."]:
    """Round half to even, then saturate to [-128, 127]."""
    return lax.clamp(-128.0, jnp.round(x), 127.0).astype(jnp.int8)


def rounded(x: Float[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """float32 values that dtype can hold. XLA drops a cast there and back as excess precision; this it keeps."""
    info = jnp.finfo(dtype)
    return lax.reduce_precision(x, info.nexp, info.nmant)

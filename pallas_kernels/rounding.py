"""The constants and the rounding that every INT8 path shares."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
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


def round_e4m3(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """float32 values of magnitude up to 448, each at its nearest float8_e4m3fn, half to even; still float32.

    The cast there and back gives the same numbers; on a CPU it takes four times as long.
    """
    size = jnp.abs(x)
    bits = lax.bitcast_convert_type(size, jnp.uint32)
    bits = bits + (jnp.uint32(0x7FFFF) + ((bits >> 20) & jnp.uint32(1)))
    normal = lax.bitcast_convert_type(bits & jnp.uint32(0xFFF00000), jnp.float32)
    subnormal = jnp.round(size * np.float32(2**9)) * np.float32(2**-9)
    return jnp.copysign(jnp.where(size < np.float32(2**-6), subnormal, normal), x)

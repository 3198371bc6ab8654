"""What turns queries and keys as their products gave them into what attention compares, and its formula."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


class Rotary(NamedTuple):
    """A norm whose factors are known, and a 3-D rotary embedding.

    factor: of each token, 1 / rms over all heads. weight: of each channel, the norm's. cos, sin: of the angle by which
    each token's pair j of channels (2j, 2j + 1) is turned, the same for all heads.
    """

    factor: Float32[Array, "B L"]
    weight: Float[Array, "H*D"]
    cos: Float[Array, "L D/2"]
    sin: Float[Array, "L D/2"]


def turned(x: Float[Array, "B L H D"], rotary: Rotary) -> Float[Array, "B L H D"]:
    """x * factor * weight, then RoPE: out[2j] = a cos - b sin, out[2j+1] = a sin + b cos of each pair (a, b).

    Everything in float32, rounded once to x's dtype. Source: wan/modules/model.py (rope_apply) of Wan2.1.
    """
    batch, length, heads, dim = x.shape
    flat = x.reshape(batch, length, heads * dim).astype(jnp.float32)
    y = flat * rotary.factor[..., None] * rotary.weight.astype(jnp.float32)
    return _turn(y.reshape(x.shape), rotary.cos, rotary.sin).astype(x.dtype)


def check_rotary(name: str, x: Float[Array, "B L H D"], rotary: Rotary) -> None:
    """Raises ValueError where rotary is not for x."""
    if rotary.factor.shape != x.shape[:2]:
        raise ValueError(f"{name}: factor {list(rotary.factor.shape)} is not [batch, length] = {list(x.shape[:2])}")
    check_angles(name, x, *rotary[1:])


def check_angles(name: str, x: Float[Array, "B L H D"], weight: Array, cos: Array, sin: Array) -> None:
    _, length, heads, dim = x.shape
    if weight.shape != (heads * dim,):
        raise ValueError(f"{name}: weight {list(weight.shape)} is not the full width [{heads * dim}]")
    if cos.shape != (length, dim // 2) or sin.shape != cos.shape:
        raise ValueError(f"{name}: cos {list(cos.shape)} and sin {list(sin.shape)} should be {[length, dim // 2]}")


def _turn(x: Float[Array, "B L H D"], cos: Array, sin: Array) -> Float[Array, "B L H D"]:
    """x * c + swap(x) * s with c = [cos, cos], s = [-sin, sin] on each pair: 3x faster on a CPU than slicing."""
    c = jnp.repeat(cos.astype(jnp.float32), 2, axis=-1)[:, None]
    s = jnp.stack([-sin, sin], axis=-1).astype(jnp.float32).reshape(c.shape)
    swapped = x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)
    return x * c + swapped * s

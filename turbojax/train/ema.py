"""Power-function averages of the weights: the window grows with the run (Karras et al. 2024, arXiv:2312.02696)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree


@functools.cache
def exponent(rate: float) -> float:
    """The power a whose average has a relative width of `rate`: largest root of (a+1) = rate^2 (a+2)^2 (a+3)."""
    if not 0.0 < rate < 0.28:
        raise ValueError(f"the EMA rate must lie in (0, 0.28), got {rate}")
    inverse = rate**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def decay(rate: float, updates: Int[Array, ""] | int) -> Float[Array, ""]:
    """What the average keeps at update number `updates` (0 at the first: it starts as a copy)."""
    i = jnp.asarray(updates, jnp.float32)
    return jnp.where(i < 1, 0.0, jnp.exp((exponent(rate) + 1.0) * jnp.log1p(-1.0 / (i + 1.0))))


def update(ema: PyTree, params: PyTree, rate: float, updates: Int[Array, ""] | int) -> PyTree:
    """The average after `params` became the weights."""
    keep = decay(rate, updates)
    return jax.tree.map(lambda e, p: keep * e + (1.0 - keep) * p, ema, params)

"""TrigFlow over a rectified-flow network: the coordinates that consistency distillation is written in.

    TrigFlow        x_t = cos t x0 + sin t noise,   t in [0, pi/2],   F = cos t noise - sin t x0
    rectified flow  x_s = (1 - s) x0 + s noise,     s in [0, 1],      v = noise - x0

s = sin t / (sin t + cos t) and x_s = x_t / (sin t + cos t), so one network serves both (`denoiser_scaling.py` of
TurboDiffusion). Times that are known while tracing are NumPy float64; drawn ones are float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from turbojax.train.flow import Velocity

Latents = Float[Array, "B t h w C"]


class Prediction(NamedTuple):
    """x0: the clean latents; F: TrigFlow's velocity."""

    x0: Latents
    F: Latents


@overload
def rf_time(t: Float[Array, "..."]) -> Float[Array, "..."]: ...
@overload
def rf_time(t: np.ndarray | float) -> np.ndarray: ...
def rf_time(t: Any) -> Any:
    """TrigFlow angle to the rectified flow's s; float64 on the host for NumPy and Python numbers."""
    xp = jnp if isinstance(t, jax.Array) else np
    return xp.sin(t) / (xp.sin(t) + xp.cos(t))


@overload
def trig_time(s: Float[Array, "..."]) -> Float[Array, "..."]: ...
@overload
def trig_time(s: np.ndarray | float) -> np.ndarray: ...
def trig_time(s: Any) -> Any:
    """The inverse of `rf_time`, exact at s = 1 too."""
    xp = jnp if isinstance(s, jax.Array) else np
    return xp.arctan2(s, 1.0 - s)


def along(t: Float[Array, "B"], x: Float[Array, "B *dims"]) -> Float[Array, "B *ones"]:
    """One number a sample, shaped to multiply x."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def add_noise(latents: Latents, noise: Latents, t: Float[Array, "B"]) -> Latents:
    """x_t."""
    t = along(t, latents)
    return jnp.cos(t) * latents + jnp.sin(t) * noise


def predict(velocity: Velocity, x: Latents, t: Float[Array, "B"]) -> Prediction:
    """What a rectified-flow network (its timestep in [0, 1000]) says at x_t, in TrigFlow's coordinates.

    The reference forms F as (cos t x - x0) / sin t, in float64; with x0 = (x - sin t v) / (cos t + sin t) put in, that
    is ((cos t - sin t) x + v) / (cos t + sin t), which loses nothing at small t.
    """
    angle = along(t, x)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    v = velocity(x / (cos + sin), 1000.0 * rf_time(t)).astype(x.dtype)
    return Prediction((x - sin * v) / (cos + sin), ((cos - sin) * x + v) / (cos + sin))


@dataclass(frozen=True)
class LogNormal:
    """log sigma ~ N(mean, std^2), s = sigma / (1 + sigma)."""

    mean: float
    std: float

    def draw(self, key: PRNGKeyArray, count: int) -> Float[Array, "count"]:
        """TrigFlow angles: tan t = sigma."""
        return jnp.arctan(jnp.exp(self.mean + self.std * jax.random.normal(key, (count,))))


@dataclass(frozen=True)
class UniformShift:
    """s = shift u / (1 + (shift - 1) u) for a uniform u, between `low` and `high` (an expert's share of the noise)."""

    shift: float
    low: float = 0.0
    high: float = 1.0

    def draw(self, key: PRNGKeyArray, count: int) -> Float[Array, "count"]:
        """TrigFlow angles."""
        first, last = (s / (self.shift - (self.shift - 1.0) * s) for s in (self.low, self.high))
        u = first + (last - first) * jax.random.uniform(key, (count,))
        return trig_time(self.shift * u / (1.0 + (self.shift - 1.0) * u))


Times = LogNormal | UniformShift

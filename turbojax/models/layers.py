"""The layers that the DiT is made of, and where each keeps float32.

Linear layers hold `kernel` as (in, out).  Everything is a flax.nnx module over plain arrays.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from pallas_kernels.row_measures import measure_rows


class Measured(NamedTuple):
    """An activation and the largest magnitude of each of its rows, for a layer that rounds them."""

    values: Float[Array, "*rows K"]
    amax: Float32[Array, "*rows"]


class Linear(nnx.Module):
    """y = x @ kernel + bias, computed in x's dtype; the initial kernel is Xavier-uniform as in Wan."""

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs, dtype: DTypeLike, scale: float = 1.0):
        bound = scale * math.sqrt(6.0 / (in_features + out_features))
        shape = (in_features, out_features)
        kernel = jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
        self.kernel = nnx.Param(kernel.astype(dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), dtype))

    def __call__(
        self, x: Float[Array, "*rows K"], activation: Literal["gelu_tanh"] | None = None
    ) -> Float[Array, "*rows N"]:
        y = self._product(x)
        if activation is None:
            return y
        # Float32 inside the activation: free on a GPU, where it is fused, and four times faster on a CPU.
        return jax.nn.gelu(y.astype(jnp.float32), approximate=True).astype(y.dtype)

    @property
    def rounds_rows(self) -> bool:
        """Whether this layer wants its input `Measured`."""
        return False

    @property
    def tells_squares(self) -> bool:
        """Whether `with_squares` costs no pass of its own."""
        return False

    def with_amax(self, x: Any, activation: Literal["gelu_tanh"] | None = None) -> Measured:
        """self(x) and what the next layer needs to round it."""
        y = self(x, activation)
        return Measured(y, measure_rows(y, "amax"))

    def with_squares(self, x: Any) -> tuple[Float[Array, "*rows N"], Float32[Array, "*rows"]]:
        """self(x) and the sum of squares of each of its rows."""
        y = self(x)
        return y, measure_rows(y, "squares")

    def onto(
        self, residual: Float[Array, "B L N"], x: Any, gate: Float[Array, "B 1 N"] | None = None
    ) -> Float[Array, "B L N"]:
        """residual + gate * self(x), in float32, rounded once."""
        y = self._product(x).astype(jnp.float32)
        y = y if gate is None else y * gate
        return (residual.astype(jnp.float32) + y).astype(residual.dtype)

    def modulated(
        self,
        x: Float[Array, "B L K"],
        shift: Float[Array, "..."],
        scale: Float[Array, "..."],
        eps: float,
        affine: bool = False,
    ) -> Float[Array, "B L K"]:
        """norm(x) * (1 + scale) + shift (affine: scale) as this layer takes it: float32, rounded once to x's dtype."""
        return (standardize(x, eps) * (scale if affine else 1.0 + scale) + shift).astype(x.dtype)

    def _product(self, x: Float[Array, "*rows K"]) -> Float[Array, "*rows N"]:
        # Rows are flattened so that the weight gradient contracts one dimension: XLA's CPU backend has a
        # thirty times slower path for bfloat16 gradients that contract two.
        rows = x.reshape(-1, x.shape[-1])
        y = jnp.dot(rows, self.kernel[...].astype(x.dtype)) + self.bias[...].astype(x.dtype)
        return y.reshape(*x.shape[:-1], y.shape[-1])


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the whole width, in float32 (Wan: q and k before the head split)."""

    def __init__(self, dim: int, eps: float):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows D"], extra: Float[Array, "D"] | None = None) -> Float[Array, "*rows D"]:
        """extra: one more scale, multiplied before the one rounding to x's dtype."""
        y = x.astype(jnp.float32) * self.factor(x)[..., None] * self.scale[...]
        return (y if extra is None else y * extra).astype(x.dtype)

    def factor(self, x: Float[Array, "*rows D"]) -> Float32[Array, "*rows"]:
        """1 / rms(x): what every row is multiplied by."""
        return self.factor_of(measure_rows(x, "squares"))

    def factor_of(self, squares: Float32[Array, "*rows"]) -> Float32[Array, "*rows"]:
        """The same of rows whose squares sum to these."""
        return jax.lax.rsqrt(squares / self.scale.shape[-1] + self.eps)


class LayerNorm(nnx.Module):
    """The affine parameters of a layer norm, float32 (Wan: before cross-attention)."""

    def __init__(self, dim: int, eps: float):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((dim,), jnp.float32))
        self.eps = eps


def standardize(x: Float[Array, "*rows D"], eps: float) -> Float[Array, "*rows D"]:
    """Layer norm without parameters: float32 in and out of the arithmetic, variance about the mean."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    return y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)


def rope_table(grid: tuple[int, int, int], head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, float32 [t*h*w, head_dim/2], of Wan's 3-D rotary embedding (`rope_params`, `rope_apply`).

    The width is split into time, height and width parts of d - 4*(d//6), 2*(d//6) and 2*(d//6) reals, each with its own
    base-10000 frequencies; angles are formed in float64 on the host.
    """
    side = 2 * (head_dim // 6)
    angles = []
    for axis, (length, width) in enumerate(zip(grid, (head_dim - 2 * side, side, side), strict=True)):
        frequency = 10000.0 ** (-np.arange(0, width, 2, dtype=np.float64) / width)
        table = np.arange(length, dtype=np.float64)[:, None] * frequency
        shape = [1, 1, 1, width // 2]
        shape[axis] = length
        angles.append(np.broadcast_to(table.reshape(shape), (*grid, width // 2)))
    angle = np.concatenate(angles, axis=-1).reshape(-1, head_dim // 2)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def timestep_embedding(timestep: Float[Array, "B"], dim: int) -> Float[Array, "B dim"]:
    """[cos(t f), sin(t f)] with f_i = 10000^(-i/half) from a float64 table (Wan `sinusoidal_embedding_1d`).

    t * f is formed as a sum of two exact-to-float32 products, because float32 alone loses 5e-5 near t = 1000.
    """
    half = dim // 2
    exact = 10000.0 ** (-np.arange(half, dtype=np.float64) / half)
    # Split the frequencies and the time in high parts of 12 bits, whose product is exact, and the rest.
    high = (exact.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFF000)).view(np.float32)
    low = (exact - high.astype(np.float64)).astype(np.float32)
    t = timestep.astype(jnp.float32)[:, None]
    t_high = jnp.round(t)
    t_low = t - t_high
    two_pi_high, two_pi_low = np.float32(6.28125), np.float32(2 * np.pi - 6.28125)
    coarse = t_high * high  # exact: 10 and 12 significant bits
    turns = jnp.round(coarse / np.float32(2 * np.pi))
    angle = (coarse - turns * two_pi_high) - turns * two_pi_low
    angle = angle + (t_high * low + t_low * (high + low))
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)

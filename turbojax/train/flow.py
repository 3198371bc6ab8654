"""Rectified flow: noised latents, velocity target and the loss that the teacher trains on.

x_s = (1 - s) x0 + s noise, velocity = noise - x0, s = timestep / 1000 (Wan, and Esser et al. 2024, arXiv:2403.03206).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

Velocity = Callable[[Float[Array, "B t h w C"], Float[Array, "B"]], Float[Array, "B t h w C"]]


def sample_noise_levels(key: PRNGKeyArray, batch: int, shift: float) -> Float[Array, "B"]:
    """One noise level s in (0, 1) a sample: stratified over the batch, pushed towards noise by `shift`."""
    u = (jnp.arange(batch) + jax.random.uniform(key, (batch,))) / batch
    return shift * u / (1.0 + (shift - 1.0) * u)


def add_noise(
    latents: Float[Array, "B t h w C"], noise: Float[Array, "B t h w C"], s: Float[Array, "B"]
) -> Float[Array, "B t h w C"]:
    """x_s, in float32."""
    s = s[:, None, None, None, None]
    return (1.0 - s) * latents + s * noise


def velocity_errors(
    velocity: Velocity,
    latents: Float[Array, "B t h w C"],
    noise: Float[Array, "B t h w C"],
    s: Float[Array, "B"],
) -> Float[Array, "B"]:
    """Mean squared velocity error of each sample."""
    predicted = velocity(add_noise(latents, noise, s), 1000.0 * s)
    return jnp.mean(jnp.square(predicted - (noise - latents)), axis=(1, 2, 3, 4))

"""rCM's sampler: 1 to 4 steps on a fixed grid of noise levels, for distilled models.

Source: `turbodiffusion/inference/wan2.1_t2v_infer.py` and `wan2.2_i2v_infer.py` (the `--ode` branch) of
TurboDiffusion; rCM, arXiv:2510.08431.  No guidance: the student has it distilled in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from turbojax.config import MID_TIMES
from turbojax.errors import UserError

MODES = ("sde", "ode")


def time_grid(
    num_steps: int, sigma_max: float, mid_times: Sequence[float] = MID_TIMES
) -> Float[np.ndarray, "{num_steps}+1"]:
    """Noise levels s_0 > ... > s_num_steps = 0 of the rectified flow, float64.

    sigma_max: start in EDM's sigma = s / (1 - s). mid_times: TrigFlow angles t of the later steps, falling, with
    s = sin t / (sin t + cos t); the first num_steps - 1 are used. Raises UserError for a step count outside
    1 ... len(mid_times) + 1, or a grid that does not fall.
    """
    most = len(mid_times) + 1
    if not 1 <= num_steps <= most:
        raise UserError(f"the rCM sampler takes 1 to {most} steps, got {num_steps}; for more use unipc or euler")
    angles = np.array([math.atan(sigma_max), *mid_times[: num_steps - 1], 0.0])
    if angles[0] <= angles[1]:
        raise UserError(
            f"sigma_max must be more than tan of the next time, {math.tan(angles[1]):.3g}, got {sigma_max:g}"
        )
    if not (np.diff(angles) < 0).all():
        raise UserError(f"mid_times must fall towards 0, got {tuple(mid_times)}")
    return np.sin(angles) / (np.sin(angles) + np.cos(angles))


def sample(
    velocity: Callable[[Array, float], Array],
    noise: Float[Array | np.ndarray, "B *dims"],
    step_noise: Float[Array | np.ndarray, "steps B *dims"] | None,
    *,
    num_steps: int,
    sigma_max: float,
    mode: str = "sde",
    mid_times: Sequence[float] = MID_TIMES,
    on_step: Callable[[int, Array], None] | None = None,
) -> Float[Array, "B *dims"]:
    """Noise to latents, float32; a plain loop over static noise levels, to be traced into one program.

    velocity: (x float32 [B, ...], s a Python float in (0, 1]) -> noise - x0, any float type. s is known at trace
        time, so a model of two experts picks one by comparing it.
    noise: standard normal. The sampler starts from s_0 * noise, not from noise.
    step_noise: standard normal, one for each step; the last is not used (its weight is 0). None for "ode".
    mode: "sde" adds fresh noise after each step: x' = (1 - s') (x - s v) + s' n; "ode" follows the flow:
        x' = x - (s - s') v.
    on_step: called with (index, x') after each step, while tracing: the place for a `jax.debug.callback`.
    Raises UserError for an unknown mode, a step count outside the grid, or noises that do not match.
    """
    if mode not in MODES:
        raise UserError(f"unknown rCM mode {mode!r}; known: {', '.join(MODES)}")
    grid = time_grid(num_steps, sigma_max, mid_times).tolist()
    if mode == "sde" and (step_noise is None or step_noise.shape != (num_steps, *noise.shape)):
        got = None if step_noise is None else list(step_noise.shape)
        raise UserError(f"step_noise must be {[num_steps, *noise.shape]} for {num_steps} SDE steps, got {got}")
    x = grid[0] * jnp.asarray(noise, jnp.float32)
    for i, (s, s_next) in enumerate(pairwise(grid)):
        v = velocity(x, s).astype(jnp.float32)
        if mode == "ode" or step_noise is None:
            x = x - (s - s_next) * v
        else:
            x = x - s * v
            if s_next > 0:
                x = (1.0 - s_next) * x + s_next * jnp.asarray(step_noise[i], jnp.float32)
        if on_step is not None:
            on_step(i, x)
    return x

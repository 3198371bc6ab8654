"""rCM's losses: continuous-time consistency along the teacher's flow, and DMD2's reverse divergence against a critic.

Sources: rCM, arXiv:2510.08431 and `rcm/models/t2v_model_distill_rcm.py` of TurboDiffusion; sCM, arXiv:2410.11081;
DMD2, arXiv:2405.14867. Every function is pure and returns one loss a sample: times, noise and networks are arguments.
A network is a `Velocity`: (latents, timestep in [0, 1000]) -> noise - x0.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from turbojax.train.flow import Velocity
from turbojax.train.trigflow import Latents, add_noise, along, predict, trig_time

Text = Float[Array, "B L D"]


def guided(
    velocity: Callable[[Latents, Array, Text], Latents],
    context: Text,
    empty: Float[Array, "#B #L D"],
    guidance: float,
) -> Velocity:
    """Classifier-free guidance, both halves in one batch: v_empty + guidance (v_context - v_empty)."""
    if guidance == 1.0:
        return lambda x, timestep: velocity(x, timestep, context)
    both = jnp.concatenate([context, jnp.broadcast_to(empty, context.shape)])

    def combined(x: Latents, timestep: Float[Array, "B"]) -> Latents:
        v = velocity(jnp.concatenate([x, x]), jnp.concatenate([timestep, timestep]), both)
        given, absent = jnp.split(v.astype(jnp.float32), 2)
        return absent + guidance * (given - absent)

    return combined


def tangent(
    student: Velocity, teacher: Velocity, x: Latents, t: Float[Array, "B"], warmup: Float[Array, ""] | float
) -> Latents:
    """sCM's direction g for the student's F at x_t, normalised to a length below 1 for each sample.

    g = -cos t sqrt(1 - r^2 sin^2 t) (F - F_teacher) - (r cos t sin t x + cos t sin t dF/dt), r = `warmup` in [0, 1],
    where dF/dt is taken along the teacher's flow by forward-mode differentiation of the student; then g / (|g| + 0.1).
    A sample with a NaN gives zero.
    """
    angle = along(t, x)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    teacher_f = predict(teacher, x, t).F
    # The tangent is scaled by cos t sin t before it enters the network, so that it stays bounded at both ends.
    directions = (cos * sin * teacher_f, jnp.cos(t) * jnp.sin(t))
    f, change = jax.jvp(lambda x, t: predict(student, x, t).F, (x, t), directions)
    g = -cos * jnp.sqrt(1.0 - (warmup * sin) ** 2) * (f - teacher_f) - (warmup * cos * sin * x + change)
    g = jnp.where(_broken(g) | _broken(f), 0.0, g)
    return g / (jnp.sqrt(jnp.sum(g * g, axis=_inside(g), keepdims=True)) + 0.1)


def consistency_losses(
    student: Velocity,
    frozen: Velocity,
    teacher: Velocity,
    latents: Latents,
    noise: Latents,
    t: Float[Array, "B"],
    warmup: Float[Array, ""] | float = 1.0,
) -> Float[Array, "B"]:
    """Continuous-time consistency: sum (F - stop_gradient(F) - g)^2, whose gradient is -2 g dF.

    frozen: the student again, on parameters that carry no gradient (the derivative along the flow needs none).
    """
    x = add_noise(latents, noise, t)
    g = jax.lax.stop_gradient(tangent(frozen, teacher, x, t, warmup))
    f = predict(student, x, t).F
    f = jnp.where(_broken(f), 0.0, f)
    return jnp.sum(jnp.square(f - jax.lax.stop_gradient(f) - g), axis=_inside(f))


def discrete_consistency_losses(
    student: Velocity,
    frozen: Velocity,
    teacher: Velocity,
    latents: Latents,
    noise: Latents,
    u: Float[Array, "B"],
    *,
    intervals: int = 48,
    shift: float = 5.0,
) -> Float[Array, "B"]:
    """The discrete alternative: the student's x0 at one time against its x0 after one Euler step of the teacher.

    u in [0, 1 - 1/intervals]; the two times are shift(1 - u) and shift(1 - u - 1/intervals) of the rectified flow.
    """

    def angle(u: Array) -> Array:
        return trig_time(shift * u / (1.0 + (shift - 1.0) * u))

    t, later = angle(1.0 - u), angle(1.0 - u - 1.0 / intervals)
    x = add_noise(latents, noise, t)
    moved = x - along(t - later, x) * predict(teacher, x, t).F
    target = jax.lax.stop_gradient(predict(frozen, moved, later).x0)
    return jnp.sum(jnp.square(predict(student, x, t).x0 - target), axis=_inside(x))


def simulate(
    student: Velocity,
    frozen: Velocity,
    noise: Float[Array, "N B t h w C"],
    times: Float[Array, "N B"],
    steps: Int[Array, ""] | int,
) -> Latents:
    """Clips as the sampler makes them: `steps` (1 ... N) times denoise and add noise again; gradient in the last only.

    noise[0] starts; noise[k] is added before denoising at times[k]; times[0] should be pi/2.
    """

    def body(k: Array, x: Latents) -> Latents:
        return add_noise(predict(frozen, x, times[k]).x0, noise[k + 1], times[k + 1])

    x = jax.lax.stop_gradient(jax.lax.fori_loop(0, steps - 1, body, noise[0]))
    return predict(student, x, times[steps - 1]).x0


def falling_times(drawn: Float[Array, "N B"]) -> Float[Array, "N B"]:
    """Times for `simulate`: pi/2 first, then the drawn ones, none above its predecessor (drawn[0] is not used)."""
    return jax.lax.cummin(drawn.at[0].set(jnp.pi / 2), axis=0)


def distribution_losses(
    made: Latents, critic: Velocity, teacher: Velocity, noise: Latents, t: Float[Array, "B"]
) -> Float[Array, "B"]:
    """DMD2: moves what the student made (`made` carries the gradient) from the critic's x0 towards the teacher's.

    sum of grad^2, with derivative 2 grad, grad = (x0_critic - x0_teacher) / max(1e-5, mean |made - x0_teacher|).
    A sample with a NaN gives zero.
    """
    fixed = jax.lax.stop_gradient(made)
    x = add_noise(fixed, noise, t)
    theirs = predict(teacher, x, t).x0
    weight = jnp.maximum(1e-5, jnp.mean(jnp.abs(fixed - theirs), axis=_inside(x), keepdims=True))
    grad = jax.lax.stop_gradient((predict(critic, x, t).x0 - theirs) / weight)
    # made - fixed is zero: written so that float32 does not round the gradient off against `made`.
    loss = jnp.square(made - fixed + grad)
    return jnp.sum(jnp.where(_broken(loss), 0.0, loss), axis=_inside(x))


def critic_losses(critic: Velocity, made: Latents, noise: Latents, t: Float[Array, "B"]) -> Float[Array, "B"]:
    """The critic learns to denoise what the student makes: sum (made - x0)^2 / sin^2 t."""
    f = predict(critic, add_noise(made, noise, t), t).F
    # made - x0 = sin t (F - target): the division is done before anything can cancel.
    target = jnp.cos(along(t, made)) * noise - jnp.sin(along(t, made)) * made
    return jnp.sum(jnp.square(f - target), axis=_inside(made))


def _inside(x: Array) -> tuple[int, ...]:
    return tuple(range(1, x.ndim))


def _broken(x: Array) -> Array:
    """True for samples that hold a NaN."""
    return jnp.any(jnp.isnan(x), axis=_inside(x), keepdims=True)

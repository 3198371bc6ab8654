"""SLA fine-tuning: a student with sparse-linear attention learns to answer as its dense teacher does.

Source: `rcm/models/t2v_model_sla.py` of TurboDiffusion (white-box); SLA, arXiv:2509.24006 (black-box: the diffusion
loss on data). With `guidance` the white-box target is the teacher's guided velocity, so that the student needs none.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from turbojax.attention import AttentionConfig
from turbojax.train import ema
from turbojax.train.flow import Velocity, add_noise
from turbojax.train.gradients import gradient
from turbojax.train.rcm import guided
from turbojax.train.student import SLA, AdamConfig, ClipSource, HostArray, Networks, skipped
from turbojax.train.trigflow import Latents, LogNormal, Times, rf_time

Trained = Literal["all", "attention", "proj_l"]

# The published distribution of noise levels, and a rate that suits a network of a million parameters.
TIMES, ADAM = LogNormal(1.5, 1.6), AdamConfig(4e-4, b2=0.99, warmup=30, hold=0.3)


def white_box_losses(
    student: Velocity, teacher: Velocity, latents: Latents, noise: Latents, s: Float[Array, "B"]
) -> Float[Array, "B"]:
    """Mean squared difference of the two velocities at x_s, float32."""
    x = add_noise(latents, noise, s)
    target = jax.lax.stop_gradient(teacher(x, 1000.0 * s).astype(jnp.float32))
    return jnp.mean(jnp.square(student(x, 1000.0 * s).astype(jnp.float32) - target), axis=(1, 2, 3, 4))


def trained_leaves(params: PyTree, what: Trained) -> PyTree:
    """True for the parameters that move: all, the self-attention's (its proj_l among them), or proj_l alone."""
    part = {"all": "", "attention": "self_attn", "proj_l": "proj_l"}[what]
    return jax.tree_util.tree_map_with_path(lambda path, _: part in jax.tree_util.keystr(path), params)


@dataclass(frozen=True)
class SLAConfig:
    """What a fine-tuning run does. `loss`: white_box (the teacher's velocity) or black_box (noise - latents).

    accumulate: parts of the batch that are worked on one after the other.
    """

    steps: int = 500
    batch: int = 8
    accumulate: int = 1
    seed: int = 0
    attention: AttentionConfig = SLA
    times: Times = TIMES
    loss: Literal["white_box", "black_box"] = "white_box"
    guidance: float = 1.0
    trained: Trained = "all"
    ema_rate: float = 0.1
    optimizer: AdamConfig = ADAM


class SLAState(NamedTuple):
    params: PyTree
    ema: PyTree
    opt_state: PyTree
    updates: Array


class SLABatch(NamedTuple):
    """One step's clips and their captions, the empty prompt, and the frozen teacher, which lies on the device."""

    latents: HostArray
    context: HostArray
    empty: Array
    teacher: PyTree


# Fields of a batch that do not have one row a sample.
FROZEN = ("empty", "teacher")


class SLAStage:
    """The stage that `loop.run` drives; `start`: a student to go on from, instead of the teacher grafted."""

    def __init__(self, config: SLAConfig, networks: Networks, clips: ClipSource, start: PyTree | None = None):
        self.config, self.networks, self.clips = config, networks, clips
        self._start = networks.graft() if start is None else start
        self._empty = jnp.asarray(clips.empty)
        self.optimizer = config.optimizer.make(config.steps, trained_leaves(self._start, config.trained))

    def init(self) -> SLAState:
        params = jax.tree.map(jnp.copy, self._start)
        return SLAState(params, jax.tree.map(jnp.copy, params), self.optimizer.init(params), jnp.zeros((), jnp.int32))

    def losses(self, params: PyTree, batch: SLABatch, key: jax.Array) -> Float[Array, "B"]:
        time_key, noise_key = jax.random.split(key)
        latents = batch.latents.astype(jnp.float32)
        s = rf_time(self.config.times.draw(time_key, len(latents)))
        noise = jax.random.normal(noise_key, latents.shape)

        def student(x: Array, timestep: Array) -> Array:
            return self.networks.student(params, x, timestep, batch.context)

        if self.config.loss == "black_box":
            x = add_noise(latents, noise, s)
            return jnp.mean(jnp.square(student(x, 1000.0 * s) - (noise - latents)), axis=(1, 2, 3, 4))
        dense = functools.partial(self.networks.like_teacher, batch.teacher)
        teacher = guided(dense, batch.context, batch.empty, self.config.guidance)
        return white_box_losses(student, teacher, latents, noise, s)

    def step(self, state: SLAState, batch: PyTree, key: jax.Array) -> tuple[SLAState, Mapping[str, jax.Array]]:
        """One update; batch: the NamedTuple that `losses` takes."""

        def loss(params: PyTree, data: dict[str, Array], key: jax.Array) -> tuple[Array, dict[str, Array]]:
            value = jnp.mean(self.losses(params, batch._replace(**data), key))
            return value, {"loss": value}

        data = {name: rows for name, rows in batch._asdict().items() if name not in FROZEN}
        grads, metrics = gradient(loss, state.params, data, key, self.config.accumulate)
        changes, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, changes)
        average = ema.update(state.ema, params, self.config.ema_rate, state.updates)
        metrics = {**metrics, "grad_norm": optax.tree.norm(grads), "skipped": skipped(opt_state)}
        return SLAState(params, average, opt_state, state.updates + 1), metrics

    def batch(self, step: int) -> SLABatch:
        drawn = self.clips.draw(step, self.config.batch)
        return SLABatch(drawn.latents, drawn.context, self._empty, self.networks.teacher_params)

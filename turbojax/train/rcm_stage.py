"""The rCM stage: a consistency loss and DMD2 for the student, and a critic that follows it, taking turns."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from turbojax.attention import AttentionConfig
from turbojax.samplers.rcm import MID_TIMES
from turbojax.train import ema, rcm
from turbojax.train.flow import Velocity
from turbojax.train.gradients import gradient
from turbojax.train.student import SLA, AdamConfig, ClipSource, HostArray, Networks, skipped
from turbojax.train.trigflow import Latents, LogNormal, Times, UniformShift

Phase = Literal["consistency", "both", "critic"]
Data = tuple[HostArray, HostArray]

# The published distributions of noise levels (1.3B), and rates that suit a network of a million parameters.
CONSISTENCY_TIMES, CRITIC_TIMES = LogNormal(0.7, 1.6), UniformShift(5.0)
ADAM = AdamConfig(1.5e-4, b1=0.0, b2=0.99, warmup=20, hold=0.5)


@dataclass(frozen=True)
class RCMConfig:
    """What a distillation run does; `steps` counts the student's and the critic's updates together.

    accumulate: parts of the batch that are worked on one after the other.
    guidance: of the teacher, which the student takes in. consistency_times, critic_times: how noise levels are drawn.
    student_every: one student update in so many. tangent_warmup: updates over which the consistency tangent grows, and
    before which there is neither DMD nor critic. fixed_times: DMD simulates the sampler's own grid; None draws times.
    consistency_scale 0 leaves DMD alone, distribution_scale 0 consistency alone.
    """

    steps: int = 2000
    batch: int = 8
    accumulate: int = 1
    seed: int = 0
    guidance: float = 3.0
    attention: AttentionConfig = SLA
    consistency: Literal["continuous", "discrete"] = "continuous"
    consistency_times: Times = CONSISTENCY_TIMES
    critic_times: Times = CRITIC_TIMES
    student_every: int = 5
    tangent_warmup: int = 200
    fixed_times: tuple[float, ...] | None = MID_TIMES
    max_simulation_steps: int = 4
    consistency_scale: float = 100.0
    distribution_scale: float = 1.0
    ema_rate: float = 0.1
    student_optimizer: AdamConfig = ADAM
    critic_optimizer: AdamConfig = ADAM

    def phase(self, step: int) -> Phase:
        """What is updated at this step."""
        if self.distribution_scale == 0 or step < self.tangent_warmup:
            return "consistency"
        return "both" if (step - self.tangent_warmup) % self.student_every == 0 else "critic"

    def student_updates(self, step: int) -> int:
        """Student updates before this step."""
        if self.distribution_scale == 0 or step <= self.tangent_warmup:
            return step
        return self.tangent_warmup + -(-(step - self.tangent_warmup) // self.student_every)

    def simulation_steps(self, step: int) -> int:
        """How many times the student denoises: it cycles through 1 ... max_simulation_steps, for each network."""
        updates = self.student_updates(step)
        count = updates if self.phase(step) != "critic" else step - updates
        return count % self.max_simulation_steps + 1

    def student_total(self) -> int:
        return self.student_updates(self.steps)


class RCMState(NamedTuple):
    """Student and critic, the student's average, an optimiser each; updates: of the student."""

    student: PyTree
    critic: PyTree
    ema: PyTree
    student_opt: PyTree
    critic_opt: PyTree
    updates: Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("latents", "context", "empty", "teacher", "simulation_steps", "warmup"),
    meta_fields=("phase",),
)
@dataclass(frozen=True)
class RCMBatch:
    """One step's clips, the empty prompt, the frozen teacher. The phase is static: each has a program of its own."""

    latents: HostArray
    context: HostArray
    empty: Array
    teacher: PyTree
    simulation_steps: HostArray
    warmup: HostArray
    phase: Phase

    @property
    def data(self) -> Data:
        """What has one row a sample."""
        return self.latents, self.context

    def part(self, data: Data) -> RCMBatch:
        """The same with other samples."""
        return dataclasses.replace(self, latents=data[0], context=data[1])


class RCMStage:
    """The stage that `loop.run` drives; `start`: a student to go on from, instead of the teacher grafted."""

    def __init__(self, config: RCMConfig, networks: Networks, clips: ClipSource, start: PyTree | None = None):
        self.config, self.networks, self.clips = config, networks, clips
        self._start = networks.graft() if start is None else start
        self._empty = jnp.asarray(clips.empty)
        total = config.student_total()
        self.student_optimizer = config.student_optimizer.make(total)
        self.critic_optimizer = config.critic_optimizer.make(max(1, config.steps - total))

    def init(self) -> RCMState:
        student, critic = jax.tree.map(jnp.copy, self._start), self.networks.teacher_copy()
        return RCMState(
            student,
            critic,
            jax.tree.map(jnp.copy, student),
            self.student_optimizer.init(student),
            self.critic_optimizer.init(critic),
            jnp.zeros((), jnp.int32),
        )

    def batch(self, step: int) -> RCMBatch:
        drawn, config = self.clips.draw(step, self.config.batch), self.config
        warmup = 1.0 if config.tangent_warmup == 0 else min(1.0, step / config.tangent_warmup)
        simulation_steps = np.int32(config.simulation_steps(step))
        given = (drawn.latents, drawn.context, self._empty, self.networks.teacher_params)
        return RCMBatch(*given, simulation_steps, np.float32(warmup), config.phase(step))

    def step(self, state: RCMState, batch: RCMBatch, key: jax.Array) -> tuple[RCMState, Mapping[str, jax.Array]]:
        return (self._update_critic if batch.phase == "critic" else self._update_student)(state, batch, key)

    def _update_student(self, state: RCMState, batch: RCMBatch, key: jax.Array) -> tuple[RCMState, Mapping[str, Array]]:
        def loss(params: PyTree, data: Data, key: jax.Array) -> tuple[Array, dict[str, Array]]:
            parts = self.student_losses(params, state.critic, batch.part(data), key)
            return sum((jnp.mean(x) for x in parts.values()), jnp.zeros(())), {k: jnp.mean(x) for k, x in parts.items()}

        grads, metrics = gradient(loss, state.student, batch.data, key, self.config.accumulate)
        changes, student_opt = self.student_optimizer.update(grads, state.student_opt, state.student)
        student = optax.apply_updates(state.student, changes)
        average = ema.update(state.ema, student, self.config.ema_rate, state.updates)
        metrics = {**metrics, "student_grad_norm": optax.tree.norm(grads), "skipped": skipped(student_opt)}
        state = state._replace(student=student, ema=average, student_opt=student_opt, updates=state.updates + 1)
        return state, metrics

    def _update_critic(self, state: RCMState, batch: RCMBatch, key: jax.Array) -> tuple[RCMState, Mapping[str, Array]]:
        def loss(params: PyTree, data: Data, key: jax.Array) -> tuple[Array, dict[str, Array]]:
            part = batch.part(data)
            made_key, time_key, noise_key = jax.random.split(key, 3)
            frozen = self._student(state.student, part)
            made = self._made(frozen, frozen, part, made_key)
            t = self.config.critic_times.draw(time_key, len(made))
            noise = jax.random.normal(noise_key, made.shape)
            value = jnp.mean(rcm.critic_losses(self._critic(params, part), made, noise, t))
            return value, {"critic": value}

        grads, metrics = gradient(loss, state.critic, batch.data, key, self.config.accumulate)
        changes, critic_opt = self.critic_optimizer.update(grads, state.critic_opt, state.critic)
        critic = optax.apply_updates(state.critic, changes)
        metrics = {**metrics, "critic_grad_norm": optax.tree.norm(grads), "critic_skipped": skipped(critic_opt)}
        return state._replace(critic=critic, critic_opt=critic_opt), metrics

    def student_losses(self, params: PyTree, critic: PyTree, batch: RCMBatch, key: jax.Array) -> dict[str, Array]:
        """Scaled losses of each sample, by name; what has no part in this phase is left out."""
        config = self.config
        keys = iter(jax.random.split(key, 5))
        student, frozen = self._student(params, batch), self._student(jax.lax.stop_gradient(params), batch)
        dense = functools.partial(self.networks.like_teacher, batch.teacher)
        teacher = rcm.guided(dense, batch.context, batch.empty, config.guidance)
        latents = batch.latents.astype(jnp.float32)
        count, parts = len(latents), {}
        if config.consistency_scale:
            time_key, noise = next(keys), jax.random.normal(next(keys), latents.shape)
            if config.consistency == "continuous":
                t = config.consistency_times.draw(time_key, count)
                moving = self._student(jax.lax.stop_gradient(params), batch, forward_mode=True)
                losses = rcm.consistency_losses(student, moving, teacher, latents, noise, t, batch.warmup)
            else:
                u = jax.random.uniform(time_key, (count,)) * (1.0 - 1.0 / 48)
                losses = rcm.discrete_consistency_losses(student, frozen, teacher, latents, noise, u)
            parts["consistency"] = config.consistency_scale * losses
        if batch.phase == "both":
            made = self._made(student, frozen, batch, next(keys))
            t = config.critic_times.draw(next(keys), count)
            noise = jax.random.normal(next(keys), latents.shape)
            losses = rcm.distribution_losses(made, self._critic(critic, batch), teacher, noise, t)
            parts["distribution"] = config.distribution_scale * losses
        return parts

    def _student(self, params: PyTree, batch: RCMBatch, *, forward_mode: bool = False) -> Velocity:
        return lambda x, timestep: self.networks.student(params, x, timestep, batch.context, forward_mode=forward_mode)

    def _critic(self, params: PyTree, batch: RCMBatch) -> Velocity:
        return lambda x, timestep: self.networks.like_teacher(params, x, timestep, batch.context)

    def _made(self, student: Velocity, frozen: Velocity, batch: RCMBatch, key: jax.Array) -> Latents:
        config, count, most = self.config, len(batch.latents), self.config.max_simulation_steps
        noise_key, time_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, (most, *batch.latents.shape))
        if config.fixed_times is None:
            drawn = config.critic_times.draw(time_key, most * count).reshape(most, count)
        else:
            drawn = jnp.broadcast_to(jnp.asarray([0.0, *config.fixed_times[: most - 1]])[:, None], (most, count))
        return rcm.simulate(student, frozen, noise, rcm.falling_times(drawn), batch.simulation_steps)

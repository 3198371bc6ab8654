"""rCM's losses against TurboDiffusion's own code (tests/golden/make_rcm.py), and what they must not let through."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden import seeded
from golden.modules import relative

from turbojax.attention import AttentionConfig
from turbojax.config import DiTConfig
from turbojax.models.dit import WanDiT
from turbojax.train import rcm, trigflow
from turbojax.train.rcm_stage import RCMConfig

SHAPES, GOLDEN = seeded.load("rcm")
LATENTS, TEXT = (2, 2, 4, 4, 4), (2, 1, 3)
TIMES = {"consistency": [0.35, 1.52], "distribution": [1.1, 1.48], "critic": [0.6, 1.3]}
SIMULATED = jnp.array([[0.0, 0.0], [1.4, 1.2], [1.45, 0.9]])


def latents(name):
    return jnp.asarray(seeded.uniform(name, LATENTS))


def parameters(name):
    drawn = seeded.weights({f"{name}.{k}": v for k, v in SHAPES.items()}, gain=1.2)
    return {k.split(".")[1]: jnp.asarray(v) for k, v in drawn.items()}


def velocity(params, x, timestep, text):
    shift = x.mean((1, 2, 3)) @ params["mixed"].T + timestep[:, None] / 1000 @ params["time"].T
    shift += text[:, 0] @ params["text"].T
    hidden = jnp.tanh(x @ params["inner"].T + shift[:, None, None, None])
    return 0.5 * x + hidden @ params["outer"].T


CONTEXT, EMPTY = (jnp.asarray(seeded.uniform(name, TEXT)) for name in ("context", "empty"))


def network(params):
    return lambda x, timestep: velocity(params, x, timestep, CONTEXT)


TEACHER = rcm.guided(functools.partial(velocity, parameters("teacher")), CONTEXT, EMPTY, 5.0)
CRITIC = network(parameters("critic"))


def simulated(student, frozen):
    noise = jnp.stack([latents("start"), latents("step_1"), latents("step_2"), jnp.zeros(LATENTS)])
    times = rcm.falling_times(jnp.concatenate([SIMULATED, jnp.zeros((1, 2))]))
    return rcm.simulate(student, frozen, noise, times, 3)


def consistency(params, warmup):
    frozen, t = network(jax.lax.stop_gradient(params)), jnp.array(TIMES["consistency"])
    args = TEACHER, latents("latents"), latents("noise"), t, warmup
    return 100.0 * rcm.consistency_losses(network(params), frozen, *args)


def distribution(params):
    made = simulated(network(params), network(jax.lax.stop_gradient(params)))
    return rcm.distribution_losses(made, CRITIC, TEACHER, latents("noise"), jnp.array(TIMES["distribution"]))


def critic(params):
    student = network(parameters("student"))
    made = simulated(student, student)
    return rcm.critic_losses(network(params), made, latents("noise"), jnp.array(TIMES["critic"]))


def discrete(params):
    frozen = network(jax.lax.stop_gradient(params))
    u = jnp.array([0.2, 0.7]) * (1 - 1 / 48)
    args = network(params), frozen, TEACHER, latents("latents"), latents("noise"), u
    return 100.0 * rcm.discrete_consistency_losses(*args)


CASES = {
    "consistency": (functools.partial(consistency, warmup=1.0), "student"),
    "consistency_warming": (functools.partial(consistency, warmup=0.3), "student"),
    "distribution": (distribution, "student"),
    "critic": (critic, "critic"),
    "discrete": (discrete, "student"),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_turbodiffusions(name):
    losses, trained = CASES[name]
    params = parameters(trained)
    assert relative(losses(params), GOLDEN[name]) < 1e-3
    grads = jax.grad(lambda p: jnp.mean(losses(p)))(params)
    for key, grad in grads.items():
        assert relative(grad, GOLDEN[f"{name}.{key}"]) < 1e-3, key


def test_phases_and_simulated_steps_follow_turbodiffusions_schedule():
    config = RCMConfig(tangent_warmup=10, student_every=5)
    assert [config.phase(i) != "critic" for i in range(40)] == GOLDEN["is_student"].tolist()
    assert [config.simulation_steps(i) for i in range(40)] == (GOLDEN["effective"] % 4 + 1).tolist()
    assert config.student_updates(40) == sum(config.phase(i) != "critic" for i in range(40))


# Time turns the embedding a thousand radians: its steps must be small. Norms and times inside the network are
# float32, so the steps in the latents must not be.
@pytest.mark.parametrize(("along", "h"), [("latents", 1e-2), ("time", 4e-5)])
@pytest.mark.parametrize("kind", ["dense", "sla"])
def test_jvp_of_the_network_is_its_central_difference(kind, along, h):
    attention = AttentionConfig(kind, topk=0.5, block_q=4, block_k=2)
    config = DiTConfig(dim=16, ffn_dim=32, num_heads=2, num_layers=2, text_dim=8, linear_branch=kind == "sla")
    with jax.enable_x64(True):
        graph, state = nnx.split(WanDiT(config, rngs=nnx.Rngs(0), dtype=jnp.float64))
        params = {
            k: jnp.asarray(seeded.uniform(".".join(map(str, k)), v.shape, scale=0.3), jnp.float64)
            for k, v in nnx.to_flat_state(state)
        }
        full = nnx.from_flat_state([(k, v.replace(params[k])) for k, v in nnx.to_flat_state(state)])
        text, x, dx = (
            jnp.asarray(seeded.uniform(n, s)) for n, s in
            (("text", (2, 4, 8)), ("x", (2, 2, 4, 4, 16)), ("dx", (2, 2, 4, 4, 16)))
        )  # fmt: skip
        t, dt = jnp.array([0.7, 1.4]), jnp.array([0.6, -0.4])

        def f(x, t):
            module = nnx.merge(graph, full)
            return trigflow.predict(lambda x, s: module(x, s, text, attention=attention), x, t).F

        x, dx, t, dt = (a.astype(jnp.float64) for a in (x, dx, t, dt))
        dx, dt = (dx, 0 * dt) if along == "latents" else (0 * dx, dt)
        f = jax.jit(f)
        exact = jax.jvp(f, (x, t), (dx, dt))[1]
        near, far = (f(x + n * dx, t + n * dt) - f(x - n * dx, t - n * dt) for n in (h, 2 * h))
        difference = (8 * near - far) / (12 * h)
    assert relative(exact, difference) < 1e-3


def test_tangent_is_shorter_than_one_and_a_broken_sample_gives_none():
    student, x = network(parameters("student")), latents("latents")
    x = x.at[1, 0, 0, 0, 0].set(jnp.nan)
    g = rcm.tangent(student, TEACHER, x, jnp.array(TIMES["consistency"]), 1.0)
    assert 0.5 < float(jnp.linalg.norm(g[0])) < 1.0
    assert not np.asarray(g[1]).any()


def test_gradient_flows_through_the_last_simulated_step_only():
    params = parameters("student")
    through = jax.grad(lambda p: simulated(network(p), network(parameters("student"))).sum())(params)
    never = jax.grad(lambda p: simulated(network(parameters("student")), network(p)).sum())(params)
    assert all(np.asarray(x).any() for x in jax.tree.leaves(through))
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(never))

"""The rCM stage: each phase moves its own network, and a run that was cut in two ends as one that was not."""

import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train.small_students import ADAM, Noise, networks

from turbojax.attention import AttentionConfig
from turbojax.train import loop, rcm
from turbojax.train.rcm_stage import RCMConfig, RCMStage


@pytest.fixture(scope="module")
def stage():
    attention = AttentionConfig("sla", topk=0.5, block_q=2, block_k=2)
    config = RCMConfig(
        steps=6, batch=2, attention=attention, student_every=2, tangent_warmup=2,
        student_optimizer=ADAM, critic_optimizer=ADAM,
    )  # fmt: skip
    return RCMStage(config, networks(attention), Noise(frames=1))


def moved(before, after):
    return any(bool(jnp.any(a != b)) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


def test_each_phase_moves_its_own_network(stage):
    step, state = jax.jit(stage.step), stage.init()
    phases = [stage.batch(i).phase for i in range(4)]
    assert phases == ["consistency", "consistency", "both", "critic"]
    # The first update of each optimiser is taken at rate zero: two rounds show every network move.
    for i in itertools.chain(range(4), range(2, 4)):
        batch, before = stage.batch(i), state
        state, metrics = step(state, batch, jax.random.key(i))
        assert all(np.isfinite(float(v)) for v in metrics.values())
        assert ("distribution" in metrics) == (batch.phase == "both")
        if batch.phase == "critic":
            assert not moved(before.student, state.student)
        else:
            assert not moved(before.critic, state.critic)
    assert moved(stage.init().student, state.student)
    assert moved(stage.init().critic, state.critic)
    assert int(state.updates) == 4


def test_the_derivative_along_the_flow_avoids_attention_without_forward_mode(monkeypatch):
    """On a GPU exact attention is cuDNN's, which `jax.jvp` cannot pass; traced only: here there is no GPU."""
    asked = []
    module = importlib.import_module("pallas_kernels.dense_attention")
    monkeypatch.setattr(module, "cudnn_refusal", lambda *_: asked.append(1) or "no GPU")
    dense = networks(AttentionConfig("dense"))
    x, t, context = jnp.ones((1, 3, 4, 2, 16)), jnp.ones(1), jnp.ones((1, 5, 8))

    def tangent(forward_mode):
        def student(x, timestep):
            return dense.student(dense.teacher_params, x, timestep, context, forward_mode=forward_mode)

        return jax.make_jaxpr(lambda: rcm.tangent(student, lambda x, t: x, x, t, 1.0))()

    tangent(forward_mode=True)
    assert not asked
    tangent(forward_mode=False)
    assert asked


@pytest.mark.slow
def test_interrupted_run_ends_as_an_uninterrupted_one(stage, tmp_path):
    whole = loop.run(stage, loop.LoopConfig(6, str(tmp_path / "whole")))
    loop.run(stage, loop.LoopConfig(3, str(tmp_path / "cut")))
    resumed = loop.run(stage, loop.LoopConfig(6, str(tmp_path / "cut")))
    assert not moved(whole, resumed)

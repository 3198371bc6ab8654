"""Accumulation is the mean over its parts, and recomputing changes memory, not numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train.small_students import sla_stage

from turbojax.train.gradients import gradient


def loss(params, data, key):
    """Depends on the key, so that every part must have its own."""
    noise = jax.random.normal(key, data.shape)
    value = jnp.mean((data * params["w"] + noise) ** 2)
    return value, {"loss": value}


def test_accumulated_gradient_is_the_mean_over_strided_parts():
    params, key = {"w": jnp.float32(0.7)}, jax.random.key(0)
    data = jax.random.normal(jax.random.key(1), (6, 5))
    together, metrics = jax.jit(lambda: gradient(loss, params, data, key, 3))()
    parts = [gradient(loss, params, data[i::3], k) for i, k in enumerate(jax.random.split(key, 3))]
    np.testing.assert_allclose(together["w"], np.mean([grads["w"] for grads, _ in parts]), rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], np.mean([m["loss"] for _, m in parts]), rtol=1e-6)


def test_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="batch of 4 does not divide into 3"):
        gradient(loss, {"w": jnp.float32(1)}, jnp.ones((4, 2)), jax.random.key(0), 3)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["blocks", "keep_linear"])
def test_recomputing_gives_the_same_gradient(remat):
    def gradients(stage):
        params, batch = stage.init().params, stage.batch(0)

        def mean(params, batch):
            return jnp.mean(stage.losses(params, batch, jax.random.key(0)))

        return jax.jit(jax.grad(mean))(params, batch)

    for a, b in zip(*map(jax.tree.leaves, map(gradients, (sla_stage(), sla_stage(remat)))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)

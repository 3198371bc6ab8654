"""TrigFlow's coordinates: the same network, the same noise levels, other names."""

import jax
import jax.numpy as jnp
import numpy as np

from turbojax.samplers.rcm import MID_TIMES, time_grid
from turbojax.train import flow, trigflow
from turbojax.train.trigflow import LogNormal, UniformShift

ANGLES = np.array([1e-4, 0.3, 1.0, 1.4, 1.5, np.pi / 2])


def test_times_convert_both_ways():
    s = trigflow.rf_time(ANGLES)
    assert s.dtype == np.float64
    np.testing.assert_allclose(trigflow.trig_time(s), ANGLES, rtol=1e-14)
    np.testing.assert_allclose(trigflow.rf_time(jnp.float32(ANGLES)), s, rtol=3e-7)


def test_sampler_and_trainer_share_the_grid():
    np.testing.assert_allclose(trigflow.rf_time(np.array(MID_TIMES)), time_grid(4, 80.0)[1:-1], rtol=1e-15)


def test_true_velocity_predicts_the_clean_latents_and_the_flow():
    rng = np.random.default_rng(0)
    x0, noise = jnp.asarray(rng.standard_normal((2, len(ANGLES), 1, 2, 2, 3)), jnp.float32)
    t = jnp.float32(ANGLES)
    x = trigflow.add_noise(x0, noise, t)

    def velocity(x_s, timestep):
        # The network must be shown the rectified flow's latents at the rectified flow's time.
        np.testing.assert_allclose(x_s, flow.add_noise(x0, noise, timestep / 1000), atol=1e-5)
        return noise - x0

    made = trigflow.predict(velocity, x, t)
    angle = trigflow.along(t, x)
    np.testing.assert_allclose(made.x0, x0, atol=1e-5)
    np.testing.assert_allclose(made.F, jnp.cos(angle) * noise - jnp.sin(angle) * x0, atol=1e-5)
    # The flow is the derivative of x_t in t.
    tangent = jax.jvp(lambda t: trigflow.add_noise(x0, noise, t), (t,), (jnp.ones_like(t),))[1]
    np.testing.assert_allclose(made.F, tangent, atol=1e-5)


def test_drawn_times_have_their_distribution():
    key, count = jax.random.key(0), 20_000
    sigma = np.tan(np.float64(LogNormal(0.7, 1.6).draw(key, count)))
    assert abs(np.log(sigma).mean() - 0.7) < 0.05  # four standard errors
    assert abs(np.log(sigma).std() - 1.6) < 0.05
    s = np.asarray(trigflow.rf_time(UniformShift(5.0).draw(key, count)))
    u = s / (5 - 4 * s)
    np.testing.assert_allclose(np.quantile(u, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.015)

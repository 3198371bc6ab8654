"""rCM sampling walks the states of TurboDiffusion's own inference loops, given the same noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import seeded
from golden.modules import relative

from turbojax.errors import UserError
from turbojax.samplers import rcm

SHAPES, GOLDEN = seeded.load("samplers")
WEIGHTS = seeded.weights(SHAPES, gain=1.5)
NOISE, STEP_NOISE = jnp.asarray(GOLDEN["noise"]), jnp.asarray(GOLDEN["step_noise"])


def velocity(x, s):
    assert isinstance(s, float)  # static, or experts could not be chosen while tracing
    hidden = jnp.tanh(x @ WEIGHTS["inner"].T + s * WEIGHTS["time"].T)
    return 0.5 * x + hidden @ WEIGHTS["outer"].T


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", ["sde", "ode"])
def test_states_equal_turbodiffusions(mode, steps):
    states = []
    out = rcm.sample(
        velocity,
        NOISE,
        STEP_NOISE[:steps] if mode == "sde" else None,
        num_steps=steps,
        sigma_max=80.0 if mode == "sde" else 200.0,  # the defaults of its two scripts
        mode=mode,
        on_step=lambda i, x: states.append(x),
    )
    reference = GOLDEN[f"rcm_{mode}_{steps}"]
    assert len(states) == steps == len(reference) - 1
    # float64 there, float32 here.
    for ours, theirs in zip(states, reference[1:], strict=True):
        assert relative(ours, theirs) < 1e-5
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, states[-1])


def test_experts_are_chosen_while_tracing_and_the_loop_is_one_program():
    asked = []

    def experts(x, s):
        asked.append(("high" if s >= 0.9 else "low", round(s, 6)))
        return velocity(x, s)

    run = jax.jit(lambda n: rcm.sample(experts, n, None, num_steps=4, sigma_max=200.0, mode="ode"))
    assert relative(run(NOISE), GOLDEN["rcm_ode_4"][-1]) < 1e-5
    assert asked == [("high", 0.995025), ("high", 0.933781), ("low", 0.852895), ("low", 0.608979)]


def test_starts_from_scaled_noise():
    seen = []
    rcm.sample(lambda x, s: seen.append(x) or x, NOISE, STEP_NOISE, num_steps=4, sigma_max=80.0)
    np.testing.assert_allclose(seen[0], NOISE * (80 / 81), rtol=1e-6)
    assert relative(seen[0], GOLDEN["rcm_sde_4"][0]) < 1e-6


def test_exact_velocity_of_a_point_reaches_it():
    """When the data are one point, v = (x - x0) / s whatever the noise, and every step lands on x0."""
    x0 = jnp.full_like(NOISE, 0.7)
    for mode in rcm.MODES:
        out = rcm.sample(lambda x, s: (x - x0) / s, NOISE, STEP_NOISE, num_steps=4, sigma_max=80.0, mode=mode)
        np.testing.assert_allclose(out, x0, atol=1e-5)


def test_grid():
    # s = tan t / (1 + tan t), of 80 and of the angles 1.5, 1.4, 1.0.
    np.testing.assert_allclose(rcm.time_grid(4, 80.0), [80 / 81, 0.93378106, 0.85289539, 0.60897905, 0], atol=1e-8)
    assert rcm.time_grid(4, 80.0).dtype == np.float64
    np.testing.assert_array_equal(rcm.time_grid(2, 80.0)[1:-1], rcm.time_grid(4, 80.0)[1:2])
    tan = np.tan(1.3)
    np.testing.assert_allclose(rcm.time_grid(2, 80.0, mid_times=(1.3,))[1], tan / (1 + tan))


def test_errors_name_the_argument():
    arguments = {"num_steps": 4, "sigma_max": 80.0}
    with pytest.raises(UserError, match="takes 1 to 4 steps, got 5"):
        rcm.time_grid(5, 80.0)
    with pytest.raises(UserError, match="takes 1 to 4 steps, got 0"):
        rcm.sample(velocity, NOISE, STEP_NOISE, num_steps=0, sigma_max=80.0)
    with pytest.raises(UserError, match="unknown rCM mode 'ddim'"):
        rcm.sample(velocity, NOISE, STEP_NOISE, mode="ddim", **arguments)
    with pytest.raises(UserError, match=r"step_noise must be \[4, 2, 8\] for 4 SDE steps, got \[3, 2, 8\]"):
        rcm.sample(velocity, NOISE, STEP_NOISE[:3], **arguments)
    with pytest.raises(UserError, match="got None"):
        rcm.sample(velocity, NOISE, None, **arguments)
    with pytest.raises(UserError, match=r"sigma_max must be more than tan of the next time, 14\.1, got 10"):
        rcm.time_grid(4, 10.0)
    with pytest.raises(UserError, match="mid_times must fall towards 0"):
        rcm.time_grid(3, 80.0, mid_times=(1.0, 1.2))

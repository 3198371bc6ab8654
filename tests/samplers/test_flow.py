"""UniPC and Euler walk the trajectories of Wan's and diffusers' own schedulers, step by step and as one program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import seeded
from golden.modules import relative

from turbojax.errors import UserError
from turbojax.samplers import flow

SHAPES, GOLDEN = seeded.load("samplers")
WEIGHTS = seeded.weights(SHAPES, gain=1.5)


def velocity(x, s):
    hidden = jnp.tanh(x @ WEIGHTS["inner"].T + s * WEIGHTS["time"].T)
    return 0.5 * x + hidden @ WEIGHTS["outer"].T


def walk(solver: flow.Solver, noise) -> np.ndarray:
    state, points = solver.start(jnp.asarray(noise)), []
    for s, row in zip(solver.times, solver.table, strict=True):
        state = solver.step(state, velocity(state.x, s), row)
        points.append(state.x)
    return np.stack(points)


CASES = {
    **{
        f"wan_unipc_{n}_{shift:g}": flow.unipc_solver(n, shift)
        for n, shift in ((50, 5.0), (50, 3.0), (40, 12.0), (1, 5.0), (2, 5.0), (3, 5.0))
    },
    "diffusers_unipc_50_5": flow.unipc_solver(50, 5.0),
    "diffusers_euler_20_3": flow.euler_solver(20, 3.0, truncate=False),
    "turbo_unipc_10_3": flow.unipc_solver(10, 3.0, start=0.97, truncate=False),
}


@pytest.mark.parametrize("name", CASES)
def test_trajectory_equals_the_reference(name):
    points = walk(CASES[name], GOLDEN["noise"])
    assert points.shape == GOLDEN[name].shape
    for i, (ours, theirs) in enumerate(zip(points, GOLDEN[name], strict=True)):
        # Float32 sums in another order; a wrong coefficient shows at 1e-3.
        assert relative(ours, theirs) < 5e-6, f"step {i}"


@pytest.mark.parametrize("sampler", ["unipc", "euler"])
def test_one_program_equals_the_walk(sampler):
    solver = getattr(flow, f"{sampler}_solver")(20, 5.0)
    run = jax.jit(lambda noise: getattr(flow, sampler)(velocity, noise, num_steps=20, shift=5.0))
    assert relative(run(GOLDEN["noise"]), walk(solver, GOLDEN["noise"])[-1]) < 1e-5


def test_grid_is_wans():
    # Printed by Wan's scheduler.
    np.testing.assert_allclose(flow.time_grid(50, 5.0)[:3], [0.99979984, 0.99573237, 0.99153047], atol=1e-8)
    np.testing.assert_allclose(flow.time_grid(50, 5.0)[-3:], [0.17226514, 0.09250685, 0.0], atol=1e-8)
    assert (flow.unipc_solver(40, 12.0).times[:5] * 1000).round(9).tolist() == [999, 997, 995, 993, 990]


def run_experts(**arguments) -> tuple[list[str], list[float], jax.Array]:
    """(which expert was asked at each step, at which s, the sample)."""
    asked = []

    def expert(name):
        def record(x, s):
            jax.debug.callback(lambda s: asked.append((name, float(s))), s, ordered=True)
            return velocity(x, s)

        return record

    out = jax.jit(
        lambda noise: flow.unipc(expert("high"), noise, low_velocity=expert("low"), **arguments),
    )(GOLDEN["noise"])
    jax.effects_barrier()
    return [name for name, _ in asked], [s for _, s in asked], out


@pytest.mark.parametrize(("shift", "boundary", "high"), [(12.0, 0.875, 26), (5.0, 0.9, 15)])
def test_experts_change_at_wans_step_and_share_the_memory(shift, boundary, high):
    names, times, out = run_experts(num_steps=40, shift=shift, boundary=boundary)
    assert names == ["high"] * high + ["low"] * (40 - high)
    np.testing.assert_allclose(times, flow.unipc_solver(40, shift).times, rtol=1e-6)
    one = flow.unipc(velocity, GOLDEN["noise"], num_steps=40, shift=shift)
    assert relative(out, one) < 1e-5


def test_a_step_at_the_boundary_is_the_high_noise_experts():
    s = flow.unipc_solver(4, 5.0).times[1]
    assert run_experts(num_steps=4, shift=5.0, boundary=s)[0] == ["high", "high", "low", "low"]
    assert run_experts(num_steps=4, shift=5.0, boundary=s + 1e-3)[0] == ["high", "low", "low", "low"]
    assert run_experts(num_steps=4, shift=5.0, boundary=0.0)[0] == ["high"] * 4
    assert run_experts(num_steps=4, shift=5.0, boundary=1.0)[0] == ["low"] * 4


def test_guidance_mixes_the_two_halves_of_one_batch():
    context = jnp.array([[1.0], [3.0], [0.5], [0.25]])  # two prompts, then their negatives
    calls = []

    def pair(x, s):
        calls.append(x.shape)
        return x * context + s

    x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    v = flow.guided(pair, 4.0)(x, 0.5)
    expected = (x * context[2:] + 0.5) + 4.0 * (x * context[:2] - x * context[2:])
    np.testing.assert_allclose(v, expected, rtol=1e-6)
    assert calls == [(4, 2)]


def test_bfloat16_velocity_keeps_a_float32_state():
    out = flow.unipc(lambda x, s: velocity(x, s).astype(jnp.bfloat16), GOLDEN["noise"], num_steps=10, shift=5.0)
    assert out.dtype == jnp.float32


def test_steps_are_reported_in_order_from_inside_the_program():
    seen = []

    def on_step(i, x):
        jax.debug.callback(lambda i, x: seen.append((int(i), np.asarray(x))), i, x, ordered=True)

    run = jax.jit(lambda noise: flow.unipc(velocity, noise, num_steps=5, shift=5.0, on_step=on_step))
    out = run(GOLDEN["noise"])
    jax.effects_barrier()
    assert [i for i, _ in seen] == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(seen[-1][1], out)


def test_errors_name_the_argument():
    with pytest.raises(UserError, match="steps must be at least 1, got 0"):
        flow.time_grid(0, 5.0)
    with pytest.raises(UserError, match="shift must be positive"):
        flow.time_grid(5, 0.0)
    with pytest.raises(UserError, match="start must lie between 0 and 1"):
        flow.time_grid(5, 5.0, start=1.0)
    with pytest.raises(UserError, match="belong together"):
        flow.unipc(velocity, GOLDEN["noise"], num_steps=5, shift=5.0, boundary=0.9)

"""Many-step samplers of a rectified flow: UniPC (Wan's own) and Euler, with shift, guidance and two experts.

Sources: `wan/utils/fm_solvers_unipc.py` (FlowUniPCMultistepScheduler) of Wan 2.1; UniPC, arXiv:2302.04867.

Every update is linear in the state and the velocity, so its coefficients are worked out on the host in float64 and a
whole run is one `lax.scan` over the rows of a table: 50 steps compile as fast as one.

    x = unipc(velocity, noise, num_steps=50, shift=5.0)                   # inside one jit

    solver = unipc_solver(50, shift=5.0)                                  # or step by step, under any loop
    state = solver.start(noise)
    for s, row in zip(solver.times, solver.table):
        state = solver.step(state, velocity(state.x, s), row)
    x = state.x
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from turbojax.errors import UserError

# Where Wan's grid starts, before the shift: 1 - 1/1000 as its scheduler holds it, in float32.
START = float(np.float32(0.999))

Velocity = Callable[[Array, Array], Array]


def time_grid(num_steps: int, shift: float, start: float = START) -> Float[np.ndarray, "{num_steps}+1"]:
    """Noise levels s_0 > ... > s_num_steps = 0, float64: evenly spaced from `start`, then shifted towards noise.

    s -> shift * s / (1 + (shift - 1) * s). Raises UserError for arguments that give no such grid.
    """
    if num_steps < 1:
        raise UserError(f"steps must be at least 1, got {num_steps}")
    if not shift > 0:
        raise UserError(f"shift must be positive, got {shift}")
    if not 0 < start < 1:
        raise UserError(f"start must lie between 0 and 1, got {start}: at 1 the data have no weight left")
    even = np.linspace(start, 0.0, num_steps + 1)
    return shift * even / (1 + (shift - 1) * even)


class State(NamedTuple):
    """x is the current sample; the rest is UniPC's memory (previous corrected sample, last two predictions of x0)."""

    x: Float[Array, "B *dims"]
    previous: Float[Array, "B *dims"]
    x0_1: Float[Array, "B *dims"]
    x0_2: Float[Array, "B *dims"]


@dataclass(frozen=True)
class Solver:
    """A run, step by step: ask the velocity at (x, times[i]), then `step` with table[i].

    times: float64 [num_steps], s for the velocity. table: float32 [num_steps, coefficients].
    start: noise -> state. step: (state, v, row) -> state. A state is a pytree whose `x` is the sample.
    """

    times: Float[np.ndarray, "steps"]
    table: Float[np.ndarray, "steps coefficients"]
    start: Callable[[Array], State]
    step: Callable[[State, Array, Array], State]


def unipc_solver(num_steps: int, shift: float, *, start: float = START, truncate: bool = True) -> Solver:
    """UniPC of order 2 (B(h) = e^h - 1, predicts x0, of order 1 on the first and the last step).

    truncate: ask the velocity at whole timesteps, trunc(1000 s), as Wan does; the solver itself keeps the exact s.
    """
    return _solver(time_grid(num_steps, shift, start), truncate, _unipc_table, _unipc_start, _unipc_step)


def euler_solver(num_steps: int, shift: float, *, start: float = START, truncate: bool = True) -> Solver:
    """Euler's method on the same grid: x' = x + (s' - s) v."""
    return _solver(time_grid(num_steps, shift, start), truncate, _euler_table, _euler_start, _euler_step)


def unipc(
    velocity: Velocity,
    noise: Float[Array | np.ndarray, "B *dims"],
    *,
    num_steps: int,
    shift: float,
    start: float = START,
    truncate: bool = True,
    low_velocity: Velocity | None = None,
    boundary: float | None = None,
    on_step: Callable[[Array, Array], None] | None = None,
) -> Float[Array, "B *dims"]:
    """`integrate` with `unipc_solver`: Wan's own sampler, 40 or 50 steps with guidance."""
    solver = unipc_solver(num_steps, shift, start=start, truncate=truncate)
    return integrate(solver, velocity, noise, low_velocity=low_velocity, boundary=boundary, on_step=on_step)


def euler(
    velocity: Velocity,
    noise: Float[Array | np.ndarray, "B *dims"],
    *,
    num_steps: int,
    shift: float,
    start: float = START,
    truncate: bool = True,
    low_velocity: Velocity | None = None,
    boundary: float | None = None,
    on_step: Callable[[Array, Array], None] | None = None,
) -> Float[Array, "B *dims"]:
    """`integrate` with `euler_solver`."""
    solver = euler_solver(num_steps, shift, start=start, truncate=truncate)
    return integrate(solver, velocity, noise, low_velocity=low_velocity, boundary=boundary, on_step=on_step)


def integrate(
    solver: Solver,
    velocity: Velocity,
    noise: Float[Array | np.ndarray, "B *dims"],
    *,
    low_velocity: Velocity | None = None,
    boundary: float | None = None,
    on_step: Callable[[Array, Array], None] | None = None,
    on_expert: Callable[[Velocity, Array], Velocity] | None = None,
) -> Float[Array, "B *dims"]:
    """Noise to latents, float32, as one `lax.scan` (two with experts).

    velocity: (x float32 [B, ...], s float32 scalar in (0, 1), traced) -> noise - x0, any float type.
    low_velocity: the low-noise expert, for every step with s < boundary (Wan 2.2; the solver's memory passes
        from one expert to the other). Both or neither must be given.
    on_step: called while tracing with (index, x) after each step: the place for a `jax.debug.callback`.
    on_expert: called while tracing with (velocity, x) before an expert's first step, gives the velocity to use: the
        place to fetch weights.
    """
    if (low_velocity is None) != (boundary is None):
        raise UserError("low_velocity and boundary belong together: give both, or neither")
    steps = len(solver.times)
    switch = steps if boundary is None else int((solver.times >= boundary).sum())
    state = solver.start(jnp.asarray(noise, jnp.float32))
    rows = (np.arange(steps), solver.times.astype(np.float32), solver.table)
    for expert, part in ((velocity, slice(0, switch)), (low_velocity, slice(switch, steps))):
        if expert is None or part.start == part.stop:
            continue
        if on_expert is not None:
            expert = on_expert(expert, state.x)

        def step(state: State, row: tuple, expert: Velocity = expert) -> tuple[State, None]:
            index, s, coefficients = row
            state = solver.step(state, expert(state.x, s).astype(jnp.float32), coefficients)
            if on_step is not None:
                on_step(index, state.x)
            return state, None

        state, _ = jax.lax.scan(step, state, tuple(jnp.asarray(r[part]) for r in rows))
    return state.x


def guided(velocity: Callable[[Array, Any], Array], guidance: float | Array) -> Callable[[Array, Any], Array]:
    """Classifier-free guidance: v_uncond + guidance * (v_cond - v_uncond), both in one batch.

    velocity: takes [2B, ...]: B samples for the prompts, then the same B for the negative (or empty) prompts.
    """

    def combined(x: Float[Array, "B *dims"], s: Any) -> Float[Array, "B *dims"]:
        cond, uncond = jnp.split(velocity(jnp.concatenate([x, x]), s).astype(jnp.float32), 2)
        return uncond + guidance * (cond - uncond)

    return combined


def _solver(
    grid: Float[np.ndarray, "levels"], truncate: bool, table: Callable, start: Callable, step: Callable
) -> Solver:
    times = np.trunc(grid[:-1] * 1000) / 1000 if truncate else grid[:-1]
    return Solver(times, table(grid).astype(np.float32), start, step)


def _euler_table(grid: Float[np.ndarray, "levels"]) -> Float[np.ndarray, "steps 1"]:
    return np.diff(grid)[:, None]


def _euler_start(noise: Float[Array, "B *dims"]) -> State:
    return State(noise, noise, noise, noise)


def _euler_step(state: State, v: Float[Array, "B *dims"], row: Float[Array | np.ndarray, "1"]) -> State:
    return state._replace(x=state.x + row[0] * v)


def _unipc_start(noise: Float[Array, "B *dims"]) -> State:
    zeros = jnp.zeros_like(noise)
    return State(noise, zeros, zeros, zeros)


def _unipc_step(state: State, v: Float[Array, "B *dims"], row: Float[Array | np.ndarray, "9"]) -> State:
    """One row of `_unipc_table`: predict x0, correct the sample with it, predict the next sample."""
    x0 = state.x - row[0] * v
    corrected = row[1] * state.x + row[2] * state.previous + row[3] * x0 + row[4] * state.x0_1 + row[5] * state.x0_2
    x = row[6] * corrected + row[7] * x0 + row[8] * state.x0_1
    return State(x, corrected, x0, state.x0_1)


def _unipc_table(grid: Float[np.ndarray, "levels"]) -> Float[np.ndarray, "steps 9"]:
    """Coefficients of every step.

    With alpha = 1 - s, lambda = log(alpha / s), h = the step in lambda, phi = expm1(-h) (which is also B(h)):
      column 0:    s, for x0 = x - s v
      columns 1-5: the corrected sample, of (x, previous corrected sample, x0, x0 one ago, x0 two ago)
      columns 6-8: the next sample, of (corrected sample, x0, x0 one ago)
    """
    n = len(grid) - 1
    alpha = 1 - grid
    lam = np.log(alpha[:-1]) - np.log(grid[:-1])
    order = [min(2, i + 1) for i in range(n)]  # of the predictor of step i, and of the corrector of i + 1
    table = np.zeros((n, 9))
    for i in range(n):
        table[i, 0] = grid[i]
        table[i, 1:6] = (1, 0, 0, 0, 0) if i == 0 else _corrector(i, order[i - 1], grid, alpha, lam)
        # The last step lands on the predicted x0: h is infinite there.
        table[i, 6:9] = (0, 1, 0) if i == n - 1 else _predictor(i, order[i], grid, alpha, lam)
    return table


def _corrector(i: int, order: int, grid: np.ndarray, alpha: np.ndarray, lam: np.ndarray) -> tuple[float, ...]:
    h = lam[i] - lam[i - 1]
    phi = math.expm1(-h)
    if order == 1:
        ratio, rho_memory, rho_new = 1.0, 0.0, 0.5
    else:
        ratio = (lam[i - 2] - lam[i - 1]) / h
        # The weights that make the update exact for polynomials of degree 2 in lambda.
        phi_2 = phi / -h - 1
        phi_3 = phi_2 / -h - 0.5
        rho_memory, rho_new = np.linalg.solve([[1.0, 1.0], [ratio, 1.0]], [phi_2 / phi, 2 * phi_3 / phi])
    scale = alpha[i] * phi
    return (
        0.0,
        grid[i] / grid[i - 1],
        -scale * rho_new,
        -scale * (1 - rho_new - rho_memory / ratio),
        -scale * rho_memory / ratio,
    )


def _predictor(i: int, order: int, grid: np.ndarray, alpha: np.ndarray, lam: np.ndarray) -> tuple[float, ...]:
    h = lam[i + 1] - lam[i]
    scale = alpha[i + 1] * math.expm1(-h)
    memory = 0.0 if order == 1 else 0.5 * h / (lam[i - 1] - lam[i])
    return grid[i + 1] / grid[i], -scale * (1 - memory), -scale * memory

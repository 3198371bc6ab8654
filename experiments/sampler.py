"""The few-step sampler: fresh noise or none, which noise levels, how many steps, and what that does to diversity.

    python -m experiments.sampler                                          (see below for the time)
    python -m experiments.sampler --sigma-max 40,80,200 --clips 96

Arms of rCM's sampler: SDE (fresh noise after each step) against ODE; the middle noise levels of TurboDiffusion's code
(angles 1.5, 1.4, 1.0), of the rCM paper (1.3, 1.0, 0.6) and two others; where it starts (sigma_max). UniPC and Euler
at the same few steps stand beside them. Diversity is the spread over seeds of place, size, speed and background
inside a motion, relative to that of drawn clips.

What came out: not run in full yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from experiments.clips import Clips, describe, diversity, right
from experiments.command import Command, run
from experiments.records import Row
from experiments.report import COLOURS, bootstrap, figure, save, write_table
from turbojax.pipeline import draw_noise
from turbojax.programs import decode
from turbojax.quant import quantize_dit
from turbojax.samplers import rcm
from turbojax.settings import Settings, resolve
from turbojax.train.evaluate import wilson

CODE, PAPER, EVEN, LATE = (1.5, 1.4, 1.0), (1.3, 1.0, 0.6), (1.17, 0.78, 0.39), (1.54, 1.52, 1.4)
MID_TIMES = {"code": CODE, "paper": PAPER, "even": EVEN, "late": LATE}


@dataclass(frozen=True)
class Arm:
    """A sampler; mid_times and sigma_max are rCM's alone."""

    sampler: str
    steps: int
    mid_times: tuple[float, ...] = CODE
    sigma_max: float = 80.0

    @property
    def name(self) -> str:
        rcm_only = f", {times_name(self.mid_times)}, sigma {self.sigma_max:g}" if self.sampler.startswith("rcm") else ""
        return f"{self.sampler}, {self.steps} steps{rcm_only}"


def times_name(times: tuple[float, ...]) -> str:
    return next((name for name, known in MID_TIMES.items() if known == times), "/".join(map(str, times)))


def arms(steps: Sequence[int], sigmas: Sequence[float], sigma: float) -> list[Arm]:
    """Mode x steps, then middle times and sigma_max at the most steps, then the many-step samplers at as few."""
    most = max(steps)
    out = [Arm(mode, n, sigma_max=sigma) for mode in ("rcm-sde", "rcm-ode") for n in steps]
    for mode in ("rcm-sde", "rcm-ode"):
        out += [Arm(mode, most, times, sigma) for times in MID_TIMES.values() if most > 1]
        out += [Arm(mode, most, sigma_max=s) for s in sigmas]
    out += [Arm(name, most) for name in ("unipc", "euler")]
    return list(dict.fromkeys(out))


def maker(clips: Clips, arm: Arm) -> Any:
    """Makes clips with an arm: through the pipeline, or through `rcm.sample` itself where the arm has other times."""
    if not arm.sampler.startswith("rcm"):
        return clips.generate(sampler=arm.sampler, steps=arm.steps, guidance=1.0)
    if arm.mid_times == CODE:
        return clips.generate(sampler=arm.sampler, steps=arm.steps, sigma_max=arm.sigma_max)
    return own_maker(clips, arm)


def own_maker(clips: Clips, arm: Arm) -> Any:
    """What `Pipeline.generate` does, with `mid_times`, which it has no option for."""
    pipeline, spec = clips.pipeline, clips.spec
    settings = resolve(spec, sampler=arm.sampler, steps=arm.steps, sigma_max=arm.sigma_max, batch_size=clips.batch_size)
    dit = quantize_dit(pipeline.dit) if settings.quant == "w8a8" else pipeline.dit
    (graph, params), (vae_graph, vae) = nnx.split(dit), nnx.split(pipeline.vae)
    denoise_arm = compiled(partial(denoise, graph=graph, settings=settings, mid_times=arm.mid_times))
    decode_all = compiled(partial(decode, graphdef=vae_graph))
    (width, height), config = settings.size, spec.vae
    frames = (settings.frames - 1) // config.temporal_stride + 1
    shape = frames, height // config.spatial_stride, width // config.spatial_stride, config.z_dim

    def make(requests: Sequence[tuple[str, int]]) -> tuple[np.ndarray, float, float]:
        filled = [*requests] + [requests[-1]] * (clips.batch_size - len(requests))
        context = jnp.concatenate([pipeline.text_encoder(*pipeline.tokenizer(prompt)) for prompt, _ in filled])
        noise, step_noise = draw_noise([seed for _, seed in filled], shape, settings)
        latents, dit_seconds = denoise_arm(params, context, noise, step_noise)
        pixels, vae_seconds = decode_all(vae, latents)
        return np.asarray(pixels), dit_seconds / clips.batch_size, vae_seconds / clips.batch_size

    return make


def denoise(
    params: Any,
    context: Float[Array, "B L D"],
    noise: Float[Array, "B t h w C"],
    step_noise: Float[Array, "steps B t h w C"] | None,
    *,
    graph: Any,
    settings: Settings,
    mid_times: tuple[float, ...],
) -> Float[Array, "B t h w C"]:
    """rCM's sampler on any grid of noise levels."""
    dit = nnx.merge(graph, params)

    def velocity(x: Array, s: float) -> Array:
        timestep = jnp.full(len(x), 1000.0 * s, jnp.float32)
        return dit(x, timestep, context, attention=settings.attention, round_timestep=settings.round_timestep)

    grid = {"num_steps": settings.steps, "sigma_max": settings.sigma_max, "mid_times": mid_times}
    return rcm.sample(velocity, noise, step_noise, **grid, mode=settings.sampler.removeprefix("rcm-"))


def compiled(function: Callable[..., Array]) -> Callable[..., tuple[Array, float]]:
    """`function` in one program, compiled before the clock starts; returns the result and the seconds."""
    programs: list[Any] = []

    def call(*arguments: Any) -> tuple[Array, float]:
        if not programs:
            programs.append(jax.jit(function).lower(*arguments).compile())
        begun = time.perf_counter()
        result = jax.block_until_ready(programs[0](*arguments))
        return result, time.perf_counter() - begun

    return call


def main(argv: Sequence[str] | None = None) -> None:
    command = Command(str(__doc__), "sampler")
    command.option("steps", (1, 2, 3, 4), (2,), "numbers of steps")
    command.option("sigma_max", (20.0, 40.0, 200.0), (200.0,), "starts besides the model's own")
    command.option("clips", 48, 2, "clips of each arm")
    command.option("batch_size", 8, 2, "clips made at once")
    args = command.parse(argv)
    clips = Clips(args.out, args.model, clips=args.clips, batch_size=args.batch_size)
    planned = arms(args.steps, args.sigma_max, clips.spec.config.sigma_max)
    if args.quick:
        planned = [arm for arm in planned if arm.mid_times in (CODE, PAPER)][:4] + planned[-1:]
    print(f"{len(planned)} arms of {args.clips} clips")
    measured = {arm: clips.measure(key(arm), lambda arm=arm: maker(clips, arm)) for arm in planned}
    report(clips, measured)


def key(arm: Arm) -> dict[str, Any]:
    fields = asdict(arm)
    return {**fields, "mid_times": times_name(arm.mid_times)}


def report(clips: Clips, measured: dict[Arm, list[Row]]) -> None:
    write_table(
        clips.out / "table.md",
        [{"arm": arm.name, **describe(rows)} for arm, rows in measured.items()],
        f"{clips.model}, {len(clips.wanted)} clips an arm, the same prompts and seeds; 95% intervals. Middle times: "
        + "; ".join(f"{name} {times}" for name, times in MID_TIMES.items()),
    )
    clips.sheet({(arm.name, ""): key(arm) for arm in measured})
    if not clips.readable:
        return
    fig, (axes,) = figure(1, 3, 4.0, 0.9 + 0.22 * len(measured))
    places = -np.arange(len(measured))
    columns = {
        "fit, dB": [_interval([r["fit"] for r in rows]) for rows in measured.values()],
        "all right, %": [_share(rows) for rows in measured.values()],
        "diversity": [(diversity(rows),) * 3 for rows in measured.values()],
    }
    kinds = list(dict.fromkeys(arm.sampler for arm in measured))
    colours = [COLOURS[kinds.index(arm.sampler)] for arm in measured]
    for axis, (title, values) in zip(axes, columns.items(), strict=True):
        middle, low, high = np.array(values).T
        axis.hlines(places, low, high, color=colours)
        axis.scatter(middle, places, color=colours, s=14, zorder=3)
        axis.set(title=title)
        axis.grid(axis="x", alpha=0.3)
        axis.set_yticks(places, [arm.name for arm in measured] if axis is axes[0] else [""] * len(measured))
    save(fig, clips.out / "samplers.png")


def _interval(values: Sequence[float]) -> tuple[float, float, float]:
    return float(np.mean(values)), *bootstrap(values)


def _share(rows: Sequence[Row]) -> tuple[float, float, float]:
    hits = sum(map(right, rows))
    low, high = wilson(hits, len(rows))
    return 100 * hits / len(rows), 100 * low, 100 * high


if __name__ == "__main__":
    run(main)

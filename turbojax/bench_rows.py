"""The article's four rows on one GPU: full-size random weights, 81 frames, 4 few-step forwards against 50 guided ones.

    python -m turbojax.bench_rows --json rows.json [--rows 1.3b-480p 14b-480p 14b-720p i2v-14b-720p]

Times are of the DiT alone, whole sampler in one program. The dense baseline (bf16, cuDNN attention, condition and
unconditional batched) is timed over 2 steps and scaled to 50, which the output says. The prompt has at most 119 tokens:
its padding to 512 rows is one row that counts often, as in `Pipeline`, but for the baseline, which has all of them.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from turbojax.attention import AttentionConfig
from turbojax.config import PRESETS, Preset
from turbojax.models.dit import WanDiT
from turbojax.programs import TEXT_BUCKETS
from turbojax.quant import quantize_dit
from turbojax.samplers import flow, rcm

FRAMES = 81
BASELINE_STEPS, TIMED_STEPS = 50, 2


@dataclass(frozen=True)
class Row:
    preset: str
    size: tuple[int, int]  # width, height


ROWS: Mapping[str, Row] = {
    "1.3b-480p": Row("wan2.1-t2v-1.3b", (832, 480)),
    "14b-480p": Row("wan2.1-t2v-14b", (832, 480)),
    "14b-720p": Row("wan2.1-t2v-14b", (1280, 720)),
    "i2v-14b-720p": Row("wan2.2-i2v-a14b", (1280, 720)),
}
# Each rung adds one part to the one before; the last is what ships.
LADDER: Mapping[str, tuple[AttentionConfig, bool]] = {
    "dense": (AttentionConfig("dense"), False),
    "dense+w8a8": (AttentionConfig("dense"), True),
    "sage+w8a8": (AttentionConfig("sage"), True),
    "sla+w8a8": (AttentionConfig("sla"), True),
    # Blocks as TurboDiffusion has them on this GPU; elsewhere it takes those of "sla".
    "sagesla+w8a8": (AttentionConfig("sagesla", block_q=64, block_k=128), True),
}


def random_dit(config: Any, quantized: bool, seed: int = 0) -> tuple[Any, Any]:
    """(graphdef, state) of a DiT with random weights, drawn on the device in the form that it runs in."""

    def make() -> Any:
        module = WanDiT(config, rngs=nnx.Rngs(0))
        return quantize_dit(module) if quantized else module

    graphdef, abstract = nnx.split(nnx.eval_shape(make))
    return graphdef, draw(abstract, seed)


def draw(abstract: Any, seed: int = 0) -> Any:
    """A tree of arrays like `abstract`: random numbers as a trained model has them."""
    key = jax.random.key(seed)
    leaves, structure = jax.tree.flatten_with_path(abstract)
    drawn = []
    for i, (path, leaf) in enumerate(leaves):
        names = {str(getattr(part, "key", getattr(part, "name", ""))) for part in path}
        drawn.append(_draw(names, jax.random.fold_in(key, i), leaf.shape, jnp.dtype(leaf.dtype)))
    return jax.tree.unflatten(structure, drawn)


def _draw(names: set[str], key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Kernels of standard deviation near 1/sqrt(width), what scales a norm near 1, and int8 as rounding a Gaussian row
    by its largest gives it: how fast the tensor cores run depends on how many bits flip."""
    if dtype == jnp.int8:

        def rounded(key: jax.Array) -> jax.Array:
            x = jax.random.normal(key, shape[1:], jnp.bfloat16).astype(jnp.float32)
            return jnp.round(x * (127.0 / jnp.max(jnp.abs(x), axis=-1, keepdims=True))).astype(jnp.int8)

        return _by_layers(rounded, key, shape[0])
    if "weight_scale" in names:
        return jnp.full(shape, 3.5 / 127 / max(shape[1:]) ** 0.5, dtype)
    if names & {"scale", "gamma"}:
        return (1.0 + 0.1 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
    scale = 0.5 / max(shape) ** 0.5 if len(shape) > 1 else 0.02
    if len(shape) == 3:
        return _by_layers(
            lambda k: (scale * jax.random.normal(k, shape[1:], jnp.bfloat16)).astype(dtype), key, shape[0]
        )
    return (scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def _by_layers(one: Callable[[jax.Array], jax.Array], key: jax.Array, layers: int) -> jax.Array:
    """Layer by layer: drawing a whole stack needs four times its bytes."""
    layer = jax.jit(one)
    return jnp.stack([layer(k) for k in jax.random.split(key, layers)])


def timed(
    program: Callable[..., Any], arguments: tuple[Any, ...], repeats: int, warm_up: bool
) -> tuple[list[float], Any]:
    """Seconds of each of `repeats` runs, after one that is not counted where `warm_up`, and the last run's result."""
    if warm_up:
        jax.block_until_ready(program(*arguments))
    seconds, result = [], None
    for _ in range(repeats):
        begun = time.perf_counter()
        result = jax.block_until_ready(program(*arguments))
        seconds.append(time.perf_counter() - begun)
    return seconds, result


def kernel_times(run: Callable[[], Any]) -> list[dict[str, Any]]:
    """What the GPU did during one run: {"name", "launches", "ms"} of each kernel, the longest first."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (trace,) = Path(folder).rglob("*.xplane.pb")
        planes = [p for p in jax.profiler.ProfileData.from_file(str(trace)).planes if "GPU" in p.name]
    spent: dict[str, list[float]] = collections.defaultdict(list)
    for line in (line for plane in planes for line in plane.lines if "Stream" in line.name):
        for event in line.events:
            spent[event.name].append(event.duration_ns / 1e6)
    found = [{"name": k, "launches": len(v), "ms": round(sum(v), 3)} for k, v in spent.items()]
    return sorted(found, key=lambda kernel: -kernel["ms"])


def latent_shape(preset: Preset, size: tuple[int, int], frames: int = FRAMES) -> tuple[int, int, int, int, int]:
    vae, (width, height) = preset.vae, size
    t = (frames - 1) // vae.temporal_stride + 1
    return 1, t, height // vae.spatial_stride, width // vae.spatial_stride, vae.z_dim


def padded_text(preset: Preset, text_rows: int) -> jax.Array:
    """Random features of a prompt, zeros from the last of `text_rows` on, as the text encoder pads them."""
    context = jax.random.normal(jax.random.key(3), (1, preset.text_len, preset.dit.text_dim), jnp.bfloat16)
    return context.at[:, text_rows - 1 :].set(0)


def sampler(preset: Preset, graphdef: Any, attention: AttentionConfig, guided: bool, boundary: bool) -> Callable:
    """The whole few-step sampler, or TIMED_STEPS of the guided baseline, over (states, noise, step_noise, context,
    condition). Of context the first rows may be given: the last one counts for those up to text_len."""

    def velocities(states: tuple[Any, ...], context: jax.Array, condition: jax.Array | None) -> list[Callable]:
        """Of every expert, for as many samples as rows of context."""

        def velocity(state: Any) -> Callable:
            dit = nnx.merge(graphdef, state)
            keys = dit.text_keys(context, last_count=preset.text_len - context.shape[1] + 1)

            def at(x: jax.Array, s: Any) -> jax.Array:
                inputs = x if condition is None else jnp.concatenate([x, jnp.repeat(condition, len(x), 0)], axis=-1)
                return dit(inputs, jnp.full(len(x), 1000.0 * s, jnp.float32), keys, attention=attention)

            return at

        return [velocity(state) for state in states]

    def few(states, noise, step_noise, context, condition):
        experts = velocities(states, context, condition)
        limit = preset.boundary if boundary else None

        def velocity(x: jax.Array, s: float) -> jax.Array:
            return experts[0 if limit is None or s >= limit or len(experts) == 1 else 1](x, s)

        return rcm.sample(velocity, noise, step_noise, num_steps=4, sigma_max=preset.sigma_max)

    def many(states, noise, step_noise, context, condition):
        # One text for both samples costs as much as two: the prompt and the empty one.
        (dit,) = velocities(states, jnp.repeat(context, 2, 0), condition)
        return flow.unipc(flow.guided(dit, preset.guidance[0]), noise, num_steps=TIMED_STEPS, shift=preset.shift)

    return many if guided else few


def measure(
    name: str,
    row: Row,
    rungs: Mapping[str, tuple[AttentionConfig, bool]],
    repeats: int,
    baseline: bool,
    profile: bool = False,
    text_rows: int = TEXT_BUCKETS[0],
) -> dict:
    """Seconds and memory of the baseline and of every rung; a rung that fails says why and the others go on.

    text_rows: of the prompt, that the rungs are given; the baseline has all.
    """
    preset = PRESETS[row.preset]
    shape = latent_shape(preset, row.size)
    extra = preset.dit.in_channels - shape[-1]
    condition = jnp.zeros((*shape[:-1], extra), jnp.float32) if extra else None
    noise = jax.random.normal(jax.random.key(1), shape)
    step_noise = jax.random.normal(jax.random.key(2), (4, *shape))
    context = padded_text(preset, text_rows)
    out: dict[str, Any] = {"row": name, "preset": row.preset, "size": row.size, "frames": FRAMES}
    out["text_rows"] = text_rows
    jobs = [("baseline", AttentionConfig("dense"), False, True)] if baseline else []
    jobs += [(rung, attention, quantized, False) for rung, (attention, quantized) in rungs.items()]
    held: dict[tuple[bool, bool, int], Any] = {}
    for rung, attention, quantized, guided in jobs:
        linear_branch = attention.kind in ("sla", "sagesla")
        # Of two experts the baseline's timed steps, the first ones, are all the high-noise one's.
        experts = 1 if guided or preset.boundary is None else 2
        key = (linear_branch, quantized, experts)
        try:
            if key not in held:
                states = ()  # and with it the last weights
                held.clear()
                config = dataclasses.replace(preset.dit, linear_branch=linear_branch)
                held[key] = [random_dit(config, quantized, seed) for seed in range(experts)]
            graphdef, states = held[key][0][0], tuple(state for _, state in held[key])
            text = context if guided else context[:, :text_rows]
            out[rung] = _rung(preset, graphdef, states, attention, guided, repeats,
                              (noise, step_noise, text, condition), profile)  # fmt: skip
        except Exception as error:
            out[rung] = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        print(name, rung, json.dumps(out[rung]), flush=True)
    return out


def _rung(preset, graphdef, states, attention, guided, repeats, inputs, profile) -> dict[str, Any]:
    program = jax.jit(sampler(preset, graphdef, attention, guided, preset.boundary is not None))
    begun = time.perf_counter()
    compiled = program.lower(states, *inputs).compile()
    compile_seconds = time.perf_counter() - begun
    analysis = compiled.memory_analysis()
    # The baseline runs for seconds to a minute: a first run's set-up does not show.
    seconds, result = timed(compiled, (states, *inputs), 1 if guided else repeats, warm_up=not guided)
    median = sorted(seconds)[len(seconds) // 2]
    out: dict[str, Any] = {
        "seconds": [round(s, 4) for s in seconds],
        "median": round(median, 4),
        "compile_seconds": round(compile_seconds, 1),
        "finite": bool(jnp.isfinite(result).all()),
        "temporary_bytes": getattr(analysis, "temp_size_in_bytes", None),
        "argument_bytes": getattr(analysis, "argument_size_in_bytes", None),
        "peak_bytes_in_use": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }
    if profile:
        out["kernels"] = kernel_times(lambda: compiled(states, *inputs))
    if guided:
        out["scaled_to_50_steps"] = round(median * BASELINE_STEPS / TIMED_STEPS, 2)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--rungs", nargs="*", choices=LADDER, default=list(LADDER))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-baseline", action="store_true")
    parser.add_argument("--profile", action="store_true", help="run once more, and say where the time goes by kernel")
    parser.add_argument(
        "--text-rows", type=int, default=TEXT_BUCKETS[0], help="rows of text of the rungs; 512: unfolded"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    most = min(PRESETS[ROWS[name].preset].text_len for name in args.rows)
    if not 1 <= args.text_rows <= most:
        parser.error(f"--text-rows must be from 1 to {most}, got {args.text_rows}")
    device = jax.devices()[0]
    results: dict[str, Any] = {"device": device.device_kind, "jax": jax.__version__, "rows": []}
    for name in args.rows:
        rungs = {rung: LADDER[rung] for rung in args.rungs}
        options = {"profile": args.profile, "text_rows": args.text_rows}
        results["rows"].append(measure(name, ROWS[name], rungs, args.repeats, not args.no_baseline, **options))
        if args.json:
            partial = args.json.with_suffix(".partial")
            partial.write_text(json.dumps(results, indent=2) + "\n")
            os.replace(partial, args.json)


if __name__ == "__main__":
    main()

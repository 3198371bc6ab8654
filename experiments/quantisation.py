"""W8A8: at which granularity do INT8 linear layers stop costing quality, and which of them are sensitive?

    python -m experiments.quantisation                                     (7 minutes on one busy core)
    python -m experiments.quantisation --clips 0 --states 8                # velocities alone, no clips

The error of the velocity (relative L2 against the float model, at states of a sampling run) with weights, activations
or both in INT8: one scale a 128 x 128 block (the reference's), a channel or token, or a whole tensor. Then one kind of
layer alone, and one block of the transformer alone. Clips are made with the main ones and read back by the oracle.

What came out (the shipped student): INT8 adds little to what the least rounding does anyway. Products in float32
instead of bfloat16, with no INT8 at all, move the velocity by 4.5%, most of it by way of other routed blocks: with
dense attention it is 1.2%. W8A8 by channel and token moves it by 6.0% (2.7% with dense attention), by the reference's
blocks 7.6% (4.7%), by tensor 8.2% (5.7%). Fine scales make weights and activations cost about the same (1.9 and 2.2%
with dense attention), coarse ones hurt the activations (2.7 and 4.2% by block). The feed-forward layers and the last
block are the sensitive ones; with routing the keys of self-attention are, which decide what is seen. Clips hardly show
it: fit changes by 0.0 dB [-0.2, 0.2] by channel and token, -0.1 by block, and -0.2 [-0.5, 0.0] by tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

import pallas_kernels as kernels
from experiments.capture import Run, sample
from experiments.clips import Clips, describe
from experiments.command import Command, run
from experiments.records import Row
from experiments.report import COLOURS, bootstrap, figure, save, write_table
from pallas_kernels.rounding import BLOCK, to_int8
from turbojax.attention import DENSE
from turbojax.errors import UserError
from turbojax.models.layers import Linear
from turbojax.pipeline import Pipeline
from turbojax.quant import block_linears, quantize_dit
from turbojax.train.evaluate import pairs, prompt_of

Grain = Literal["none", "row", "block", "tensor"]
# Weights' and activations' grain; a row is an output channel of a weight, a token of an activation.
VARIANTS: dict[str, tuple[Grain, Grain]] = {
    "no INT8, products in float32": ("none", "none"),
    "W8A8 channel, token (ours)": ("row", "row"),
    "W8A8 block (reference's)": ("block", "block"),
    "W8A8 tensor": ("tensor", "tensor"),
    "weights, channel": ("row", "none"),
    "weights, block": ("block", "none"),
    "weights, tensor": ("tensor", "none"),
    "activations, token": ("none", "row"),
    "activations, block": ("none", "block"),
    "activations, tensor": ("none", "tensor"),
}
GRAINS = ("weights", "activations")
MADE = ("float", "W8A8 channel, token (ours)", "W8A8 block (reference's)", "W8A8 tensor")


class Rounded(Linear):
    """A linear layer whose weights and activations pass through INT8 and back, in the layers of a stack that are on."""

    def __init__(self, linear: Linear, weights: Grain, activations: Grain, on: Sequence[bool]):
        stack = linear.kernel[...]
        rounded = jnp.stack([through_int8(kernel.T, weights).T for kernel in stack])
        self.on = nnx.Param(jnp.asarray(on))
        self.kernel = nnx.Param(jnp.where(self.on[...][:, None, None], rounded, stack.astype(jnp.float32)))
        self.bias = nnx.Param(linear.bias[...])
        self.activations: Grain = activations

    def _product(self, x: Float[Array, "*rows K"]) -> Float[Array, "*rows N"]:
        rows = x.reshape(-1, x.shape[-1])
        rows = jnp.where(self.on[...], through_int8(rows, self.activations), rows.astype(jnp.float32))
        y = rows @ self.kernel[...] + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype).reshape(*x.shape[:-1], y.shape[-1])


def through_int8(x: Float[Array, "M K"], grain: Grain) -> Float[Array, "M K"]:
    """x rounded to INT8 with a scale a row, a 128 x 128 block or the tensor, and back to float32."""
    x = x.astype(jnp.float32)
    if grain == "none":
        return x
    if grain == "row":
        values, scale = kernels.quantize_per_token(x)
        return values * scale[:, None]
    if grain == "block":
        values, scale = kernels.quantize_blockwise(x)
        wide = jnp.repeat(jnp.repeat(scale, BLOCK, axis=0), BLOCK, axis=1)
        return values * wide[: x.shape[0], : x.shape[1]]
    scale = jnp.maximum(jnp.max(jnp.abs(x)), 1e-8) / 127.0
    return to_int8(x / scale) * scale


def rounded_dit(
    dit: Any, weights: Grain, activations: Grain, paths: Sequence[str] | None = None, block: int | None = None
) -> Any:
    """A copy of the DiT whose block linears (or those at `paths`, or those of one block) pass through INT8."""
    copy = nnx.merge(*nnx.split(dit))
    on = [block is None or i == block for i in range(dit.config.num_layers)]
    for path in block_linears(dit) if paths is None else paths:
        *parents, name = path.split(".")
        owner = copy
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, Rounded(getattr(owner, name), weights, activations, on))
    return copy


def velocity_errors(captured: Run, exact: Sequence[Array], dit: Any) -> list[float]:
    """Relative L2 of the velocity for every state, over all clips."""
    found = velocities(captured, dit)
    return [float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in zip(found, exact, strict=True)]


def velocities(captured: Run, dit: Any) -> list[Array]:
    """The DiT's answer at each state, with the attention that the run's settings name."""
    settings = captured.settings
    options = {"attention": settings.attention, "round_timestep": settings.round_timestep}
    return [
        dit(state.latents, jnp.full(len(state.latents), 1000.0 * state.s), captured.context, **options)
        for state in captured.states
    ]


def main(argv: Sequence[str] | None = None) -> None:
    command = Command(str(__doc__), "quantisation")
    command.option("states", 4, 2, "states of the sampling run")
    command.option("batch", 8, 2, "clips whose velocity is compared")
    command.option("clips", 48, 2, "clips made with each main variant; 0: none")
    command.option("batch_size", 8, 2, "clips made at once")
    args = command.parse(argv)
    clips = Clips(args.out, args.model, clips=max(1, args.clips), batch_size=args.batch_size)
    pipeline = clips.pipeline
    if pipeline.dit_low is not None:
        raise UserError(f"{args.model} has two experts: take a model of one")
    if not block_linears(pipeline.dit):
        raise UserError(f"the weights of {args.model} are int8 already: there is no float model to compare with")
    names = list(VARIANTS)[1:4] if args.quick else list(VARIANTS)
    kinds = block_linears(pipeline.dit)[:: 5 if args.quick else 1]
    blocks = range(pipeline.dit.config.num_layers)[:: 3 if args.quick else 1]
    plan: dict[str, dict[str, Any]] = {name: dict(zip(GRAINS, VARIANTS[name], strict=True)) for name in names}
    one = {"weights": "row", "activations": "row"}
    plan |= {f"only {path.removeprefix('blocks.')}": {**one, "paths": [path]} for path in kinds}
    plan |= {f"only block {i}": {**one, "block": i} for i in blocks}
    attentions = ("own",) if args.quick else ("own", "dense")
    errors = {attention: measure_errors(clips, plan, args, attention) for attention in attentions}
    made = make_clips(clips, [n for n in MADE if n == "float" or n in names]) if args.clips else {}
    report(clips, errors, made, names)


def measure_errors(clips: Clips, plan: dict[str, dict[str, Any]], args: Any, attention: str) -> dict[str, list[float]]:
    """Name -> the velocity's error at each state, measured or read back; attention: the model's own, or dense."""
    key = {"model": args.model, "states": args.states, "batch": args.batch, "attention": attention}
    known = {name: clips.results.where(**key, variant=name) for name in plan}
    if not all(known.values()):
        requests = [(prompt_of(combination), seed) for combination, seed in pairs(args.batch)]
        captured = sample(clips.pipeline, *zip(*requests, strict=True), states=args.states, quant="none")
        if attention == "dense":
            captured = captured._replace(settings=dataclasses.replace(captured.settings, attention=DENSE))
        exact = velocities(captured, clips.pipeline.dit)
        for name, options in plan.items():
            if not known[name]:
                found = velocity_errors(captured, exact, rounded_dit(clips.pipeline.dit, **options))
                levels = [round(state.s, 4) for state in captured.states]
                row = {**key, "variant": name, "s": levels, "error": [float(f"{e:.5g}") for e in found]}
                clips.results.add([row])
                known[name] = [row]
    return {name: rows[0]["error"] for name, rows in known.items()}


def make_clips(clips: Clips, names: Sequence[str]) -> dict[str, list[Row]]:
    """Clips of the float model and of W8A8: by the shipped layers, or by rounding where none has the grain."""

    def maker(name: str) -> Any:
        if name == "float":
            return clips.generate(quant="none")
        if name == MADE[1]:
            return clips.generate(quant="w8a8")
        if name == MADE[2]:
            return clips.generate(with_dit(clips.pipeline, quantize_dit(clips.pipeline.dit, "block")), quant="w8a8")
        return clips.generate(with_dit(clips.pipeline, rounded_dit(clips.pipeline.dit, *VARIANTS[name])), quant="none")

    made = {}
    for name in names:
        reference = None if name == "float" else {"linears": "float"}
        made[name] = clips.measure({"linears": name}, lambda name=name: maker(name), reference)
    return made


def with_dit(pipeline: Pipeline, dit: Any) -> Pipeline:
    parts = {name: getattr(pipeline, name) for name in ("vae", "text_encoder", "tokenizer")}
    return Pipeline(pipeline.spec.config, dit=dit, name=pipeline.spec.name, **parts)


def report(
    clips: Clips, errors: dict[str, dict[str, list[float]]], made: dict[str, list[Row]], names: Sequence[str]
) -> None:
    rows = []
    for name, values in errors["own"].items():
        mean, first, last = (f"{100 * x:.2f}%" for x in (np.mean(values), values[0], values[-1]))
        rows.append({"INT8": name, "error of the velocity": mean, "first state": first, "last state": last})
        if "dense" in errors:
            rows[-1]["with dense attention"] = f"{100 * np.mean(errors['dense'][name]):.2f}%"
    notes = (
        "Relative L2 against the float model at states of its own run, with the model's attention and, at the same "
        "states, with dense attention. Only ...: that kind of layer, or that block, by channel and token."
    )
    write_table(clips.out / "table.md", rows, notes)
    if made:
        float_rows = made["float"]
        table = [{"linear layers": name, **describe(found, float_rows)} for name, found in made.items()]
        write_table(
            clips.out / "clips.md",
            table,
            f"{len(float_rows)} clips each, the same prompts and seeds; 95% intervals; change and agreement against "
            "float, clip by clip. Times are a CPU's: no INT8 speed-up there.",
        )
        clips.sheet({(name, ""): {"linears": name} for name in made})
    alone = [name for name in errors["own"] if name not in names]
    fig, (axes,) = figure(1, 2 + bool(made), 4.4, 4.2)
    for axis, shown, title in ((axes[0], names, "error of the velocity, %"), (axes[1], alone, "one part alone, %")):
        places = np.arange(len(shown))[::-1]
        for i, attention in enumerate(errors):
            values = np.array([100 * np.mean(errors[attention][name]) for name in shown])
            axis.barh(places - 0.4 * i + 0.2, values, 0.38, color=COLOURS[i], label=f"{attention} attention")
            for place, value in zip(places, values, strict=True):
                axis.text(value, place - 0.4 * i + 0.2, f" {value:.2f}", va="center", fontsize=7)
        axis.set_yticks(places, list(shown))
        axis.set(title=title)
        axis.margins(x=0.3)
    axes[0].legend(frameon=False, fontsize=7)
    if made and clips.readable:
        for i, found in enumerate(made.values()):
            fits = [r["fit"] for r in found]
            low, high = bootstrap(fits)
            middle = float(np.mean(fits))
            axes[2].errorbar([middle], [-i], xerr=[[middle - low], [high - middle]], fmt="o", capsize=3)
        axes[2].set_yticks([-i for i in range(len(made))], list(made))
        axes[2].set(title="fit of the clips, dB")
    save(fig, clips.out / "errors.png")


if __name__ == "__main__":
    run(main)

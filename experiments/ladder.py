"""The acceleration ladder: what does each part of TurboDiffusion add, in time and in quality?

    python -m experiments.ladder --clips 24                                (4 minutes on two cores)
    python -m experiments.ladder --model DIR-STUDENT --teacher DIR-TEACHER

From the many-step teacher with guidance, parts are added one after the other: sparse-linear attention (SLA; the
teacher was not tuned for it), its low-bit form (Sage), W8A8 linear layers with norms apart and then fused, and rCM
(the student: few steps, no guidance, tuned for all of it). Below the ladder, each part alone. On a CPU the INT8 and
FP8 formats are emulated: their rungs show quality, not the speed that they have on a GPU.

What came out (two quiet CPU cores, `--clips 24`: clip by clip, as `generate` makes them): what pays on a
CPU is steps. The student's four unguided steps take 0.030 s a clip where the teacher's 50 guided ones take 0.61, 20
times less, and 24 clips show no loss (+0.4 dB [-0.6, 1.2]). The other parts only cost time here, since the formats are
emulated: sparsity 1%, its low-bit form 10% more, of which W8A8 wins back 4, the fused norms nothing; Sage on all keys
costs 16% and W8A8 alone 13%. The dense student in floats is the fastest, 0.028 s, and the least diverse (0.63; 0.85
with the attention that it was trained with). As long as nothing is tuned for it, sparsity costs 1.2 dB [0.1, 2.1], more
than all low-bit formats together: alone those leave the clips as they were (agreement with dense: 53 dB for Sage, 46
for W8A8).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from experiments.clips import Clips, describe, right, seconds
from experiments.command import Command, run
from experiments.records import Row
from experiments.report import COLOURS, bootstrap, figure, save, write_table
from experiments.sparse import few_steps, own_attention
from turbojax.errors import UserError
from turbojax.models.layers import Linear
from turbojax.pipeline import Pipeline
from turbojax.quant import QuantizedLinear, block_linears, quantize_dit
from turbojax.train.evaluate import wilson

Rungs = dict[str, Callable[[], Any]]


class NormsApart(QuantizedLinear):
    """A W8A8 layer whose input is normalised, written as floats, read again and quantised: three passes, not one."""

    def modulated(self, x: Array, shift: Array, scale: Array, eps: float, affine: bool = False) -> Any:
        return jax.lax.optimization_barrier(Linear.modulated(self, x, shift, scale, eps, affine))  # pyright: ignore


def norms_apart(pipeline: Pipeline) -> Pipeline:
    """The same pipeline with W8A8 layers that do not fuse the norms."""
    dit = quantize_dit(pipeline.dit)
    for path in block_linears(pipeline.dit):
        *parents, name = path.split(".")
        owner = dit
        for parent in parents:
            owner = getattr(owner, parent)
        layer = getattr(owner, name)
        setattr(owner, name, NormsApart(layer.weight_q[...], layer.weight_scale[...], layer.bias[...]))
    parts = {name: getattr(pipeline, name) for name in ("vae", "text_encoder", "tokenizer")}
    return Pipeline(pipeline.spec.config, dit=dit, name=pipeline.spec.name, **parts)


def main(argv: Sequence[str] | None = None) -> None:
    command = Command(str(__doc__), "ladder")
    command.option("teacher", "tiny-teacher", "tiny-teacher", "the many-step model")
    command.option("steps", 50, 6, "steps of the teacher")
    command.option("clips", 48, 4, "clips of each rung")
    command.option("batch_size", 1, 1, "clips made at once; `turbojax generate` makes one")
    args = command.parse(argv)
    student = Clips(args.out, args.model, clips=args.clips, batch_size=args.batch_size)
    teacher = Clips(args.out, args.teacher, clips=args.clips, batch_size=args.batch_size)
    if teacher.spec.config.boundary is not None:
        raise UserError(f"{args.teacher} has two experts: the ladder takes models of one")
    ladder, alone = rungs(student, teacher, args.steps, args.quick)
    print(f"{len(ladder)} rungs and {len(alone)} parts alone")
    measured = {}
    for name, make in (ladder | alone).items():
        # Both models' rows share the file: a rung's name says which made it.
        measured[name] = teacher.measure({"rung": name, "steps": args.steps}, make, reference_of(name, args.steps))
    report(teacher, measured, list(ladder), args.steps)


def reference_of(name: str, steps: int) -> dict[str, Any] | None:
    return None if name == "dense" else {"rung": "dense", "steps": steps}


def rungs(student: Clips, teacher: Clips, steps: int, quick: bool) -> tuple[Rungs, Rungs]:
    """Name -> what makes its clips: the ladder, and the parts alone."""
    sparse = own_attention(student.spec)
    float_sla = dataclasses.replace(sparse, kind="sla")
    sage_sla = dataclasses.replace(sparse, kind="sagesla")
    many: dict[str, Any] = {"steps": steps, "quant": "none"}
    dense: dict[str, Any] = {"attention": "dense"}

    def w8a8(**options: Any) -> Callable[[], Any]:
        return lambda: teacher.generate(steps=steps, quant="w8a8", **options)

    ladder: Rungs = {
        "dense": lambda: teacher.generate(**many, **dense),
        "+ SLA": lambda: teacher.generate(**many, attention=float_sla),
        "+ Sage": lambda: teacher.generate(**many, attention=sage_sla),
        "+ W8A8": lambda: teacher.generate(
            norms_apart(teacher.pipeline), steps=steps, quant="w8a8", attention=sage_sla
        ),
        "+ fused norms": w8a8(attention=sage_sla),
    }
    alone: Rungs = {
        "Sage alone": lambda: teacher.generate(**many, attention="sage"),
        "W8A8 alone": w8a8(**dense),
    }
    if few_steps(student.spec):
        ladder["+ rCM = all"] = lambda: student.generate(quant="w8a8", attention=sage_sla)
        alone["rCM and SLA, float"] = lambda: student.generate(quant="none", attention=float_sla)
        alone["rCM, dense, float"] = lambda: student.generate(quant="none", **dense)
    if quick:
        alone = {}
    return ladder, alone


def report(clips: Clips, measured: dict[str, list[Row]], ladder: Sequence[str], steps: int) -> None:
    first = measured[ladder[0]]
    rows = []
    for name, clip_rows in measured.items():
        faster = f"{seconds(first) / seconds(clip_rows):.1f}x"
        rows.append({"rung": name, "DiT speed-up": faster, **describe(clip_rows, first)})
    device = jax.devices()[0].device_kind
    write_table(
        clips.out / "table.md",
        rows,
        f"{len(clips.wanted)} clips a rung, the same in each, {steps} steps of the teacher, on {device}; 95% "
        "intervals. Change of fit and agreement: against the dense rung, clip by clip; the student adds fresh noise at "
        "each step, so its clips are other clips and agreement means little there.",
    )
    fig, (axes,) = figure(1, 3 if clips.readable else 1, 4.2, 3.4)
    colours = [COLOURS[0] if name in ladder else COLOURS[5] for name in measured]
    places = np.arange(len(measured))[::-1]
    times = {name: seconds(r) for name, r in measured.items()}
    waterfall(axes[0], times, ladder)
    axes[0].set_yticks(places, list(measured))
    if clips.readable:
        hits = [sum(map(right, r)) for r in measured.values()]
        shares = [(100 * h / len(first), *(100 * x for x in wilson(h, len(first)))) for h in hits]
        fits = [(float(np.mean(f)), *bootstrap(f)) for f in ([x["fit"] for x in r] for r in measured.values())]
        for axis, data, title in ((axes[1], shares, "all right, %"), (axes[2], fits, "fit, dB")):
            middle, low, high = np.array(data).T
            axis.hlines(places, low, high, color=colours)
            axis.scatter(middle, places, color=colours, zorder=3)
            axis.set(title=title)
            axis.grid(axis="x", alpha=0.3)
            axis.set_yticks(places, [""] * len(places))
    save(fig, clips.out / "waterfall.png")
    clips.sheet({(name, ""): {"rung": name, "steps": steps} for name in measured})


def waterfall(axes: Any, times: dict[str, float], ladder: Sequence[str]) -> None:
    """Bars from the rung before (of a part alone: from the first) to each rung's own time, on a logarithmic axis."""
    first, before = times[ladder[0]], times[ladder[0]]
    for place, (name, value) in zip(np.arange(len(times))[::-1], times.items(), strict=True):
        start = before if name in ladder else first
        colour = COLOURS[2] if value < start else COLOURS[1]
        axes.barh(place, value - start, left=start, color=colour, alpha=1.0 if name in ladder else 0.55)
        axes.plot([value], [place], "k|", markersize=11)
        axes.text(max(value, start) * 1.08, place, f"{value:.3f} s  {first / value:.1f}x", va="center", fontsize=8)
        before = value
    axes.axvline(first, color="black", linewidth=0.6, linestyle=":")
    axes.set(title="DiT seconds a clip (green: faster)", xscale="log")
    axes.set_xlim(min(times.values()) / 1.3, max(times.values()) * 3.5)
    axes.xaxis.set_major_formatter("{x:g}")


if __name__ == "__main__":
    run(main)

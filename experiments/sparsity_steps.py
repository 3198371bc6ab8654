"""Sparsity and steps: how few key blocks and how few steps still give the clip that was asked for?

    python -m experiments.sparsity_steps                                   (8 minutes on two cores)
    python -m experiments.sparsity_steps --steps 2,4 --topk 0.1,0.5 --clips 96 --out runs/mine

Every cell makes the same clips (prompt and seed) with one top-k and one number of steps. "All right" is colour, shape
and motion together; fit is the PSNR of a clip against the ideal clip of what it shows; agreement is the PSNR against
the clip of the same seed and steps at the largest top-k, so it isolates what sparsity changes.

What came out (the shipped student, 48 clips a cell): three quarters of the key blocks can go. At top-k 0.25, which the
student was trained with, and at 0.5 nothing is lost that 48 clips could show: fit changes by 0.3 dB or less at every
number of steps, with intervals from -0.8 to +0.6. It is another clip than the one of all keys (at 0.25 they agree to
22 dB), but as good a one. At 0.1 it breaks: 1.8 to 2.7 dB, and 15 to 40 points fewer clips that are all right. Below
that most clips are wrong, and more steps do not mend it: with a single block of keys fit is 16 dB in one step and 12 in
four. Steps count for as much: at top-k 0.25 one step gets 67% of the clips all right and two 88%, with 2.6 dB more; the
third adds 1.0 dB, the fourth 0.3 [0.2, 0.4]. Diversity falls as attention sees more, from 1.1 at a tenth of the keys to
0.7 at all of them: part of what looks like variety is error. In four steps a quarter of the keys takes two thirds of
the DiT's time, in one step nine tenths; the VAE takes ten times the DiT's at four steps, and more at fewer (two quiet
cores, batches of 8).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.clips import Clips, describe, right, seconds
from experiments.command import Command, run
from experiments.records import Row
from experiments.report import figure, heat_map, save, write_table
from experiments.sparse import few_steps, own_attention
from turbojax.pipeline_config import find_pipeline

# The small model has 40 key blocks of 8 tokens: 1, 2, 4, 10, 20 and all of them.
TOPK = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
FEW, MANY = (1, 2, 3, 4), (6, 12, 25, 50)


def main(argv: Sequence[str] | None = None) -> None:
    command = Command(str(__doc__), "sparsity_steps")
    command.option("topk", TOPK, (0.1, 1.0), "shares of key blocks")
    command.option("steps", (0,), (0,), f"numbers of steps; 0: {FEW} of a distilled model, {MANY} of another")
    command.option("clips", 48, 4, "clips of each cell")
    command.option("batch_size", 8, 2, "clips made at once")
    command.option("attention", "own", "own", "sla, sagesla, or the model's own")
    args = command.parse(argv)
    spec = find_pipeline(args.model).spec
    steps = args.steps
    if steps == (0,):
        steps = FEW if few_steps(spec) else MANY
        steps = steps[1::2] if args.quick and few_steps(spec) else steps[:1] if args.quick else steps
    attention = own_attention(spec)
    if args.attention != "own":
        attention = dataclasses.replace(attention, kind=args.attention)
    clips = Clips(args.out, args.model, clips=args.clips, batch_size=args.batch_size)
    grid = measure(clips, attention, steps, sorted(args.topk, reverse=True))
    report(clips, grid, attention)


def measure(
    clips: Clips, attention: Any, steps: Sequence[int], topk: Sequence[float]
) -> dict[tuple[int, float], list[Row]]:
    """The rows of every cell; of each number of steps the largest top-k comes first, as what others agree with."""
    grid = {}
    for n in steps:
        dense = cell(attention, n, topk[0])
        for share in topk:
            sparse = dataclasses.replace(attention, topk=share)
            make = lambda n=n, sparse=sparse: clips.generate(steps=n, attention=sparse)  # noqa: E731
            grid[n, share] = clips.measure(cell(attention, n, share), make, None if share == topk[0] else dense)
    return grid


def cell(attention: Any, steps: int, topk: float) -> dict[str, Any]:
    return {"attention": attention.kind, "steps": steps, "topk": topk}


def report(clips: Clips, grid: dict[tuple[int, float], list[Row]], attention: Any) -> None:
    steps = sorted({n for n, _ in grid})
    topk = sorted({share for _, share in grid})
    dense = topk[-1]
    table = [{"steps": n, "top-k": share, **describe(grid[n, share], grid[n, dense])} for n in steps for share in topk]
    count = len(clips.wanted)
    write_table(
        clips.out / "table.md",
        table,
        f"{clips.model}, {attention.kind}, blocks {attention.block_q} x {attention.block_k}, {count} clips a cell, "
        f"the same in every cell; 95% intervals. Change of fit and agreement: against top-k {dense:g}, clip by clip.",
    )

    def matrix(value: Any) -> np.ndarray:
        return np.array([[value(grid[n, share], grid[n, dense]) for share in topk] for n in steps])

    maps = {"DiT seconds a clip": (matrix(lambda rows, _: seconds(rows)), 3, "magma_r")}
    if len(topk) > 1:
        agreement = lambda rows, _: np.mean([r.get("psnr", np.nan) for r in rows])  # noqa: E731
        maps[f"agreement with top-k {topk[-1]:g}, dB"] = matrix(agreement), 1, "viridis"
    if clips.readable:
        maps = {
            "all right, %": (matrix(lambda rows, _: 100 * np.mean([right(r) for r in rows])), 0, "viridis"),
            "fit, dB": (matrix(lambda rows, _: np.mean([r["fit"] for r in rows])), 1, "viridis"),
            **maps,
        }
    fig, axes = figure(1, len(maps) + clips.readable, 3.2, 2.9)
    labels = {"xlabel": "top-k", "ylabel": "steps"}
    for axis, (title, (values, digits, colours)) in zip(axes[0], maps.items(), strict=False):
        heat_map(axis, values, steps, topk, title=title, digits=digits, cmap=colours, **labels)
    if clips.readable:
        pareto(axes[0, -1], grid, steps, topk)
    save(fig, clips.out / "grid.png")
    name = {n: f"{n} step" + "s" * (n > 1) for n in steps}
    cells = {(name[n], f"top-k {share:g}"): cell(attention, n, share) for n in steps for share in topk}
    clips.sheet(cells, "the same two clips in every cell, four frames each")


def pareto(axes: Any, grid: dict[tuple[int, float], list[Row]], steps: Sequence[int], topk: Sequence[float]) -> None:
    """Fit against time, one line a number of steps; the black outline joins the cells that nothing beats."""
    points = {key: (seconds(rows), float(np.mean([r["fit"] for r in rows]))) for key, rows in grid.items()}
    for n in steps:
        line = zip(*(points[n, share] for share in topk), strict=True)
        axes.plot(*line, "o-", label=f"{n} step" + "s" * (n > 1), markersize=4)
    best, front = -np.inf, []
    for time, fit in sorted(points.values()):
        if fit > best:
            best = fit
            front.append((time, fit))
    axes.step(*zip(*front, strict=True), where="post", color="black", linewidth=0.8, linestyle=":", label="front")
    axes.set(title="Pareto front", xlabel="DiT seconds a clip", ylabel="fit, dB")
    axes.legend(frameon=False, fontsize=7)


if __name__ == "__main__":
    run(main)

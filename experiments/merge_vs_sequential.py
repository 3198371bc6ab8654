"""Sparse attention and few steps in one student: merge two fine-tunings, or train one after the other?

    python -m experiments.merge_vs_sequential --sla-steps 500 --rcm-steps 500          (67 minutes, one busy core)
    python -m experiments.merge_vs_sequential --pca runs/vae/pca.npz

    merged       dense student by rCM + (student with SLA - teacher): the two train apart (TurboDiffusion's way)
    sequential   the student with SLA, then rCM on it with sparse attention
    dense        the student by rCM alone, for what sparsity costs

All start from the same teacher and see the same clips; both students have had the same numbers of updates, with the
settings of the shipped student (`turbojax/train/configs/tiny-sla.toml`, `tiny-rcm.toml`). The one to be merged learns
to answer as the teacher does without guidance, since guidance enters by rCM's change; the one to go on from learns the
guided answer. Every stage resumes: give the same command again.

What came out (`--sla-steps 500 --rcm-steps 500`, half of the shipped student's rCM; 336 clips a row): merging loses
nothing. The merged student fits 0.5 dB [0.3, 0.7] better than the sequential one in two steps and as much in one; the
0.3 dB [-0.1, 0.6] in four may be chance, and so may every difference in the shapes that are right. What the two
trainings teach adds up, and each can be had apart. Sparsity costs more than the order does: the dense student is 1.5 dB
[1.3, 1.8] above the merged one in four steps, and gets 12 points [7, 16] more of the shapes in one. It is the least
diverse of them (0.83). One run of each, so that a few tenths may also be the seed's. Other work ran beside: the times
are for comparison with each other.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert import merge_checkpoints
from experiments.clips import diversity
from experiments.command import Command, run
from experiments.records import Results, Row
from experiments.report import COLOURS, bootstrap, figure, save, with_bootstrap, write_table
from experiments.training import fitted_codec
from turbojax.attention import DENSE
from turbojax.cli_evaluate import measured, read_prompts, subject, write
from turbojax.errors import UserError
from turbojax.pipeline_config import find_pipeline
from turbojax.train.cli import settings
from turbojax.train.config_file import read_config
from turbojax.train.evaluate import wilson
from turbojax.train.launch import train_student
from turbojax.train.rcm_stage import RCMConfig
from turbojax.train.sla import SLAConfig
from turbojax.train.student import SLA, StudentRun

SPARSE = dataclasses.replace(SLA, kind="sla")
ARMS, STEPS = ("merged", "sequential", "dense"), (4, 2, 1)


def shipped(stage: str) -> Any:
    """The settings that the shipped student was trained with."""
    file = read_config(f"tiny-{stage}")
    del file["stage"]
    return settings(stage, file)[1]


def main(argv: Sequence[str] | None = None) -> None:
    command = Command(__doc__ or "", "merge_vs_sequential", model="tiny-teacher")
    command.option("pca", "new", "new", "codec of the training clips, a file; new: fitted, as the shipped one was")
    command.option("sla_steps", shipped("sla").steps, 2, "updates of SLA")
    command.option("rcm_steps", shipped("rcm").steps, 3, "updates of rCM, student and critic together")
    command.option("clips", 16_384, 16, "scenes to train on")
    command.option("seeds", 7, 1, "clips of each prompt to measure")
    command.option("prompts", 48, 2, "prompts to measure")
    command.option("guidance", 2.0, 2.0, "of the teacher, which the students take in")
    command.option("arms", ARMS, ("merged", "dense"), "what is trained and compared")
    angles = find_pipeline("tiny").spec.config.mid_times
    command.option("mid_times", angles, angles, "TrigFlow angles of the later steps")
    args = command.parse(argv)
    if unknown := set(args.arms) - set(ARMS):
        raise UserError(f"--arms {', '.join(sorted(unknown))}: known are {', '.join(ARMS)}")
    if args.pca != "new" and not Path(args.pca).is_file():
        raise UserError(f"--pca {args.pca}: no such file; `turbojax train vae --part pca` makes it")
    if args.model == "tiny":
        raise UserError("--model must be the teacher: tiny-teacher, or a folder of its kind")
    folders = train(args)
    arms = {arm: pipeline(args, arm, folder) for arm, folder in folders.items()}
    compare(args, arms)


def train(args: argparse.Namespace) -> dict[str, Path]:
    """The folder of each arm's transformer."""
    teacher = find_pipeline(args.model).paths
    # What a run needs of the teacher lies together in one folder.
    together = args.out / "teacher"
    together.mkdir(exist_ok=True)
    for part in ("dit", "text_encoder"):
        if not (together / part).exists():
            (together / part).symlink_to(teacher[part])
    pca = fitted_codec(args.out) if args.pca == "new" else Path(args.pca)
    common = StudentRun(teacher=together, pca=pca, cache=args.out, clips=args.clips, sample_every=10**9)

    def student(name: str, config: SLAConfig | RCMConfig, start: Path | None = None) -> Path:
        export = args.out / name / "student"
        train_student(dataclasses.replace(common, out=args.out / name, export=export, start=start), config)
        return export

    sla = dataclasses.replace(shipped("sla"), steps=args.sla_steps, guidance=1.0, attention=SPARSE)
    rcm = dataclasses.replace(shipped("rcm"), steps=args.rcm_steps, guidance=args.guidance)
    rcm = dataclasses.replace(rcm, tangent_warmup=rcm.tangent_warmup * args.rcm_steps // shipped("rcm").steps)
    made: dict[str, Path] = {}
    if {"merged", "dense"} & set(args.arms):
        made["dense"] = student("rcm-dense", dataclasses.replace(rcm, attention=DENSE))
    if "merged" in args.arms:
        apart, merged = student("sla-unguided", sla), args.out / "merged"
        written: dict[str, Any] = {"format": "safetensors", "overwrite": True, "progress": False}
        merge_checkpoints(made["dense"], together / "dit", apart, merged, **written)
        made["merged"] = merged
    if "sequential" in args.arms:
        guided = student("sla-guided", dataclasses.replace(sla, guidance=args.guidance))
        made["sequential"] = student("rcm-sparse", dataclasses.replace(rcm, attention=SPARSE), guided)
    return {arm: made[arm] for arm in args.arms}


def pipeline(args: argparse.Namespace, arm: str, dit: Path) -> Path:
    """A pipeline folder that samples the arm's transformer in four steps without guidance."""
    found = find_pipeline(args.model)
    attention = DENSE if arm == "dense" else SPARSE
    parts = {name: str(path.absolute()) for name, path in ({**found.paths, "dit": dit}).items()}
    config = dataclasses.replace(
        found.spec.config, sampler="rcm-sde", steps=4, guidance=(1.0, 1.0), mid_times=args.mid_times,
        attention=attention.kind, topk=attention.topk, block_q=attention.block_q, block_k=attention.block_k,
        parts=parts,
    )  # fmt: skip
    folder = args.out / "pipelines" / arm
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pipeline.json").write_text(config.to_json())
    return folder


def compare(args: argparse.Namespace, arms: dict[str, Path]) -> None:
    """All arms in 4, 2 and 1 steps beside the teacher, on the same noise."""
    teacher = subject(args.model, {"steps": 4} if args.quick else {})
    students = [
        dataclasses.replace(subject(str(folder), {"steps": steps}), name=named(arm, steps))
        for arm, folder in arms.items()
        for steps in ((4,) if args.quick else STEPS)
    ]
    prompts = dict(list(read_prompts(None).items())[: args.prompts])
    with (args.out / "results.jsonl").open("w") as log:
        for rows in measured([teacher, *students], teacher, prompts, args.seeds, 2 if args.quick else 8):
            log.write("".join(json.dumps(row) + "\n" for row in rows))
    write(args.out, [teacher, *students], teacher)
    report(args.out, args.model)


def named(arm: str, steps: int) -> str:
    return f"{arm}, {steps} step{'s' * (steps > 1)}"


def report(out: Path, teacher: str) -> None:
    """differences.md: arms against each other, clip by clip; arms.png: all of them by steps, beside the teacher."""
    found = Results(out / "results.jsonl")
    rows = {(arm, n): found.where(model=named(arm, n)) for arm in ARMS for n in STEPS}
    arms = [arm for arm in ARMS if any(rows[arm, n] for n in STEPS)]
    steps = [n for n in STEPS if rows[arms[0], n]]
    compared = [pair for pair in (("merged", "sequential"), ("dense", "merged")) if set(pair) <= set(arms)]
    differences = []
    for n in steps:
        for one, other in compared:
            pairs = list(zip(rows[one, n], rows[other, n], strict=True))
            fit = with_bootstrap([a["fit"] - b["fit"] for a, b in pairs], 2)
            shape = with_bootstrap([100.0 * (a["shape"] - b["shape"]) for a, b in pairs])
            differences.append({"steps": n, "difference": f"{one} - {other}", "fit, dB": fit, "shape, points": shape})
    if differences:
        write_table(out / "differences.md", differences, "Clip by clip, 95% intervals.")
    fig, (axes,) = figure(1, 3, 3.6, 3.0)
    for i, arm in enumerate(arms):
        x = np.arange(len(steps)) + 0.06 * (i - 1)
        measures = [fit_and_shapes(rows[arm, n]) for n in steps]
        for axis, points in zip(axes, zip(*measures, strict=True), strict=False):
            middle, low, high = np.transpose(points)
            axis.plot(x, middle, "o-", markersize=4, color=COLOURS[i], label=arm)
            axis.vlines(x, low, high, color=COLOURS[i])
        axes[2].plot(x, [diversity(rows[arm, n]) for n in steps], "o-", markersize=4, color=COLOURS[i])
    guided = found.where(model=teacher)
    levels = [middle for middle, *_ in fit_and_shapes(guided)] + [diversity(guided)]
    for axis, title, level in zip(axes, ("fit, dB", "shape right, %", "diversity"), levels, strict=True):
        axis.axhline(level, color="black", linewidth=0.8, linestyle=":", label=teacher)
        axis.set(title=title, xlabel="steps of the students")
        axis.set_xticks(range(len(steps)), steps)
    axes[1].legend(frameon=False, fontsize=8)
    save(fig, out / "arms.png")


def fit_and_shapes(rows: Sequence[Row]) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean fit in dB and the share of shapes that are right in percent, each with its 95% interval."""
    fits, hits = [r["fit"] for r in rows], sum(r["shape"] for r in rows)
    low, high = wilson(hits, len(rows))
    return (float(np.mean(fits)), *bootstrap(fits)), (100 * hits / len(rows), 100 * low, 100 * high)


if __name__ == "__main__":
    run(main)

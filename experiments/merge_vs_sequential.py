"""Sparse attention and few steps in one student: merge two fine-tunings, or train one after the other?

    python -m experiments.merge_vs_sequential --pca runs/vae/pca.npz       (67 minutes as below, one busy core)
    python -m experiments.merge_vs_sequential --pca runs/vae/pca.npz --quick

    merged       dense student by rCM + (student with SLA - teacher): the two train apart (TurboDiffusion's way)
    sequential   the student with SLA, then rCM on it with sparse attention
    dense        the student by rCM alone, for what sparsity costs

All start from the same teacher and see the same clips; both students have had the same numbers of updates, with the
settings of the shipped student (`turbojax/train/configs/tiny-sla.toml`, `tiny-rcm.toml`). The one to be merged learns
to answer as the teacher does without guidance, since guidance enters by rCM's change; the one to go on from learns the
guided answer. Every stage resumes: give the same command again.

What came out (`--sla-steps 500 --rcm-steps 500`, half of the shipped student's rCM; 336 clips a row): merging loses
nothing. The merged student is 0.3 dB [0.0, 0.6] better than the sequential one in four steps and 0.5 dB [0.3, 0.7] in
two, with the same shapes and motions right to a point: what the two trainings teach adds up, and each can be had
apart. Sparsity costs either of them more than the order does: the dense student is 1.5 dB [1.3, 1.8] above the merged
one in four steps and gets 1.8 points more of the shapes, at one step 12 points. It is the least diverse of them
(0.83). One run of each, so that the differences of a few tenths may be the seed's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convert import merge_checkpoints
from experiments.command import Command, run
from turbojax.attention import DENSE
from turbojax.cli_evaluate import measured, read_prompts, subject, write
from turbojax.errors import UserError
from turbojax.pipeline_config import find_pipeline
from turbojax.train.cli import settings
from turbojax.train.config_file import read_config
from turbojax.train.launch import train_student
from turbojax.train.rcm_stage import RCMConfig
from turbojax.train.sla import SLAConfig
from turbojax.train.student import SLA, StudentRun

SPARSE, ARMS = dataclasses.replace(SLA, kind="sla"), ("merged", "sequential", "dense")


def shipped(stage: str) -> Any:
    """The settings that the shipped student was trained with."""
    file = read_config(f"tiny-{stage}")
    del file["stage"]
    return settings(stage, file)[1]


def main(argv: Sequence[str] | None = None) -> None:
    command = Command(__doc__ or "", "merge_vs_sequential", model="tiny-teacher")
    command.option("pca", "runs/vae/pca.npz", "runs/vae/pca.npz", "codec of the training clips")
    command.option("sla_steps", shipped("sla").steps, 2, "updates of SLA")
    command.option("rcm_steps", shipped("rcm").steps, 3, "updates of rCM, student and critic together")
    command.option("clips", 16_384, 16, "scenes to train on")
    command.option("seeds", 7, 1, "clips of each prompt to measure")
    command.option("prompts", 48, 2, "prompts to measure")
    command.option("guidance", 2.0, 2.0, "of the teacher, which the students take in")
    angles = find_pipeline("tiny").spec.config.mid_times
    command.option("mid_times", angles, angles, "TrigFlow angles of the later steps")
    args = command.parse(argv)
    if not Path(args.pca).is_file():
        raise UserError(f"--pca {args.pca}: no such file; `turbojax train vae --part pca` makes it")
    if args.model == "tiny":
        raise UserError("--model must be the teacher: tiny-teacher, or a folder of its kind")
    folders = train(args)
    arms = {arm: pipeline(args, arm, folders[arm]) for arm in ARMS}
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
    common = StudentRun(teacher=together, pca=Path(args.pca), cache=args.out, clips=args.clips, sample_every=10**9)

    def student(name: str, config: SLAConfig | RCMConfig, start: Path | None = None) -> Path:
        export = args.out / name / "student"
        train_student(dataclasses.replace(common, out=args.out / name, export=export, start=start), config)
        return export

    sla = dataclasses.replace(shipped("sla"), steps=args.sla_steps, guidance=1.0, attention=SPARSE)
    rcm = dataclasses.replace(shipped("rcm"), steps=args.rcm_steps, guidance=args.guidance)
    rcm = dataclasses.replace(rcm, tangent_warmup=rcm.tangent_warmup * args.rcm_steps // shipped("rcm").steps)
    dense = student("rcm-dense", dataclasses.replace(rcm, attention=DENSE))
    apart = student("sla-unguided", sla)
    guided = student("sla-guided", dataclasses.replace(sla, guidance=args.guidance))
    after = student("rcm-sparse", dataclasses.replace(rcm, attention=SPARSE), guided)
    merged = args.out / "merged"
    merge_checkpoints(dense, together / "dit", apart, merged, format="safetensors", overwrite=True, progress=False)
    return {"merged": merged, "sequential": after, "dense": dense}


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
        dataclasses.replace(subject(str(folder), {"steps": steps}), name=f"{arm}, {steps} steps")
        for arm, folder in arms.items()
        for steps in ((4,) if args.quick else (4, 2, 1))
    ]
    prompts = dict(list(read_prompts(None).items())[: args.prompts])
    with (args.out / "results.jsonl").open("w") as log:
        for rows in measured([teacher, *students], teacher, prompts, args.seeds, 2 if args.quick else 8):
            log.write("".join(json.dumps(row) + "\n" for row in rows))
    write(args.out, [teacher, *students], teacher)


if __name__ == "__main__":
    run(main)

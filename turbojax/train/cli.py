"""`turbojax train STAGE` and `turbojax evaluate`: train the small model's parts, and measure what they make."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_STAGES = """\
stages, in order:
  vae      the VAE: a PCA codec first, then --part decoder and --part encoder against it, then --part joint and polish
  teacher  the DiT and its text encoder, by rectified flow on the PCA latents of the vae stage
  sla      a student with sparse-linear attention, fine-tuned to answer as the teacher does
  rcm      a student of few steps, by consistency along the teacher's guided flow and DMD2

Every stage resumes where it stopped: give the same command again.
"""


def add_arguments(subparsers: Any) -> None:
    train = subparsers.add_parser(
        "train",
        help="train a part of the small model",
        description="Train a part of the small model.",
        epilog=_STAGES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    stages = train.add_subparsers(dest="stage", metavar="STAGE", required=True)
    vae = stages.add_parser("vae", help="the VAE")
    vae.add_argument("--part", choices=("pca", "decoder", "encoder", "joint", "polish"), required=True)
    vae.add_argument("--steps", type=int, default=1000)
    teacher = stages.add_parser("teacher", help="the DiT and its text encoder")
    teacher.add_argument("--pca", type=Path, required=True, help="pca.npz of the vae stage")
    teacher.add_argument("--steps", type=int, default=9000)
    teacher.add_argument("--clips", type=int, default=16384, help="scenes drawn and encoded once")
    teacher.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json (default: the shipped one)")
    teacher.add_argument("--export", type=Path, help="write the averaged weights here: dit/ and text_encoder/")
    sla = stages.add_parser("sla", help="fine-tune with sparse-linear attention")
    sla.add_argument("--loss", choices=("white_box", "black_box"), default="white_box")
    sla.add_argument("--trained", choices=("all", "attention", "proj_l"), default="all", help="what moves")
    sla.add_argument("--guidance", type=float, default=1.0, help="of the teacher that white_box follows")
    sla.add_argument("--steps", type=int, default=500)
    rcm = stages.add_parser("rcm", help="distil to few steps")
    rcm.add_argument("--guidance", type=float, default=3.0, help="of the teacher: the student takes it in")
    rcm.add_argument("--consistency", choices=("continuous", "discrete"), default="continuous")
    rcm.add_argument("--steps", type=int, default=2000, help="updates of student and critic together")
    rcm.add_argument("--student-every", type=int, default=5, help="one student update in so many, then critic's")
    rcm.add_argument("--tangent-warmup", type=int, default=200, help="updates of consistency alone, at first")
    for stage in (sla, rcm):
        stage.add_argument("--teacher", type=Path, required=True, help="exported teacher, or pipeline folder")
        stage.add_argument("--start", type=Path, help="student to go on from (default: the teacher, proj_l zero)")
        stage.add_argument("--pca", type=Path, required=True, help="pca.npz of the vae stage")
        stage.add_argument("--clips", type=int, default=16384, help="scenes drawn and encoded once")
        stage.add_argument("--topk", type=float, default=0.25, help="share of key blocks that the student keeps")
        stage.add_argument("--export", type=Path, help="write the student's averaged weights here")
    for stage in (vae, teacher, sla, rcm):
        stage.add_argument("--out", type=Path, required=True, help="folder of checkpoints, metrics and sheets")
        stage.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    from turbojax.host_memory import keep_freed_memory

    keep_freed_memory()
    if args.stage == "vae":
        from turbojax.train.vae import TrainVAEConfig, train_vae

        train_vae(TrainVAEConfig(part=args.part, out=args.out, steps=args.steps, seed=args.seed))
        return 0
    if args.stage in ("sla", "rcm"):
        return _run_student(args)
    from turbojax.train.teacher import TeacherConfig, export, train_teacher

    config = TeacherConfig(steps=args.steps, clips=args.clips, seed=args.seed)
    stage, state = train_teacher(config, args.out, args.pca, args.tokenizer)
    if args.export:
        export(stage, state, args.export)
    return 0


def _run_student(args: argparse.Namespace) -> int:
    import dataclasses

    from turbojax.train import student
    from turbojax.train.rcm_stage import RCMConfig, RCMStage
    from turbojax.train.sla import SLAConfig, SLAStage

    attention = dataclasses.replace(student.SLA, topk=args.topk)
    networks, clips = student.prepare(
        args.teacher, args.pca, args.out, attention=attention, clips=args.clips, seed=args.seed
    )
    start = networks.load(args.start) if args.start else None
    shared = {"steps": args.steps, "seed": args.seed, "attention": attention, "guidance": args.guidance}
    if args.stage == "sla":
        stage = SLAStage(SLAConfig(loss=args.loss, trained=args.trained, **shared), networks, clips, start)
    else:
        shared |= {"student_every": args.student_every, "tangent_warmup": args.tangent_warmup}
        stage = RCMStage(RCMConfig(consistency=args.consistency, **shared), networks, clips, start)
    state = student.train(stage, steps=args.steps, out=args.out, seed=args.seed)
    if args.export:
        networks.export(state.ema, args.export)
    return 0

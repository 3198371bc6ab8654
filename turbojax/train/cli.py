"""`turbojax train STAGE` and `turbojax evaluate`: train the small model's parts, and measure what they make."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_STAGES = """\
stages, in order:
  vae      the VAE: a PCA codec first, then --part decoder and --part encoder against it, then --part joint
  teacher  the DiT and its text encoder, by rectified flow on the PCA latents of the vae stage

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
    vae.add_argument("--part", choices=("pca", "decoder", "encoder", "joint"), required=True)
    vae.add_argument("--steps", type=int, default=1000)
    teacher = stages.add_parser("teacher", help="the DiT and its text encoder")
    teacher.add_argument("--pca", type=Path, required=True, help="pca.npz of the vae stage")
    teacher.add_argument("--steps", type=int, default=9000)
    teacher.add_argument("--clips", type=int, default=16384, help="scenes drawn and encoded once")
    teacher.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json (default: the shipped one)")
    teacher.add_argument("--export", type=Path, help="write the averaged weights here: dit/ and text_encoder/")
    for stage in (vae, teacher):
        stage.add_argument("--out", type=Path, required=True, help="folder of checkpoints, metrics and sheets")
        stage.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    from turbojax.host_memory import keep_freed_memory

    keep_freed_memory()
    if args.stage == "vae":
        from turbojax.train.vae import TrainVAEConfig, train_vae

        train_vae(TrainVAEConfig(part=args.part, out=args.out, steps=args.steps, seed=args.seed))
        return 0
    from turbojax.train.teacher import TeacherConfig, export, train_teacher

    config = TeacherConfig(steps=args.steps, clips=args.clips, seed=args.seed)
    stage, state = train_teacher(config, args.out, args.pca, args.tokenizer)
    if args.export:
        export(stage, state, args.export)
    return 0

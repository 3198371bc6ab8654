"""`turbojax train i2v`: one part of the small image-to-video model at a time."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_PARTS = """\
parts, in order (TEACHER is the pipeline folder of the small text-to-video teacher, PCA its latents' codec):
  turbojax train i2v --part shared --teacher TEACHER --pca PCA --cache CACHE --out shared
  turbojax train i2v --part high --start shared/dit ... --out high            the same for --part low
  turbojax train i2v --part high --distil --start high/dit ... --out student  the same for --part low

The exported weights of high and low are the dit and dit_low of a pipeline.
Every part resumes where it stopped: give the same command again.
"""


def add_arguments(stages: Any) -> None:
    parser = stages.add_parser(
        "i2v",
        help="image to video with two experts",
        epilog=_PARTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--part", choices=("shared", "high", "low"), required=True, help="both experts at first, then each")
    add("--distil", action="store_true", help="a student with sparse-linear attention that answers as --start does")
    add("--teacher", type=Path, required=True, help="pipeline folder of the text-to-video model")
    add("--start", type=Path, metavar="DIR", help="exported weights of the part before (none: the teacher, grown)")
    add("--pca", type=Path, required=True, help="pca.npz of the vae stage")
    add("--pictures", type=int, default=4096, help="drawn and encoded once (4096)")
    add("--cache", type=Path, metavar="DIR", help="folder for encoded pictures and clips, shared by the parts (OUT)")
    add("--steps", type=int, required=True)
    add("--batch", type=int, default=8, help="clips an update (8)")
    add("--guidance", type=float, default=1.0, help="of the expert that --distil follows: the student takes it in (1)")
    add("--topk", type=float, default=0.25, help="share of key blocks that the student keeps (0.25)")
    add("--seed", type=int, default=0, help="of order and noise (0)")
    add("--out", type=Path, required=True, help="folder of checkpoints and metrics")
    add("--export", type=Path, metavar="DIR", help="write the averaged weights here at the end (OUT/dit)")


def run(args: argparse.Namespace) -> int:
    from turbojax.train.i2v import I2VConfig, train_i2v

    names = ("part", "distil", "steps", "batch", "seed", "guidance", "topk")
    config = I2VConfig(**{name: getattr(args, name) for name in names})
    where = {name: getattr(args, name) for name in ("teacher", "pca", "start", "cache", "export")}
    train_i2v(config, args.out, count=args.pictures, **where)
    return 0

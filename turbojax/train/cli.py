"""`turbojax train STAGE`: train the small model's parts, or a large one's student, from flags and a settings file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from turbojax.train import i2v_cli

_STAGES = """\
stages, in order:
  vae      the VAE: a PCA codec first, then --part decoder and --part encoder against it, then --part joint
  teacher  the DiT and its text encoder, by rectified flow on the PCA latents of the vae stage
  sla      a student with sparse-linear attention, fine-tuned to answer as the teacher does
  rcm      a student of few steps, by consistency along the teacher's guided flow and DMD2
  i2v      image to video: two experts grown from the teacher, then a student of each

Every stage resumes where it stopped: give the same command again.
"""
_SETTINGS = """\
Settings are taken from the flags, then --set, then the file, then the defaults. In a file (TOML or JSON) they bear the
names of the stage's configuration and of its run, nested ones as tables; shipped files: turbojax/train/configs.
"""


class Flag(NamedTuple):
    """A flag, and the setting that it stands for where that is not its own name."""

    setting: str
    kind: type = str
    help: str = ""
    choices: tuple[str, ...] | None = None


_COMMON: Mapping[str, Flag] = {
    "out": Flag("out", Path, "folder of checkpoints, metrics and sheets"),
    "export": Flag("export", Path, "write the averaged weights here at the end"),
    "pca": Flag("pca", Path, "pca.npz of the vae stage"),
    "cache": Flag("cache", Path, "folder for the encoded scenes, which runs may share (OUT)"),
    "clips": Flag("clips", int, "procedural scenes drawn and encoded once (16384)"),
    "steps": Flag("steps", int, "updates in all"),
    "batch": Flag("batch", int, "samples an update (8)"),
    "accumulate": Flag("accumulate", int, "parts of the batch that are worked on one after the other (1)"),
    "seed": Flag("seed", int, "of initial weights, order and noise (0)"),
    "compute": Flag("compute", str, "dtype of the networks; what trains is float32", ("bfloat16", "float32")),
    "remat": Flag("remat", str, "what backward passes recompute (none)", ("none", "blocks", "keep_linear")),
    "data": Flag("data", int, "devices that share the batch (1)"),
    "fsdp": Flag("fsdp", int, "devices that share batch and weights (1)"),
}
_TEACHER: Mapping[str, Flag] = {
    "start": Flag("start", Path, "earlier run, or exported teacher, to go on from"),
    "learning-rate": Flag("optimizer.learning_rate", float, "(2e-3)"),
    "hold": Flag("optimizer.hold", float, "share of the steps before the rate falls (0.5)"),
    "tokenizer": Flag("tokenizer", Path, "folder with tokenizer.json (the shipped one)"),
}
_STUDENT: Mapping[str, Flag] = {
    "teacher": Flag("teacher", Path, "exported teacher, or pipeline folder"),
    "start": Flag("start", Path, "student to go on from (the teacher, proj_l zero)"),
    "shards": Flag("shards", str, "tar files in place of procedural clips: 'DIR/*.tar'"),
    "negative": Flag("negative", Path, "text features of the negative prompt, for --shards with guidance"),
    "attention": Flag("attention.kind", str, "of the student (sla)", ("dense", "sla")),
    "topk": Flag("attention.topk", float, "share of key blocks that the student keeps (0.25)"),
}
_FLAGS: Mapping[str, Mapping[str, Flag]] = {
    "teacher": _TEACHER,
    "sla": {
        **_STUDENT,
        "loss": Flag("loss", str, "(white_box)", ("white_box", "black_box")),
        "trained": Flag("trained", str, "what moves (all)", ("all", "attention", "proj_l")),
        "guidance": Flag("guidance", float, "of the teacher that white_box follows (1)"),
        "learning-rate": Flag("optimizer.learning_rate", float, "(4e-4)"),
    },
    "rcm": {
        **_STUDENT,
        "guidance": Flag("guidance", float, "of the teacher: the student takes it in (3)"),
        "consistency": Flag("consistency", str, "(continuous)", ("continuous", "discrete")),
        "student-every": Flag("student_every", int, "one student update in so many, the rest the critic's (5)"),
        "tangent-warmup": Flag("tangent_warmup", int, "updates of consistency alone, at first (200)"),
    },
}
_HELP = {
    "teacher": "the DiT and its text encoder",
    "sla": "fine-tune with sparse-linear attention",
    "rcm": "distil to few steps",
}


def add_arguments(subparsers: Any) -> None:
    train = subparsers.add_parser(
        "train",
        help="train a part of the small model",
        description="Train a part of the small model, or the student of a large one.",
        epilog=_STAGES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    stages = train.add_subparsers(dest="stage", metavar="STAGE", required=True)
    vae = stages.add_parser("vae", help="the VAE")
    vae.add_argument("--part", choices=("pca", "decoder", "encoder", "joint", "polish"), required=True)
    vae.add_argument("--out", type=Path, required=True, help="folder of checkpoints, metrics and sheets")
    vae.add_argument("--pca", type=Path, default=argparse.SUPPRESS, help="the codec's file (OUT/pca.npz)")
    vae.add_argument("--phases", choices=("crops", "frames", "whole"), default="crops", help="(crops)")
    for name, kind in {"steps": int, "learning-rate": float, "warmup": int, "seed": int}.items():
        vae.add_argument(f"--{name}", type=kind, metavar=kind.__name__.upper(), default=argparse.SUPPRESS)
    i2v_cli.add_arguments(stages)
    for stage, flags in _FLAGS.items():
        parser = stages.add_parser(stage, help=_HELP[stage], epilog=_SETTINGS)
        parser.add_argument("--config", metavar="FILE", help="settings in TOML or JSON, or the name of a shipped file")
        parser.add_argument(
            "--set", action="append", default=[], metavar="NAME=VALUE", help="any setting, such as optimizer.b1=0.9"
        )
        for name, flag in {**flags, **_COMMON}.items():
            options = {"choices": flag.choices} if flag.choices else {"metavar": flag.kind.__name__.upper()}
            parser.add_argument(
                f"--{name}", dest=f"setting {flag.setting}", type=flag.kind, default=argparse.SUPPRESS,
                help=flag.help, **options,
            )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Train to the end, or on from where an earlier call stopped. Raises UserError."""
    from turbojax.host_memory import keep_freed_memory

    keep_freed_memory()
    if args.stage == "vae":
        from turbojax.train.vae import PHASES, TrainVAEConfig, train_vae

        names = ("part", "out", "pca", "steps", "learning_rate", "warmup", "seed")
        given = {name: getattr(args, name) for name in names if hasattr(args, name)}
        train_vae(TrainVAEConfig(**given, phases=PHASES[args.phases]))
        return 0
    if args.stage == "i2v":
        return i2v_cli.run(args)
    from turbojax.train import launch

    where, config = configured(args)
    (launch.train_teacher if args.stage == "teacher" else launch.train_student)(where, config)
    return 0


def configured(args: argparse.Namespace) -> tuple[Any, Any]:
    """(run, configuration) of a parsed command line. Raises UserError for what is unknown or of the wrong type."""
    from turbojax.config import nested
    from turbojax.errors import UserError
    from turbojax.train.config_file import read_config

    file = read_config(args.config) if args.config else {}
    stage = file.pop("stage", args.stage)
    if stage != args.stage:
        raise UserError(f"--config {args.config} is for stage {stage!r}, not {args.stage!r}")
    flags = {name.removeprefix("setting "): v for name, v in vars(args).items() if name.startswith("setting ")}
    return settings(args.stage, file, nested(_parsed(args.set)), nested(flags))


def settings(stage: str, *layers: Mapping[str, Any]) -> tuple[Any, Any]:
    """(run, configuration) of a stage from its defaults and `layers`, a later one going before an earlier."""
    import dataclasses

    from turbojax.train.config_file import overlay, unknown_setting
    from turbojax.train.launch import TeacherRun
    from turbojax.train.rcm_stage import RCMConfig
    from turbojax.train.sla import SLAConfig
    from turbojax.train.student import StudentRun
    from turbojax.train.teacher import TeacherConfig

    where: Any = TeacherRun() if stage == "teacher" else StudentRun()
    config: Any = {"teacher": TeacherConfig, "sla": SLAConfig, "rcm": RCMConfig}[stage]()
    of_run, of_config = ({f.name for f in dataclasses.fields(x)} for x in (where, config))
    for layer in layers:
        if unknown := [name for name in layer if name not in of_run | of_config]:
            raise unknown_setting(unknown[0], sorted(of_run | of_config))
        where = overlay(where, {k: v for k, v in layer.items() if k in of_run})
        config = overlay(config, {k: v for k, v in layer.items() if k in of_config})
    return where, config


def _parsed(pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE, the value as JSON, or as text where it is none."""
    from turbojax.errors import UserError

    parsed = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--set takes NAME=VALUE, got {pair!r}")
        try:
            parsed[name] = json.loads(value)
        except json.JSONDecodeError:
            parsed[name] = value
    return parsed

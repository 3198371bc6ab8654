"""SLA tuning: what has to move, for how long, and what does it win back of what sparsity took?

    python -m experiments.training                                         (19 minutes with --steps 200, one busy core)
    python -m experiments.training --arms proj_l,all --steps 600 --clips 48

The teacher's weights with sparse attention are tuned to answer as the teacher does with dense attention and guidance
(the white-box loss of `turbojax/train/sla.py`): all of them, the self-attention's, or SLA's proj_l alone. The error is
the relative L2 of the velocity on clips that no arm saw, at four noise levels, every few steps; the rate is constant
after a warm-up, so that a shorter run is a prefix of a longer one. Before tuning, what lacks is guidance as much as
the blocks left out. Then every arm makes clips. Only for models of the small model's kind, whose training clips are
drawn. `experiments.merge_vs_sequential` asks what merging does.

What came out (`--steps 200`): everything has to move. The velocity's error falls from 25.3% to 19.4% when all weights
move and to 22.7% when proj_l moves alone. The self-attention's weights end where they began, at 25.4%: quick at first
(23.1% after 25 updates), they gain at high noise (34% to 25% at s = 0.95), but lose at low noise what the teacher knew
(17% to 23% at s = 0.5), where few updates look. The curves of the other two still fall: 200 updates are too few. On
clips the arms cannot be told apart, 24 each: 0.7 to 1.2 dB short of the guided teacher's and 83 to 92% right, as is the
teacher with sparse attention and no tuning (1.2 dB, 88%), which pays two passes a step for guidance and they one.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, PyTree

from experiments.clips import Clips, describe
from experiments.command import Command, run
from experiments.records import Row
from experiments.report import figure, save, write_table
from turbojax.attention import AttentionConfig
from turbojax.errors import UserError
from turbojax.models.dit import WanDiT
from turbojax.pipeline import Pipeline
from turbojax.train import data, loop, sla, student
from turbojax.train.encoded import encode_scenes
from turbojax.train.flow import add_noise
from turbojax.train.pca import PCALatents
from turbojax.train.rcm import guided
from turbojax.train.student import SLA
from turbojax.train.vae import TrainVAEConfig, fit_codec

LEVELS = (0.95, 0.8, 0.5, 0.2)


def main(argv: Sequence[str] | None = None) -> None:
    command = Command(str(__doc__), "training", model="tiny-teacher")
    command.option("arms", ("proj_l", "attention", "all"), ("proj_l", "all"), "what moves")
    command.option("topk", 0.25, 0.25, "share of key blocks that is kept")
    command.option("steps", 300, 4, "updates of each arm")
    command.option("measure_every", 25, 2, "updates between two measurements")
    command.option("batch", 8, 2, "clips of an update")
    command.option("scenes", 1024, 16, "training clips drawn and encoded once")
    command.option("clips", 24, 0, "clips made by each arm in the end; 0: none")
    command.option("sampling_steps", 25, 4, "steps of those clips")
    command.option("batch_size", 8, 2, "clips made at once")
    args = command.parse(argv)
    made = Clips(args.out, args.model, clips=max(1, args.clips), batch_size=args.batch_size)
    if made.spec.config.preset != "tiny":
        raise UserError(f"{args.model}: only models of the small model's kind can be trained on drawn clips")
    attention = dataclasses.replace(SLA, topk=args.topk)
    tuning = Tuning(args, made, attention)
    students = {}
    for arm in args.arms:
        students[arm] = tuning.tune(arm)
    rows = {arm: tuning.curve(arm) for arm in args.arms}
    clips = make_clips(made, tuning, students, args) if args.clips else {}
    report(args, rows, clips, made)


class Tuning:
    """The teacher, its student's shape and the clips of a run; tunes one arm after the other."""

    def __init__(self, args: argparse.Namespace, made: Clips, attention: AttentionConfig):
        self.args, self.made, self.attention = args, made, attention
        pipeline = made.pipeline
        self.guidance = made.spec.config.guidance[0]
        self.networks = student.Networks(pipeline.dit, attention)
        pca = PCALatents.load(fitted_codec(args.out))
        self.clips = drawn_clips(pipeline, pca, args.out, args.scenes, seed=1000, combinations=data.TRAINED)
        unseen = drawn_clips(pipeline, pca, args.out, 16, seed=5000, combinations=data.COMBINATIONS)
        batch = unseen.draw(0, 16)
        self._measure = jax.jit(self._errors)
        self._latents = jnp.asarray(batch.latents, jnp.float32)
        self._context = jnp.asarray(batch.context)

    def tune(self, arm: str) -> PyTree:
        """The averaged weights of the arm after all steps; goes on from its last checkpoint."""
        args = self.args
        adam = dataclasses.replace(sla.ADAM, warmup=min(sla.ADAM.warmup, args.steps // 4), hold=1.0)
        config = sla.SLAConfig(
            steps=args.steps, batch=args.batch, attention=self.attention, guidance=self.guidance,
            trained=arm, optimizer=adam,  # pyright: ignore[reportArgumentType] (checked by `trained_leaves`)
        )  # fmt: skip
        stage = sla.SLAStage(config, self.networks, self.clips)
        self.record(arm, 0, stage.init().ema)
        settings = loop.LoopConfig(
            args.steps, str(args.out / f"{arm}-{args.topk:g}-{args.batch}"), sample_every=args.measure_every
        )
        return loop.run(stage, settings, lambda state, step: self.record(arm, step, state.ema)).ema

    def record(self, arm: str, step: int, params: PyTree) -> dict[str, float]:
        """Measure, unless a run before this one did."""
        key = self._key(arm) | {"step": step}
        rows = self.made.results.where(**key)
        if not rows:
            errors = [float(f"{e:.5g}") for e in np.asarray(self._measure(params))]
            rows = [{**key, "levels": LEVELS, "error": errors}]
            self.made.results.add(rows)
        return {"unseen_error": float(np.mean(rows[0]["error"]))}

    def curve(self, arm: str) -> list[Row]:
        """The arm's measurements up to the steps that were asked for."""
        rows = [r for r in self.made.results.where(**self._key(arm)) if r["step"] <= self.args.steps]
        return sorted(rows, key=lambda r: r["step"])

    def module(self, params: PyTree) -> WanDiT:
        """A student as the pipeline takes it, in the dtypes that the model keeps."""
        shape = nnx.eval_shape(
            lambda: WanDiT(self.networks.config, rngs=nnx.Rngs(0), dtype=self.made.pipeline.dit.dtype)
        )
        graph, like = nnx.split(shape)
        cast = jax.tree.map(lambda x, to: x.astype(to.dtype), params, nnx.to_pure_dict(like))
        nnx.replace_by_pure_dict(like, cast)
        return nnx.merge(graph, like)

    def _key(self, arm: str) -> Row:
        return {"arm": arm, "topk": self.args.topk, "batch": self.args.batch, "scenes": self.args.scenes}

    def _errors(self, params: PyTree) -> Array:
        """Relative L2 of the student's velocity against the guided teacher's, for each of `LEVELS`."""
        noise = jax.random.normal(jax.random.key(1), self._latents.shape)
        empty = jnp.asarray(self.clips.empty)
        teacher = guided(self.networks.teacher, self._context, empty, self.guidance)

        def at(s: Array) -> Array:
            times = jnp.full(len(noise), s)
            x = add_noise(self._latents, noise, times)
            target = teacher(x, 1000.0 * times)
            found = self.networks.student(params, x, 1000.0 * times, self._context)
            return jnp.linalg.norm(found - target) / jnp.linalg.norm(target)

        return jax.lax.map(at, jnp.asarray(LEVELS))


def fitted_codec(out: Path) -> Path:
    """The codec that the small model's latents come from, fitted once into `out` (seconds)."""
    codec = TrainVAEConfig(part="pca", out=out)
    if not codec.pca_path.exists():
        fit_codec(codec)
    return codec.pca_path


def drawn_clips(
    pipeline: Pipeline, pca: PCALatents, out: Path, count: int, *, seed: int, combinations: Sequence[Any]
) -> student.Clips:
    """Captioned latents of `count` drawn scenes, encoded once into `out`."""
    scenes = data.clips(seed, count, combinations)
    latents = encode_scenes(scenes, pca, out / f"latents-{seed}-{count}.npy")
    named = [(s.colour, s.shape, s.motion) for s in scenes]
    return student.Clips(latents, named, pipeline.tokenizer, pipeline.text_encoder, seed=0)


def make_clips(made: Clips, tuning: Tuning, students: dict[str, PyTree], args: Any) -> dict[str, list[Row]]:
    """Clips of the guided teacher, dense and sparse without tuning, and of every arm without guidance."""
    parts = {name: getattr(made.pipeline, name) for name in ("vae", "text_encoder", "tokenizer")}
    steps = {"steps": args.sampling_steps}

    def tuned(arm: str) -> Any:
        pipeline = Pipeline(made.spec.config, dit=tuning.module(students[arm]), name=made.spec.name, **parts)
        return made.generate(pipeline, attention=tuning.attention, guidance=1.0, **steps)

    makers: dict[str, Any] = {
        "teacher, dense, guided": lambda: made.generate(attention="dense", **steps),
        "teacher, sparse, not tuned": lambda: made.generate(attention=tuning.attention, **steps),
        **{f"tuned: {arm}": lambda arm=arm: tuned(arm) for arm in students},
    }
    dense = clip_key("teacher, dense, guided", args)
    return {
        name: made.measure(clip_key(name, args), make, None if name == dense["student"] else dense)
        for name, make in makers.items()
    }


def clip_key(name: str, args: Any) -> Row:
    return {"student": name, "topk": args.topk, "steps": args.sampling_steps, "tuned": args.steps}


def report(args: Any, curves: dict[str, list[Row]], clips: dict[str, list[Row]], made: Clips) -> None:
    steps = sorted({r["step"] for rows in curves.values() for r in rows})
    shown = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, 7).round().astype(int))]
    table = []
    for arm, rows in curves.items():
        by_step = {r["step"]: 100 * np.mean(r["error"]) for r in rows}
        cells = {f"{n} steps": f"{by_step[n]:.2f}%" if n in by_step else "-" for n in shown}
        table.append({"what moves": arm, **cells})
    write_table(
        args.out / "table.md",
        table,
        f"{args.model}, top-k {args.topk:g}, {args.batch} clips an update: relative L2 of the velocity against the "
        f"guided dense teacher's, averaged weights, 16 unseen clips, mean over s = {', '.join(map(str, LEVELS))}.",
    )
    fig, (axes,) = figure(1, 2, 4.4, 3.2)
    for arm, rows in curves.items():
        axes[0].plot(
            [r["step"] for r in rows], [100 * np.mean(r["error"]) for r in rows], "o-", markersize=3, label=arm
        )
        axes[1].plot(
            LEVELS, [100 * e for e in rows[-1]["error"]], "o-", markersize=3, label=f"{arm}, {rows[-1]['step']}"
        )
    first = next(iter(curves.values()))[0]
    axes[1].plot(LEVELS, [100 * e for e in first["error"]], "k:", label="not tuned")
    axes[0].set(title="error of the velocity, %", xlabel="updates", ylim=(0, None))
    axes[1].set(title="by noise level, after the last update, %", xlabel="s", ylim=(0, None))
    for axis in axes:
        axis.legend(frameon=False, fontsize=8)
    save(fig, args.out / "curves.png")
    if clips:
        dense = next(iter(clips.values()))
        write_table(
            args.out / "clips.md",
            [{"student": name, **describe(rows, dense)} for name, rows in clips.items()],
            f"{len(dense)} clips each, {args.sampling_steps} UniPC steps, the same prompts and seeds; 95% intervals.",
        )
        made.sheet({(name, ""): clip_key(name, args) for name in clips})


if __name__ == "__main__":
    run(main)

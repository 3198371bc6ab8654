"""From settings to a trained network: what `turbojax train` does once it has read its options."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, PyTree

from turbojax.checkpoint import load_component
from turbojax.errors import UserError
from turbojax.train import evaluate as evaluation
from turbojax.train import loop, sheets
from turbojax.train.config_file import plain, remember
from turbojax.train.pca import PCALatents
from turbojax.train.rcm_stage import RCMConfig, RCMStage
from turbojax.train.shards import ShardClips, find_shards, read_negative
from turbojax.train.sla import SLAConfig, SLAStage
from turbojax.train.state import restore_run
from turbojax.train.student import Clips, Networks, RunConfig, StudentRun, part_folder, prepare_clips, prepare_networks
from turbojax.train.teacher import Sampler, Teacher, TeacherConfig, prepare_teacher
from turbojax.train.teacher import export as export_teacher

# Settings that say how a run goes, not what it computes: they may change when it is taken up again.
HOW = ("out", "export", "cache", "data", "fsdp", "log_every", "sample_every", "checkpoint_every", "keep")
SHEET_CLIPS = 8


@dataclasses.dataclass(frozen=True)
class TeacherRun(RunConfig):
    """A run of the teacher stage. tokenizer: its folder (None: the shipped one)."""

    tokenizer: Path | None = None


def train_teacher(run: TeacherRun, config: TeacherConfig) -> tuple[Teacher, Any]:
    """Train, or go on with, a teacher in `run.out`: checkpoints/, metrics.jsonl, sheet-STEP.png; (stage, its end)."""
    out = _begin(run, config, ("pca",))
    assert run.pca is not None
    pca = PCALatents.load(run.pca)
    stage = prepare_teacher(
        config, pca, run.encoded, tokenizer=run.tokenizer, clips=run.clips, data_seed=run.data_seed,
        compute=run.compute, remat=run.remat,
    )  # fmt: skip
    if run.start is not None:
        stage.start = _earlier_teacher(run.start, stage)
    state = loop.run(stage, run.loop(config.steps, config.seed), Sampler(stage, pca, out), run.mesh())
    if run.export:
        export_teacher(stage, state, run.export)
    return stage, state


def train_student(run: StudentRun, config: SLAConfig | RCMConfig) -> tuple[Networks, Any]:
    """Train, or go on with, a student in `run.out`, with its sample sheets; the stage is the config's."""
    needed = ("teacher", "negative") if run.shards and config.guidance != 1.0 else ("teacher",)
    out = _begin(run, config, needed if run.shards else ("teacher", "pca"))
    networks = prepare_networks(run, config.attention)
    clips = _shard_clips(run, config, networks) if run.shards else prepare_clips(run, config.seed)
    start = None if run.start is None else networks.load(run.start)
    make = SLAStage if isinstance(config, SLAConfig) else RCMStage
    stage: Any = make(config, networks, clips, start)  # pyright: ignore[reportArgumentType]
    sample = _student_sheets(run, config, networks, clips, out)
    state = loop.run(stage, run.loop(config.steps, config.seed), sample, run.mesh())
    if run.export:
        networks.export(state.ema, run.export)
    return networks, state


def _begin(run: RunConfig, config: Any, needed: tuple[str, ...]) -> Path:
    """The run's folder, once everything that it needs has been named."""
    for name in (*needed, "out"):
        if getattr(run, name) is None:
            raise UserError(f"this run needs --{name} (or {name!r} in its --config)")
    for name in ("teacher", "start", "pca", "negative", "tokenizer"):
        path = getattr(run, name, None)
        if path is not None and not path.exists():
            raise UserError(f"--{name} {path}: no such file or folder")
    assert run.out is not None
    kept = {name: value for name, value in plain(run).items() if name not in HOW and not name.startswith("sheet_")}
    remember(run.out / "run.json", _flat(kept | plain(config)))
    return run.out


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _earlier_teacher(folder: Path, stage: Teacher) -> PyTree:
    """Averaged weights of an earlier run: from its own folder in float32, or as it exported them."""
    if (found := restore_run(folder, stage.init())) is not None:
        return found[0].ema
    parts = {"dit": load_component(folder / "dit"), "text": load_component(folder / "text_encoder")}
    if parts["dit"].config != stage.config.dit:
        raise UserError(f"{folder}: a teacher of another shape")
    return {name: nnx.to_pure_dict(nnx.split(module)[1]) for name, module in parts.items()}


def _shard_clips(run: StudentRun, config: SLAConfig | RCMConfig, networks: Networks) -> ShardClips:
    assert run.shards is not None
    # Without guidance nothing reads the negative prompt.
    empty = np.zeros((1, 1, networks.config.text_dim), np.float32)
    if run.negative is not None:
        empty = read_negative(run.negative)
    return ShardClips(find_shards(run.shards), empty, seed=config.seed, frames=run.latent_frames)


def _student_sheets(
    run: StudentRun, config: SLAConfig | RCMConfig, networks: Networks, clips: Clips | ShardClips, out: Path
) -> sheets.Sheets | None:
    """Sheets through the PCA codec, or for shards the VAE of the teacher's pipeline; None where there is no decoder."""
    if isinstance(clips, Clips):
        wanted = evaluation.pairs(SHEET_CLIPS, seed=1)
        rows = [clips.captions.rows[combination, 0] for combination, _ in wanted]
        context, shape, seeds = clips.contexts[rows], clips.latents.shape[1:], [seed for _, seed in wanted]
        assert run.pca is not None
        decoder: Any = PCALatents.load(run.pca)

        def decode(codec: Any, latents: Array) -> Array:
            return codec.decode(latents)
    else:
        assert run.teacher is not None
        folder = part_folder(run.teacher, "vae")
        if not folder.is_dir():
            return None
        wanted, seeds = None, list(range(2))
        drawn = clips.draw(0, len(seeds))
        context, shape = drawn.context, drawn.latents.shape[1:]
        graph, decoder = nnx.split(load_component(folder))

        def decode(codec: Any, latents: Array) -> Array:
            return nnx.merge(graph, codec).decode(latents)

    noise, context = sheets.fixed_noise(seeds, shape), jnp.asarray(context)
    if isinstance(config, RCMConfig):
        latents = sheets.few_steps(networks.student, context, noise, sigma_max=run.sheet_sigma_max)
    else:
        # A student of the guided velocity needs no guidance of its own.
        guided = config.loss == "white_box" and config.guidance != 1.0
        guidance = 1.0 if guided or (isinstance(clips, ShardClips) and run.negative is None) else run.sheet_guidance
        latents = sheets.many_steps(
            networks.student, context, jnp.asarray(clips.empty), noise, guidance=guidance, shift=run.sheet_shift
        )
    return sheets.Sheets(out, latents, decode, decoder, wanted)

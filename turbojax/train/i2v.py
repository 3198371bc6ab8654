"""Image to video for the small model: two experts grown from its text-to-video teacher, then distilled.

In order, each part from the one before:

    shared       the teacher, its input widened by zero rows to take mask and picture, learns to use them
    high, low    an expert for each side of the noise level where they take turns
    distil       for each expert a student with sparse-linear attention, which answers as the expert does

The text encoder and the VAE are the text-to-video model's and stay as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PyTree

from turbojax.attention import DENSE, AttentionConfig
from turbojax.checkpoint import load_component
from turbojax.config import PRESETS
from turbojax.errors import UserError
from turbojax.models.dit import WanDiT
from turbojax.tokenizer import Tokenizer
from turbojax.train import loop
from turbojax.train.encoded import encode_scenes
from turbojax.train.flow import add_noise
from turbojax.train.i2v_data import TEMPLATE_WEIGHTS, encode_pictures, pictures
from turbojax.train.optimizer import OptimizerConfig, make_optimizer
from turbojax.train.pca import PCALatents
from turbojax.train.rcm import guided
from turbojax.train.sla import SLAConfig, SLAStage, white_box_losses
from turbojax.train.student import SLA, AdamConfig, ClipSource, HostArray, Networks, part_folder
from turbojax.train.teacher import SHIPPED_TOKENIZER, Captions
from turbojax.train.trigflow import UniformShift, rf_time

Part = Literal["shared", "high", "low"]

BOUNDARY, SHIFT = 0.9, 3.0
_PICTURES_SEED = 1000
TIMES = {
    "shared": UniformShift(SHIFT),
    "high": UniformShift(SHIFT, low=BOUNDARY),
    "low": UniformShift(SHIFT, high=BOUNDARY),
}
# What a student is asked for: its sampler's last step starts from 0.61.
STUDENT_TIMES = {**TIMES, "low": UniformShift(SHIFT, low=0.5, high=BOUNDARY)}
# Learning from data, and from an expert.
MUON = {
    "shared": OptimizerConfig(1.5e-3, warmup=50, hold=0.35),
    "high": OptimizerConfig(7e-4, warmup=20, hold=0.35),
    "low": OptimizerConfig(7e-4, warmup=20, hold=0.35),
}
ADAM = AdamConfig(6e-4, b2=0.99, warmup=20, hold=0.3)


class Drawn(NamedTuple):
    """latents [B,t,h,w,C], text rows [B,L,D], and mask and picture channels [B,t,h,w,C+4]."""

    latents: HostArray
    context: HostArray
    condition: HostArray


class I2VBatch(NamedTuple):
    """One step's clips, captions and pictures, the empty prompt, and the expert to distil, which lies on the device."""

    latents: HostArray
    context: HostArray
    condition: HostArray
    empty: Array
    teacher: PyTree


class PicturedClips:
    """Clips, the pictures that they start with, and encoded captions; step n sees what the seed and n say.

    picture_of: for each clip, the row of `conditions` that it starts with.
    """

    def __init__(
        self,
        latents: np.ndarray,
        conditions: np.ndarray,
        picture_of: Sequence[int],
        combinations: Sequence[tuple[str, str, str]],
        tokenizer: Tokenizer,
        encode: Callable[[Any, Any], Array],
        *,
        seed: int = 0,
        dropout: float = 0.1,
    ):
        self.latents, self.conditions, self.picture_of = latents, conditions, np.asarray(picture_of)
        self.combinations, self.seed, self.dropout = combinations, seed, dropout
        self.captions = Captions(tokenizer)
        self.contexts = np.asarray(encode(self.captions.ids, self.captions.mask), np.float32)

    @property
    def empty(self) -> HostArray:
        """The empty prompt's rows [1, L, D], for guidance."""
        return self.contexts[-1:]

    def draw(self, step: int, count: int) -> Drawn:
        """Step `step`'s clips: each epoch is a permutation of them all."""
        rng, total = np.random.default_rng((self.seed, step)), len(self.latents)
        epoch, offset = divmod(step * count, total - total % count)
        rows = np.random.default_rng((self.seed, 1 << 40, epoch)).permutation(total)[offset : offset + count]
        texts = [self._caption(rng, self.combinations[row]) for row in rows]
        return Drawn(self.latents[rows], self.contexts[texts], self.conditions[self.picture_of[rows]])

    def _caption(self, rng: np.random.Generator, combination: tuple[str, str, str]) -> int:
        if rng.random() < self.dropout:
            return len(self.contexts) - 1
        weights = np.asarray(TEMPLATE_WEIGHTS)
        return self.captions.rows[combination, int(rng.choice(len(weights), p=weights / weights.sum()))]


def grow(teacher: WanDiT) -> WanDiT:
    """The same network for twice the channels and a mask: it does not look at what is new, yet."""
    config = teacher.config
    wide = dataclasses.replace(config, in_channels=config.in_channels + config.out_channels + 4)
    params = nnx.to_pure_dict(nnx.split(teacher)[1])
    kernel = params["patch_embedding"]["kernel"]
    rows = (wide.in_channels - config.in_channels) * config.patch_volume
    embedding = {**params["patch_embedding"], "kernel": jnp.pad(kernel, ((0, rows), (0, 0)))}
    shape = nnx.eval_shape(lambda: WanDiT(wide, rngs=nnx.Rngs(0), dtype=teacher.dtype))
    return nnx.merge(nnx.split(shape)[0], {**params, "patch_embedding": embedding})


@dataclasses.dataclass(frozen=True)
class I2VConfig:
    """What one part's run does. distil: answer as the expert does, with `guidance`, instead of learning from data."""

    part: Part
    distil: bool = False
    steps: int = 1500
    batch: int = 8
    seed: int = 0
    guidance: float = 1.0
    topk: float = SLA.topk

    @property
    def attention(self) -> AttentionConfig:
        return dataclasses.replace(SLA, topk=self.topk) if self.distil else DENSE


class I2VStage(SLAStage):
    """The stage that `loop.run` drives; `networks` holds the network to start from, which is the teacher as well."""

    def __init__(self, config: I2VConfig, networks: Networks, clips: ClipSource, start: PyTree | None = None):
        times, loss = (STUDENT_TIMES, "white_box") if config.distil else (TIMES, "black_box")
        shared = SLAConfig(
            steps=config.steps, batch=config.batch, seed=config.seed, attention=config.attention,
            times=times[config.part], loss=loss, guidance=config.guidance, optimizer=ADAM,
        )  # fmt: skip
        super().__init__(shared, networks, clips, start)
        if not config.distil:
            self.optimizer = make_optimizer(MUON[config.part], config.steps)

    def losses(self, params: PyTree, batch: I2VBatch, key: jax.Array) -> Float[Array, "B"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        time_key, noise_key = jax.random.split(key)
        latents, condition = batch.latents.astype(jnp.float32), batch.condition.astype(jnp.float32)
        s = rf_time(self.config.times.draw(time_key, len(latents)))
        noise = jax.random.normal(noise_key, latents.shape)

        def beside_picture(x: Array) -> Array:
            times = len(x) // len(condition)  # guidance asks for both halves in one batch
            return jnp.concatenate([x, jnp.concatenate([condition] * times)], axis=-1)

        def student(x: Array, timestep: Array) -> Array:
            return self.networks.student(params, beside_picture(x), timestep, batch.context)

        def expert(x: Array, timestep: Array, context: Array) -> Array:
            return self.networks.like_teacher(batch.teacher, beside_picture(x), timestep, context)

        if self.config.loss == "black_box":
            x = add_noise(latents, noise, s)
            return jnp.mean(jnp.square(student(x, 1000.0 * s) - (noise - latents)), axis=(1, 2, 3, 4))
        teacher = guided(expert, batch.context, batch.empty, self.config.guidance)
        return white_box_losses(student, teacher, latents, noise, s)

    def batch(self, step: int) -> I2VBatch:  # pyright: ignore[reportIncompatibleMethodOverride]
        drawn = self.clips.draw(step, self.config.batch)
        given = (drawn.latents, drawn.context, drawn.condition)
        return I2VBatch(*given, self._empty, self.networks.teacher_params)


def prepare(
    teacher: Path, pca: Path, cache: Path, *, count: int, start: Path | None, attention: AttentionConfig, seed: int
) -> tuple[Networks, PicturedClips]:
    """The networks and the data of a run.

    teacher: pipeline folder of the text-to-video model. start: exported weights to go on from (None: the teacher,
    grown). cache: folder of encoded pictures and clips, which all parts share. seed: of the order alone.
    """
    folders = {part: part_folder(teacher, part) for part in ("dit", "vae", "text_encoder")}
    dit = load_component(start) if start else grow(load_component(folders["dit"]))
    drawn = pictures(_PICTURES_SEED, count)
    conditions = encode_pictures(drawn, load_component(folders["vae"]), cache / f"pictures-{count}")
    scenes = [scene for pictured in drawn for scene in pictured.clips]
    latents = encode_scenes(scenes, PCALatents.load(pca), cache / f"clips-{count}.npy")
    picture_of = [i for i, pictured in enumerate(drawn) for _ in pictured.clips]
    combinations = [(s.colour, s.shape, s.motion) for s in scenes]
    graph, state = nnx.split(load_component(folders["text_encoder"], dtype="float32"))
    encode = jax.jit(lambda ids, mask: nnx.merge(graph, state)(ids, mask))
    tokenizer = Tokenizer.load(SHIPPED_TOKENIZER, PRESETS["tiny"].text_len)
    clips = PicturedClips(latents, conditions, picture_of, combinations, tokenizer, encode, seed=seed)
    return Networks(dit, attention), clips


def train_i2v(
    config: I2VConfig,
    out: Path,
    *,
    teacher: Path,
    pca: Path,
    start: Path | None = None,
    count: int = 4096,
    cache: Path | None = None,
    export: Path | None = None,
) -> None:
    """Train one part, or go on from where an earlier call stopped; see `prepare` for the folders.

    export: where the averaged weights go at the end, as a component (OUT/dit). The data are the same for every seed.
    """
    if start is None and (config.part != "shared" or config.distil):
        part = f"{config.part}{' --distil' * config.distil}"
        raise UserError(f"--part {part} goes on from an earlier part: name its weights with --start")
    networks, clips = prepare(
        teacher, pca, cache or out, count=count, start=start, attention=config.attention, seed=config.seed
    )
    settings = loop.LoopConfig(config.steps, str(out), config.seed, checkpoint_every=120.0)
    state = loop.run(I2VStage(config, networks, clips), settings)
    networks.export(state.ema, export or out / "dit")

"""The rectified-flow teacher: the small DiT and its text encoder, trained together on latents of procedural clips."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from turbojax.checkpoint import save_component
from turbojax.config import PRESETS, DiTConfig
from turbojax.models.dit import Remat, WanDiT
from turbojax.models.umt5 import UMT5Encoder
from turbojax.tokenizer import Tokenizer
from turbojax.train import data
from turbojax.train import evaluate as evaluation
from turbojax.train.encoded import encode_scenes
from turbojax.train.flow import sample_noise_levels, velocity_errors
from turbojax.train.gradients import gradient
from turbojax.train.optimizer import OptimizerConfig, make_optimizer
from turbojax.train.pca import PCALatents
from turbojax.train.sheets import Sheets, fixed_noise, many_steps

TEXT_ENCODER = PRESETS["tiny"].text_encoder
SHIPPED_TOKENIZER = Path(__file__).parent.parent / "tiny" / "tokenizer"


@dataclass(frozen=True)
class TeacherConfig:
    """How the shipped teacher is trained. accumulate: parts of the batch that are worked on one after the other."""

    steps: int = 9_000
    batch: int = 8
    accumulate: int = 1
    seed: int = 0
    shift: float = 3.0
    caption_dropout: float = 0.1
    dit: DiTConfig = PRESETS["tiny"].dit
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


class TeacherState(NamedTuple):
    """params and ema: {"dit", "text"} trees, float32; opt_state: optax's."""

    params: PyTree
    ema: PyTree
    opt_state: PyTree


class Batch(NamedTuple):
    latents: Any  # [B,t,h,w,C], float
    ids: Any  # [B,L], int32
    mask: Any  # [B,L], int32


class Captions:
    """Every caption that the clips can have, tokenised once; the last row is the empty prompt."""

    def __init__(self, tokenizer: Tokenizer):
        self.rows: dict[tuple[tuple[str, str, str], int], int] = {
            (c, t): i for i, (c, t) in enumerate((c, t) for c in data.COMBINATIONS for t in range(len(data.TEMPLATES)))
        }
        texts = [data.TEMPLATES[t][0].format(colour=c, shape=s, motion=m) for (c, s, m), t in self.rows]
        self.ids, self.mask = tokenizer([*texts, ""])

    def draw(self, rng: np.random.Generator, combination: tuple[str, str, str], dropout: float) -> int:
        """The row of one of the combination's captions, or of the empty prompt."""
        if rng.random() < dropout:
            return len(self.ids) - 1
        weights = np.asarray([w for _, w in data.TEMPLATES])
        return self.rows[combination, int(rng.choice(len(weights), p=weights / weights.sum()))]


class Teacher:
    """The stage that `loop.run` drives. `latents` [clips,t,h,w,C] and `combinations` describe the same scenes.

    start: {"dit", "text"} trees to go on from; compute: dtype of the DiT; remat: what its backward pass recomputes.
    """

    def __init__(
        self,
        config: TeacherConfig,
        latents: np.ndarray,
        combinations: list[tuple[str, str, str]],
        tokenizer: Tokenizer,
        start: PyTree | None = None,
        compute: DTypeLike = jnp.bfloat16,
        remat: Remat = "none",
    ):
        self.config, self.latents, self.combinations = config, latents, combinations
        self.tokenizer, self.captions = tokenizer, Captions(tokenizer)
        self.start = start
        self.remat: Remat = remat
        dit = WanDiT(config.dit, rngs=nnx.Rngs(config.seed), dtype=compute)
        text = UMT5Encoder(TEXT_ENCODER, rngs=nnx.Rngs(config.seed + 1), dtype=jnp.float32)
        (self.dit, dit_state), (self.text, text_state) = nnx.split(dit), nnx.split(text)
        self._params = {"dit": nnx.to_pure_dict(dit_state), "text": nnx.to_pure_dict(text_state)}
        self.optimizer = make_optimizer(config.optimizer, config.steps)

    def init(self) -> TeacherState:
        """Master weights in float32, whatever the model computes in."""
        params = self._params if self.start is None else self.start
        # Copied: the loop donates its state, and a second run starts from the same parameters.
        params = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)
        return TeacherState(params, jax.tree.map(jnp.copy, params), self.optimizer.init(params))

    def context(
        self, params: PyTree, ids: Int[Array | np.ndarray, "B L"], mask: Int[Array | np.ndarray, "B L"]
    ) -> Float[Array, "B L D"]:
        return nnx.merge(self.text, params["text"])(ids, mask)

    def velocity(
        self, params: PyTree, latents: Float[Array, "B t h w C"], timestep: Float[Array, "B"], context: Array
    ) -> Float[Array, "B t h w C"]:
        return nnx.merge(self.dit, params["dit"])(latents, timestep, context, remat=self.remat)

    def losses(self, params: PyTree, batch: Batch, key: jax.Array) -> Float[Array, "B"]:
        level_key, noise_key = jax.random.split(key)
        latents = batch.latents.astype(jnp.float32)
        s = sample_noise_levels(level_key, len(latents), self.config.shift)
        noise = jax.random.normal(noise_key, latents.shape)
        context = self.context(params, batch.ids, batch.mask)
        return velocity_errors(lambda x, t: self.velocity(params, x, t, context), latents, noise, s)

    def step(self, state: TeacherState, batch: Batch, key: jax.Array) -> tuple[TeacherState, Mapping[str, jax.Array]]:
        def loss(params: PyTree, part: Batch, key: jax.Array) -> tuple[Array, dict[str, Array]]:
            value = jnp.mean(self.losses(params, part, key))
            return value, {"loss": value}

        grads, metrics = gradient(loss, state.params, batch, key, self.config.accumulate)
        opt_state: Any
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = self.config.optimizer.ema
        ema = jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, state.ema, params)
        metrics = {**metrics, "grad_norm": optax.tree.norm(grads), "skipped": opt_state.total_notfinite}
        return TeacherState(params, ema, opt_state), metrics

    def batch(self, step: int) -> Batch:
        size, count = self.config.batch, len(self.latents)
        rng = np.random.default_rng((self.config.seed, step))
        epoch, offset = divmod(step * size, count - count % size)
        order = np.random.default_rng((self.config.seed, 1 << 40, epoch)).permutation(count)
        rows = order[offset : offset + size]
        texts = [self.captions.draw(rng, self.combinations[r], self.config.caption_dropout) for r in rows]
        return Batch(self.latents[rows], self.captions.ids[texts], self.captions.mask[texts])


class Sampler(Sheets):
    """Clips from the averaged weights, drawn through the PCA codec: what the sample sheets show while training."""

    def __init__(self, stage: Teacher, pca: PCALatents, folder: Path, steps: int = 20, guidance: float = 3.0):
        wanted = evaluation.pairs(8, seed=1)
        prompts = [evaluation.prompt_of(combination) for combination, _ in wanted]
        ids, mask = stage.tokenizer([*prompts, *[""] * len(prompts)])
        noise = fixed_noise([seed for _, seed in wanted], stage.latents.shape[1:])

        def latents(params: PyTree) -> Array:
            context, empty = jnp.split(stage.context(params, ids, mask), 2)
            draw = many_steps(
                stage.velocity, context, empty[:1], noise, guidance=guidance, shift=stage.config.shift, steps=steps
            )
            return draw(params)

        super().__init__(folder, latents, lambda codec, z: codec.decode(z), pca, wanted)


def prepare_teacher(
    config: TeacherConfig,
    pca: PCALatents,
    encoded: Path,
    *,
    tokenizer: Path | None = None,
    clips: int = 16_384,
    data_seed: int = 0,
    start: PyTree | None = None,
    compute: DTypeLike | None = None,
    remat: Remat = "none",
) -> Teacher:
    """The stage on `clips` scenes drawn from `data_seed`, whose latents are kept in the file `encoded`."""
    scenes = data.clips(data_seed + 1000, clips)
    latents = encode_scenes(scenes, pca, encoded)
    combinations = [(s.colour, s.shape, s.motion) for s in scenes]
    words = Tokenizer.load(tokenizer or SHIPPED_TOKENIZER, PRESETS["tiny"].text_len)
    return Teacher(config, latents, combinations, words, start, jnp.bfloat16 if compute is None else compute, remat)


def export(stage: Teacher, state: TeacherState, out: Path) -> None:
    """Write the averaged weights as components: `out`/dit (bfloat16 but for what stays float32), `out`/text_encoder."""
    parts = (("dit", "dit", WanDiT, stage.config.dit), ("text_encoder", "text", UMT5Encoder, TEXT_ENCODER))
    for folder, name, module, config in parts:
        abstract = nnx.eval_shape(lambda module=module, config=config: module(config, rngs=nnx.Rngs(0)))
        like = nnx.to_pure_dict(nnx.state(abstract))
        params = jax.tree.map(lambda x, shape: x.astype(shape.dtype), state.ema[name], like)
        save_component(out / folder, (config, params), format="safetensors", overwrite=True)

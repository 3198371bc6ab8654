"""Train the small VAE: decoder and encoder each against fixed PCA latents, both together, and the decoder once more.

    python -m turbojax.train.vae --part pca      --out runs/vae
    python -m turbojax.train.vae --part decoder  --out runs/vae
    python -m turbojax.train.vae --part encoder  --out runs/vae
    python -m turbojax.train.vae --part joint    --out runs/vae --phases frames --steps 240 --learning-rate 1e-3
    python -m turbojax.train.vae --part polish   --out runs/vae --phases whole --steps 400 --learning-rate 7e-4

Decoder and encoder do not need each other and may run side by side; joint starts from what
they left, polish from joint.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, PyTree, UInt8
from PIL import Image

from turbojax.checkpoint import save_component
from turbojax.config import PRESETS, VAEConfig
from turbojax.models.vae import WanVAE
from turbojax.train import data, loop
from turbojax.train.pca import PCALatents, fit_pca_latents
from turbojax.train.state import restore_run
from turbojax.train.vae_measure import contact_sheet, evaluate, measure, unseen_clips

Part = Literal["pca", "decoder", "encoder", "joint", "polish"]
PARTS: tuple[Part, ...] = get_args(Part)

# What each part's loss reaches.
TRAINS: Mapping[Part, tuple[str, ...]] = {
    "decoder": ("decoder", "post_quant_conv"),
    "encoder": ("encoder", "quant_conv"),
    "joint": ("encoder", "quant_conv", "decoder", "post_quant_conv"),
    "polish": ("decoder", "post_quant_conv"),
}

# A shape may reach these beyond what the diffusion model is trained on, so that its mistakes still decode.
RADIUS, TRAVEL = (14.0, 30.0), (0.0, 56.0)


@dataclass(frozen=True)
class Phase:
    """Part of a run: batches of `batch` clips of `frames` frames, cropped to `size` x `size` pixels."""

    share: float
    batch: int
    frames: int
    size: int


# Small crops first: more updates a second. Whole frames last: a crop's border is not the frame's.
CROPS_THEN_FRAMES = (Phase(0.40, 4, 5, 64), Phase(0.35, 4, 9, 64), Phase(0.25, 1, 17, 128))
# To polish what is trained already.
MOSTLY_FRAMES = (Phase(0.5, 4, 9, 64), Phase(0.5, 1, 17, 128))
WHOLE_FRAMES = (Phase(1.0, 1, 17, 128),)
PHASES: Mapping[str, tuple[Phase, ...]] = {"crops": CROPS_THEN_FRAMES, "frames": MOSTLY_FRAMES, "whole": WHOLE_FRAMES}


@dataclass(frozen=True)
class TrainVAEConfig:
    """One part of the training, into `out`/{part}. `pca` is the codec's file; None: `out`/pca.npz."""

    part: Part
    out: Path
    pca: Path | None = None
    model: VAEConfig = PRESETS["tiny"].vae
    steps: int = 1000
    learning_rate: float = 2e-3
    warmup: int = 50
    latent_noise: float = 0.05
    phases: tuple[Phase, ...] = CROPS_THEN_FRAMES
    seed: int = 0
    pca_clips: int = 240
    std_floor: float = 0.2
    eval_clips: int = 48
    eval_every: int = 200
    log_every: int = 20

    @property
    def pca_path(self) -> Path:
        return self.pca or self.out / "pca.npz"


class VAEState(NamedTuple):
    """The whole VAE's parameters (those that a part does not reach stay as they are) and the optimiser's state."""

    params: PyTree
    opt_state: PyTree


# Losses: pure functions of the parameters, the batch and a key.


def pixel_loss(made: Float[Array, "*n"], video: Float[Array, "*n"]) -> Float[Array, ""]:
    """L1 keeps flat areas flat, the square pulls on edges."""
    error = made - video
    return jnp.abs(error).mean() + jnp.square(error).mean()


def decoder_loss(vae: WanVAE, pca: PCALatents, video: Array, key: Array, noise: float) -> Float[Array, ""]:
    """Draw the clip from its noisy PCA latents."""
    z = pca.encode(video)
    z = z + noise * jax.random.normal(key, z.shape)
    return pixel_loss(vae.decode(z, clamp=False), video)


def encoder_loss(vae: WanVAE, pca: PCALatents, video: Array) -> Float[Array, ""]:
    """Regress the PCA latents."""
    error = vae.encode(video) - pca.encode(video)
    return jnp.abs(error).mean() + jnp.square(error).mean()


def joint_loss(vae: WanVAE, pca: PCALatents, video: Array, key: Array, noise: float) -> Float[Array, ""]:
    """Draw each clip from the encoder's latents or, as often, from PCA's; the encoder must stay near PCA's."""
    z, target = vae.encode(video), pca.encode(video)
    which, key = jax.random.split(key)
    own = jax.random.bernoulli(which, 0.5, (video.shape[0], 1, 1, 1, 1))
    mixed = jnp.where(own, z, target) + noise * jax.random.normal(key, z.shape)
    error = z - target
    anchor = jnp.abs(error).mean() + jnp.square(error).mean()
    return pixel_loss(vae.decode(mixed, clamp=False), video) + 0.25 * anchor


def polish_loss(vae: WanVAE, pca: PCALatents, video: Array, key: Array, noise: float) -> Float[Array, ""]:
    """`joint_loss` for the decoder alone, on whole frames, with more weight where zero padding shows."""
    which, key = jax.random.split(key)
    own = jax.random.bernoulli(which, 0.5, (video.shape[0], 1, 1, 1, 1))
    z = jax.lax.stop_gradient(jnp.where(own, vae.encode(video), pca.encode(video)))
    made = vae.decode(z + noise * jax.random.normal(key, z.shape), clamp=False)
    weight = jnp.asarray(border_weight(*video.shape[1:4]))
    error = made - video
    return (weight * (jnp.abs(error) + jnp.square(error))).mean()


def border_weight(frames: int, height: int, width: int) -> Float[np.ndarray, "frames height width 1"]:
    """1 inside; 8 on the outer two pixels, where a fault is a line that the eye sees and the mean does not; and twice
    that in the first frame, which has no frames before it to lean on."""
    weight = np.full((frames, height, width, 1), 8.0, np.float32)
    weight[:, 2:-2, 2:-2] = 1.0
    weight[0] *= 2.0
    return weight


def loss_of(config: TrainVAEConfig, vae: WanVAE, pca: PCALatents, video: Array, key: Array) -> Float[Array, ""]:
    match config.part:
        case "decoder":
            return decoder_loss(vae, pca, video, key, config.latent_noise)
        case "encoder":
            return encoder_loss(vae, pca, video)
        case "joint":
            return joint_loss(vae, pca, video, key, config.latent_noise)
        case "polish":
            return polish_loss(vae, pca, video, key, config.latent_noise)
    raise ValueError(f"part {config.part!r} has no loss")


def phase_of(phases: tuple[Phase, ...], step: int, steps: int) -> Phase:
    """The phase that a step belongs to; shares are relative to their sum."""
    edges = np.cumsum([p.share for p in phases]) / sum(p.share for p in phases) * steps
    return phases[min(int(np.searchsorted(edges, step, side="right")), len(phases) - 1)]


def training_batch(seed: int, step: int, phase: Phase) -> UInt8[np.ndarray, "b t size size 3"]:
    """Clips of trained combinations, each cropped around its shape; a function of (seed, step, phase) alone."""
    rng = np.random.default_rng([seed, step])
    return np.stack([_crop(rng, phase) for _ in range(phase.batch)])


def _crop(rng: np.random.Generator, phase: Phase) -> UInt8[np.ndarray, "t size size 3"]:
    combination = data.TRAINED[rng.integers(len(data.TRAINED))]
    scene = data.sample_scene(rng, combination, radius=RADIUS, travel=TRAVEL)
    start = int(rng.integers(data.FRAMES - phase.frames + 1))
    clip = data.render(scene)[start : start + phase.frames]
    # Centred within a radius of the shape: a crop of bare background teaches nothing.
    centre = scene.positions()[start + phase.frames // 2] + rng.uniform(-1, 1, 2) * scene.radius * 1.5
    x, y = np.clip(np.rint(centre - phase.size / 2), 0, data.SIZE - phase.size).astype(int)
    return clip[:, y : y + phase.size, x : x + phase.size]


class VAEStage:
    """The stage that `loop.run` drives."""

    def __init__(self, config: TrainVAEConfig, pca: PCALatents) -> None:
        self.config, self.pca = config, pca
        self.graphdef, self._params = nnx.split(WanVAE(config.model, rngs=nnx.Rngs(config.seed)))
        rate = optax.warmup_cosine_decay_schedule(
            0.0, config.learning_rate, config.warmup, config.steps, 0.01 * config.learning_rate
        )
        self.optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))

    def init(self) -> VAEState:
        """Fresh parameters, but those that an earlier part has trained."""
        state = VAEState(self._params, self.optimizer.init(self._params))
        params = dict(nnx.to_flat_state(state.params))
        for part in PARTS[1 : PARTS.index(self.config.part)]:
            if (earlier := restore_run(self.config.out / part, state)) is not None:
                trained = nnx.to_flat_state(earlier[0].params)
                params |= {path: leaf for path, leaf in trained if path[0] in TRAINS[part]}
        return state._replace(params=nnx.from_flat_state(params))

    def batch(self, step: int) -> UInt8[np.ndarray, "b t size size 3"]:
        return training_batch(self.config.seed, step, phase_of(self.config.phases, step, self.config.steps))

    def step(
        self, state: VAEState, batch: UInt8[Array, "b t size size 3"], key: Array
    ) -> tuple[VAEState, Mapping[str, Array]]:
        video = batch.astype(jnp.float32) / 127.5 - 1.0

        def loss(params: PyTree) -> Array:
            return loss_of(self.config, self.vae(params), self.pca, video, key)

        value, gradient = jax.value_and_grad(loss)(state.params)
        updates, opt_state = self.optimizer.update(gradient, state.opt_state, state.params)
        return VAEState(optax.apply_updates(state.params, updates), opt_state), {"loss": value}

    def vae(self, params: PyTree) -> WanVAE:
        return nnx.merge(self.graphdef, params)


def train_vae(config: TrainVAEConfig) -> Mapping[str, Mapping[str, float]]:
    """Run or resume one part; returns its last evaluation.

    Part pca leaves `pca_path`; the others leave in `out`/{part}: checkpoints/, metrics.jsonl, the component
    folder vae/, and sheet.png with three rows a clip: true, decoded from its PCA latents, and round trip.
    """
    if config.part == "pca":
        return {"pca": fit_codec(config)}
    folder = config.out / config.part
    stage = VAEStage(config, PCALatents.load(config.pca_path))
    clips = unseen_clips(config.eval_clips)
    report: dict[str, dict[str, float]] = {}

    def sample(state: VAEState, step: int) -> Mapping[str, dict[str, float]]:
        seen = clips if step == config.steps else clips[:8]
        found, pictures = evaluate(stage.vae(state.params), stage.pca, seen)
        shown = (seen, pictures["decoder"], pictures["round_trip"])
        rows = [videos[i] for i in range(min(4, len(seen))) for videos in shown]
        _write_png(folder / "sheet.png", contact_sheet(rows))
        report.update(found)
        return found

    settings = loop.LoopConfig(
        steps=config.steps,
        out=str(folder),
        seed=config.seed,
        log_every=config.log_every,
        sample_every=config.eval_every,
    )
    state = loop.run(stage, settings, sample)
    save_component(folder / "vae", stage.vae(state.params), format="safetensors", overwrite=True)
    return report


def fit_codec(config: TrainVAEConfig) -> dict[str, float]:
    """Fit the PCA codec, save it, and measure it alone."""
    scenes = data.clips(config.seed, config.pca_clips)
    pca = fit_pca_latents((data.render(s) for s in scenes), channels=config.model.z_dim, std_floor=config.std_floor)
    pca.save(config.pca_path)
    true = unseen_clips(config.eval_clips)
    made = np.stack([np.asarray(pca.decode(pca.encode(data.to_float(clip[None])))[0]) for clip in true])
    return measure(data.to_uint8(made), true)


def _write_png(path: Path, picture: UInt8[np.ndarray, "h w 3"]) -> None:
    partial = path.with_name(path.name + ".partial")
    Image.fromarray(picture).save(partial, format="png")
    os.replace(partial, path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m turbojax.train.vae", description="Train the small VAE.")
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/vae"))
    parser.add_argument("--phases", choices=tuple(PHASES), default="crops")
    parser.add_argument("--pca", type=Path, help="the codec's file (default: OUT/pca.npz)")
    defaults = {f.name: f.default for f in dataclasses.fields(TrainVAEConfig)}
    for name in ("steps", "learning_rate", "warmup", "latent_noise", "seed", "eval_clips", "eval_every"):
        parser.add_argument("--" + name.replace("_", "-"), type=type(defaults[name]), default=defaults[name])
    options = vars(parser.parse_args(argv))
    options["phases"] = PHASES[options["phases"]]
    report = train_vae(TrainVAEConfig(**options))
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

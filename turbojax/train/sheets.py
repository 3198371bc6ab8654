"""Sample sheets: what a run's averaged weights draw for fixed prompts and noise, as pictures and as scores."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree
from PIL import Image

from turbojax.samplers import flow, rcm
from turbojax.train import data
from turbojax.train import evaluate as evaluation
from turbojax.video import contact_sheet

# (parameters, latents, timestep, text features) -> velocity
Network = Callable[[PyTree, Array, Array, Array], Array]


class Sheets:
    """`sample(state, step)` for the loop: writes FOLDER/sheet-STEP.png, returns scores where the prompts are known.

    latents: parameters -> latents of the fixed clips. decode: (decoder, latents) -> video in [-1, 1].
    wanted: the clips' (combination, seed), for what the oracle can read.
    """

    def __init__(
        self,
        folder: Path,
        latents: Callable[[PyTree], Float[Array, "B t h w C"]],
        decode: Callable[[PyTree, Array], Float[Array, "B T H W 3"]],
        decoder: PyTree,
        wanted: Sequence[tuple[evaluation.Combination, int]] | None = None,
    ):
        self.folder, self.wanted, self._decoder = folder, wanted, decoder
        self._clips = jax.jit(lambda params, decoder: decode(decoder, latents(params)))

    def __call__(self, state: Any, step: int) -> Mapping[str, Any]:
        videos = data.to_uint8(np.asarray(self._clips(state.ema, self._decoder)))
        path = self.folder / f"sheet-{step:06d}.png"
        partial = path.with_name(path.name + ".partial")
        Image.fromarray(contact_sheet(list(videos))).save(partial, format="png")
        os.replace(partial, path)
        if self.wanted is None:
            return {}
        scores = [evaluation.score(v, *pair) for v, pair in zip(videos, self.wanted, strict=True)]
        return evaluation.summarise(scores)


def many_steps(
    network: Network,
    context: Float[Array, "B L D"],
    empty: Float[Array, "1 L D"],
    noise: Float[np.ndarray, "B t h w C"],
    *,
    guidance: float,
    shift: float,
    steps: int = 20,
) -> Callable[[PyTree], Array]:
    """Latents by UniPC, guided unless `guidance` is 1."""
    both = context if guidance == 1.0 else jnp.concatenate([context, jnp.broadcast_to(empty, context.shape)])

    def latents(params: PyTree) -> Array:
        def velocity(x: Array, s: Array) -> Array:
            return network(params, x, jnp.full(len(x), 1000.0 * s), both)

        asked = velocity if guidance == 1.0 else flow.guided(velocity, guidance)
        return flow.unipc(asked, noise, num_steps=steps, shift=shift)

    return latents


def few_steps(
    network: Network,
    context: Float[Array, "B L D"],
    noise: Float[np.ndarray, "B t h w C"],
    *,
    sigma_max: float,
    steps: int = 4,
) -> Callable[[PyTree], Array]:
    """Latents by the rCM sampler with fresh noise at each step."""
    step_noise = np.random.default_rng(0).standard_normal((steps, *noise.shape), np.float32)

    def latents(params: PyTree) -> Array:
        def velocity(x: Array, s: float) -> Array:
            return network(params, x, jnp.full(len(x), 1000.0 * s), context)

        return rcm.sample(velocity, noise, step_noise, num_steps=steps, sigma_max=sigma_max)

    return latents


def fixed_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Float[np.ndarray, "B t h w C"]:
    return np.stack([np.random.default_rng(seed).standard_normal(shape, np.float32) for seed in seeds])

"""Pictures and what can happen to them: the first frames of drawn clips, and every motion that has room to follow."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, PyTree, UInt8
from tqdm import tqdm

from turbojax.models.vae import WanVAE
from turbojax.programs import image_condition
from turbojax.train import data

# Pixels; the equal-area circle's radius, before a triangle's reduction.
RADIUS = (16.0, 30.0)
NEW_RADII = ((13.5, 16.0), (30.0, 32.5))  # never trained on
TRAVEL = (30.0, 52.0)
MARGIN = 2.0  # of background between the shape and the frame's edge
CELL = 8  # pixels: the grid of places of which a fifth is never trained on
SHARD = 64  # pictures to a file

# Prompts beside a picture name less than those that stand alone; the weights are of `data.TEMPLATES`.
TEMPLATE_WEIGHTS = (0.36, 0.20, 0.05, 0.09, 0.25, 0.05, 0.0)


@dataclass(frozen=True)
class Pictured:
    """A first frame, as the scene that it was drawn from, and the scenes that start with it, one a motion."""

    scene: data.Scene
    clips: tuple[data.Scene, ...]

    def render(self) -> UInt8[np.ndarray, "size size 3"]:
        return render_first(self.scene)


def render_first(scene: data.Scene) -> UInt8[np.ndarray, "size size 3"]:
    """The first frame alone."""
    x, y = scene.positions()[0]
    return data.render(dataclasses.replace(scene, centre=(float(x), float(y)), speed=0.0), frames=1)[0]


def is_new_place(scene: data.Scene) -> bool:
    """True where no training picture has its shape: the centroid's cell is one of every five."""
    x, y = (int(v // CELL) for v in scene.positions()[0])
    return (x + 2 * y) % 5 == 0


def room(scene: data.Scene, motion: str) -> float:
    """Pixels that the shape of the first frame can move before it reaches the frame's edge."""
    x, y = scene.positions()[0]
    left, right, up, down = data.extent(scene.shape, scene.radius)
    free = {"left": x - left, "right": data.SIZE - right - x, "up": y - up, "down": data.SIZE - down - y}
    return float(free[motion]) - MARGIN


def continuations(rng: np.random.Generator, scene: data.Scene) -> tuple[data.Scene, ...]:
    """The scenes that start with the same picture: one for each motion that has room, each at a speed of its own."""
    start = scene.positions()[0]
    made = []
    for motion, direction in data.MOTIONS.items():
        free = room(scene, motion)
        if free >= TRAVEL[0]:
            travel = rng.uniform(TRAVEL[0], min(TRAVEL[1], free))
            centre = start + np.asarray(direction) * travel / 2
            made.append(
                dataclasses.replace(
                    scene,
                    motion=motion,
                    centre=(float(centre[0]), float(centre[1])),
                    speed=float(travel / (data.FRAMES - 1)),
                )
            )
    return tuple(made)


def pictures(
    seed: int,
    count: int,
    *,
    combinations: Sequence[tuple[str, str, str]] = data.TRAINED,
    radius: tuple[float, float] = RADIUS,
    new_places: bool = False,
) -> list[Pictured]:
    """`count` pictures, each colour and shape about equally often, with those continuations that `combinations` has.

    new_places: pictures only of the places that training never sees, or (False) only of the others.
    """
    rng, allowed = np.random.default_rng(seed), set(combinations)
    made: list[Pictured] = []
    while len(made) < count:
        combination = combinations[int(rng.integers(len(combinations)))]
        scene = data.sample_scene(rng, combination, radius=radius, travel=TRAVEL)
        if is_new_place(scene) != new_places:
            continue
        clips = tuple(c for c in continuations(rng, scene) if (c.colour, c.shape, c.motion) in allowed)
        if clips:
            made.append(Pictured(scene, clips))
    return made


def encode_pictures(
    pictured: Sequence[Pictured], vae: WanVAE, folder: Path, *, whole: int = 512, batch: int = 8
) -> Float[np.ndarray, "N t h w K"]:
    """What the pipeline puts beside the noise for each picture (mask and latents), float16.

    What the VAE makes of the grey frames behind the picture costs thirty times the picture itself and says next to
    nothing about it, so only the first `whole` pictures have their own; the others borrow it from one of those.
    Written to `folder` in files of `SHARD` pictures, so that a run which was ended goes on; the caller names the
    folder after everything that the latents depend on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    graph, state = nnx.split(vae)

    @partial(jax.jit, static_argnums=2)
    def encode(state: PyTree, images: jax.Array, frames: int) -> jax.Array:
        return image_condition(nnx.merge(graph, state), images, frames)

    def shards(part: Sequence[Pictured], frames: int) -> Float[np.ndarray, "n t h w K"]:
        done = []
        for start in tqdm(range(0, len(part), SHARD), desc=f"encode pictures, {frames} frames", mininterval=2.0):
            path = folder / f"{frames}-{start:06d}.npy"
            if not path.exists():
                images = np.stack([p.render() for p in part[start : start + SHARD]])
                # Whole batches alone, so that one program serves all.
                padded = np.concatenate([images, np.repeat(images[-1:], -len(images) % batch, 0)])
                chunks = [padded[i : i + batch] for i in range(0, len(padded), batch)]
                rows = np.concatenate([np.asarray(encode(state, c, frames), np.float16) for c in chunks])
                partial_path = path.with_suffix(".partial.npy")
                np.save(partial_path, rows[: len(images)])
                os.replace(partial_path, path)
            done.append(np.load(path))
        return np.concatenate(done)

    own = shards(pictured[:whole], data.FRAMES)
    if len(pictured) <= whole:
        return own
    first = shards(pictured[whole:], 1)
    lender = np.random.default_rng(len(pictured)).integers(len(own), size=len(first))
    return np.concatenate([own, np.concatenate([first, own[lender, 1:]], axis=1)])

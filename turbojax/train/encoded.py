"""The training set of the DiT: scenes drawn from a seed, rendered and encoded once, kept on disk as float16."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from turbojax.train import data
from turbojax.train.pca import PCALatents


def encode_scenes(
    scenes: list[data.Scene], pca: PCALatents, cache: str | Path, *, batch: int = 16
) -> Float[np.ndarray, "N t h w C"]:
    """PCA latents of the scenes as a memory-mapped float16 array; `cache` is reused if it has as many.

    The caller names the cache after everything that the latents depend on: seed, count and codec.
    """
    path = Path(cache)
    if path.exists():
        stored = np.load(path, mmap_mode="r")
        if len(stored) == len(scenes):
            return stored
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npy")
    # Pixels travel as uint8: converting them inside the program is twice as fast.
    encode = jax.jit(lambda pixels: pca.encode(pixels.astype(jnp.float32) / 127.5 - 1.0))
    out = None
    for start in tqdm(range(0, len(scenes), batch), desc="render and encode", mininterval=2.0):
        z = np.asarray(encode(np.stack([data.render(s) for s in scenes[start : start + batch]])), np.float16)
        if out is None:
            out = np.lib.format.open_memmap(partial, "w+", np.float16, (len(scenes), *z.shape[1:]))
        out[start : start + len(z)] = z
    if out is None:
        raise ValueError("no scenes to encode")
    out.flush()
    os.replace(partial, path)
    return np.load(path, mmap_mode="r")

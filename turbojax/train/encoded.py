"""The training set of the DiT: scenes drawn from a seed, rendered and encoded once, kept on disk as float16."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from tqdm import tqdm

from turbojax.train import data

Encode = Callable[[Float[np.ndarray, "B T H W 3"]], Float[np.ndarray, "B t h w C"]]


def encode_scenes(
    scenes: list[data.Scene], encode: Encode, cache: str | Path, *, batch: int = 16, workers: int | None = None
) -> Float[np.ndarray, "N t h w C"]:
    """Latents of the scenes as a memory-mapped float16 array; `cache` is reused if it has as many.

    The caller names the cache after everything that the latents depend on: seed, count and encoder.
    """
    path = Path(cache)
    if path.exists():
        stored = np.load(path, mmap_mode="r")
        if len(stored) == len(scenes):
            return stored
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npy")
    out = None
    for start, videos in _rendered(scenes, batch, workers):
        z = np.asarray(encode(data.to_float(videos)), np.float16)
        if out is None:
            out = np.lib.format.open_memmap(partial, "w+", np.float16, (len(scenes), *z.shape[1:]))
        out[start : start + len(z)] = z
    if out is None:
        raise ValueError("no scenes to encode")
    out.flush()
    os.replace(partial, path)
    return np.load(path, mmap_mode="r")


def _render(scenes: list[data.Scene]) -> UInt8[np.ndarray, "B T H W 3"]:
    return np.stack([data.render(s) for s in scenes])


def _rendered(
    scenes: list[data.Scene], batch: int, workers: int | None
) -> Iterable[tuple[int, UInt8[np.ndarray, "B T H W 3"]]]:
    chunks = [scenes[i : i + batch] for i in range(0, len(scenes), batch)]
    if workers == 0:
        rendered: Iterable[np.ndarray] = map(_render, chunks)
        yield from enumerate_chunks(rendered, batch, len(chunks))
        return
    # "spawn": forking a process in which JAX has started its threads can deadlock.
    import multiprocessing

    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from enumerate_chunks(pool.map(_render, chunks), batch, len(chunks))


def enumerate_chunks(
    rendered: Iterable[np.ndarray], batch: int, total: int
) -> Iterable[tuple[int, UInt8[np.ndarray, "B T H W 3"]]]:
    for i, videos in enumerate(tqdm(rendered, total=total, desc="render and encode", mininterval=2.0)):
        yield i * batch, videos

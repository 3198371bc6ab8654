"""Numbers that a fixture and its test both draw, so that a fixture need not store a model's weights.

Only numpy: the scripts run under the references' torch, the tests under this project.  `RandomState.random_sample`
is frozen by numpy and made of integers and one multiplication, so every machine draws the same bits.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent
Shapes = Mapping[str, tuple[int, ...]]


def uniform(name: str, shape: tuple[int, ...], *, scale: float = 1.0) -> np.ndarray:
    """float32 with mean 0 and standard deviation `scale`, fixed by `name` and `shape` alone."""
    stream = np.random.RandomState(zlib.crc32(name.encode()))
    return ((stream.random_sample(shape) - 0.5) * (12**0.5 * scale)).astype(np.float32)


def weights(shapes: Shapes, *, gain: float = 1.0) -> dict[str, np.ndarray]:
    """One array for each name: matrices keep the size of what passes through them, vectors are of size 0.2.

    A vector that multiplies (a norm's) is drawn around 1: its name says so by ending in a norm's `weight`.
    """
    drawn = {}
    for name, shape in shapes.items():
        if len(shape) > 1 and "modulation" not in name:
            fan_in = int(np.prod(shape[1:]))
            drawn[name] = uniform(name, shape, scale=gain * fan_in**-0.5)
        else:
            drawn[name] = uniform(name, shape, scale=0.2) + np.float32("norm" in name and "weight" in name)
    return drawn


def save(name: str, shapes: Shapes, **arrays: np.ndarray) -> None:
    """Write NAME.npz beside this file: arrays (inputs, the reference's outputs) and the weights' shapes."""
    path = GOLDEN / f"{name}.npz"
    arrays["shapes"] = np.array(json.dumps({k: list(v) for k, v in shapes.items()}))
    np.savez_compressed(path, allow_pickle=False, **arrays)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


def load(name: str) -> tuple[dict[str, tuple[int, ...]], dict[str, np.ndarray]]:
    """(shapes, arrays) of a fixture."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as data:
        arrays = {k: data[k] for k in data.files}
    shapes = json.loads(str(arrays.pop("shapes")))
    return {k: tuple(v) for k, v in shapes.items()}, arrays

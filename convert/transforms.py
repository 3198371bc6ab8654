"""How a tensor of the torch world becomes a parameter here, and back: axes and shapes, never values.

torch keeps Linear weights as (out, in) and convolutions as (out, in, *window); here kernels end in (in, out).
Shapes are those of one layer: stacking is not a transform.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]


class Transform(NamedTuple):
    """source_shapes(shape here, patch size) lists what is accepted; the first is what is exported."""

    source_shapes: Callable[[Shape, Shape], list[Shape]]
    forward: Callable[[np.ndarray, Shape], np.ndarray]  # (source, shape here) -> a view where numpy can
    inverse: Callable[[np.ndarray, Shape], np.ndarray]  # (parameter, source shape) -> a view where numpy can


def _reshaped(x: np.ndarray, shape: Shape) -> np.ndarray:
    return x.reshape(shape)


TRANSFORMS: Mapping[str, Transform] = {
    "same": Transform(lambda shape, _: [shape], _reshaped, _reshaped),
    "linear": Transform(lambda shape, _: [shape[::-1]], lambda x, _: x.T, lambda x, _: x.T),
    # (features, D): a Conv3d in Wan and diffusers, a Linear in TurboDiffusion; feature order (c, kt, kh, kw).
    "patch": Transform(
        lambda shape, patch: [(shape[1], shape[0] // int(np.prod(patch)), *patch), shape[::-1]],
        lambda x, shape: x.reshape(shape[::-1]).T,
        lambda x, source: x.T.reshape(source),
    ),
    # (rows, D) of modulation, with a batch axis in torch.
    "table": Transform(lambda shape, _: [(1, *shape), shape], _reshaped, _reshaped),
    "conv": Transform(
        lambda shape, _: [(shape[-1], shape[-2], *shape[:-2])],
        lambda x, _: np.moveaxis(x, (0, 1), (-1, -2)),
        lambda x, _: np.moveaxis(x, (-1, -2), (0, 1)),
    ),
    # (C,), stored as wide as what it multiplies: [C, T, H, W] or [C, H, W].
    "gamma_video": Transform(lambda shape, _: [(*shape, 1, 1, 1)], _reshaped, _reshaped),
    "gamma_image": Transform(lambda shape, _: [(*shape, 1, 1)], _reshaped, _reshaped),
}

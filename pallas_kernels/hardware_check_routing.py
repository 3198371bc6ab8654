"""The lists of key blocks on the GPU, against sorting: cases of `hardware_check`."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._hopper_top_blocks import listed, top_blocks


@dataclasses.dataclass(frozen=True)
class RoutingCheck:
    """The k largest of `width` scores, of `rows` rows. ties: scores of which many are equal."""

    rows: int
    width: int
    k: int
    ties: bool = False

    @property
    def name(self) -> str:
        return f"routing {self.rows}x{self.width} {self.k}{' ties' if self.ties else ''}"


def checks() -> list[RoutingCheck]:
    """1.3B at 480p in both sizes of blocks, 14B at 720p, one block, all of them, and the most that a row may have."""
    shapes = ((6144, 256, 25), (3072, 512, 51), (23_640, 1182, 118), (5, 1, 1), (7, 40, 40), (66, 4096, 1000))
    return [RoutingCheck(*shape, ties) for shape in shapes for ties in (False, True)]


def run_check(check: RoutingCheck) -> dict:
    scores = jax.random.normal(jax.random.key(check.width), (check.rows, check.width))
    if check.ties:
        scores = jnp.round(scores) + 0.0  # no negative zeros: sorting puts them below the others
    scales = jax.random.normal(jax.random.key(1), (1 if check.rows % 3 else 3, check.width))
    found, scale = jax.jit(lambda x, s: top_blocks(x, check.k, s, interpret=False))(scores, scales)
    alone, _ = jax.jit(lambda x: top_blocks(x, check.k, interpret=False))(scores)
    want = -np.sort(-np.asarray(jax.lax.top_k(scores, check.k)[1]), axis=1)
    unequal = [
        int((np.asarray(a) != b).sum())
        for a, b in ((found, want), (alone, want), (scale, listed(scales, jnp.asarray(want))))
    ]
    return {"unequal": unequal, "ok": not any(unequal)}

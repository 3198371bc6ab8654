"""Why an attention kernel cannot run: the limits of the Mosaic GPU paths, in words."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.dispatch import gpu_arch

HEAD_DIMS = (64, 128)
BLOCKS = ((128, 64), (64, 64), (64, 128))
OLDEST_ARCH = (8, 0)
MAX_HEADS = 65_535
"""batch * heads is the z extent of the grid, which CUDA caps."""


def attention_refusal(
    q: Array | jax.ShapeDtypeStruct, implementation: str | None, scale: float, block_q: int, block_k: int
) -> str | None:
    """The first reason why no kernel covers this call, or None. The interpreter needs no GPU."""
    b, _, h, dim = q.shape
    if dim not in HEAD_DIMS:
        return f"head_dim is {dim}; the kernels have {HEAD_DIMS[0]} and {HEAD_DIMS[1]}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"q is {q.dtype}; the kernels take bfloat16 and float16"
    if (block_q, block_k) not in BLOCKS:
        sizes = ", ".join(f"{bq}x{bk}" for bq, bk in BLOCKS)
        return f"blocks are {block_q}x{block_k}; the kernels have {sizes}"
    if scale <= 0:
        return f"scale is {scale}; the kernels need it positive"
    if b * h > MAX_HEADS:
        return f"batch * heads is {b * h}; a grid holds {MAX_HEADS}"
    if implementation != "interpret" and gpu_arch() < OLDEST_ARCH:
        major, minor = gpu_arch()
        return f"the GPU is sm_{major}{minor}; the kernels need sm_80"
    return None

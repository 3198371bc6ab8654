"""The backward kernels of block-sparse attention at the shapes of real Wan models, for `pallas_kernels.aot`."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels._refusals import BLOCKS
from pallas_kernels.aot import Case
from pallas_kernels.block_map import num_selected
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.cases_attention import TOPK

# Tokens, heads, head_dim, block_q and block_k: the first shape with every block size.
SHAPES = (
    *((32_760, 12, 128, *blocks) for blocks in BLOCKS),
    (75_600, 40, 128, *BLOCKS[0]),
    (32_760, 12, 64, *BLOCKS[0]),
)


def compile_cases() -> list[Case]:
    """Three kernels each: the forward pass, whose results the gradients need, then dQ, then dK and dV."""
    cases = []
    for tokens, heads, dim, block_q, block_k in SHAPES:
        x = jax.ShapeDtypeStruct((1, tokens, heads, dim), jnp.bfloat16)
        selected = num_selected(math.ceil(tokens / block_k), TOPK)
        index = jax.ShapeDtypeStruct((1, heads, math.ceil(tokens / block_q), selected), jnp.int32)
        sizes = {"block_q": block_q, "block_k": block_k}
        name = f"block_sparse_attention backward {block_q}x{block_k} {tokens}x{heads}x{dim}"
        cases.append(Case(name, functools.partial(_gradients, sizes), (x, x, x, x, index), ("h100",), kernels=3))
    return cases


def _gradients(sizes, q, k, v, do, index):
    def op(q, k, v):
        return block_sparse_attention(q, k, v, index, **sizes, implementation="mosaic_gpu")

    return jax.vjp(op, q, k, v)[1](do)

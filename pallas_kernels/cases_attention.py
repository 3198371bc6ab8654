"""The attention kernels at the shapes of real Wan models, for compiling without a GPU (`pallas_kernels.aot`)."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels._refusals import BLOCKS
from pallas_kernels.aot import Case
from pallas_kernels.block_map import num_selected
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.rotary import Rotary
from pallas_kernels.sage_attention import sage_attention
from pallas_kernels.sparse_linear_attention import sparse_linear_attention
from pallas_kernels.text_attention import text_attention

# Tokens, heads, head_dim: Wan 1.3B at 480p and 14B at 720p (81 frames); the other head_dim; a length that is not a
# multiple of the 8 rows that TMA moves at least.
SHAPES = ((32_760, 12, 128), (75_600, 40, 128), (32_760, 12, 64), (777, 2, 128))
TOPK = 0.1
# GPUs that run _portable_attention.
PORTABLE = ("rtx4090", "rtx5090", "a100")


def compile_cases() -> list[Case]:
    cases = []
    for shape in SHAPES:
        tokens, heads, dim = shape
        x = jax.ShapeDtypeStruct((1, tokens, heads, dim), jnp.bfloat16)
        at = f"{tokens}x{heads}x{dim}"
        sage = functools.partial(sage_attention, implementation="mosaic_gpu")
        cases.append(Case(f"sage_attention {at}", sage, (x, x, x), _targets(shape, BLOCKS[0])))
        for block_q, block_k in BLOCKS:
            blocks_q, blocks_k = math.ceil(tokens / block_q), math.ceil(tokens / block_k)
            index = jax.ShapeDtypeStruct((1, heads, blocks_q, num_selected(blocks_k, TOPK)), jnp.int32)
            for quantized in (True, False):
                sparse = functools.partial(
                    block_sparse_attention,
                    block_q=block_q,
                    block_k=block_k,
                    quantized=quantized,
                    implementation="mosaic_gpu",
                )
                name = f"block_sparse_attention {'int8' if quantized else 'bf16'} {block_q}x{block_k} {at}"
                targets = _targets(shape, (block_q, block_k))
                if targets:
                    cases.append(Case(name, sparse, (x, x, x, index), targets))
    return cases + _fused_cases() + _text_cases()


def _fused_cases() -> list[Case]:
    """Sparse-linear attention, fused on Hopper alone: elsewhere it is the cases above beside XLA. "amax": with the
    largest outputs; "rotary": from queries as their product gave them."""
    variants = [(SHAPES[0], blocks, quantized, "") for blocks in BLOCKS for quantized in (True, False)]
    variants += [(SHAPES[1], BLOCKS[0], False, ""), (SHAPES[0], BLOCKS[-1], True, "amax")]
    variants += [(shape, BLOCKS[-1], True, "rotary") for shape in SHAPES if shape != SHAPES[1]]
    variants += [(SHAPES[0], BLOCKS[0], False, "rotary"), (SHAPES[3], BLOCKS[-1], False, "rotary")]
    return [_fused_case(*variant) for variant in variants]


def _fused_case(shape: tuple[int, int, int], blocks: tuple[int, int], quantized: bool, extra: str) -> Case:
    (tokens, heads, dim), (block_q, block_k) = shape, blocks
    op = functools.partial(
        sparse_linear_attention,
        topk=TOPK,
        block_q=block_q,
        block_k=block_k,
        quantized=quantized,
        return_amax=extra == "amax",
        implementation="mosaic_gpu",
    )

    def run(q, k, v, proj_w, proj_b, *rotary):
        return op(q, k, v, proj_w, proj_b, q_rotary=Rotary(*rotary) if rotary else None)

    x = jax.ShapeDtypeStruct((1, tokens, heads, dim), jnp.bfloat16)
    args = [x, x, x, *(jax.ShapeDtypeStruct(part, jnp.bfloat16) for part in ((dim, dim), (dim,)))]
    if extra == "rotary":
        parts = ((1, tokens), (heads * dim,), (tokens, dim // 2), (tokens, dim // 2))
        args += [jax.ShapeDtypeStruct(part, jnp.float32) for part in parts]
    kind = "int8" if quantized else "bf16"
    name = f"sparse_linear_attention {kind} {block_q}x{block_k} {tokens}x{heads}x{dim} {extra}".rstrip()
    return Case(name, run, args, ("h100",), kernels=3)


def _text_cases() -> list[Case]:
    """Prompts of 119 and 247 tokens and Wan's padding to 512; a short one without what else the op may give."""
    variants = [(SHAPES[0], 120, True), (SHAPES[0], 248, True), (SHAPES[1], 120, True), (SHAPES[3], 56, False)]
    cases = []
    for (tokens, heads, dim), keys, everything in variants:
        op = functools.partial(
            text_attention, last_count=513 - keys, return_amax=everything, implementation="mosaic_gpu"
        )

        def run(q, k, v, *factor, op=op):
            return op(q, k, v, q_factor=factor[0] if factor else None)

        q = jax.ShapeDtypeStruct((1, tokens, heads, dim), jnp.bfloat16)
        k = jax.ShapeDtypeStruct((1, keys, heads, dim), jnp.bfloat16)
        factor = (jax.ShapeDtypeStruct((1, tokens), jnp.float32),) if everything else ()
        name = f"text_attention {keys} keys {tokens}x{heads}x{dim}"
        cases.append(Case(name, run, (q, k, k, *factor), ("h100",)))
    return cases


def _targets(shape: tuple[int, int, int], blocks: tuple[int, int]) -> tuple[str, ...]:
    """GPUs to compile for: the first shape everywhere with every block size, as the code hardly depends on lengths."""
    if shape == SHAPES[0]:
        return ("h100", *PORTABLE)
    if shape == SHAPES[1]:
        return ("h100", *PORTABLE) if blocks == BLOCKS[0] else ("h100",)
    return ("h100", "rtx5090") if blocks == BLOCKS[0] else ()

"""Sparse-linear attention (SLA): exact attention on the blocks that matter, linear attention for the rest.

Source: SLA (arXiv 2509.24006) and `SLA/core.py` of TurboDiffusion.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from pallas_kernels._attention_kernels import HOPPER
from pallas_kernels._attention_xla import compute_dtype, default_scale
from pallas_kernels._derivatives import forward_only
from pallas_kernels._heads import check_qkv, with_largest
from pallas_kernels._refusals import attention_refusal
from pallas_kernels.block_map import sla_block_map
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.dispatch import dispatch, gpu_arch
from pallas_kernels.linear_attention import FEATURE_MAPS, linear_attention
from pallas_kernels.rotary import Rotary, check_rotary, turned


@functools.partial(
    jax.jit,
    static_argnames=(
        "topk",
        "block_q",
        "block_k",
        "quantized",
        "feature_map",
        "scale",
        "return_amax",
        "implementation",
    ),
)
def sparse_linear_attention(
    q: Float[Array, "b lq h d"],
    k: Float[Array, "b lk h d"],
    v: Float[Array, "b lk h d"],
    proj_w: Float[Array, "d d"],
    proj_b: Float[Array, " d"],
    *,
    topk: float,
    block_q: int,
    block_k: int,
    quantized: bool = False,
    feature_map: str = "softmax",
    scale: float | None = None,
    q_rotary: Rotary | None = None,
    return_amax: bool = False,
    implementation: str | None = None,
) -> Float[Array, "b lq h d"] | tuple[Float[Array, "b lq h d"], Float32[Array, "b lq"]]:
    """Block-sparse attention over the routed blocks plus the projected linear attention over all keys.

    o = block_sparse(q, k, v) + linear(q, k, v) @ proj_w^T + proj_b; routing by `sla_block_map`, without gradient.
    Differentiable in q, k, v, proj_w and proj_b, in reverse and forward mode, unless quantised.

    Args:
        proj_w: [head_dim (out), head_dim (in)] as torch holds `proj_l.weight`, shared by the heads; proj_b
            [head_dim]. Zeros (their initialisation) leave the sparse branch alone.
        topk: share of the key blocks that each query block keeps, in (0, 1].
        block_q, block_k: rows of a query block and of a key block.
        quantized: INT8 scores and FP8 values in the sparse branch (SageSLA); no derivative.
        feature_map: "softmax" (over head_dim), "elu" (elu + 1) or "relu".
        scale: factor on the sparse branch's scores; None is 1 / sqrt(head_dim).
        q_rotary: what q, as its product gave it, is multiplied and turned by first, `turned(q, q_rotary)`, rounded once
            to its dtype: on Hopper in the pass that sums and quantises it (`rotates_queries`). None: q is that already.
        return_amax: also return float32 [B, L], the largest |o| over all heads of a token, o as it is rounded.
        implementation: None, "xla", "mosaic_gpu" or "interpret".

    Returns o in q's dtype, or (o, amax).

    Raises:
        ValueError: shapes or options that do not fit, or an implementation that cannot run, with the reason.
        NotImplementedError: a derivative of the quantised op was asked for.
    """
    dim = q.shape[-1]
    if proj_w.shape != (dim, dim) or proj_b.shape != (dim,):
        raise ValueError(
            f"sparse_linear_attention: proj_w {proj_w.shape} and proj_b {proj_b.shape} must be "
            f"({dim}, {dim}) and ({dim},) for head_dim {dim}"
        )
    name = "sparse_linear_attention"
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map {feature_map!r} is unknown; choose one of {', '.join(FEATURE_MAPS)}")
    check_qkv(name, q, k, v)
    if q_rotary is not None:
        check_rotary(name, q, q_rotary)
    scale = default_scale(dim) if scale is None else scale
    sizes: dict[str, Any] = {"block_q": block_q, "block_k": block_k}

    def branches(q, k, v, proj_w, proj_b, *rotary, implementation):
        """Each branch by itself, and their sum: what the op returns."""
        if rotary:
            # The barrier keeps XLA from leaving out that this is rounded.
            q = lax.optimization_barrier(turned(q, Rotary(*rotary)))
        block_index = sla_block_map(q, k, topk=topk, **sizes)
        sparse = block_sparse_attention(
            q, k, v, block_index, quantized=quantized, scale=scale, implementation=implementation, **sizes
        )
        linear = linear_attention(q, k, v, feature_map)
        wide = compute_dtype(q.dtype)
        projected = jnp.einsum("blhd,ed->blhe", linear, proj_w.astype(q.dtype), preferred_element_type=wide)
        o = (sparse.astype(wide) + projected + proj_b.astype(wide)).astype(q.dtype)
        return with_largest(o) if return_amax else o

    def kernel(*args, interpret):
        apart = functools.partial(branches, implementation=implementation)
        if gpu_arch() != HOPPER:
            return apart(*args)
        from pallas_kernels._hopper_sla import sla_forward  # late: see _plgpu

        options = {"topk": topk, "quantized": quantized, "feature_map": feature_map, "scale": scale}

        def fused(q, k, v, proj_w, proj_b, *rotary):
            args = q, k, v, proj_w, proj_b, Rotary(*rotary) if rotary else None
            o, amax = sla_forward(*args, amax=return_amax, interpret=interpret, **options, **sizes)
            return o if amax is None else (o, amax)

        return _differentiated_as(apart, fused)(*args)

    unsupported = attention_refusal(q, implementation, scale, block_q, block_k)
    rotary = () if q_rotary is None else tuple(q_rotary)
    if quantized:
        q, k, v, *rotary = forward_only(name, q, k, v, *rotary)
    xla = functools.partial(branches, implementation="xla")
    args = (q, k, v, proj_w, proj_b, *rotary)
    return dispatch(name, implementation, args, xla=xla, kernel=kernel, unsupported=unsupported)


def rotates_queries(
    head_dim: int, dtype: DTypeLike, *, block_q: int, block_k: int, implementation: str | None = None
) -> bool:
    """Whether `sparse_linear_attention` is faster for norming and turning q itself (`q_rotary`) than where that is done
    before, if the sums of squares of q's rows are known."""
    if gpu_arch() != HOPPER or implementation == "xla":
        return False
    q = jax.ShapeDtypeStruct((1, 1, 1, head_dim), dtype)
    return attention_refusal(q, implementation, default_scale(head_dim), block_q, block_k) is None


def _differentiated_as(apart: Callable[..., Any], fused: Callable[..., Any]) -> Callable[..., Any]:
    """`fused`; under differentiation, in either mode, `apart`, the same function whose parts have derivatives."""
    op = jax.custom_jvp(lambda *args: fused(*args))

    @functools.partial(op.defjvp, symbolic_zeros=True)
    def _(primals, tangents):
        # Only along what moves: a zero written out would be a constant to the parts' derivatives, which have no
        # transpose for one.
        moves = [not isinstance(tangent, SymbolicZero) for tangent in tangents]

        def moved(*moving):
            rest = iter(moving)
            return apart(*(next(rest) if move else x for x, move in zip(primals, moves, strict=True)))

        points, directions = (tuple(x for x, move in zip(xs, moves, strict=True) if move) for xs in (primals, tangents))
        return jax.jvp(moved, points, directions)

    return op

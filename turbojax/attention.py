"""What attention a model uses: one frozen config, one dispatch to the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, overload

from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

import pallas_kernels as kernels
from pallas_kernels._heads import with_largest

Kind = Literal["dense", "sage", "sla", "sagesla"]
FeatureMap = Literal["softmax", "elu", "relu"]
Implementation = Literal["xla", "mosaic_gpu", "interpret"]


@dataclass(frozen=True)
class AttentionConfig:
    """How self-attention is computed; hashable, so it is a static argument and never reloads a weight.

    kind: "dense" (exact), "sage" (INT8 QK^T, FP8 PV), "sla" (block-sparse plus linear branch),
        "sagesla" (SLA whose sparse branch is quantised).
    topk: fraction of key blocks that each query block keeps (SLA kinds).
    block_q, block_k: routing granularity in tokens.
    implementation: None picks the fastest that the platform has; a named one that cannot run raises.
    """

    kind: Kind = "dense"
    topk: float = 0.1
    block_q: int = 128
    block_k: int = 64
    feature_map: FeatureMap = "softmax"
    implementation: Implementation | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("dense", "sage", "sla", "sagesla"):
            raise ValueError(f"unknown attention {self.kind!r}; known: dense, sage, sla, sagesla")
        if not 0.0 < self.topk <= 1.0:
            raise ValueError(f"topk must be in (0, 1], got {self.topk}")
        if self.block_q < 1 or self.block_k < 1:
            raise ValueError(f"block sizes must be positive, got {self.block_q} x {self.block_k}")


DENSE = AttentionConfig()
LINEAR_BRANCH: tuple[Kind, ...] = ("sla", "sagesla")
"""Kinds that may have one."""


@overload
def attend(
    q: Array,
    k: Array,
    v: Array,
    config: AttentionConfig = ...,
    proj_l: tuple[Array, Array] | None = ...,
    return_amax: Literal[False] = ...,
    q_rotary: kernels.Rotary | None = ...,
) -> Array: ...


@overload
def attend(
    q: Array,
    k: Array,
    v: Array,
    config: AttentionConfig = ...,
    proj_l: tuple[Array, Array] | None = ...,
    *,
    return_amax: Literal[True],
    q_rotary: kernels.Rotary | None = ...,
) -> tuple[Array, Array]: ...


def attend(
    q: Float[Array, "B L H d"],
    k: Float[Array, "B S H d"],
    v: Float[Array, "B S H d"],
    config: AttentionConfig = DENSE,
    proj_l: tuple[Float[Array, "d d"], Float[Array, "d"]] | None = None,
    return_amax: bool = False,
    q_rotary: kernels.Rotary | None = None,
) -> Float[Array, "B L H d"] | tuple[Float[Array, "B L H d"], Float32[Array, "B L"]]:
    """Scaled dot-product attention of the configured kind; `proj_l` is (weight [d, d] as (out, in), bias [d]).

    Without `proj_l` an SLA kind is pure block-sparse attention: what SLA computes when proj_l is zero.
    return_amax: also return float32 [B, L], the largest |o| over all heads of a token, o as it is rounded.
    q_rotary: what q is still to be multiplied and turned by (`kernels.turned`), rounded once to its dtype.
    """
    if proj_l is not None and config.kind in LINEAR_BRANCH:
        weight, bias = proj_l
        return kernels.sparse_linear_attention(
            q,
            k,
            v,
            weight,
            bias,
            topk=config.topk,
            block_q=config.block_q,
            block_k=config.block_k,
            quantized=config.kind == "sagesla",
            feature_map=config.feature_map,
            q_rotary=q_rotary,
            return_amax=return_amax,
            implementation=config.implementation,
        )
    if q_rotary is not None:
        q = kernels.turned(q, q_rotary)
    o = _one_branch(q, k, v, config)
    return with_largest(o) if return_amax else o


def rotates_queries(config: AttentionConfig, head_dim: int, dtype: DTypeLike, *, linear_branch: bool) -> bool:
    """Whether `attend` is faster for norming and turning the queries itself, where their sums of squares are known."""
    return (
        linear_branch
        and config.kind in LINEAR_BRANCH
        and kernels.rotates_queries(
            head_dim, dtype, block_q=config.block_q, block_k=config.block_k, implementation=config.implementation
        )
    )


def _one_branch(
    q: Float[Array, "B L H d"], k: Float[Array, "B S H d"], v: Float[Array, "B S H d"], config: AttentionConfig
) -> Float[Array, "B L H d"]:
    match config.kind:
        case "dense":
            return kernels.dense_attention(q, k, v, implementation=config.implementation)
        case "sage":
            return kernels.sage_attention(q, k, v, implementation=config.implementation)
    block_index = kernels.sla_block_map(q, k, topk=config.topk, block_q=config.block_q, block_k=config.block_k)
    return kernels.block_sparse_attention(
        q,
        k,
        v,
        block_index,
        block_q=config.block_q,
        block_k=config.block_k,
        quantized=config.kind == "sagesla",
        implementation=config.implementation,
    )

"""INT8 queries and keys, FP8 values: what the quantised attention kernels read.

Sources: SageAttention 2 (arXiv 2411.10958, smoothing of K, INT8 QK, FP8 PV), SLA's SageSLA
(`SLA/core.py` of TurboDiffusion and `get_vanilla_qk_quant` of SpargeAttn: per-block scales, rounding half
away from zero) and QuaRot (arXiv 2404.00456, the Hadamard rotation).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float, Float8e4m3fn, Float32, Int8

from pallas_kernels.rounding import round_e4m3

E4M3_MAX = 448.0
"""Largest finite float8_e4m3fn. The probabilities are scaled by it, so that their largest is exact."""


@functools.cache
def hadamard(dim: int) -> np.ndarray:
    """Block-diagonal Hadamard matrix of +-1, int8 [dim, dim]: blocks of the largest power of two in `dim`."""
    block = dim & -dim
    matrix = np.ones((1, 1), np.int8)
    while matrix.shape[0] < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.kron(np.eye(dim // block, dtype=np.int8), matrix)


def rotate(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """`x` in a basis where no channel stands out, float32.

    (q H)(k H)^T = q k^T for an orthogonal H, so scores do not change, while a channel that is 20 times the
    others, which would take the whole INT8 range of its block, is spread over all of them. Without it such a
    channel costs 10% (relative L2) of the attention output, with it nothing measurable.
    """
    dim = x.shape[-1]
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        x = x.astype(jnp.float32)
    # +-1 is exact in every dtype and the sum is float32: no rounding before the quantiser's.
    rotated = jnp.dot(
        x,
        jnp.asarray(hadamard(dim), x.dtype),
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST,
    )
    return rotated * np.float32((dim & -dim) ** -0.5)


def round_half_away(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.trunc(x + 0.5 * jnp.sign(x))


def quantize_rows(x: Float[Array, "n l d"], block: int) -> tuple[Int8[Array, "n padded d"], Float[Array, "n blocks"]]:
    """INT8 rows with one float32 scale for each `block` rows: x ~ x8 * scale.

    scale = max|x| / 127 + 1e-7, so that a block of zeros is well defined. Rows are padded with zeros to a
    multiple of `block`.
    """
    n, length, dim = x.shape
    blocks = -(-length // block)
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, blocks * block - length), (0, 0)))
    x = x.reshape(n, blocks, block, dim)
    scale = jnp.max(jnp.abs(x), axis=(2, 3)) / 127.0 + 1e-7
    x8 = round_half_away(x / scale[:, :, None, None]).astype(jnp.int8)
    return x8.reshape(n, blocks * block, dim), scale


def quantize_query_key(
    q: Float[Array, "n lq d"], k: Float[Array, "n lk d"], block_q: int, block_k: int, smooth_k: bool = True
) -> tuple[
    Int8[Array, "n lq_padded d"],
    Float[Array, "n nq"],
    Int8[Array, "n lk_padded d"],
    Float[Array, "n nk"],
]:
    """Rotated INT8 queries and keys: (q8, q_scale, k8, k_scale).

    `smooth_k` subtracts the mean key: it moves every score of a query by the same amount, which softmax does
    not see, and keys of a video transformer share a large mean that INT8 could not afford.
    """
    q, k = rotate(q), rotate(k)
    if smooth_k:
        k = k - jnp.mean(k, axis=1, keepdims=True)
    return *quantize_rows(q, block_q), *quantize_rows(k, block_k)


def quantize_value(
    v: Float[Array, "n l d"],
) -> tuple[Float8e4m3fn[Array, "n l d"], Float32[Array, "n d"]]:
    """FP8 e4m3 values with one float32 scale for each channel: v ~ v8 * scale, max|v8| = 448.

    SageSLA stops at 2.25 because its RTX kernels accumulate PV in fp16; here PV is accumulated in float32, and
    the full range keeps small values out of e4m3's subnormals.
    """
    scale = value_scale(v)
    return (v.astype(jnp.float32) / scale[:, None, :]).astype(jnp.float8_e4m3fn), scale


def rounded_value(
    v: Float[Array, "n l d"],
) -> tuple[BFloat16[Array, "n l d"], Float32[Array, "n d"]]:
    """`quantize_value` for machines that multiply no e4m3: the same values, which bfloat16 holds exactly."""
    scale = value_scale(v)
    return round_e4m3(v.astype(jnp.float32) / scale[:, None, :]).astype(jnp.bfloat16), scale


def value_scale(v: Float[Array, "n l *channels"]) -> Float32[Array, "n *channels"]:
    """max|v| / 448 of each channel over the length; 1 for a channel of zeros."""
    return scale_of_largest(jnp.max(jnp.abs(v), axis=1).astype(jnp.float32))


def scale_of_largest(amax: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
    """`value_scale` of channels whose max|v| is known."""
    return jnp.where(amax > 0, amax / E4M3_MAX, 1.0)

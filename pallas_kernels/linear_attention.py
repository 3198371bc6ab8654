"""The linear branch of sparse-linear attention, in plain JAX: its feature maps and its formula.

Source: SLA (arXiv 2509.24006) and `SLA/core.py` of TurboDiffusion.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels._attention_xla import compute_dtype
from pallas_kernels._heads import heads_first, heads_last

FEATURE_MAPS: dict[str, Callable[[Array], Array]] = {
    "softmax": lambda x: jax.nn.softmax(x, axis=-1),
    "elu": lambda x: jax.nn.elu(x) + 1,
    "relu": jax.nn.relu,
}

DENOMINATOR_EPS = 1e-5


def linear_attention(
    q: Float[Array, "b lq h d"], k: Float[Array, "b lk h d"], v: Float[Array, "b lk h d"], feature_map: str
) -> Float[Array, "b lq h d"]:
    """f(q) (f(k)^T v) / (1e-5 + f(q) . sum f(k)) over all keys, accumulated in float32; in q's dtype."""
    shape, dtype, wide = q.shape, q.dtype, compute_dtype(q.dtype)
    features = FEATURE_MAPS[feature_map]
    q, k, v = map(heads_first, (q, k, v))
    fq = features(q.astype(wide)).astype(dtype)
    fk = features(k.astype(wide)).astype(dtype)
    # Sums over the keys stay in float32: in bfloat16 they would saturate at a few hundred keys.
    kv = jnp.einsum("nld,nle->nde", fk, v, preferred_element_type=wide).astype(dtype)
    k_sum = jnp.sum(fk, axis=1, dtype=wide)
    o = jnp.einsum("nld,nde->nle", fq, kv, preferred_element_type=wide)
    norm = jnp.einsum("nld,nd->nl", fq.astype(wide), k_sum)
    return heads_last((o / (norm + DENOMINATOR_EPS)[..., None]).astype(dtype), shape)

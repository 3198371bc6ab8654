"""umT5's encoder, Wan's text encoder: T5 v1.1 with a relative position bias in every layer.

Sources: `wan/modules/t5.py` (Wan 2.1) and `UMT5EncoderModel` (transformers); arXiv:2304.09151.
Letters: B prompts, L tokens, rows = B * L, D dim, H heads, d = dim_attn / H.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int, PyTree, Shaped

from turbojax.config import UMT5Config
from turbojax.models.layers import RMSNorm


def relative_position_buckets(length: int, num_buckets: int = 32, max_distance: int = 128) -> np.ndarray:
    """Bucket of the offset key - query: int32 [query, key].

    Half of the buckets serve each sign. Within one sign, half are exact and the rest grow with the logarithm
    up to `max_distance` (T5, arXiv:1910.10683; `wan/modules/t5.py`, T5RelativeEmbedding). The reference takes
    the logarithm in float32 and truncates, and so does this.
    """
    half = num_buckets // 2
    exact = half // 2
    offset = np.arange(length) - np.arange(length)[:, None]
    distance = np.abs(offset)
    scaled = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    scaled = scaled / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + scaled.astype(np.int32), half - 1)
    return (np.where(offset > 0, half, 0) + np.where(distance < exact, distance, far)).astype(np.int32)


class Attention(nnx.Module):
    """Self-attention without 1/sqrt(d): T5 folds the scale into its initialisation."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs, dtype: DTypeLike):
        c = config

        def linear(fan_in: int, fan_out: int, std: float) -> nnx.Linear:
            return _linear(fan_in, fan_out, std, rngs=rngs, dtype=dtype)

        head_dim = c.dim_attn // c.num_heads
        self.num_heads = c.num_heads
        self.q = linear(c.dim, c.dim_attn, (c.dim * head_dim) ** -0.5)
        self.k = linear(c.dim, c.dim_attn, c.dim**-0.5)
        self.v = linear(c.dim, c.dim_attn, c.dim**-0.5)
        self.o = linear(c.dim_attn, c.dim, c.dim_attn**-0.5)

    def __call__(
        self,
        x: Float[Array, "rows D"],
        position_bias: Float[Array, "H L L"],
        key_bias: Float[Array, "B 1 1 L"],
    ) -> Float[Array, "rows D"]:
        length = position_bias.shape[-1]
        q, k, v = (p(x).reshape(-1, length, self.num_heads, p.out_features // self.num_heads)
                   for p in (self.q, self.k, self.v))  # fmt: skip
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits + position_bias + key_bias, axis=-1).astype(v.dtype)
        out = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return self.o(out.reshape(x.shape[0], -1))


class FeedForward(nnx.Module):
    """down(up(x) * gelu_tanh(gate(x)))."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs, dtype: DTypeLike):
        c = config
        self.gate = _linear(c.dim, c.dim_ffn, c.dim**-0.5, rngs=rngs, dtype=dtype)
        self.up = _linear(c.dim, c.dim_ffn, c.dim**-0.5, rngs=rngs, dtype=dtype)
        self.down = _linear(c.dim_ffn, c.dim, c.dim_ffn**-0.5, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "rows D"]) -> Float[Array, "rows D"]:
        return self.down(self.up(x) * jax.nn.gelu(self.gate(x), approximate=True))


class Block(nnx.Module):
    """Attention and feed-forward, each on the RMS norm of the residual stream."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs, dtype: DTypeLike):
        c = config
        self.norm1 = RMSNorm(c.dim, c.eps)
        self.attn = Attention(c, rngs=rngs, dtype=dtype)
        self.position_bias = nnx.Embed(
            c.num_buckets,
            c.num_heads,
            embedding_init=nnx.initializers.normal((2 * c.num_buckets * c.num_heads) ** -0.5),
            param_dtype=dtype,
            rngs=rngs,
        )
        self.norm2 = RMSNorm(c.dim, c.eps)
        self.ffn = FeedForward(c, rngs=rngs, dtype=dtype)

    def __call__(
        self, x: Float[Array, "rows D"], buckets: Int[Array, "L L"], key_bias: Float[Array, "B 1 1 L"]
    ) -> Float[Array, "rows D"]:
        bias = self.position_bias(buckets).transpose(2, 0, 1)
        x = x + self.attn(self.norm1(x), bias, key_bias)
        return x + self.ffn(self.norm2(x))


class UMT5Encoder(nnx.Module):
    """Token ids to text features; call it eagerly, or `nnx.split` it and `jax.jit` over the state.

    Args:
        config: shape of the encoder.
        rngs: keys of the initial weights (the standard deviations of T5).
        dtype: of parameters and arithmetic; bfloat16 when None. The norms' scales stay float32.
    """

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs, dtype: DTypeLike | None = None):
        dtype = jnp.dtype(jnp.bfloat16 if dtype is None else dtype)
        if config.dim_attn % config.num_heads:
            raise ValueError(f"dim_attn {config.dim_attn} is not a multiple of num_heads {config.num_heads}")
        self.config = config
        self.dtype = dtype
        self.token_embedding = nnx.Embed(
            config.vocab_size,
            config.dim,
            embedding_init=nnx.initializers.normal(1.0),
            param_dtype=dtype,
            dtype=dtype,
            rngs=rngs,
        )

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs, dtype=dtype)

        self.blocks = stack(rngs)  # every parameter has a leading axis of num_layers
        self.norm = RMSNorm(config.dim, config.eps)

    def __call__(
        self,
        ids: Int[Array | np.ndarray, "B L"],
        mask: Shaped[Array | np.ndarray, "B L"],
        *,
        unroll: bool | int = 1,
    ) -> Float[Array, "B L D"]:
        """Encode token ids; positions whose mask is 0 are neither attended to nor returned (zeros).

        unroll: layers per `lax.scan` step (True: a plain loop).
        """
        graph, state = nnx.split(self)
        return _encode(state, jnp.asarray(ids), jnp.asarray(mask), graph=graph, unroll=unroll)


# Compiled once a shape: a scan run eagerly would be compiled again at every call.
@partial(jax.jit, static_argnames=("graph", "unroll"))
def _encode(
    state: PyTree[Array],
    ids: Int[Array, "B L"],
    mask: Shaped[Array, "B L"],
    *,
    graph: nnx.GraphDef[UMT5Encoder],
    unroll: bool | int,
) -> Float[Array, "B L D"]:
    model = nnx.merge(graph, state)
    c = model.config
    buckets = jnp.asarray(relative_position_buckets(ids.shape[1], c.num_buckets, c.max_distance))
    key_bias = jnp.where(mask == 0, jnp.finfo(jnp.float32).min, 0.0)[:, None, None, :]
    block, layers = nnx.split(model.blocks)

    def layer(x: Array, layer_state: PyTree[Array]) -> tuple[Array, None]:
        return nnx.merge(block, layer_state)(x, buckets, key_bias), None

    # One row a token: a matrix product over [B, L, D] has a slow weight gradient in bfloat16 on CPU.
    x = model.token_embedding(ids).reshape(-1, c.dim)
    x, _ = jax.lax.scan(layer, x, layers, unroll=unroll)
    x = model.norm(x).reshape(*ids.shape, c.dim)
    return jnp.where((mask != 0)[..., None], x, jnp.zeros_like(x))


def _linear(fan_in: int, fan_out: int, std: float, *, rngs: nnx.Rngs, dtype: DTypeLike) -> nnx.Linear:
    return nnx.Linear(
        fan_in,
        fan_out,
        use_bias=False,
        kernel_init=nnx.initializers.normal(std),
        param_dtype=dtype,
        dtype=dtype,
        rngs=rngs,
    )

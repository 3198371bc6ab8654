"""The Wan diffusion transformer: latents, timestep and text context in, velocity out.

    latents [B,t,h,w,C] --patchify--> tokens [B,L,D] --N blocks--> tokens --head, unpatchify--> velocity [B,t,h,w,C_out]

Formulas: `wan/modules/model.py` of Wan 2.1 and 2.2 (one time embedding per sample). The N blocks are one `Block`
whose parameters carry a leading layer axis, run by `lax.scan`: compile time and dispatch do not grow with depth.

Precision: linear layers, attention and the residual stream run in `dtype` (bfloat16 unless told otherwise);
norms, modulation, the time embedding and the head stay float32.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, PyTree

import pallas_kernels as kernels
from turbojax.attention import DENSE, AttentionConfig, attend, rotates_queries
from turbojax.config import DiTConfig
from turbojax.models.layers import (
    LayerNorm,
    Linear,
    Measured,
    RMSNorm,
    rope_table,
    timestep_embedding,
)
from turbojax.models.text_keys import TextKeys
from turbojax.sharding import gathered, keep_batch

Rope = tuple[Float[Array, "L half"], Float[Array, "L half"]]
# What the backward pass computes again: nothing, each whole block, or all of it but what the linear layers gave.
Remat = Literal["none", "blocks", "keep_linear"]
# What a block's linear layer takes: a float array, or an int8 one with its scales (turbojax.quant.Quantized).
Activation = Any


class MLP(nnx.Module):
    """Two linear layers; the caller picks the activation."""

    def __init__(self, sizes: tuple[int, int, int], *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.linear_1 = Linear(sizes[0], sizes[1], rngs=rngs, dtype=dtype)
        self.linear_2 = Linear(sizes[1], sizes[2], rngs=rngs, dtype=dtype)


class Attention(nnx.Module):
    """q, k, v, o and the scales of the RMS norms of q and k, which are over the full width: heads split after them."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.q, self.k, self.v, self.o = (Linear(config.dim, config.dim, rngs=rngs, dtype=dtype) for _ in range(4))
        self.norm_q = RMSNorm(config.dim, config.eps)
        self.norm_k = RMSNorm(config.dim, config.eps)
        self.num_heads = config.num_heads

    def heads(self, y: Float[Array, "B L D"]) -> Float[Array, "B L H d"]:
        return rearrange(y, "b l (n d) -> b l n d", n=self.num_heads)

    def onto(
        self,
        residual: Float[Array, "B L D"],
        out: Float[Array, "B L H d"] | tuple[Float[Array, "B L H d"], Float32[Array, "B L"]],
        gate: Float[Array, "B 1 D"] | None = None,
    ) -> Float[Array, "B L D"]:
        """residual + gate * o(what attention gave, with the largest magnitude of each token or without)."""
        out, *amax = out if isinstance(out, tuple) else (out,)
        tokens = rearrange(out, "b l n d -> b l (n d)")
        return self.o.onto(residual, Measured(tokens, *amax) if amax else tokens, gate)


class SelfAttention(Attention):
    """Of tokens to each other, with rotary embedding; SLA's kinds may have a linear branch."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        super().__init__(config, rngs=rngs, dtype=dtype)
        # SLA's projection of the linear branch, shared by the heads and zero at first.
        self.proj_l = nnx.data(
            Linear(config.head_dim, config.head_dim, rngs=rngs, dtype=dtype, scale=0.0)
            if config.linear_branch
            else None
        )

    def __call__(
        self,
        residual: Float[Array, "B L D"],
        x: Activation,
        *,
        rope: Rope,
        attention: AttentionConfig,
        gate: Float[Array, "B 1 D"],
    ) -> Float[Array, "B L D"]:
        """residual + gate * attention of x to itself."""
        q, q_rotary = self._queries(x, rope, attention)
        k, v = (self.heads(layer(x)) for layer in (self.k, self.v))
        k = kernels.rms_norm_rope(k, self.norm_k.scale[...], *rope, eps=self.norm_k.eps)
        proj_l = None if self.proj_l is None else (self.proj_l.kernel[...].T, self.proj_l.bias[...])
        out = attend(q, k, v, attention, proj_l, return_amax=self.o.rounds_rows, q_rotary=q_rotary)
        return self.onto(residual, out, gate)

    def _queries(
        self, x: Activation, rope: Rope, attention: AttentionConfig
    ) -> tuple[Float[Array, "B L H d"], kernels.Rotary | None]:
        """Queries, and what attention shall norm and turn them by, where its pass over them can do that as well."""
        dim = self.norm_q.scale.shape[-1] // self.num_heads
        if self.q.tells_squares and rotates_queries(
            attention, dim, self.q.bias.dtype, linear_branch=self.proj_l is not None
        ):
            q, squares = self.q.with_squares(x)
            return self.heads(q), kernels.Rotary(self.norm_q.factor_of(squares), self.norm_q.scale[...], *rope)
        q = self.heads(self.q(x))
        return kernels.rms_norm_rope(q, self.norm_q.scale[...], *rope, eps=self.norm_q.eps), None


class TextAttention(Attention):
    """Of tokens to the rows of a text, exact."""

    def keys(self, text: Float[Array, "B S D"], last_count: int = 1) -> TextKeys:
        """K and V of text, whose last row counts `last_count` times."""
        k, v = self.k(text), self.heads(self.v(text))
        if last_count == 1:
            return TextKeys(self.heads(self.norm_k(k)), v, None, last_count)
        # q's norm needs no pass over q of its own: its scale goes into the few keys, and 1/rms into the softmax.
        k = self.heads(self.norm_k(k, self.norm_q.scale[...]))
        return TextKeys(k, v, kernels.text_columns(k, v, last_count=last_count), last_count)

    def __call__(
        self,
        residual: Float[Array, "B L D"],
        x: Activation,
        text: TextKeys,
        *,
        implementation: Literal["xla"] | None,
    ) -> Float[Array, "B L D"]:
        """residual + attention of x to text."""
        if text.last_count == 1:
            q = self.heads(self.norm_q(self.q(x)))
            out = kernels.dense_attention(q, text.k, text.v, implementation=implementation)
        else:
            q, squares = self.q.with_squares(x)
            out = kernels.text_attention(
                self.heads(q), text.k, text.v, q_factor=self.norm_q.factor_of(squares), last_count=text.last_count,
                columns=text.columns, return_amax=self.o.rounds_rows, implementation=implementation,
            )  # fmt: skip
        return self.onto(residual, out)


class FeedForward(nnx.Module):
    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.up = Linear(config.dim, config.ffn_dim, rngs=rngs, dtype=dtype)
        self.down = Linear(config.ffn_dim, config.dim, rngs=rngs, dtype=dtype)

    def __call__(
        self, residual: Float[Array, "B L D"], x: Activation, gate: Float[Array, "B 1 D"]
    ) -> Float[Array, "B L D"]:
        """residual + gate * down(gelu(up(x)))."""
        up = self.up.with_amax if self.down.rounds_rows else self.up
        return self.down.onto(residual, up(x, "gelu_tanh"), gate)


class Block(nnx.Module):
    """Self-attention and feed-forward, each shifted, scaled and gated by the timestep; text by cross-attention."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (6, config.dim)) / config.dim**0.5)
        self.self_attn = SelfAttention(config, rngs=rngs, dtype=dtype)
        self.cross_norm = LayerNorm(config.dim, config.eps)
        self.cross_attn = TextAttention(config, rngs=rngs, dtype=dtype)
        self.ffn = FeedForward(config, rngs=rngs, dtype=dtype)
        self.eps = config.eps

    def __call__(
        self,
        x: Float[Array, "B L D"],
        time: Float[Array, "B 6 D"],
        text: TextKeys,
        rope: Rope,
        attention: AttentionConfig,
    ) -> Float[Array, "B L D"]:
        """text: `cross_attn.keys`, of this layer."""
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(self.modulation[...] + time, 6, axis=1)

        eps, norm = self.eps, self.cross_norm
        h = self.self_attn.q.modulated(x, shift1, scale1, eps)
        x = self.self_attn(x, h, rope=rope, attention=attention, gate=gate1)
        h = self.cross_attn.q.modulated(x, norm.bias[...], norm.scale[...], norm.eps, affine=True)
        # Only "xla" means the same for exact attention: it is what forward mode needs, which cuDNN lacks.
        implementation = "xla" if attention.implementation == "xla" else None
        x = self.cross_attn(x, h, text, implementation=implementation)
        return self.ffn(x, self.ffn.up.modulated(x, shift2, scale2, eps), gate2)


class WanDiT(nnx.Module):
    """Wan 2.1 / 2.2 transformer; call it eagerly, or `nnx.split` it and `jax.jit` over the state."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs, dtype: DTypeLike | None = None):
        self.config = config
        self.dtype = jnp.dtype(jnp.bfloat16 if dtype is None else dtype)
        dim, f32 = config.dim, jnp.float32
        self.patch_embedding = Linear(config.in_channels * config.patch_volume, dim, rngs=rngs, dtype=self.dtype)
        self.text_embedding = MLP((config.text_dim, dim, dim), rngs=rngs, dtype=self.dtype)
        self.time_embedding = MLP((config.freq_dim, dim, dim), rngs=rngs, dtype=f32)
        self.time_projection = Linear(dim, 6 * dim, rngs=rngs, dtype=f32)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs, dtype=self.dtype)

        self.blocks = stack(rngs)
        self.head_modulation = nnx.Param(jax.random.normal(rngs.params(), (2, dim)) / dim**0.5)
        # Zero, as Wan starts it: an untrained model predicts no velocity.
        self.head = Linear(dim, config.out_channels * config.patch_volume, rngs=rngs, dtype=f32, scale=0.0)

    def __call__(
        self,
        latents: Float[Array | np.ndarray, "B t h w C"],
        timestep: Float[Array | np.ndarray, "B"],
        context: Float[Array | np.ndarray, "B S text_dim"] | TextKeys,
        *,
        attention: AttentionConfig = DENSE,
        last_count: int = 1,
        round_timestep: bool = False,
        unroll: bool | int = 1,
        remat: Remat = "none",
    ) -> Float[Array, "B t h w C_out"]:
        """Velocity noise - x0, float32 [B,t,h,w,out_channels].

        latents: noisy latents, for I2V with 4 mask and 16 picture channels behind them; t, h, w multiples of the
            patch (1, 2, 2).
        timestep: in [0, 1000], 1000 = pure noise.
        context: text encoder output; callers pad it (Wan: to 512 rows of zeros), the model neither pads nor masks.
            Or the `text_keys` of that, with the same result: they do not depend on latents and timestep, so that
            what calls the model often with one text makes them once. last_count is then theirs.
        last_count: how many equal rows the last one of context stands for. Rows of padding are equal, and nothing tells
            where a row stands, so that one of them, counted often, is the same function and not an approximation:
            context[:, :S] with last_count 512 - S + 1, where all rows from S - 1 on are zeros. (W8A8 in tiles, whose
            scales rows share, rounds them otherwise.)
        round_timestep: round the timestep to bfloat16 first, as TurboDiffusion's sampler does.
        unroll: layers per `lax.scan` step (True: a plain loop); remat: what the backward pass recomputes.
        Raises ValueError for a shape that the model cannot take, a last_count below 1, or text keys of another one.
        """
        latents, timestep = jnp.asarray(latents), jnp.asarray(timestep)
        _check_latents(latents.shape, self.config)
        if isinstance(context, TextKeys):
            context.check(self.config, len(latents), last_count)
        else:
            context = jnp.asarray(context)
            _check_context(context.shape, last_count, self.config)
        graph, state = nnx.split(self)
        options = _Options(attention, last_count, round_timestep, unroll, remat)
        return _forward(state, latents, timestep, context, graph=graph, options=options)

    def text_keys(self, context: Float[Array | np.ndarray, "B S text_dim"], *, last_count: int = 1) -> TextKeys:
        """K and V of every layer for a text; context and last_count are as in a call, which takes these instead.

        num_layers * 2 * B * S * dim numbers of the model's dtype: 98 MB for 120 rows of the 14B model, 0.8 GB for all
        512 under guidance. Raises ValueError for a context that the model cannot take, or a last_count below 1.
        """
        context = jnp.asarray(context)
        _check_context(context.shape, last_count, self.config)
        graph, state = nnx.split(self)
        return _text_keys(state, context, graph=graph, last_count=last_count)

    def embed_time(self, timestep: Float[Array, "B"]) -> tuple[Float[Array, "B D"], Float[Array, "B 6 D"]]:
        """The time vector (for the head) and its six projections (for the blocks), float32."""
        mlp = self.time_embedding
        time = mlp.linear_2(jax.nn.silu(mlp.linear_1(timestep_embedding(timestep, self.config.freq_dim))))
        return time, rearrange(self.time_projection(jax.nn.silu(time)), "b (six d) -> b six d", six=6)

    def embed_text(self, context: Float[Array, "B S text_dim"]) -> Float[Array, "B S D"]:
        """Text encoder rows to the model's width."""
        mlp = self.text_embedding
        return mlp.linear_2(jax.nn.gelu(mlp.linear_1(context.astype(self.dtype)), approximate=True))


class _Options(NamedTuple):
    attention: AttentionConfig
    last_count: int
    round_timestep: bool
    unroll: bool | int
    remat: Remat


# Compiled once a shape: a scan run eagerly would be compiled again at every call.
@partial(jax.jit, static_argnames=("graph", "options"))
def _forward(
    state: PyTree[Array],
    latents: Float[Array, "B t h w C"],
    timestep: Float[Array, "B"],
    context: Float[Array, "B S text_dim"] | TextKeys,
    *,
    graph: nnx.GraphDef[WanDiT],
    options: _Options,
) -> Float[Array, "B t h w C_out"]:
    # The blocks' are gathered layer by layer.
    model = nnx.merge(graph, gathered(state, leave="blocks"))
    config = model.config
    (t, h, w), (kt, kh, kw) = latents.shape[1:4], config.patch_size
    grid = t // kt, h // kh, w // kw
    tokens = keep_batch(model.patch_embedding(patchify(latents.astype(model.dtype), config.patch_size)))
    if options.round_timestep:
        timestep = timestep.astype(jnp.bfloat16)
    time, time6 = model.embed_time(timestep)
    text, keys = (None, context) if isinstance(context, TextKeys) else (model.embed_text(context), None)
    cos, sin = rope_table(grid, config.head_dim)
    rope = jnp.asarray(cos), jnp.asarray(sin)
    graph_of_block, layers = nnx.split(model.blocks)

    def layer(x: Array, inputs: tuple[PyTree[Array], Any]) -> tuple[Array, None]:
        layer_state, keys = inputs
        block = nnx.merge(graph_of_block, gathered(layer_state))
        if text is not None:
            keys = block.cross_attn.keys(text, options.last_count)
        return keep_batch(block(x, time6, keys, rope, options.attention)), None

    body = layer
    if options.remat != "none":
        saved = None if options.remat == "blocks" else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        body = jax.checkpoint(layer, policy=saved, prevent_cse=False)
    tokens, _ = jax.lax.scan(body, tokens, (layers, keys), unroll=options.unroll)

    shift, scale = jnp.split(model.head_modulation[...] + time[:, None], 2, axis=1)
    out = model.head(model.head.modulated(tokens.astype(jnp.float32), shift, scale, config.eps))
    return unpatchify(out, grid, config.patch_size)


@partial(jax.jit, static_argnames=("graph", "last_count"))
def _text_keys(
    state: PyTree[Array], context: Float[Array, "B S text_dim"], *, graph: nnx.GraphDef[WanDiT], last_count: int
) -> TextKeys:
    model = nnx.merge(graph, gathered(state, leave="blocks"))
    text = model.embed_text(context)
    graph_of_layer, layers = nnx.split(model.blocks.cross_attn)

    def layer(_: None, layer_state: PyTree[Array]) -> tuple[None, TextKeys]:
        keys = nnx.merge(graph_of_layer, gathered(layer_state)).keys(text, last_count)
        return None, jax.tree.map(keep_batch, keys)

    return jax.lax.scan(layer, None, layers)[1]


def patchify(latents: Float[Array, "B t h w C"], patch: tuple[int, int, int]) -> Float[Array, "B L features"]:
    """Tokens in (t, h, w) order; features ordered (c, kt, kh, kw), as a flattened Conv3d weight expects."""
    kt, kh, kw = patch
    return rearrange(latents, "b (t kt) (h kh) (w kw) c -> b (t h w) (c kt kh kw)", kt=kt, kh=kh, kw=kw)


def unpatchify(
    tokens: Float[Array, "B L features"], grid: tuple[int, ...], patch: tuple[int, int, int]
) -> Float[Array, "B t h w C"]:
    """Inverse of the head's order (kt, kh, kw, c): channels fastest, unlike `patchify`."""
    (t, h, w), (kt, kh, kw) = grid, patch
    return rearrange(
        tokens,
        "b (t h w) (kt kh kw c) -> b (t kt) (h kh) (w kw) c",
        t=t, h=h, w=w, kt=kt, kh=kh, kw=kw,
    )  # fmt: skip


def _check_latents(shape: tuple[int, ...], config: DiTConfig) -> None:
    if len(shape) != 5 or shape[-1] != config.in_channels:
        raise ValueError(f"latents must be [B, t, h, w, {config.in_channels}], got {list(shape)}")
    if any(n % p for n, p in zip(shape[1:4], config.patch_size, strict=True)):
        raise ValueError(f"latents of {list(shape[1:4])} do not divide into patches of {config.patch_size}")


def _check_context(shape: tuple[int, ...], last_count: int, config: DiTConfig) -> None:
    if len(shape) != 3 or shape[-1] != config.text_dim:
        raise ValueError(f"context must be [B, tokens, {config.text_dim}], got {list(shape)}")
    if last_count < 1:
        raise ValueError(f"last_count is {last_count}; the last row of context counts at least once")

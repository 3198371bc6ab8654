"""The Wan 2.1 VAE: 4x in time and 8x in space, causal in time (`wan/modules/vae.py`; diffusers' AutoencoderKLWan).

Parameter names are those of diffusers' AutoencoderKLWan; kernels are (*window, in, out), gammas (C,).
A video of 1 + 4n frames has 1 + n latent frames: the first frame stands alone, then four by four.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from turbojax.config import VAEConfig
from turbojax.models.vae_layers import (
    Attention,
    Cache,
    CausalConv,
    Downsample,
    PointwiseConv,
    ResBlock,
    RMSNorm,
    Upsample,
    run_layers,
)

Video = Float[Array, "b t h w 3"]
Latents = Float[Array, "b t_lat h_lat w_lat c"]
HostVideo = Float[np.ndarray, "b t h w 3"]
HostLatents = Float[np.ndarray, "b t_lat h_lat w_lat c"]


class MidBlock(nnx.Module):
    """ResBlock, attention within each frame, ResBlock."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.resnets = nnx.List([ResBlock(channels, channels, rngs=rngs, dtype=dtype) for _ in range(2)])
        self.attentions = nnx.List([Attention(channels, rngs=rngs, dtype=dtype)])

    def __call__(self, x: Array, cache: Cache = None) -> tuple[Array, Cache]:
        return run_layers([self.resnets[0], self.attentions[0], self.resnets[1]], x, cache)


class Head(nnx.Module):
    """Base of encoder and decoder: `conv_out(silu(norm_out(x)))` at the end of both."""

    norm_out: RMSNorm
    conv_out: CausalConv

    def _head(self, x: Array, cache: Cache) -> tuple[Array, Cache]:
        return self.conv_out(nnx.silu(self.norm_out(x)), cache)


class Encoder(Head):
    """[B, 1+4n, H, W, 3] -> [B, 1+n, H/8, W/8, 2 z_dim]; a later chunk of a stream has 4n frames."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        make: dict[str, Any] = {"rngs": rngs, "dtype": dtype}
        dims = [config.base_dim * m for m in (1, *config.dim_mult)]
        self.conv_in = CausalConv(3, dims[0], **make)
        blocks: list[nnx.Module] = []
        for stage, (c_in, c_out) in enumerate(itertools.pairwise(dims)):
            for i in range(config.num_res_blocks):
                blocks.append(ResBlock(c_in if i == 0 else c_out, c_out, **make))
            if stage < len(config.dim_mult) - 1:
                blocks.append(Downsample(c_out, temporal=config.temporal_downsample[stage], **make))
        self.down_blocks = nnx.List(blocks)
        self.mid_block = MidBlock(dims[-1], **make)
        self.norm_out = RMSNorm(dims[-1])
        self.conv_out = CausalConv(dims[-1], 2 * config.z_dim, **make)

    def __call__(self, x: Array, cache: Cache = None) -> tuple[Array, Cache]:
        return run_layers([self.conv_in, *self.down_blocks, self.mid_block, self._head], x, cache)


class UpBlock(nnx.Module):
    """A stage of the decoder: num_res_blocks + 1 ResBlocks, then an upsampler unless it is the last."""

    def __init__(
        self, c_in: int, c_out: int, count: int, temporal: bool | None, *, rngs: nnx.Rngs, dtype: DTypeLike
    ) -> None:
        self.resnets = nnx.List(
            [ResBlock(c_in if i == 0 else c_out, c_out, rngs=rngs, dtype=dtype) for i in range(count)]
        )
        upsamplers = [] if temporal is None else [Upsample(c_out, temporal=temporal, rngs=rngs, dtype=dtype)]
        self.upsamplers = nnx.List(upsamplers)

    def __call__(self, x: Array, cache: Cache = None) -> tuple[Array, Cache]:
        return run_layers([*self.resnets, *self.upsamplers], x, cache)


class Decoder(Head):
    """[B, 1+n, h, w, z_dim] -> [B, 1+4n, 8h, 8w, 3]; a later chunk of n latent frames gives 4n frames."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        make: dict[str, Any] = {"rngs": rngs, "dtype": dtype}
        dims = [config.base_dim * m for m in reversed(config.dim_mult)]
        temporal: list[bool | None] = [*reversed(config.temporal_downsample), None]
        self.conv_in = CausalConv(config.z_dim, dims[0], **make)
        self.mid_block = MidBlock(dims[0], **make)
        blocks: list[UpBlock] = []
        c_in = dims[0]
        for c_out, upsample in zip(dims, temporal, strict=True):
            blocks.append(UpBlock(c_in, c_out, config.num_res_blocks + 1, upsample, **make))
            c_in = c_out // 2  # an upsampler halves the channels
        self.up_blocks = nnx.List(blocks)
        self.norm_out = RMSNorm(dims[-1])
        self.conv_out = CausalConv(dims[-1], 3, **make)

    def __call__(self, x: Array, cache: Cache = None) -> tuple[Array, Cache]:
        return run_layers([self.conv_in, self.mid_block, *self.up_blocks, self._head], x, cache)


class WanVAE(nnx.Module):
    """The VAE with normalised latents: `z = (mu - latents_mean) / latents_std`.

    dtype: of convolutions and attention (None: float32, as Wan runs it; TurboDiffusion uses bfloat16). Norms and
    the latents' statistics stay float32. Results have the dtype of the input.

    `encode` and `decode` see the whole sequence at once; `encode_streamed` and `decode_streamed` give the same
    result in memory that, but for input and output, does not grow with the number of frames.
    """

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs, dtype: DTypeLike | None = None) -> None:
        self.config = config
        self.dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
        make: dict[str, Any] = {"rngs": rngs, "dtype": self.dtype}
        self.encoder = Encoder(config, **make)
        self.quant_conv = PointwiseConv((1, 1, 1), 2 * config.z_dim, 2 * config.z_dim, **make)
        self.post_quant_conv = PointwiseConv((1, 1, 1), config.z_dim, config.z_dim, **make)
        self.decoder = Decoder(config, **make)

    def encode(self, video: Video | HostVideo) -> Latents:
        """video [B, 1+4n, H, W, 3] in [-1, 1] -> normalised latents [B, 1+n, H/8, W/8, z_dim] (the mean, no noise).

        Raises ValueError for another rank or channel count, integer pixels, frames not 4n+1, or sizes that are
        not multiples of 8.
        """
        return self._compiled(WanVAE._encode_whole, self._checked_video(video))

    def decode(self, z: Latents | HostLatents, *, clamp: bool = True) -> Video:
        """Normalised latents [B, 1+n, h, w, z_dim] -> video [B, 1+4n, 8h, 8w, 3], clamped to [-1, 1] as Wan does.

        Raises ValueError for another rank or channel count.
        """
        return self._compiled(WanVAE._decode_whole, self._checked_latents(z), clamp=clamp)

    def encode_streamed(self, video: Video | HostVideo) -> Latents:
        """`encode`, four frames at a time."""
        return self._compiled(WanVAE._encode_stream, self._checked_video(video))

    def decode_streamed(self, z: Latents | HostLatents, *, clamp: bool = True) -> Video:
        """`decode`, one latent frame at a time."""
        return self._compiled(WanVAE._decode_stream, self._checked_latents(z), clamp=clamp)

    # The mathematics, on one chunk of frames.

    def _encode_chunk(self, video: Array, cache: Cache = None) -> tuple[Array, Cache]:
        h, cache = self.encoder(video.astype(self.dtype), cache)
        mean, std = self._statistics()
        mu = self.quant_conv(h)[0][..., : self.config.z_dim].astype(jnp.float32)
        return ((mu - mean) / std).astype(video.dtype), cache

    def _decode_chunk(self, z: Array, cache: Cache = None, *, clamp: bool) -> tuple[Array, Cache]:
        mean, std = self._statistics()
        h = (z.astype(jnp.float32) * std + mean).astype(self.dtype)
        video, cache = self.decoder(self.post_quant_conv(h)[0], cache)
        video = jnp.clip(video, -1.0, 1.0) if clamp else video
        return video.astype(z.dtype), cache

    def _statistics(self) -> tuple[Array, Array]:
        return jnp.asarray(self.config.latents_mean), jnp.asarray(self.config.latents_std)

    def _encode_whole(self, video: Array) -> Array:
        return self._encode_chunk(video)[0]

    def _decode_whole(self, z: Array, *, clamp: bool) -> Array:
        return self._decode_chunk(z, clamp=clamp)[0]

    def _encode_stream(self, video: Array) -> Array:
        return _stream(self._encode_chunk, video, self.config.temporal_stride, 1)

    def _decode_stream(self, z: Array, *, clamp: bool) -> Array:
        return _stream(functools.partial(self._decode_chunk, clamp=clamp), z, 1, self.config.temporal_stride)

    # Checks, and one compiled program for each method, shape and dtype.

    def _compiled(self, method: Callable[..., Array], x: Array, **options: Any) -> Array:
        graphdef, state = nnx.split(self)
        return _run(graphdef, state, x, method, tuple(options.items()))

    def _checked_video(self, video: Any) -> Array:
        s, t = self.config.spatial_stride, self.config.temporal_stride
        video = _checked(video, 3, "video [B, T, H, W, 3]")
        frames, height, width = video.shape[1:4]
        if frames % t != 1:
            raise ValueError(f"{frames} frames: the VAE takes {t}n + 1 (1, {t + 1}, {2 * t + 1}, ...)")
        if height % s or width % s or not height * width:
            raise ValueError(f"size {width}x{height}: width and height must be multiples of {s}")
        return video

    def _checked_latents(self, z: Any) -> Array:
        return _checked(z, self.config.z_dim, f"latents [B, t, h, w, {self.config.z_dim}]")


def _checked(x: Any, channels: int, expected: str) -> Array:
    if jnp.ndim(x) != 5 or jnp.shape(x)[-1] != channels or not all(jnp.shape(x)):
        raise ValueError(f"expected {expected}, got shape {tuple(jnp.shape(x))}")
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"expected {expected} in floating point, got {x.dtype}; map uint8 to x / 127.5 - 1")
    return x


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _run(graphdef: Any, state: Any, x: Array, method: Callable[..., Array], options: Any) -> Array:
    return method(nnx.merge(graphdef, state), x, **dict(options))


def _stream(
    chunk: Callable[..., tuple[Array, Cache]], x: Array, size_in: int, size_out: int
) -> Float[Array, "b t_out h_out w_out c_out"]:
    """Run `chunk` on the first frame, then over chunks of `size_in` frames, each giving `size_out`, by lax.scan.

    The output is written in place chunk by chunk, so that no second copy of it is made.
    """
    first, cache = chunk(x[:, :1])
    count = (x.shape[1] - 1) // size_in
    out = jnp.zeros((first.shape[0], 1 + count * size_out, *first.shape[2:]), first.dtype)
    out = lax.dynamic_update_slice_in_dim(out, first, 0, axis=1)

    def body(carry: tuple[Array, Cache], i: Array) -> tuple[tuple[Array, Cache], None]:
        out, cache = carry
        frames = lax.dynamic_slice_in_dim(x, 1 + i * size_in, size_in, axis=1)
        y, cache = chunk(frames, cache)
        return (lax.dynamic_update_slice_in_dim(out, y, 1 + i * size_out, axis=1), cache), None

    return lax.scan(body, (out, cache), jnp.arange(count))[0][0]

"""Layers of the Wan 2.1 VAE, channels-last, each in one form for whole sequences and for streams.

Every layer is called as `layer(x, cache) -> (y, cache)` on a chunk of frames `x [B, T, H, W, C]`. `cache=None`
says that the chunk starts the sequence; otherwise it is what the previous chunk returned. A whole sequence
is therefore the case of one chunk, and a stream carries the caches from chunk to chunk.

Source: `wan/modules/vae.py` of Wan 2.1 (CausalConv3d, RMS_norm, Resample, ResidualBlock, AttentionBlock); its
`feat_cache` protocol is the chunked form of the same mathematics.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

Video = Float[Array, "b t h w c"]
Widened = Float[Array, "b t h w c_out"]  # of a Video, in another number of channels
Resized = Float[Array, "b t_out h_out w_out c_out"]
Cache = Any  # a pytree of arrays: the frames a layer must remember

# Attention scores held at once, in numbers: a frame at 720p alone has 2e8.
_MAX_SCORES = 1 << 26


def run_layers(layers: Iterable[Any], x: Video, caches: Sequence[Cache] | None) -> tuple[Resized, list[Cache]]:
    """Apply layers in turn; `caches` holds one cache a layer, or is None at the start of a sequence."""
    layers = list(layers)
    new_caches = []
    for layer, cache in zip(layers, caches or [None] * len(layers), strict=True):
        x, cache = layer(x, cache)
        new_caches.append(cache)
    return x, new_caches


def _with_history(x: Video, cache: Float[Array, "b 2 h w c"] | None) -> Float[Array, "b t+2 h w c"]:
    """The two frames before the chunk (zeros where the sequence starts), then the chunk."""
    if cache is None:
        return jnp.pad(x, ((0, 0), (2, 0), (0, 0), (0, 0), (0, 0)))
    return jnp.concatenate([cache, x], axis=1)


def _conv2d(x: Float[Array, "n h w i"], kernel: Float[Array, "kh kw i o"], stride: int, padding: Any) -> Array:
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _temporal_taps(frames: Video, stride: int) -> Array:
    """The three frames under a kernel's temporal taps, concatenated on channels: [B, T', H, W, 3I]."""
    n = (frames.shape[1] - 3) // stride + 1
    return jnp.concatenate([frames[:, i : i + (n - 1) * stride + 1 : stride] for i in range(3)], axis=-1)


def _causal_conv(frames: Video, kernel: Float[Array, "3 3 3 i o"]) -> Resized:
    """A valid-in-time, same-in-space 3x3x3 convolution as ONE conv2d: XLA's conv3d on CPU is 5-7x slower."""
    taps = _temporal_taps(frames, 1)
    b, t, h, w, _ = taps.shape
    flat = jnp.moveaxis(kernel, 0, 2).reshape(3, 3, -1, kernel.shape[-1])
    return _conv2d(taps.reshape(b * t, h, w, -1), flat, 1, "SAME").reshape(b, t, h, w, -1)


class Conv(nnx.Module):
    """Kernel and bias of a convolution; kernel (*window, I, O), scaled for unit variance at initialisation."""

    def __init__(self, window: tuple[int, ...], c_in: int, c_out: int, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")
        self.kernel = nnx.Param(init(rngs.params(), (*window, c_in, c_out), dtype))
        self.bias = nnx.Param(jnp.zeros((c_out,), dtype))


class PointwiseConv(Conv):
    """A convolution whose window is one pixel: `x @ kernel + bias`. `window` only shapes the stored kernel."""

    def __call__(self, x: Video, cache: Cache = None) -> tuple[Widened, Cache]:
        kernel = self.kernel[...].reshape(self.kernel.shape[-2:])
        return x @ kernel + self.bias[...], ()


class CausalConv(Conv):
    """A 3x3x3 convolution that sees the current frame and the two before it (zeros before the first)."""

    def __init__(self, c_in: int, c_out: int, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        super().__init__((3, 3, 3), c_in, c_out, rngs=rngs, dtype=dtype)

    def __call__(self, x: Video, cache: Cache = None) -> tuple[Widened, Cache]:
        frames = _with_history(x, cache)
        return _causal_conv(frames, self.kernel[...]) + self.bias[...], frames[:, -2:]


class TemporalConv(Conv):
    """A (3,1,1) convolution without padding: T frames in, (T-3)//stride + 1 out."""

    def __init__(self, c_in: int, c_out: int, *, stride: int, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        super().__init__((3, 1, 1), c_in, c_out, rngs=rngs, dtype=dtype)
        self.stride = stride

    def __call__(self, frames: Video) -> Resized:
        kernel = self.kernel[...]
        taps = _temporal_taps(frames, self.stride)
        return taps @ kernel.reshape(-1, kernel.shape[-1]) + self.bias[...]


class SpatialConv(Conv):
    """A 3x3 convolution of every frame; `padding` as (before, after) for height and width alike."""

    def __init__(
        self, c_in: int, c_out: int, *, stride: int, padding: tuple[int, int], rngs: nnx.Rngs, dtype: DTypeLike
    ) -> None:
        super().__init__((3, 3), c_in, c_out, rngs=rngs, dtype=dtype)
        self.stride, self.padding = stride, padding

    def __call__(self, x: Video) -> Resized:
        b, t, *frame = x.shape
        y = _conv2d(x.reshape(b * t, *frame), self.kernel[...], self.stride, (self.padding, self.padding))
        return y.reshape(b, t, *y.shape[1:]) + self.bias[...]


class Identity(nnx.Module):
    """What stands at index 0 of the reference's `resample`: its convolution, with the parameters, is at 1."""

    def __call__(self, x: Video) -> Video:
        return x


class Double(nnx.Module):
    """Each pixel twice in height and in width (nearest-exact interpolation by two)."""

    def __call__(self, x: Video) -> Resized:
        return jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)


class RMSNorm(nnx.Module):
    """`x / max(|x|_2, 1e-12) * sqrt(C) * gamma` over channels, in float32 whatever the input's dtype."""

    def __init__(self, channels: int) -> None:
        self.gamma = nnx.Param(jnp.ones((channels,), jnp.float32))

    def __call__(self, x: Video) -> Video:
        x32 = x.astype(jnp.float32)
        inverse = lax.rsqrt(jnp.maximum(jnp.sum(x32 * x32, axis=-1, keepdims=True), 1e-24))
        return (x32 * inverse * (x.shape[-1] ** 0.5 * self.gamma[...])).astype(x.dtype)


class ResBlock(nnx.Module):
    """`conv2(silu(norm2(conv1(silu(norm1(x)))))) + shortcut(x)`; cache: the inputs of both convolutions."""

    def __init__(self, c_in: int, c_out: int, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.norm1 = RMSNorm(c_in)
        self.conv1 = CausalConv(c_in, c_out, rngs=rngs, dtype=dtype)
        self.norm2 = RMSNorm(c_out)
        self.conv2 = CausalConv(c_out, c_out, rngs=rngs, dtype=dtype)
        if c_in != c_out:
            self.conv_shortcut = PointwiseConv((1, 1, 1), c_in, c_out, rngs=rngs, dtype=dtype)
        self.has_shortcut = c_in != c_out

    def __call__(self, x: Video, cache: Cache = None) -> tuple[Widened, Cache]:
        cache1, cache2 = cache or (None, None)
        y, cache1 = self.conv1(nnx.silu(self.norm1(x)), cache1)
        y, cache2 = self.conv2(nnx.silu(self.norm2(y)), cache2)
        return y + (self.conv_shortcut(x)[0] if self.has_shortcut else x), (cache1, cache2)


class Attention(nnx.Module):
    """Self-attention with one head over the pixels of each frame, with residual; it has no cache."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.norm = RMSNorm(channels)
        self.to_qkv = PointwiseConv((1, 1), channels, 3 * channels, rngs=rngs, dtype=dtype)
        self.proj = PointwiseConv((1, 1), channels, channels, rngs=rngs, dtype=dtype)

    def __call__(self, x: Video, cache: Cache = None) -> tuple[Video, Cache]:
        b, t, h, w, c = x.shape
        qkv = self.to_qkv(self.norm(x))[0].reshape(b * t, h * w, 3, c)

        def frame(qkv: Float[Array, "l 3 c"]) -> Float[Array, "l c"]:
            q, k, v = jnp.moveaxis(qkv, 1, 0)
            scores = jnp.matmul(q, k.T, preferred_element_type=jnp.float32) * c**-0.5
            return jax.nn.softmax(scores, axis=-1).astype(v.dtype) @ v

        at_once = max(1, _MAX_SCORES // (h * w) ** 2)
        y = jax.vmap(frame)(qkv) if b * t <= at_once else lax.map(frame, qkv, batch_size=at_once)
        return x + self.proj(y.reshape(b, t, h, w, c))[0], ()


class Resample(nnx.Module):
    """Base of the two: `resample` holds what happens to each frame, under the reference's indices."""

    resample: nnx.List[Any]

    def _resample(self, x: Video) -> Resized:
        for layer in self.resample:
            x = layer(x)
        return x


class Downsample(Resample):
    """Halve height and width; if `temporal`, then time too, the first frame of the sequence passing alone.

    Cache: the last frame before the temporal convolution.
    """

    def __init__(self, channels: int, *, temporal: bool, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        conv = SpatialConv(channels, channels, stride=2, padding=(0, 1), rngs=rngs, dtype=dtype)
        self.resample = nnx.List([Identity(), conv])
        if temporal:
            self.time_conv = TemporalConv(channels, channels, stride=2, rngs=rngs, dtype=dtype)
        self.temporal = temporal

    def __call__(self, x: Video, cache: Cache = None) -> tuple[Resized, Cache]:
        x = self._resample(x)
        if not self.temporal:
            return x, ()
        if cache is not None:
            x = jnp.concatenate([cache, x], axis=1)
        parts = [x[:, :1]] if cache is None else []
        if x.shape[1] > 1:
            parts.append(self.time_conv(x))
        return jnp.concatenate(parts, axis=1), x[:, -1:]


class Upsample(Resample):
    """Double time if `temporal` (the first frame of the sequence stays single), then height and width.

    Channels halve. Cache: the last two inputs of the temporal convolution, which never sees the first frame.
    """

    def __init__(self, channels: int, *, temporal: bool, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        conv = SpatialConv(channels, channels // 2, stride=1, padding=(1, 1), rngs=rngs, dtype=dtype)
        self.resample = nnx.List([Double(), conv])
        if temporal:
            self.time_conv = TemporalConv(channels, 2 * channels, stride=1, rngs=rngs, dtype=dtype)
        self.temporal = temporal

    def _double_time(self, x: Video, cache: Cache) -> tuple[Float[Array, "b t_out h w c"], Cache]:
        parts = []
        if cache is None:
            parts, x = [x[:, :1]], x[:, 1:]
        frames = _with_history(x, cache)
        if x.shape[1]:
            b, t, h, w, c = x.shape
            pairs = self.time_conv(frames).reshape(b, t, h, w, 2, c)
            parts.append(jnp.moveaxis(pairs, 4, 2).reshape(b, 2 * t, h, w, c))
        return jnp.concatenate(parts, axis=1), frames[:, -2:]

    def __call__(self, x: Video, cache: Cache = None) -> tuple[Resized, Cache]:
        if self.temporal:
            x, cache = self._double_time(x, cache)
        else:
            cache = ()
        return self._resample(x), cache

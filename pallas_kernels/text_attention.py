"""Attention of many queries to the few keys of a text, of which the last stands for all of the padding."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from pallas_kernels._attention_kernels import HOPPER
from pallas_kernels._attention_xla import compute_dtype, default_scale, map_chunks
from pallas_kernels._derivatives import derivative_of
from pallas_kernels._heads import check_qkv, with_largest
from pallas_kernels._refusals import MAX_HEADS
from pallas_kernels.dense_attention import cudnn_refusal, dense_attention
from pallas_kernels.dispatch import dispatch, gpu_arch

HEAD_DIM = 128
MAX_COLUMNS = 256
"""K and V of a head stay in shared memory, and a row of scores in registers."""


class TextColumns(NamedTuple):
    """K and V of a text as the kernel takes them: see `_hopper_text`."""

    keys: Float[Array, "b w h d"]
    values: Float[Array, "b h rows w"]


@functools.partial(jax.jit, static_argnames=("last_count", "return_amax", "implementation"))
def text_attention(
    q: Float[Array, "b l h d"],
    k: Float[Array, "b s h d"],
    v: Float[Array, "b s h d"],
    *,
    q_factor: Float32[Array, "b l"] | None = None,
    last_count: int = 1,
    columns: TextColumns | None = None,
    return_amax: bool = False,
    implementation: str | None = None,
) -> Float[Array, "b l h d"] | tuple[Float[Array, "b l h d"], Float32[Array, "b l"]]:
    """softmax(q_factor q k^T / sqrt(d)) v, the last key counting `last_count` times; softmax in float32.

    Wan pads every prompt with zeros to 512 rows and masks none, so that all padding has one key and one value: they
    are one row here, exactly. Differentiable in q, k, v and q_factor, in forward and reverse mode.

    Args:
        q_factor: float32 [B, L], positive: what each token's queries are multiplied by, such as 1/rms of an RMSNorm
            over all heads, which then needs no pass of its own. Not checked. None is 1.
        last_count: how many equal keys the last one stands for, at least 1.
        columns: `text_columns` of the same k, v and last_count, if they were made ahead: what attends to one text many
            times makes them once. Derivatives are taken through k and v all the same.
        return_amax: also return float32 [B, L], the largest |o| over all heads of a token, o as it is rounded.
        implementation: None, "xla" (any dtype), "mosaic_gpu" (Hopper, bfloat16, head_dim 128, S plus one less than
            the ones of last_count in binary at most 256) or "interpret". None on a GPU without the kernel is cuDNN's
            attention to all keys written out, for the dtypes that it takes.

    Returns o in q's dtype, or (o, amax).

    Raises:
        ValueError: shapes that do not fit together, or last_count below 1.
        NotImplementedError: an implementation that cannot run, with the reason.

    Source: WanT2VCrossAttention and the padding of `context` in wan/modules/model.py of Wan2.1.
    """
    name = "text_attention"
    check_qkv(name, q, k, v)
    if q_factor is not None and q_factor.shape != q.shape[:2]:
        raise ValueError(f"{name}: q_factor has shape {q_factor.shape}; expected [batch, length] = {q.shape[:2]}")
    if last_count < 1:
        raise ValueError(f"{name}: last_count is {last_count}; the last key counts at least once")
    if columns is not None:
        _check_columns(name, k, columns, last_count)

    options = {"last_count": last_count, "amax": return_amax}
    xla = functools.partial(_xla, **options)

    def kernel(*args, interpret):
        return derivative_of(xla, functools.partial(_kernel, **options, interpret=interpret))(*args)

    def cudnn(*args, interpret):
        return derivative_of(xla, functools.partial(_written_out, **options))(*args)

    args = (q, k, v, q_factor, *(columns or (None, None)))
    unsupported = supports(k, last_count, implementation)
    if implementation is None and unsupported and cudnn_refusal(q, k) is None:
        kernel, unsupported = cudnn, None
    return dispatch(name, implementation, args, xla=xla, kernel=kernel, unsupported=unsupported)


def text_columns(k: Float[Array, "b s h d"], v: Float[Array, "b s h d"], *, last_count: int = 1) -> TextColumns | None:
    """What `text_attention` takes as `columns`; None where it has no kernel for such k and v, and needs none.

    Not differentiable: they are constants to derivatives, which go through k and v.
    """
    if supports(k, last_count):
        return None
    from pallas_kernels import _hopper_text  # late: see _plgpu

    return TextColumns(*_hopper_text.text_columns(*lax.stop_gradient((k, v)), last_count))


def supports(k: Array, last_count: int, implementation: str | None = None) -> str | None:
    """Why the kernel cannot run, or None if it can. The interpreter needs no GPU."""
    b, keys, h, dim = k.shape
    columns = _used_columns(keys, last_count)
    if dim != HEAD_DIM:
        return f"head_dim is {dim}; the kernel has {HEAD_DIM}"
    if k.dtype != jnp.bfloat16:
        return f"k is {k.dtype}; the kernel takes bfloat16"
    if columns > MAX_COLUMNS:
        return f"{keys} keys, the last one {last_count} times, are {columns} columns; the kernel has {MAX_COLUMNS}"
    if b * h > MAX_HEADS:
        return f"batch * heads is {b * h}; a grid holds {MAX_HEADS}"
    if implementation != "interpret" and gpu_arch() != HOPPER:
        major, minor = gpu_arch()
        return f"the GPU is sm_{major}{minor}; the kernel needs sm_90"
    return None


def _used_columns(keys: int, last_count: int) -> int:
    """The last key has a column for each power of two in its count."""
    return keys - 1 + last_count.bit_count()


def _check_columns(name: str, k: Array, columns: TextColumns, last_count: int) -> None:
    (b, keys, h, dim), width = k.shape, columns.keys.shape[1]
    fit = columns.keys.shape == (b, width, h, dim) and columns.values.shape[::3] == (b, width)
    if not fit or columns.values.shape[1] != h or width < _used_columns(keys, last_count):
        raise ValueError(
            f"{name}: columns {columns.keys.shape} and {columns.values.shape} are not those of k {k.shape} with its "
            f"last key {last_count} times; make them by text_columns"
        )


def _kernel(q, k, v, q_factor, keys, values, *, last_count, amax, interpret):
    from pallas_kernels import _hopper_text  # late: see _plgpu

    if keys is None:
        keys, values = _hopper_text.text_columns(k, v, last_count)
    o, top = _hopper_text.text_forward(
        q, keys, values, q_factor, scale=default_scale(q.shape[-1]), amax=amax, interpret=interpret
    )
    return o if top is None else (o, jnp.max(top, axis=1))


def _written_out(q, k, v, q_factor=None, *_columns, last_count, amax) -> Any:
    """Dense attention to all keys: cuDNN's one pass over many is faster than XLA's several over few."""
    if q_factor is not None:
        q = (q * q_factor[:, :, None, None]).astype(q.dtype)
    k, v = (jnp.pad(x, ((0, 0), (0, last_count - 1), (0, 0), (0, 0)), mode="edge") for x in (k, v))
    o = dense_attention(q, k, v)
    return with_largest(o) if amax else o


def _xla(q, k, v, q_factor=None, *_columns, last_count, amax) -> Any:
    """Chunks of queries, so that the scores held at once are bounded."""
    dtype = compute_dtype(q.dtype)
    b, _, h, _ = q.shape
    keys = k.shape[1]
    extra = jnp.zeros(keys, dtype).at[-1].set(math.log(last_count))

    def chunk(*rows):
        q, *factor = (jnp.swapaxes(x, 0, 1) for x in rows)
        s = jnp.einsum("blhd,bshd->bhls", q, k, preferred_element_type=dtype) * default_scale(q.shape[-1])
        if factor:
            s = s * factor[0][:, None, :, None].astype(dtype)
        p = jax.nn.softmax(s + extra, axis=-1)
        o = jnp.einsum("bhls,bshd->blhd", p.astype(v.dtype), v, preferred_element_type=dtype).astype(q.dtype)
        found = with_largest(o) if amax else (o,)
        return tuple(jnp.swapaxes(x, 0, 1) for x in found)

    arrays = (q,) if q_factor is None else (q, q_factor)
    # A row of scores, probabilities and their low-precision copy.
    found = map_chunks(chunk, tuple(jnp.swapaxes(x, 0, 1) for x in arrays), 12 * b * h * keys)
    o, *top = (jnp.swapaxes(x, 0, 1) for x in found)
    return (o, *top) if amax else o

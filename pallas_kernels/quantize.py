"""INT8 quantisation: the reference's 128x128 tiles, and the scales per row that our own weights use.

Two granularities run through the W8A8 path:

`block`  one scale for a 128x128 tile, as TurboDiffusion's checkpoints hold them (ops/quant/quant.hpp). The divisor
         is 128, not 127: +amax becomes 128 and saturates to 127, -amax is exact. Needed to load those files.
`token`  one scale for a row (a token of the activations, an output channel of the weights). The divisor is 127, so
         nothing saturates, and the scale leaves the sum over K: INT32 accumulation runs through the whole of K.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8

from pallas_kernels.dispatch import dispatch
from pallas_kernels.quantize_kernels import quantize_rows, quantize_tiles, supports_rows, supports_tiles
from pallas_kernels.rounding import AMAX_FLOOR, BLOCK, INT8_MAX_BLOCK, INT8_MAX_TOKEN, to_int8


@partial(jax.jit, static_argnames="implementation")
def quantize_blockwise(
    x: Float[Array, "M K"], *, implementation: str | None = None
) -> tuple[Int8[Array, "M K"], Float[Array, "Mb Kb"]]:
    """INT8 values and one float32 scale for each 128x128 tile: x ~ q * scale[m // 128, k // 128].

    amax = max(1e-8, max|tile|) in float32; q = saturate(rint(x * (128 / amax))), half to even; scale = amax / 128.
    Ragged edge tiles take their maximum over what is there. x: any float dtype. Source: ops/quant/quant.hpp of
    TurboDiffusion.
    """
    if x.ndim != 2:
        raise ValueError(f"quantize_blockwise takes a matrix [M, K], got shape {x.shape}")
    return dispatch(
        "quantize_blockwise",
        # With no norm in front XLA's two passes win: 0.113 ms against 0.147 for [32760, 1536] on an H100, 2026-11.
        implementation or "xla",
        (x,),
        xla=tiles_xla,
        kernel=lambda x, interpret: with_ragged_tiles(quantize_tiles(x, interpret=interpret), x, tiles_xla),
        unsupported=supports_tiles(*x.shape),
    )


@partial(jax.jit, static_argnames="implementation")
def quantize_per_token(
    x: Float[Array, "*batch K"], *, implementation: str | None = None
) -> tuple[Int8[Array, "*batch K"], Float[Array, "*batch"]]:
    """INT8 values and one float32 scale for each row of the last axis: x ~ q * scale[..., None].

    amax = max(1e-8, max|row|) in float32; q = rint(x * (127 / amax)), half to even; scale = amax / 127.
    """
    q, scale = dispatch(
        "quantize_per_token",
        implementation,
        (x.reshape(1, -1, x.shape[-1]),),
        xla=rows_xla,
        kernel=quantize_rows,
        unsupported=supports_rows(x.shape[-1]),
    )
    return q.reshape(x.shape), scale.reshape(x.shape[:-1])


def quantize_per_channel(
    weight: Float[Array, "*stack N K"], *, implementation: str | None = None
) -> tuple[Int8[Array, "*stack N K"], Float[Array, "*stack N"]]:
    """Weights [N (out), K (in)] to INT8 with one float32 scale for each output channel (stacked layers in front)."""
    return quantize_per_token(weight, implementation=implementation)


def rows_xla(x: Array, amax: Array | None = None) -> tuple[Array, Array]:
    """`quantize_per_token` in plain JAX. amax: the largest magnitude of each row, if it is known."""
    x = x.astype(jnp.float32)
    amax = jnp.maximum(jnp.max(jnp.abs(x), axis=-1) if amax is None else amax, AMAX_FLOOR)
    return to_int8(x * (INT8_MAX_TOKEN / amax)[..., None]), amax / INT8_MAX_TOKEN


def tiles_xla(x: Array) -> tuple[Array, Array]:
    """`quantize_blockwise` in plain JAX."""
    m, k = x.shape
    padded = jnp.pad(x.astype(jnp.float32), ((0, -m % BLOCK), (0, -k % BLOCK)))
    tiles = padded.reshape(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    amax = jnp.maximum(jnp.max(jnp.abs(tiles), axis=(1, 3)), AMAX_FLOOR)
    q = to_int8(tiles * (INT8_MAX_BLOCK / amax)[:, None, :, None])
    return q.reshape(padded.shape)[:m, :k], amax / INT8_MAX_BLOCK


def with_ragged_tiles(quantised: tuple[Array, Array], x: Array, xla) -> tuple[Array, Array]:
    """The kernel's whole tiles and, of x's last rows (under 128), what `xla` makes of them."""
    whole = x.shape[0] // BLOCK * BLOCK
    if whole == x.shape[0]:
        return quantised
    tail = xla(x[whole:])
    # Without it XLA 0.11.2 takes the kernel's output for the update's operand and fails: "DUS target must be ...".
    quantised = lax.optimization_barrier(quantised)
    return quantised[0].at[whole:].set(tail[0]), quantised[1].at[whole // BLOCK :].set(tail[1])

"""W8A8 linear layer: INT8 weights and activations, INT32 sums, float32 scales.

The granularity follows from the shape of `weight_scale`:

[ceil(N/128), ceil(K/128)]  the reference's tiles (TurboDiffusion, ops/gemm): activations in 128x128 tiles over the
    flattened rows; for each tile t of K an INT32 dot, and in float32, t increasing,
    acc += dot_t * (scale_x[m // 128, t] * scale_w[n // 128, t]). Cast to the output dtype, then add the bias in it.
[N]  one scale per output channel and one per token: a single INT32 sum over K, scales, bias and activation in
    float32, one rounding at the end. Faster (the tensor core never stops to rescale) and closer.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8, Num

from pallas_kernels._hopper_round_ahead import supports_rounding_ahead
from pallas_kernels.dispatch import dispatch, gpu_arch
from pallas_kernels.int8_gemm_hopper import HopperTiles, hopper_gemm, supports_hopper
from pallas_kernels.int8_gemm_portable import PortableTiles, portable_gemm, supports_portable
from pallas_kernels.quantize import quantize_blockwise, quantize_per_token, rows_xla
from pallas_kernels.rounding import BLOCK, rounded
from pallas_kernels.row_measures import MEASURES, Measure, measure_rows
from pallas_kernels.tuning import tiles

HOPPER = (9, 0)
Activation = Literal["gelu_tanh"] | None
# |q| <= 128 on both sides: past this many terms an INT32 sum could wrap.
MAX_K = 2**31 // (128 * 128) - 1
# Elements of the INT32 product that the XLA path holds at a time: 64 MiB, inside which CPU caches still help.
XLA_CHUNK = 2**24


@partial(jax.jit, static_argnames=("activation", "out_dtype", "measure", "implementation"))
def int8_linear(
    x: Num[Array, "*batch K"],
    weight_q: Int8[Array, "N K"],
    weight_scale: Float[Array, "..."],
    bias: Float[Array, " N"] | None = None,
    *,
    x_scale: Float[Array, "..."] | None = None,
    x_amax: Float[Array, "*batch"] | None = None,
    activation: Activation = None,
    residual: Float[Array, "*batch N"] | None = None,
    gate: Float[Array, "..."] | None = None,
    out_dtype: DTypeLike | None = None,
    measure: Measure | None = None,
    implementation: str | None = None,
) -> Any:
    """activation(x @ weight.T + bias), then residual + gate * that where a residual is given.

    x: any float dtype, quantised here; or int8 with its `x_scale`, as `norm_modulate_quantize` and the quantisers
        return it ([*batch] for weight_scale [N]; [ceil(M/128), ceil(K/128)], M the product of batch, for tiles).
    x_amax: the largest magnitude of each row of a float x, where it is known and weight_scale is [N]: the same numbers,
        but the rows are rounded during the product where that is faster (`rounds_rows`).
    weight_q: [N, K], out by in, as torch stores it. weight_scale: [N] or [ceil(N/128), ceil(K/128)], float32.
    gate: anything that broadcasts against the output, [B, 1, N] in the DiT. Needs `residual`.
    out_dtype: of the result; default x's, or the residual's or bfloat16 when x is int8.
    measure: return also, float32 [*batch], the largest magnitude of each row of the result ("amax") or the sum of its
        squares ("squares"), as rounded to its dtype.
    Returns [*batch, N], or that and the measure.
    Not differentiable: raises NotImplementedError under `jax.grad` or `jax.jvp` with respect to x.
    """
    n, k = _check(x, weight_q, weight_scale, bias, x_scale, activation, residual, gate)
    _check_rows(x, weight_scale, x_amax, measure)
    if out_dtype is None:
        if jnp.issubdtype(x.dtype, jnp.floating):
            out_dtype = x.dtype
        else:
            out_dtype = jnp.bfloat16 if residual is None else residual.dtype
    dtype = jnp.dtype(out_dtype)
    batch = x.shape[:-1]
    x = _no_derivative(x)
    rows = x.reshape(-1, k)
    ahead = None
    if x_amax is not None and rounds_rows(n, k, x.dtype):
        ahead = x_amax.reshape(-1).astype(jnp.float32)
    elif x_scale is None:
        quantize = quantize_blockwise if weight_scale.ndim == 2 else quantize_per_token
        # "xla" is forced throughout; a kernel is forced for the product alone.
        rows, x_scale = quantize(rows, implementation="xla" if implementation == "xla" else None)
    elif weight_scale.ndim == 1:
        x_scale = x_scale.reshape(-1)
    # A gate that is the same for all rows is part of the kernels; any other is applied outside.
    fused = residual is not None and (gate is None or gate.size == n)
    product = dtype if fused or residual is None or weight_scale.ndim == 2 else jnp.float32
    inside = measure if fused or residual is None else None
    y, measured = dispatch(
        "int8_linear",
        implementation,
        (
            rows,
            weight_q,
            x_scale,
            weight_scale,
            bias,
            residual.reshape(-1, n) if residual is not None and fused else None,
            gate.reshape(n) if fused and gate is not None else None,
            ahead,
        ),
        xla=partial(_xla, activation=activation, dtype=product, measure=inside),
        kernel=partial(_kernel, activation=activation, dtype=product, measure=inside),
        unsupported=supports(rows.shape[0], n, k, product),
    )
    y = y.reshape(*batch, n)
    if residual is not None and not fused:
        y = add_gated(residual, gate, y, dtype)
    if measure is None:
        return y
    return y, measure_rows(y, measure) if inside is None else measured.reshape(batch)


def rounds_rows(n: int, k: int, dtype: DTypeLike = jnp.bfloat16) -> bool:
    """Whether `int8_linear` of [N, K] weights, one scale a channel, is faster for knowing the maxima of x's rows."""
    if gpu_arch() != HOPPER or jnp.dtype(dtype) != jnp.bfloat16 or supports_rounding_ahead(k):
        return False
    return tiles("int8_rows_rounded", n=n, k=k)["ahead"]


def measures_rows(n: int, k: int, dtype: DTypeLike = jnp.bfloat16) -> bool:
    """Whether the product of `int8_linear` by [N, K] weights takes the `measure` of its rows without another pass."""
    return gpu_arch() == HOPPER and supports_hopper(n, k, dtype) is None


def supports(m: int, n: int, k: int, dtype: DTypeLike) -> str | None:
    """Why the kernels cannot run a product of this shape, or None if they can."""
    if m == 0:
        return "there are no rows"
    if gpu_arch() < (8, 0):
        return f"compute capability {gpu_arch()} has no INT8 mma"
    return (supports_hopper if gpu_arch() == HOPPER else supports_portable)(n, k, dtype)


def add_gated(residual: Array, gate: Array | None, y: Array, dtype: jnp.dtype) -> Array:
    """residual + gate * y in float32, rounded once."""
    y = y.astype(jnp.float32)
    if gate is not None:
        y = gate.astype(jnp.float32) * y
    return (residual.astype(jnp.float32) + y).astype(dtype)


def _activate(y: Array, activation: Activation) -> Array:
    return y if activation is None else jax.nn.gelu(y, approximate=True)


def _kernel(x, weight_q, x_scale, weight_scale, bias, residual, gate, x_amax, *, measure, **options):
    operands = x, weight_q, x_scale, weight_scale.astype(jnp.float32), bias, residual, gate
    facts = {
        "m": x.shape[0],
        "n": weight_q.shape[0],
        "k": x.shape[1],
        "granularity": "blocks" if weight_scale.ndim == 2 else "channels",
        "dtype": jnp.dtype(options["dtype"]).name,
    }
    if gpu_arch() == HOPPER:
        shape = HopperTiles(**tiles("int8_gemm_hopper", **facts))
        return hopper_gemm(*operands, tiles=shape, x_amax=x_amax, measure=measure, **options)
    chosen = PortableTiles(**tiles("int8_gemm_portable", **facts))
    cp_async = gpu_arch() < HOPPER and not options["interpret"]
    y = portable_gemm(*operands, tiles=chosen, cp_async=cp_async, **options)
    return y, None if measure is None else measure_rows(y, measure)


def _xla(x, weight_q, x_scale, weight_scale, bias, residual, gate, x_amax, *, activation, dtype, measure):
    if x_amax is not None:
        x, x_scale = rows_xla(x, x_amax)
    y = _product(x, weight_q, x_scale, weight_scale, bias, residual, gate, activation=activation, dtype=dtype)
    return y, None if measure is None else measure_rows(y, measure)


def _product(x, weight_q, x_scale, weight_scale, bias, residual, gate, *, activation, dtype):
    """Rows in chunks, so that no product of more than XLA_CHUNK (or, in tiles, 2^20) elements is held."""
    m, n = x.shape[0], weight_q.shape[0]
    weight_scale = weight_scale.astype(jnp.float32)
    if weight_scale.ndim == 2:
        product, rows = (
            _tile_product(weight_q, weight_scale, bias, activation, dtype),
            max(BLOCK, 2**20 // n // BLOCK * BLOCK),
        )
        x_scale = jnp.repeat(x_scale, BLOCK, axis=0)[:m]
    else:
        product, rows = _channel_product(weight_q, weight_scale, bias, activation), max(1, XLA_CHUNK // n)

    def chunk(part):
        q, scale, residual = part
        y = product(q, scale)
        return y.astype(dtype) if residual is None else add_gated(residual, gate, y, dtype)

    return _map_rows(chunk, (x, x_scale, residual), rows)


def _channel_product(weight_q, weight_scale, bias, activation):
    def product(q, scale):
        total = lax.dot_general(q, weight_q, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        y = total.astype(jnp.float32) * (scale[:, None] * weight_scale)
        if bias is not None:
            y = y + bias.astype(jnp.float32)
        return _activate(y, activation)

    return product


def _tile_product(weight_q, weight_scale, bias, activation, dtype):
    """Tiles of K in the inner loop over a few rows: the running sum stays in a core's cache."""
    (n, k), tiles = weight_q.shape, weight_scale.shape[1]
    padding = tiles * BLOCK - k
    # Tiles in front, once per call: each step of the loop then reads one contiguous matrix.
    weight = jnp.pad(weight_q, ((0, 0), (0, padding))).reshape(n, tiles, BLOCK).swapaxes(0, 1)
    column_scale = jnp.repeat(weight_scale, BLOCK, axis=0)[:n].T

    def product(q, scale):
        q = jnp.pad(q, ((0, 0), (0, padding))).reshape(-1, tiles, BLOCK)

        def step(t, total):
            dot = lax.dot_general(q[:, t], weight[t], (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
            return total + dot.astype(jnp.float32) * (scale[:, t, None] * column_scale[t])

        y = rounded(lax.fori_loop(0, tiles, step, jnp.zeros((q.shape[0], n), jnp.float32)), dtype)
        if bias is not None:
            y = rounded(y + bias.astype(jnp.float32), dtype)
        return _activate(y, activation)

    return product


def _map_rows(f, rows, size: int):
    """f over even chunks of at most `size` rows; if none divide the rows, the last is filled up with zeros (and the
    result copied), rather than traced a second time."""
    m = jax.tree.leaves(rows)[0].shape[0]
    if m <= size:
        return f(rows)
    fewest = -(-m // size)
    chunks = next((n for n in range(fewest, 2 * fewest) if m % n == 0), fewest)
    size = -(-m // chunks)
    split = jax.tree.map(
        lambda a: jnp.pad(a, ((0, -m % size), *[(0, 0)] * (a.ndim - 1))).reshape(-1, size, *a.shape[1:]), rows
    )
    out = lax.map(f, split)
    return out.reshape(-1, *out.shape[2:])[:m]


@jax.custom_jvp
def _no_derivative(x):
    return x


@_no_derivative.defjvp
def _raise(primals, tangents):
    raise NotImplementedError(
        "int8_linear has no derivative (rounding is flat): train the unquantised weights, or stop_gradient x"
    )


def _check(x, weight_q, weight_scale, bias, x_scale, activation, residual, gate) -> tuple[int, int]:
    if weight_q.ndim != 2 or weight_q.dtype != jnp.int8:
        raise ValueError(f"int8_linear: weight_q is int8 [N, K], got {weight_q.dtype}{list(weight_q.shape)}")
    n, k = weight_q.shape
    if x.shape[-1] != k:
        raise ValueError(f"int8_linear: x has {x.shape[-1]} features, weight_q {list(weight_q.shape)} takes {k}")
    tiles = (-(-n // BLOCK), -(-k // BLOCK))
    if weight_scale.shape not in ((n,), tiles):
        raise ValueError(
            f"int8_linear: weight_scale {list(weight_scale.shape)} is neither [{n}] (per output channel) "
            f"nor {list(tiles)} (128x128 tiles)"
        )
    if k > MAX_K:
        raise ValueError(f"int8_linear: K = {k} could overflow the INT32 sum; at most {MAX_K}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"int8_linear: bias {list(bias.shape)} is not [{n}]")
    if (x.dtype == jnp.int8) != (x_scale is not None):
        raise ValueError(f"int8_linear: x_scale goes with an int8 x and only with it, got x of {x.dtype}")
    if x_scale is not None:
        rows = 1
        for size in x.shape[:-1]:
            rows *= size
        expected = x.shape[:-1] if weight_scale.ndim == 1 else (-(-rows // BLOCK), tiles[1])
        if x_scale.shape != expected:
            raise ValueError(f"int8_linear: x_scale {list(x_scale.shape)} should be {list(expected)}")
    if activation not in (None, "gelu_tanh"):
        raise ValueError(f"int8_linear: activation={activation!r} is unknown; take None or 'gelu_tanh'")
    if residual is not None and residual.shape != (*x.shape[:-1], n):
        raise ValueError(f"int8_linear: residual {list(residual.shape)} should be {[*x.shape[:-1], n]}")
    if gate is not None and residual is None:
        raise ValueError("int8_linear: gate scales what is added to a residual; none was given")
    return n, k


def _check_rows(x, weight_scale, x_amax, measure) -> None:
    if measure is not None and measure not in MEASURES:
        raise ValueError(f"int8_linear: measure={measure!r} is unknown; take None or one of {', '.join(MEASURES)}")
    if x_amax is None:
        return
    if x.dtype == jnp.int8 or weight_scale.ndim != 1:
        raise ValueError("int8_linear: x_amax goes with a float x and one scale an output channel")
    if x_amax.shape != x.shape[:-1]:
        raise ValueError(f"int8_linear: x_amax {list(x_amax.shape)} should be {list(x.shape[:-1])}")

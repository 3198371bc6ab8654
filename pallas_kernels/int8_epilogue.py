"""What follows the INT32 sums of `int8_linear`, in registers: scales, bias, activation, gated residual."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import lax

from pallas_kernels import _plgpu as plgpu


def epilogue(total, *, row_scale, column_scale, bias, gate, residual, activation, dtype, layout):
    """A tile of sums to float32 results that only the last rounding to dtype separates from the output.

    total: int32 with row_scale [m] and column_scale [n], or float32 sums of tiles with neither: those round to
        dtype after the sum and after the bias, as the reference does.
    bias, gate: [n] float32 or None. residual: a function that returns the tile of the residual, or None.
    layout: of the tile in registers.
    """

    def across(vector, axis):
        return plgpu.layout_cast(lax.broadcast_in_dim(vector, total.shape, [axis]), layout)

    y = total.astype(jnp.float32)
    tiled = row_scale is None
    if tiled:
        y = y.astype(dtype).astype(jnp.float32)
    else:
        y = y * across(row_scale, 0) * across(column_scale, 1)
    if bias is not None:
        y = y + across(bias, 1)
        if tiled:
            y = y.astype(dtype).astype(jnp.float32)
    if activation is not None:
        y = gelu_tanh(y)
    if residual is not None:
        if gate is not None:
            y = y * across(gate, 1)
        y = residual().astype(jnp.float32) + y
    return y


def gelu_tanh(y):
    """y (1 + tanh(a y + b y^3)) / 2 in six operations. tanh.approx errs by 2^-11, so this by at most 2^-12 |y|: an
    eighth of rounding y to bf16."""
    a = math.sqrt(2 / math.pi)
    half = 0.5 * y
    return half * jnp.tanh(y * (y * y * (0.044715 * a) + a)) + half

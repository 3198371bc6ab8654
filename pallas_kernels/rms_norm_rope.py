"""RMSNorm over the full width and 3-D rotary embedding in one pass: what stands between q, k and attention.

Bound by memory. Expected on H100 (3.35 TB/s) for 32,760 tokens of bf16: 1,536 wide 0.20 GB read and written, 0.03 GB
of angles: 0.07 ms; 5,120 wide 0.70 GB: 0.21 ms. Apart, the norm and the rotation would move q twice and in float32.
Plain loads and stores only: no TMA, no tensor core, so one kernel serves every architecture.
"""

from __future__ import annotations

import functools
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels import _plgpu as plgpu
from pallas_kernels._loads import Places, load_rows
from pallas_kernels.dispatch import dispatch
from pallas_kernels.rotary import Rotary, check_angles, turned

PAIRS = 128  # pairs that a warpgroup takes at a time, one a thread
ROWS = 8  # tokens that a block takes in turn, so that the weight is loaded once for them


def rms_norm_rope(
    x: Float[Array, "B L H D"],
    weight: Float[Array, "H*D"],
    cos: Float[Array, "L D/2"],
    sin: Float[Array, "L D/2"],
    *,
    eps: float = 1e-6,
    implementation: str | None = None,
) -> Float[Array, "B L H D"]:
    """RMSNorm over all heads together (x * rsqrt(mean(x^2) + eps) * weight), then RoPE on interleaved pairs.

    Pair j of a head is its elements (2j, 2j+1): out[2j] = a cos - b sin, out[2j+1] = a sin + b cos, the angle of
    token l and pair j, the same for all heads. Everything in float32, rounded once to x's dtype.
    Differentiable in forward and reverse mode. Source: wan/modules/model.py (WanRMSNorm, rope_apply) of Wan2.1.
    """
    check_angles("rms_norm_rope", x, weight, cos, sin)
    return _rms_norm_rope(x, weight, cos, sin, eps, implementation)


@partial(jax.custom_jvp, nondiff_argnums=(4, 5))
@partial(jax.jit, static_argnums=(4, 5))
def _rms_norm_rope(x, weight, cos, sin, eps, implementation):
    return dispatch(
        "rms_norm_rope",
        implementation,
        (x, weight, cos, sin),
        xla=partial(_xla, eps=eps),
        kernel=partial(_kernel, eps=eps),
        unsupported=supports(x),
    )


@_rms_norm_rope.defjvp
def _jvp(eps, implementation, primals, tangents):
    """The kernel has no derivative of its own: XLA's serves."""
    _, tangent = jax.jvp(partial(_xla, eps=eps), primals, tangents)
    return _rms_norm_rope(*primals, eps, implementation), tangent


def supports(x: Array) -> str | None:
    """Why the kernel cannot run, or None if it can."""
    _, _, heads, dim = x.shape
    if x.dtype != jnp.bfloat16:
        return f"a pair of {x.dtype.name} does not fit the 32 bits that the kernel moves; bfloat16 does"
    if dim % 2 or PAIRS % (dim // 2) or heads * dim % (2 * PAIRS):
        return f"{heads} heads of {dim} do not divide into runs of {PAIRS} pairs with the same angles"
    return None


def _kernel(x, weight, cos, sin, *, eps, interpret):
    """A pair of bf16 is one uint32: rotation stays within a thread, and no element is ever shuffled."""
    batch, length, heads, dim = x.shape
    width = heads * dim // 2
    layout = plgpu.Layout.WG_STRIDED((PAIRS,), vec_size=1)
    runs = range(0, width, PAIRS)
    weight, cos, sin = (v.astype(jnp.float32) for v in (weight, cos, sin))
    angles = Places(period=dim // 2)
    pairs = lax.bitcast_convert_type(x.reshape(batch, length, width, 2), jnp.uint32)

    def body(pairs, weight, cos, sin, out):
        def at(places, ref):
            return load_rows(ref, (PAIRS,), layout, places=places, interpret=interpret)

        weights = [[at(Places(2, 2 * run + half), weight) for half in (0, 1)] for run in runs]
        b = lax.axis_index("batch")

        @pl.loop(0, ROWS)
        def _(i):
            row = lax.axis_index("rows") * ROWS + i

            @pl.when(row < length)
            def _():
                c, s = (at(angles, ref.at[row]) for ref in (cos, sin))
                here = (pairs.at[b, row, pl.ds(run, PAIRS)] for run in runs)
                values = [_unpack(plgpu.load(ref, layout=layout, optimized=False)) for ref in here]
                squares = functools.reduce(jnp.add, (first * first + second * second for first, second in values))
                scale = lax.rsqrt(jnp.sum(squares) * (0.5 / width) + eps)
                for run, value, weight in zip(runs, values, weights, strict=True):
                    first, second = (v * scale * w for v, w in zip(value, weight, strict=True))
                    turned = _pack(first * c - second * s, first * s + second * c)
                    out.at[b, row, pl.ds(run, PAIRS)][...] = turned

    body.__name__ = "rms_norm_rope"
    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch, length, width), jnp.uint32),
        grid=(batch, pl.cdiv(length, ROWS)),
        grid_names=("batch", "rows"),
        compiler_params=plgpu.CompilerParams(
            # Solving for the layouts of some hundred small vectors takes ten seconds; here each load states its own.
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            # Pallas would put two in front of and behind every store; the only memory shared is the reduction's own,
            # which has its own.
            unsafe_no_auto_barriers=True,
        ),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(pairs, weight, cos, sin)
    return lax.bitcast_convert_type(out, jnp.bfloat16).reshape(x.shape)


def _unpack(pairs):
    """The two bfloat16 of a uint32 as float32: the upper half of a float32 is a bfloat16."""
    first = lax.bitcast_convert_type(pairs << 16, jnp.float32)
    return first, lax.bitcast_convert_type(pairs & jnp.uint32(0xFFFF0000), jnp.float32)


def _pack(first, second):
    """Two float32 to the uint32 of their bfloat16, half to even (NaN is not preserved)."""

    def rounded(x):
        bits = lax.bitcast_convert_type(x, jnp.uint32)
        return bits + jnp.uint32(0x7FFF) + ((bits >> 16) & jnp.uint32(1))

    return (rounded(second) & jnp.uint32(0xFFFF0000)) | (rounded(first) >> 16)


def _xla(x, weight, cos, sin, *, eps):
    batch, length, *_ = x.shape
    mean_square = jnp.mean(jnp.square(x.reshape(batch, length, -1).astype(jnp.float32)), axis=-1)
    return turned(x, Rotary(lax.rsqrt(mean_square + eps), weight, cos, sin))

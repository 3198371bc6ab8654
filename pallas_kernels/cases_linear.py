"""The linear kernels at the shapes of the real Wan models, for `pallas_kernels.aot`."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.aot import TARGETS, Case
from pallas_kernels.int8_linear import int8_linear
from pallas_kernels.norm_modulate_quantize import norm_modulate_quantize
from pallas_kernels.quantize import quantize_blockwise, quantize_per_token
from pallas_kernels.rms_norm_rope import rms_norm_rope
from pallas_kernels.rounding import BLOCK

# Tokens of 81 frames, width, feed-forward width, heads: the 1.3B model at 480p, the 14B model at 720p.
MODELS = {"1.3b": (32760, 1536, 8960, 12), "14b": (75600, 5120, 13824, 40)}
# The portable kernels' tiles do not depend on the matrices: one model shows what each GPU but Hopper makes of them.
TARGETS_OF = {"1.3b": ("h100",), "14b": tuple(TARGETS)}

Shape = jax.ShapeDtypeStruct


def compile_cases() -> list[Case]:
    """Every linear kernel, every granularity and every epilogue."""
    return [*_products(), *_handed_on(), *_quantisers(), *_rotations()]


def memory_cases() -> list[Case]:
    """The XLA path of the widest product, whose INT32 result would be 1.2 GB if it were held whole."""
    tokens, width, hidden, _ = MODELS["1.3b"]
    weights = {
        "channels": [Shape((hidden,), jnp.float32), Shape((tokens,), jnp.float32)],
        "blocks": [
            Shape((_tiles(hidden), _tiles(width)), jnp.float32),
            Shape((_tiles(tokens), _tiles(width)), jnp.float32),
        ],
    }
    fn = partial(_product, gelu=True, implementation="xla")
    matrices = [Shape((tokens, width), jnp.int8), Shape((hidden, width), jnp.int8)]
    bias = Shape((hidden,), jnp.bfloat16)
    return [
        Case(f"int8_linear_xla_{kind}", fn, [*matrices, *scales, bias], ("h100",), kernels=0)
        for kind, scales in weights.items()
    ]


def _products():
    for model, (tokens, width, hidden, _) in MODELS.items():
        for k, n in ((width, width), (width, hidden), (hidden, width)):
            up = n > k
            for granularity in ("channels", "blocks"):
                if granularity == "blocks":
                    scales = [
                        Shape((_tiles(n), _tiles(k)), jnp.float32),
                        Shape((_tiles(tokens), _tiles(k)), jnp.float32),
                    ]
                else:
                    scales = [Shape((n,), jnp.float32), Shape((tokens,), jnp.float32)]
                args = [Shape((tokens, k), jnp.int8), Shape((n, k), jnp.int8), *scales, Shape((n,), jnp.bfloat16)]
                if not up:
                    args += [Shape((tokens, n), jnp.bfloat16), Shape((n,), jnp.float32)]
                yield Case(
                    f"int8_linear_{granularity}_{model}_{k}_{n}", partial(_product, gelu=up), args, TARGETS_OF[model]
                )


def _handed_on():
    """A product that tells of its rows, and one that rounds rows of which it was told."""
    tokens, width, hidden, _ = MODELS["1.3b"]
    for measure, n in (("amax", hidden), ("squares", width)):
        scales = [Shape((n,), jnp.float32), Shape((tokens,), jnp.float32)]
        args = [Shape((tokens, width), jnp.int8), Shape((n, width), jnp.int8), *scales, Shape((n,), jnp.bfloat16)]
        fn = partial(_product, gelu=measure == "amax", measure=measure)
        yield Case(f"int8_linear_{measure}_1.3b_{width}_{n}", fn, args, ("h100",))
    for k in (hidden, width):
        yield Case(f"int8_linear_rounding_1.3b_{k}_{width}", _rounding, _rounding_args(tokens, k, width), ("h100",))


def _rounding_args(tokens, k, n):
    x, weight_q = Shape((tokens, k), jnp.bfloat16), Shape((n, k), jnp.int8)
    vectors = [Shape((n,), jnp.float32), Shape((tokens,), jnp.float32), Shape((n,), jnp.bfloat16)]
    return [x, weight_q, *vectors, Shape((tokens, n), jnp.bfloat16), Shape((n,), jnp.float32)]


def _rounding(x, weight_q, weight_scale, x_amax, bias, residual, gate):
    return int8_linear(
        x, weight_q, weight_scale, bias, x_amax=x_amax, residual=residual, gate=gate, implementation="mosaic_gpu"
    )


def _quantisers():
    for model, (tokens, width, hidden, _) in MODELS.items():
        for columns in (width, hidden):
            x = Shape((tokens, columns), jnp.bfloat16)
            for quantize, kind in ((quantize_per_token, "rows"), (quantize_blockwise, "tiles")):
                fn = partial(quantize, implementation="mosaic_gpu")
                yield Case(f"quantize_{kind}_{model}_{columns}", fn, [x], TARGETS_OF[model])
        args = [Shape((1, tokens, width), jnp.bfloat16), *[Shape((1, 1, width), jnp.float32)] * 2]
        for granularity in ("token", "block"):
            fn = partial(norm_modulate_quantize, granularity=granularity, implementation="mosaic_gpu")
            yield Case(f"norm_modulate_quantize_{granularity}_{model}_{width}", fn, args, TARGETS_OF[model])


def _rotations():
    for model, (tokens, width, _, heads) in MODELS.items():
        angles = Shape((tokens, 64), jnp.float32)
        args = [Shape((1, tokens, heads, 128), jnp.bfloat16), Shape((width,), jnp.float32), angles, angles]
        fn = partial(rms_norm_rope, implementation="mosaic_gpu")
        yield Case(f"rms_norm_rope_{model}_{heads}_heads", fn, args, TARGETS_OF[model])


def _product(
    x,
    weight_q,
    weight_scale,
    x_scale,
    bias,
    residual=None,
    gate=None,
    *,
    gelu,
    measure=None,
    implementation="mosaic_gpu",
):
    return int8_linear(
        x,
        weight_q,
        weight_scale,
        bias,
        x_scale=x_scale,
        activation="gelu_tanh" if gelu else None,
        residual=residual,
        gate=gate,
        measure=measure,
        implementation=implementation,
    )


def _tiles(size: int) -> int:
    return -(-size // BLOCK)

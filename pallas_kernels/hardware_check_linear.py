"""The linear kernels on a real GPU: agreement with exact arithmetic, and time against XLA in the same run.

    python -m pallas_kernels.hardware_check_linear --json OUT [--bench] [--sweep] [--only TEXT]

Checks take about a minute, --bench a minute and a half, --sweep (the tiles of the INT8 product) half of one. Each
case stands alone: one that fails is reported and the others run. Expect every error under its bound, and
`int8_linear` ahead of bf16.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch import compiling_for, gpu_arch
from pallas_kernels.int8_gemm_hopper import HopperTiles, hopper_gemm
from pallas_kernels.int8_gemm_portable import PortableTiles, portable_gemm
from pallas_kernels.int8_linear import int8_linear, rounds_rows
from pallas_kernels.norm_modulate_quantize import norm_modulate_quantize
from pallas_kernels.quantize import quantize_blockwise, quantize_per_channel, quantize_per_token
from pallas_kernels.rms_norm_rope import rms_norm_rope
from pallas_kernels.row_measures import MEASURES, measure_rows
from pallas_kernels.timing import seconds

# (M, K, N) of the two Wan models at 480p: attention, then the two of the feed-forward.
WAN = [
    (32760, 1536, 1536),
    (32760, 1536, 8960),
    (32760, 8960, 1536),
    (32760, 5120, 5120),
    (32760, 5120, 13824),
    (32760, 13824, 5120),
]
# Two at a time against the first: cluster, width, order of the tiles.
SWEPT = [
    HopperTiles(256, 4, 1, 8),
    HopperTiles(256, 4, 2, 8),
    HopperTiles(256, 4, 1, 4),
    HopperTiles(256, 4, 1, 16),
    HopperTiles(256, 4, 2, 16),
    HopperTiles(192, 4, 1, 8),
    HopperTiles(192, 4, 2, 8),
    HopperTiles(128, 6, 2, 8),
]


def random_product(m: int, k: int, n: int, blocks: bool, dtype=jnp.bfloat16, seed: int = 0) -> tuple:
    """x, its INT8 form and scales, the weights' and a bias; x with outlier channels, x20."""
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (m, k)) * jnp.where(jnp.arange(k) % 100 == 7, 20.0, 1.0)
    weight = jax.random.normal(keys[1], (n, k)) / np.sqrt(k)
    x, bias = x.astype(dtype), jax.random.normal(keys[2], (n,)).astype(dtype)
    q, x_scale = (quantize_blockwise if blocks else quantize_per_token)(x)
    weight_q, weight_scale = (quantize_blockwise if blocks else quantize_per_channel)(weight)
    return x, q, x_scale, weight_q, weight_scale, bias


def exact_rows(q, x_scale, weight_q, weight_scale, bias, activation, rows) -> np.ndarray:
    """Some rows of the product, with exact integers and float64 scales, on the host."""
    q, weight_q = np.asarray(q)[rows].astype(np.float64), np.asarray(weight_q).astype(np.float64)
    x_scale, weight_scale = np.asarray(x_scale, np.float64), np.asarray(weight_scale, np.float64)
    if weight_scale.ndim == 1:
        y = q @ weight_q.T * x_scale[rows][:, None] * weight_scale
    else:
        (n, k) = weight_q.shape
        spread = np.repeat(np.repeat(weight_scale, 128, 0)[:n], 128, 1)[:, :k]
        y = (q * np.repeat(x_scale, 128, 1)[rows // 128, :k]) @ (weight_q * spread).T
    y = y + np.asarray(bias.astype(jnp.float32), np.float64)
    if activation:
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    return y


def check_product(m, k, n, blocks, activation=None, residual=False, dtype=jnp.bfloat16) -> dict[str, Any]:
    _, q, x_scale, weight_q, weight_scale, bias = random_product(m, k, n, blocks, dtype)
    extra = {}
    if residual:
        keys = jax.random.split(jax.random.key(9))
        extra = {"residual": jax.random.normal(keys[0], (m, n)).astype(dtype), "gate": jax.random.normal(keys[1], (n,))}
    run = jax.jit(partial(int8_linear, activation=activation, out_dtype=dtype, implementation="mosaic_gpu"))
    y, again = (run(q, weight_q, weight_scale, bias, x_scale=x_scale, **extra) for _ in range(2))
    expected = partial(exact_rows, q, x_scale, weight_q, weight_scale, bias, activation)
    # One rounding of the result, two more where tiles round as the reference does; the approximate tanh is below.
    bound = (1 if dtype == jnp.bfloat16 else 2e-3) * (4e-3 if blocks else 2.5e-3)
    result = _against_rows(y, expected, bound, extra)
    return result | {"repeatable": bool((y == again).all()), "ok": result["ok"] and bool((y == again).all())}


def _against_rows(y, expected, bound, extra) -> dict[str, Any]:
    """The relative error of some rows of y against `expected(rows)` in float64, gated and added as `extra` says."""
    y = np.asarray(y.astype(jnp.float32))
    rows = np.unique(np.r_[0, len(y) - 1, np.random.default_rng(0).integers(0, len(y), 100)])
    reference = expected(rows)
    if extra:
        base = np.asarray(extra["residual"].astype(jnp.float32), np.float64)[rows]
        reference = base + np.asarray(extra["gate"], np.float64) * reference
    error = float(np.linalg.norm(y[rows] - reference) / np.linalg.norm(reference))
    finite = bool(np.isfinite(y).all())
    return {"relative_error": error, "bound": bound, "finite": finite, "ok": error <= bound and finite}


def checks() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    yield "int8_linear channels (32760, 1536, 1536)", partial(check_product, 32760, 1536, 1536, False)
    yield "int8_linear blocks (4096, 13824, 512)", partial(check_product, 4096, 13824, 512, True, None, True)
    for blocks in (False, True):
        kind = "blocks" if blocks else "channels"
        yield f"int8_linear {kind} gelu", partial(check_product, 77, 256, 192, blocks, "gelu_tanh")
        yield f"int8_linear {kind} residual", partial(check_product, 1000, 1536, 256, blocks, None, True)
        yield f"int8_linear {kind} float32", partial(check_product, 300, 384, 192, blocks, None, True, jnp.float32)
        for machine in ("cluster", "tma", "cp.async"):
            yield f"int8 product forced {machine} {kind}", partial(check_forced, 1000, 1536, 512, blocks, machine)
    for shape in ((32760, 8960, 1536), (32760, 1536, 1536), (1000, 512, 320), (77, 256, 192), (8, 1536, 64)):
        yield f"int8_linear rounding {shape}", partial(check_rounding, *shape)
    for measure in MEASURES:
        yield f"int8_linear {measure}", partial(check_measure, 1000, 1536, 640, measure)
    # One of these, in the first run, left its output unwritten: which dimension of a single tile does it?
    for shape in ((1, 128, 64), (1, 256, 192), (128, 128, 128), (128, 256, 64), (128, 128, 192), (8, 256, 192)):
        yield f"int8_linear one tile {shape}", partial(check_product, *shape, False)
    for shape in ((32760, 1536), (300, 13824), (1, 640)):
        yield f"quantize rows {shape}", partial(check_quantiser, *shape, tiles=False)
        if shape[0] >= 128:
            yield f"quantize tiles {shape}", partial(check_quantiser, *shape, tiles=True)
    for shape in ((1, 32760, 1536), (1, 300, 5120), (2, 77, 640)):
        yield f"norm rows {shape}", partial(check_norm, *shape, granularity="token")
    for shape in ((1, 32760, 1536), (1, 200, 5120)):
        yield f"norm tiles {shape}", partial(check_norm, *shape, granularity="block")
    for shape in ((1, 32760, 12), (1, 500, 40), (2, 13, 4)):
        yield f"rope {shape}", partial(check_rope, *shape)


def check_rounding(m, k, n) -> dict[str, Any]:
    """Rows rounded ahead of the product against rows rounded before it, on inputs in turn: where a product reads what
    is not rounded yet, it reads what the call before left there."""
    ahead, before = (jax.jit(partial(int8_linear, implementation="mosaic_gpu")) for _ in range(2))
    differing = 0.0
    for seed in range(4):
        x, _, _, weight_q, weight_scale, bias = random_product(m, k, n, False, seed=seed)
        # Largest magnitudes of 127 times a power of two: of others the last bit of 127 / amax would decide ties.
        power = 2.0 ** (jnp.arange(m) % 5 - 3.0 + seed)[:, None]
        x = (jnp.clip(x * 20, -126, 126) * power).at[:, seed].set(127 * power[:, 0]).astype(jnp.bfloat16)
        amax = jnp.abs(x).max(axis=-1).astype(jnp.float32)
        told, alone = ahead(x, weight_q, weight_scale, bias, x_amax=amax), before(x, weight_q, weight_scale, bias)
        differing = max(differing, float((told != alone).mean()))
    return {"differing": differing, "ok": differing == 0.0}


def check_measure(m, k, n, measure) -> dict[str, Any]:
    """Of a result of three tiles of columns, the last one ragged."""
    _, q, x_scale, weight_q, weight_scale, bias = random_product(m, k, n, False)
    run = jax.jit(partial(int8_linear, implementation="mosaic_gpu", measure=measure))
    y, measured = run(q, weight_q, weight_scale, bias, x_scale=x_scale)
    want = np.asarray(measure_rows(y, measure), np.float64)
    error = float(np.abs(np.asarray(measured, np.float64) / want - 1.0).max())
    # Sums in another order; a maximum is one of the numbers.
    return {"relative_error": error, "ok": error <= (0.0 if measure == "amax" else 1e-5)}


def check_forced(m, k, n, blocks, machine) -> dict[str, Any]:
    """Products that this GPU's `int8_linear` would not take: clusters, and the portable kernel with either copy."""
    _, q, x_scale, weight_q, weight_scale, bias = random_product(m, k, n, blocks)
    residual, gate = random_rows(m, n), jax.random.normal(jax.random.key(1), (n,))
    arguments = q, weight_q, x_scale, weight_scale, bias
    options = {"activation": "gelu_tanh", "dtype": jnp.dtype(jnp.bfloat16), "interpret": False}
    if machine == "cluster":
        tiles = HopperTiles(128 if blocks else 256, cluster=2)
        kernel = lambda *a: hopper_gemm(*a, tiles=tiles, **options)[0]  # noqa: E731
    else:
        tiles = PortableTiles(64 if blocks else 128)
        kernel = partial(portable_gemm, tiles=tiles, cp_async=machine == "cp.async", **options)
    with compiling_for((8, 9)) if machine == "cp.async" else contextlib.nullcontext():
        y = jax.jit(kernel)(*arguments, residual, gate)
    expected = partial(exact_rows, q, x_scale, weight_q, weight_scale, bias, "gelu_tanh")
    return _against_rows(y, expected, 4e-3, {"residual": residual, "gate": gate})


def check_quantiser(rows: int, width: int, tiles: bool) -> dict[str, Any]:
    """The kernel's integers against XLA's: equal but for ties that a last bit of the quotient decides."""
    x = random_rows(rows, width)
    quantize = quantize_blockwise if tiles else quantize_per_token
    return _compare(*(quantize(x, implementation=name) for name in ("mosaic_gpu", "xla")), share=1e-5)


def check_norm(batch: int, length: int, width: int, granularity: str) -> dict[str, Any]:
    """LayerNorm sums in another order: some values land on the other side of a rounding boundary, none by two."""
    x = random_rows(batch * length, width).reshape(batch, length, width) + 3
    scale, shift = (0.3 * jax.random.normal(jax.random.key(i), (batch, 1, width)) for i in (1, 2))
    run = partial(norm_modulate_quantize, x, scale, shift, granularity=granularity)
    return _compare(*(run(implementation=name) for name in ("mosaic_gpu", "xla")), share=2e-3)


def check_rope(batch: int, length: int, heads: int) -> dict[str, Any]:
    x = random_rows(batch * length, heads * 128).reshape(batch, length, heads, 128)
    weight = jax.random.normal(jax.random.key(1), (heads * 128,))
    angle = jax.random.uniform(jax.random.key(2), (length, 64), maxval=6.28)
    arguments = (x, weight, jnp.cos(angle), jnp.sin(angle))
    y, expected = (
        np.asarray(rms_norm_rope(*arguments, implementation=name).astype(jnp.float32)) for name in ("mosaic_gpu", "xla")
    )
    error = float(np.linalg.norm(y - expected) / np.linalg.norm(expected))
    return {"relative_error": error, "unequal": float((y != expected).mean()), "ok": bool(error < 1e-3)}


def random_rows(rows: int, width: int):
    x = jax.random.normal(jax.random.key(0), (rows, width)) * jnp.where(jnp.arange(width) % 100 == 7, 20.0, 1.0)
    return x.astype(jnp.bfloat16)


def _compare(kernel, xla, share: float) -> dict[str, Any]:
    q, scale, expected_q, expected_scale = (np.asarray(a) for a in (*kernel, *xla))
    steps = np.abs(q.astype(np.int32) - expected_q)
    scales = float(np.abs(scale / expected_scale - 1).max())
    result = {"largest_step": int(steps.max()), "unequal": float((steps > 0).mean()), "scales": scales}
    return result | {"ok": bool(steps.max() <= 1 and result["unequal"] <= share and scales <= 1e-5)}


def bench_rows(rows: int, width: int) -> dict[str, Any]:
    """Each row kernel against XLA, with the bytes that it must move."""
    x = random_rows(rows, width)
    scale = shift = jnp.ones((1, 1, width))
    angle = jnp.ones((rows, 64))
    heads, weight = x.reshape(1, rows, -1, 128), jnp.ones((width,))
    variants, moved = {}, {"quantize_rows": 3, "quantize_tiles": 3, "norm_rows": 3, "norm_tiles": 3, "rope": 4}
    for name in ("mosaic_gpu", "xla"):
        for kind, fn, args in (
            ("quantize_rows", quantize_per_token, (x,)),
            ("quantize_tiles", quantize_blockwise, (x,)),
            ("norm_rows", norm_modulate_quantize, (x[None], scale, shift)),
            ("norm_tiles", partial(norm_modulate_quantize, granularity="block"), (x[None], scale, shift)),
            ("rope", rms_norm_rope, (heads, weight, angle, angle)),
        ):
            if width > 5120 and not kind.startswith("quantize"):
                continue
            variants[f"{kind} {name}"] = partial(seconds, partial(fn, implementation=name), *args, budget=0.3)
    result = _time_all(variants, 1)
    for name, entry in result.items():
        if "ms" in entry:
            entry["GB/s"] = moved[name.split()[0]] * rows * width / entry["ms"] / 1e6
            del entry["tops"]
    return result


def bench_product(m, k, n) -> dict[str, Any]:
    x, q, x_scale, weight_q, weight_scale, bias = random_product(m, k, n, False)
    _, block_q, block_scale, block_weight, block_weight_scale, _ = random_product(m, k, n, True)
    weight = (weight_q.astype(jnp.float32) * weight_scale[:, None]).astype(jnp.bfloat16)
    operations = 2 * m * n * k

    def dot(a, b, dtype):
        return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=dtype)

    def xla_int8(q, w, sx, sw, b):
        return (dot(q, w, jnp.int32).astype(jnp.float32) * sx[:, None] * sw + b).astype(jnp.bfloat16)

    forced = partial(int8_linear, implementation="mosaic_gpu")
    portable = partial(portable_gemm, activation=None, dtype=jnp.dtype(jnp.bfloat16), cp_async=False, interpret=False)

    def quantised(q, w, sw, b, sx, activation=None):
        return forced(q, w, sw, b, x_scale=sx, activation=activation)

    channels = q, weight_q, weight_scale, bias, x_scale
    tiled = block_q, block_weight, block_weight_scale, bias, block_scale
    plain = q, weight_q, x_scale, weight_scale, bias
    contestants: dict[str, tuple] = {
        "xla_bf16": (lambda x, w, b: dot(x, w, jnp.bfloat16) + b, x, weight, bias),
        "xla_int8": (xla_int8, *plain),
        "channels": (quantised, *channels),
        "channels_gelu": (partial(quantised, activation="gelu_tanh"), *channels),
        "channels_quantising": (forced, x, weight_q, weight_scale, bias),
        "blocks": (quantised, *tiled),
        "portable_channels": (partial(portable, tiles=PortableTiles()), *plain, None, None),
    }
    if rounds_rows(n, k):
        amax = jnp.abs(x).max(axis=-1).astype(jnp.float32)
        told = lambda x, w, sw, b, amax: forced(x, w, sw, b, x_amax=amax)  # noqa: E731
        contestants["channels_rounding"] = told, x, weight_q, weight_scale, bias, amax
    variants = {name: partial(seconds, *call, budget=0.2) for name, call in contestants.items()}
    return _time_all(variants, operations)


def sweep_product(m, k, n) -> dict[str, Any]:
    _, q, x_scale, weight_q, weight_scale, bias = random_product(m, k, n, False)
    variants = {}
    for tiles in SWEPT:
        product = partial(hopper_gemm, activation=None, dtype=jnp.dtype(jnp.bfloat16), tiles=tiles, interpret=False)
        arguments = q, weight_q, x_scale, weight_scale, bias, None, None
        variants[str(tiles)] = partial(seconds, product, *arguments, budget=0.15)
    return _time_all(variants, 2 * m * n * k)


def _time_all(variants: dict[str, Callable[[], float]], operations: float) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, measure in variants.items():
        try:
            result[name] = {"ms": 1e3 * (time_s := measure()), "tops": operations / time_s / 1e12}
        except Exception as error:
            result[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(f"    {name}: {result[name]}", flush=True)
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.hardware_check_linear", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--bench", action="store_true", help="time against XLA too")
    parser.add_argument("--sweep", action="store_true", help="time the tiles of the INT8 product")
    parser.add_argument("--only", default="", help="only cases whose name holds this")
    options = parser.parse_args(argv)
    device = jax.devices()[0]
    results: dict[str, Any] = {"device": device.device_kind, "arch": gpu_arch(), "jax": jax.__version__, "cases": {}}
    cases = list(checks())
    if options.bench:
        cases += [(f"bench rows {shape}", partial(bench_rows, *shape)) for shape in ((32760, 1536), (32760, 5120))]
        cases += [(f"bench product {shape}", partial(bench_product, *shape)) for shape in WAN]
    if options.sweep:
        cases += [(f"sweep {shape}", partial(sweep_product, *shape)) for shape in (WAN[1], WAN[4])]
    failed = 0
    for name, case in cases:
        if options.only not in name:
            continue
        start = time.perf_counter()
        try:
            result = case()
        except Exception as error:
            result = {
                "ok": False,
                "error": f"{type(error).__name__}: {error}"[:500],
                "trace": traceback.format_exc()[-3000:],
            }
        failed += not result.get("ok", True)
        results["cases"][name] = result
        shown = {key: value for key, value in result.items() if key != "trace"}
        print(f"{name} ({time.perf_counter() - start:.1f} s): {shown}", flush=True)
        options.json.write_text(json.dumps(results, indent=1, default=str))
    print(f"{failed} of {len(results['cases'])} failed on {device.device_kind}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

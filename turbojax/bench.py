"""`turbojax bench kernels`: every kernel against what XLA offers for the same work, in one run.

On an NVIDIA GPU the shapes are Wan's at 480p (`--model 14b`: at 720p) and the rivals cuDNN's attention and XLA's bf16
and INT8 products; on a CPU the shapes are smaller and the XLA paths run. Contestants take turns on the machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as kernels
from pallas_kernels.timing import Call, compare
from turbojax.errors import UserError


@dataclass(frozen=True)
class Size:
    """Tokens, width, feed-forward width and heads of what is timed; head_dim is 128. products: (M, K, N)."""

    tokens: int
    width: int
    heads: int
    products: tuple[tuple[int, int, int], ...]


GPU_SIZES: Mapping[str, Size] = {
    "1.3b": Size(32760, 1536, 12, ((32760, 1536, 1536), (32760, 1536, 8960), (32760, 8960, 1536))),
    "14b": Size(75600, 5120, 40, ((75600, 5120, 5120), (75600, 5120, 13824), (75600, 13824, 5120))),
}
CPU_SIZE = Size(8192, 1536, 2, ((2048, 1536, 8960),))
TOPK, BLOCK_Q, BLOCK_K, HEAD_DIM = 0.1, 128, 64, 128


@dataclass(frozen=True)
class Contest:
    """The same work done in several ways; the first is the one that the others are measured against."""

    op: str
    shape: str
    operations: float
    calls: Callable[[], Mapping[str, Call]]


@dataclass(frozen=True)
class Time:
    """One line of the result. ms is None and error says why where it could not run. tops: 10^12 of the contest's
    operations (dense ones, for sparse attention) a second. speedup: over the contest's first."""

    op: str
    shape: str
    contestant: str
    ms: float | None
    tops: float | None
    speedup: float | None
    error: str | None = None


def contests(size: Size, gpu: bool) -> Iterator[Contest]:
    dense = 4.0 * size.tokens**2 * size.heads * HEAD_DIM
    shape = f"{size.tokens} tokens, {size.heads} heads of {HEAD_DIM}"
    # Few-step inference on a GPU runs in bf16; a CPU may be faster in either.
    for dtype in ("bfloat16",) if gpu else ("float32", "bfloat16"):
        yield Contest(f"attention {dtype}", shape, dense, partial(_attention, size, gpu, dtype))
    for m, k, n in size.products:
        yield Contest("linear", f"{m} x {k} x {n}", 2.0 * m * k * n, partial(_linear, m, k, n, gpu))
    shape = f"{size.tokens} x {size.width}"
    yield Contest("norm_modulate_quantize", shape, 0.0, partial(_norm, size, gpu))
    yield Contest("rms_norm_rope", shape, 0.0, partial(_rope, size, gpu))


def _attention(size: Size, gpu: bool, dtype: str) -> Mapping[str, Call]:
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (1, size.tokens, size.heads, HEAD_DIM)
    qkv = tuple(jax.random.normal(key, shape, dtype) for key in keys)
    eye = jnp.eye(HEAD_DIM, dtype=dtype), jnp.zeros(HEAD_DIM, dtype)
    sla = partial(kernels.sparse_linear_attention, topk=TOPK, block_q=BLOCK_Q, block_k=BLOCK_K)
    rival = "cudnn" if gpu else "xla"
    return {
        f"dense ({rival})": (partial(kernels.dense_attention, implementation=rival), qkv),
        "sage": (kernels.sage_attention, qkv),
        f"sla, top-k {TOPK}": (sla, (*qkv, *eye)),
        f"sagesla, top-k {TOPK}": (partial(sla, quantized=True), (*qkv, *eye)),
    }


def _linear(m: int, k: int, n: int, gpu: bool) -> Mapping[str, Call]:
    dtype = jnp.bfloat16 if gpu else jnp.float32
    keys = jax.random.split(jax.random.key(0), 2)
    x, weight = jax.random.normal(keys[0], (m, k), dtype), jax.random.normal(keys[1], (n, k), dtype) / k**0.5
    channels, blocks = kernels.quantize_per_channel(weight), kernels.quantize_blockwise(weight)
    q, scale = kernels.quantize_per_token(x)

    def product(x: jax.Array, weight: jax.Array, dtype: Any = dtype) -> jax.Array:
        return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=dtype)

    def scaled(q: jax.Array, scale: jax.Array, weight: jax.Array, weight_scale: jax.Array) -> jax.Array:
        return (product(q, weight, jnp.int32).astype(jnp.float32) * scale[:, None] * weight_scale).astype(dtype)

    return {
        f"{jnp.dtype(dtype).name} product (xla)": (product, (x, weight)),
        "int8 product, quantised before (xla)": (scaled, (q, scale, *channels)),
        "int8_linear, channels": (kernels.int8_linear, (x, *channels)),
        "int8_linear, channels, quantised before": (
            lambda q, scale, weight, weight_scale: kernels.int8_linear(
                q, weight, weight_scale, x_scale=scale, out_dtype=dtype
            ),
            (q, scale, *channels),
        ),
        "int8_linear, 128x128 blocks": (kernels.int8_linear, (x, *blocks)),
    }


def _norm(size: Size, gpu: bool) -> Mapping[str, Call]:
    x = jax.random.normal(jax.random.key(0), (1, size.tokens, size.width), jnp.bfloat16)
    modulation = jnp.ones((1, 1, size.width))
    calls: dict[str, Call] = {
        "xla": (partial(kernels.norm_modulate_quantize, implementation="xla"), (x, modulation, modulation))
    }
    if gpu:
        calls["kernel"] = (kernels.norm_modulate_quantize, (x, modulation, modulation))
    return calls


def _rope(size: Size, gpu: bool) -> Mapping[str, Call]:
    x = jax.random.normal(jax.random.key(0), (1, size.tokens, size.width // HEAD_DIM, HEAD_DIM), jnp.bfloat16)
    angles = jnp.ones((size.tokens, HEAD_DIM // 2))
    args = x, jnp.ones(size.width), angles, angles
    calls: dict[str, Call] = {"xla": (partial(kernels.rms_norm_rope, implementation="xla"), args)}
    if gpu:
        calls["kernel"] = (kernels.rms_norm_rope, args)
    return calls


def run_contest(contest: Contest, budget: float) -> list[Time]:
    """Times of one contest, `budget` seconds for each contestant."""
    measured = compare(contest.calls(), budget=budget)
    first = next(iter(measured.values()))
    times = []
    for name, took in measured.items():
        if isinstance(took, Exception):
            error = f"{type(took).__name__}: {took}".splitlines()[0][:200]
            times.append(Time(contest.op, contest.shape, name, None, None, None, error))
            continue
        tops = contest.operations / took / 1e12 if contest.operations else None
        speedup = None if isinstance(first, Exception) else first / took
        times.append(Time(contest.op, contest.shape, name, 1e3 * took, tops, speedup))
    return times


def bench_kernels(model: str = "1.3b", budget: float = 1.0, show: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs every contest: {"device", "jax", "times": [Time as a dict]}; `show` is given a line for each."""
    gpu = jax.default_backend() == "gpu"
    times = []
    for contest in contests(GPU_SIZES[model] if gpu else CPU_SIZE, gpu):
        for time in run_contest(contest, budget):
            times.append(time)
            show(_line(time))
    device = jax.devices()[0]
    return {"device": device.device_kind, "jax": jax.__version__, "times": [asdict(time) for time in times]}


def _line(time: Time) -> str:
    head = f"{time.op:24}{time.shape:38}{time.contestant:42}"
    if time.ms is None:
        return f"{head}{time.error}"
    tops = "" if time.tops is None else f"{time.tops:9.2f} TOP/s"
    return f"{head}{time.ms:10.3f} ms{tops}" + ("" if time.speedup is None else f"{time.speedup:8.2f}x")


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Bars of each contestant's speed relative to the first of its contest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    times = [time for time in result["times"] if time["speedup"]]
    labels = [f"{time['op']} {time['shape']}\n{time['contestant']}: {time['ms']:.3g} ms" for time in times]
    figure, axes = pyplot.subplots(figsize=(9, 0.5 * len(times) + 1))
    positions = np.arange(len(times))[::-1]
    colours = ["0.6" if time["speedup"] == 1.0 else "tab:blue" for time in times]
    axes.barh(positions, [time["speedup"] for time in times], color=colours)
    axes.axvline(1.0, color="0.3", linewidth=0.8)
    axes.set_yticks(positions, labels, fontsize=7)
    axes.set_xlabel("speed relative to the grey bar above")
    axes.set_title(f"{result['device']}, JAX {result['jax']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def add_arguments(subparsers: Any) -> None:
    parser = subparsers.add_parser("bench", help="time the kernels", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("what", choices=["kernels"], help="kernels: every kernel against XLA and cuDNN")
    parser.add_argument("--model", default="1.3b", choices=GPU_SIZES, help="whose shapes, on a GPU (1.3b)")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="for each contestant (1.0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the times here, and a plot beside it (.png)")


def run(args: argparse.Namespace) -> int:
    if args.json is not None and not args.json.resolve().parent.is_dir():
        raise UserError(f"--json {args.json}: the folder {args.json.parent} does not exist; make it first")
    result = bench_kernels(args.model, args.seconds)
    if args.json is not None:
        temporary = args.json.with_suffix(".part")
        temporary.write_text(json.dumps(result, indent=1))
        temporary.rename(args.json)
        plot(result, args.json.with_suffix(".png"))
    return 0

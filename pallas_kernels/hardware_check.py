"""Every attention op on the GPU that is here, against a float32 reference, and how long it takes.

    python -m pallas_kernels.hardware_check --json OUT            accuracy, 10 to 20 s a case; --only TEXT for some
    python -m pallas_kernels.hardware_check --bench --json OUT    times at 32,760 tokens, beside cuDNN attention

Nearly all of an accuracy case is compilation: processes with --part 0/4, 1/4 ... share a GPU well.

Cases run in a child process, so that one that hangs or corrupts the GPU's state costs only itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import hardware_check_queries, hardware_check_routing, hardware_check_text
from pallas_kernels._attention_xla import block_sparse_xla, default_scale, dense_xla
from pallas_kernels._heads import heads_first, heads_last
from pallas_kernels._refusals import BLOCKS
from pallas_kernels.block_map import sla_block_map
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.dispatch import compiling_for, gpu_arch
from pallas_kernels.hardware_check_queries import QueryCheck
from pallas_kernels.hardware_check_routing import RoutingCheck
from pallas_kernels.hardware_check_text import TextCheck
from pallas_kernels.sage_attention import BLOCK_K, BLOCK_Q, sage_attention
from pallas_kernels.sparse_linear_attention import sparse_linear_attention

CASE_SECONDS = 150
# Relative L2 against exact attention; why: tests/pallas_kernels. "sla" and "sagesla" are "bf16" and "int8" with the
# routing and the linear branch.
BOUNDS = {"int8": 5e-2, "bf16": 1e-2, "sagesla": 5e-2, "sla": 1e-2}
# Kernels round P against the running maximum, XLA against the final one: measured 1.8e-2 apart.
FROM_XLA = {"int8": 3e-2, "bf16": 5e-3, "sagesla": 3e-2, "sla": 5e-3}
PARTS = ("routing", "quantize", "linear branch", "queries", "text")


@dataclasses.dataclass(frozen=True)
class Check:
    """One accuracy case. blocks None is dense attention. data: a key of DATA. portable: the kernel that other GPUs
    run, as built for this architecture: (9, 0) fills its ring by TMA, older ones by cp.async, (8, 0) has no e4m3.
    amax: with the largest output of each token, for the kinds with a linear branch."""

    kind: str
    length: int
    heads: int
    dim: int
    blocks: tuple[int, int] | None = None
    data: str = "gaussian"
    batch: int = 1
    dtype: str = "bfloat16"
    topk: float = 0.3
    portable: tuple[int, int] | None = None
    amax: bool = False

    @property
    def name(self) -> str:
        blocks = "dense" if self.blocks is None else f"{self.blocks[0]}x{self.blocks[1]}"
        shape = f"{self.batch}x{self.length}x{self.heads}x{self.dim}"
        portable = "" if self.portable is None else " portable sm_{}{}".format(*self.portable)
        amax = " amax" if self.amax else ""
        return f"{self.kind} {blocks} {shape} {self.data} {self.dtype}{amax}{portable}"


def _gaussian(rng, shape):
    return [rng.standard_normal(shape, np.float32) for _ in range(3)]


def _outliers(rng, shape):
    q, k, v = _gaussian(rng, shape)
    for x in (k, v):
        x[..., [3, shape[-1] // 2]] *= 20
    return q, k, v


def _channels(rng, shape):
    """Values whose channels are up to 60 times apart, the largest of each in the last rows."""
    q, k, v = _gaussian(rng, shape)
    v[:, -8:] *= 3
    return q, k, v * np.geomspace(1 / 8, 8, shape[-1], dtype=np.float32)


def _mean(rng, shape):
    q, k, v = _gaussian(rng, shape)
    return q, k + 6 * rng.standard_normal(shape[-1], np.float32), v


def _offset(rng, shape):
    """Over many independent keys attention gives nearly the mean of V. Were that 0, what is left of the values would
    be as small as the rounding of all of them, and the error relative to it would say nothing."""
    q, k, v = _gaussian(rng, shape)
    return q, k, v + 1


AnyCheck = Check | QueryCheck | TextCheck | RoutingCheck
DATA: dict[str, Callable] = {
    "gaussian": _gaussian,
    "offset": _offset,
    "outliers": _outliers,
    "channels": _channels,
    "mean": _mean,
    "zeros": lambda rng, shape: [np.zeros(shape, np.float32)] * 3,
    "constant": lambda rng, shape: [np.full(shape, c, np.float32) for c in (0.5, -2.0, 3.0)],
    "logits 1e4": lambda rng, shape: [x * s for x, s in zip(_gaussian(rng, shape), (100, 100, 1), strict=True)],
}


def checks() -> list[AnyCheck]:
    out: list[AnyCheck] = [Check("int8", length, 2, 128) for length in (128, 1024, 1, 64, 100, 333, 4100)]
    out += [Check("int8", 1024, 2, 128, blocks) for blocks in BLOCKS]
    out += [Check("int8", 777, 3, 128, blocks, "outliers", batch=2) for blocks in BLOCKS]
    out += [Check("int8", 1000, 3, 64, blocks, "mean") for blocks in (None, *BLOCKS)]
    out += [Check("int8", 500, 2, 128, None, data) for data in DATA if data != "gaussian"]
    out += [Check("int8", 500, 2, 128, BLOCKS[0], data) for data in ("zeros", "constant", "logits 1e4")]
    out += [Check("int8", 1024, 2, 128, None, dtype="float16")]
    out += [Check("bf16", 777, 3, dim, blocks, "outliers", batch=2) for blocks in BLOCKS for dim in (128, 64)]
    out += [Check("bf16", 500, 2, 128, BLOCKS[0], data) for data in ("zeros", "constant", "logits 1e4")]
    for kind in ("sla", "sagesla"):
        out += [Check(kind, 777, 3, 128, blocks, batch=2) for blocks in BLOCKS]
        out += [Check(kind, 1000, 3, 64, BLOCKS[0], "mean"), Check(kind, 32_760, 12, 128, BLOCKS[0], topk=0.1)]
        # The maxima of V come from the pass over the keys, those of the output from the attention kernel.
        out += [Check(kind, 777, 3, 128, blocks, "channels", batch=2, amax=True) for blocks in BLOCKS]
        out += [Check(kind, 1000, 3, 64, BLOCKS[-1], dtype="float16", amax=True)]
        out += [Check(kind, 32_760, 12, 128, BLOCKS[-1], topk=0.1, amax=True)]
    out += [Check("int8", 32_760, 12, 128, blocks, "outliers", topk=0.1) for blocks in (None, *BLOCKS)]
    # 720p, and longer than any preset.
    out += [Check(kind, 75_600, 2, 128, BLOCKS[0], topk=0.1) for kind in ("sla", "sagesla")]
    out += [Check(kind, 200_000, 1, 128, BLOCKS[-1], topk=0.05) for kind in ("sla", "sagesla")]
    out.append(Check("int8", 200_000, 1, 128, None, "offset"))
    out += [Check("bf16", 32_760, 12, 128, blocks, "outliers", topk=0.1) for blocks in BLOCKS]
    for arch in ((9, 0), (8, 9), (8, 0)):
        for dim, blocks in zip((128, 64, 128, 64), (None, *BLOCKS), strict=True):
            out.append(Check("int8", 777, 3, dim, blocks, "outliers", batch=2, portable=arch))
        out += [Check("bf16", 777, 3, dim, BLOCKS[0], batch=2, portable=arch) for dim in (128, 64)]
    for arch in ((9, 0), (8, 9)):
        large = functools.partial(Check, length=32_760, heads=12, dim=128, data="offset", topk=0.1, portable=arch)
        out += [large("int8", blocks=blocks) for blocks in (None, BLOCKS[0])]
        out.append(large("bf16", blocks=BLOCKS[0]))
    return out + hardware_check_queries.checks() + hardware_check_text.checks() + hardware_check_routing.checks()


def run_check(check: AnyCheck) -> dict:
    if isinstance(check, QueryCheck):
        return hardware_check_queries.run_check(check)
    if isinstance(check, TextCheck):
        return hardware_check_text.run_check(check)
    if isinstance(check, RoutingCheck):
        return hardware_check_routing.run_check(check)
    rng = np.random.default_rng(0)
    shape = (check.batch, check.length, check.heads, check.dim)
    q, k, v = (jnp.asarray(x, check.dtype) for x in DATA[check.data](rng, shape))
    wide = [heads_first(x.astype(jnp.float32)) for x in (q, k, v)]
    scale = default_scale(check.dim)
    quantized = check.kind in ("int8", "sagesla")
    with jax.default_matmul_precision("highest"):
        if check.blocks is None:
            run = functools.partial(sage_attention, q, k, v)
            want = heads_last(jax.jit(dense_xla, static_argnums=3)(*wide, scale), shape)
        elif check.kind in ("sla", "sagesla"):
            op = functools.partial(
                sparse_linear_attention, topk=check.topk, block_q=check.blocks[0], block_k=check.blocks[1]
            )
            w, b = (jnp.asarray(rng.standard_normal(s) / 8, check.dtype) for s in ((check.dim,) * 2, (check.dim,)))
            run = functools.partial(op, q, k, v, w, b, quantized=quantized, return_amax=check.amax)
            want = op(*(x.astype(jnp.float32) for x in (q, k, v, w, b)), implementation="xla")
        else:
            block_q, block_k = check.blocks
            index = sla_block_map(q, k, topk=check.topk, block_q=block_q, block_k=block_k)
            run = functools.partial(
                block_sparse_attention,
                q,
                k,
                v,
                index,
                block_q=block_q,
                block_k=block_k,
                quantized=quantized,
            )
            flat = index.reshape(-1, *index.shape[2:])
            exact = jax.jit(block_sparse_xla, static_argnums=(4, 5, 6, 7))
            want = heads_last(exact(*wide, flat, scale, block_q, block_k, False)[0], shape)
    kernel = functools.partial(run, implementation="mosaic_gpu")
    if check.portable is not None:
        kernel = _portable(check, q, k, v, None if check.blocks is None else index)
    got, amax = _with_amax(kernel())
    same, _ = _with_amax(run(implementation="xla"))
    repeat, amax_again = _with_amax(kernel())
    want = np.asarray(want, np.float64)
    norm = max(np.linalg.norm(want), 1e-30)
    row = {
        "relative": np.linalg.norm(got - want) / norm,
        "cosine": float((got * want).sum() / max(np.linalg.norm(got) * norm, 1e-30)),
        "from_xla": np.linalg.norm(got - same) / norm,
        "xla_relative": np.linalg.norm(same - want) / norm,
        "worst": float(np.abs(got - want).max()),
        "finite": bool(np.isfinite(got).all()),
        "repeatable": bool((got == repeat).all() and np.array_equal(amax, amax_again)),
    }
    maxima = True
    if check.amax:
        row["amax"] = np.array_equal(amax, np.abs(got).max(axis=(2, 3)))
        row["v_max"] = _finds_largest_values(k, v)
        maxima = row["amax"] and row["v_max"]
    if check.portable is not None:
        row["ms"] = _milliseconds(kernel)
    # INT8 cannot place logits of 1e4 within one unit: only finiteness and agreement with XLA are claimed there.
    loose = quantized and check.data == "logits 1e4"
    # Without e4m3, V is rounded in XLA's path only.
    from_xla = BOUNDS if check.portable == (8, 0) else FROM_XLA
    close = row["relative"] <= BOUNDS[check.kind] and row["from_xla"] <= from_xla[check.kind]
    row["ok"] = bool(row["finite"] and row["repeatable"] and maxima and (loose or close))
    return row


def _with_amax(found) -> tuple[np.ndarray, np.ndarray]:
    """The output, and the largest of each token: none where the op was not asked for them."""
    o, amax = found if isinstance(found, tuple) else (found, ())
    return np.asarray(o, np.float64), np.asarray(amax, np.float64)


def _finds_largest_values(k: jax.Array, v: jax.Array) -> bool:
    """Whether the pass over the keys gives the maxima of the values, exactly."""
    from pallas_kernels._hopper_attention import whole_rows
    from pallas_kernels._hopper_linear import summarize_keys

    @jax.jit
    def found(k, v):
        k, v, length = whole_rows(k), whole_rows(v), k.shape[1]
        runs = summarize_keys(k, v, length, "softmax", v_max=True, interpret=False)
        return None if runs.v_max is None else runs.v_max.max(axis=1)

    return np.array_equal(found(k, v), np.abs(np.asarray(heads_first(v), np.float32)).max(axis=1))


def _portable(check: Check, q, k, v, index) -> Callable[[], jax.Array]:
    """What the op would run on check.portable, compiled for this GPU."""
    from pallas_kernels import _portable_attention as portable

    block_q, block_k = check.blocks or (BLOCK_Q, BLOCK_K)
    forward = functools.partial(portable.sage_forward, smooth_k=True)
    if check.kind != "int8":
        forward = portable.sparse_forward
    sizes = {"scale": default_scale(check.dim), "block_q": block_q, "block_k": block_k, "interpret": False}
    with compiling_for(check.portable or gpu_arch()):
        compiled = jax.jit(lambda *args: forward(*args, **sizes)[0]).lower(q, k, v, index).compile()
    return functools.partial(compiled, q, k, v, index)


def timed(f: Callable, *args, repeats: int = 10) -> float:
    """Milliseconds of one call, from `repeats` calls queued one behind the other."""
    return _milliseconds(functools.partial(jax.jit(f), *args), repeats)


def _milliseconds(run: Callable[[], jax.Array], repeats: int = 10) -> float:
    jax.block_until_ready(run())
    best = np.inf
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(repeats):
            out = run()
        jax.block_until_ready(out)
        best = min(best, (time.perf_counter() - start) / repeats)
    return best * 1e3


def bench_cases(length: int, heads: int, dim: int, topk: float) -> dict[str, Callable[[], float]]:
    """Name -> a function that returns milliseconds. "kernel" is the kernel alone, on operands made before."""
    from pallas_kernels import _hopper_attention as hopper
    from pallas_kernels.linear_attention import linear_attention

    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, length, heads, dim), jnp.bfloat16) for key in keys)
    scale = default_scale(dim)
    w, b = jnp.zeros((dim, dim), jnp.bfloat16), jnp.zeros(dim, jnp.bfloat16)

    def index(blocks):
        return sla_block_map(q, k, topk=topk, block_q=blocks[0], block_k=blocks[1])

    def operands(blocks, i):
        sizes = {"block_q": blocks[0], "block_k": blocks[1]}

        def make(q, k, v):
            dense = hopper.sage_operands(q, k, v, scale=scale, smooth_k=True, interpret=False, **sizes)
            if i is None:
                return dense
            lists = hopper.tail_first(i, dense.k_scale.shape[1])
            return hopper.over_lists(dense, lists, hopper.listed(dense.k_scale, lists), blocks[0])

        return jax.jit(make)(q, k, v)

    def kernel(blocks, dense):
        args = operands(blocks, None if dense else index(blocks))
        shared = dense or blocks[0] == hopper.TILE_Q
        stages = hopper.ring_stages(dim, blocks[1], 1 if shared else hopper.WARPGROUPS, 1)
        config = hopper.AttentionTiles(block_k=blocks[1], stages=stages, shared=shared)
        run = functools.partial(
            hopper.hopper_attention, shape=q.shape, lk=length, dtype=q.dtype, scale=None, config=config, interpret=False
        )
        return timed(lambda *a: run(*a)[0], *args)

    def sla(blocks, quantized):
        op = functools.partial(
            sparse_linear_attention,
            topk=topk,
            block_q=blocks[0],
            block_k=blocks[1],
            quantized=quantized,
        )
        return timed(op, q, k, v, w, b)

    cases: dict[str, Callable[[], float]] = {
        "cudnn bf16": lambda: timed(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"), q, k, v),
        "sage": lambda: timed(sage_attention, q, k, v),
        "sage kernel": lambda: kernel((64, 128), True),
        "quantize": lambda: timed(
            lambda q, k, v: hopper.sage_operands(
                q, k, v, scale=scale, block_q=64, block_k=128, smooth_k=True, interpret=False
            )[:6],
            q,
            k,
            v,
        ),
        "linear branch": lambda: timed(functools.partial(linear_attention, feature_map="softmax"), q, k, v),
    }
    for blocks in BLOCKS:
        size = f"{blocks[0]}x{blocks[1]}"
        cases[f"routing {size}"] = lambda blocks=blocks: timed(
            functools.partial(sla_block_map, topk=topk, block_q=blocks[0], block_k=blocks[1]), q, k
        )
        cases[f"sla {size}"] = lambda blocks=blocks: sla(blocks, False)
        cases[f"sagesla {size}"] = lambda blocks=blocks: sla(blocks, True)
        cases[f"sagesla kernel {size}"] = lambda blocks=blocks: kernel(blocks, False)
    cases |= hardware_check_queries.bench_cases(length, heads, dim, timed)
    return cases | hardware_check_text.bench_cases(length, heads, timed)


def part(text: str) -> tuple[int, int]:
    """ "I/N": the Ith of N processes that share the cases, counted from 0."""
    i, n = map(int, text.split("/"))
    return i, n


def _names(options) -> list[str]:
    if options.bench:
        names = list(bench_cases_names())
    else:
        names = [check.name for check in checks()]
    return [name for name in names if options.only in name][options.part[0] :: options.part[1]]


def bench_cases_names() -> list[str]:
    names = ["cudnn bf16", "sage", "sage kernel", "quantize", "linear branch"]
    for block_q, block_k in BLOCKS:
        size = f"{block_q}x{block_k}"
        names += [f"routing {size}", f"sla {size}", f"sagesla {size}", f"sagesla kernel {size}"]
    names += hardware_check_queries.bench_cases(1, 1, 128, timed)
    return names + list(hardware_check_text.bench_cases(1, 1, timed))


def _child(options) -> None:
    """Runs the named cases from `--start` on, writing one line for each as it ends."""
    names = _names(options)
    by_name = {check.name: check for check in checks()}
    bench = bench_cases(options.length, options.heads, options.dim, options.topk) if options.bench else {}
    with options.child.open("a") as out:
        for name in names[options.start :]:
            start = time.perf_counter()
            try:
                if options.bench:
                    ms = bench[name]()
                    flops = 4.0 * options.length**2 * options.dim * options.heads
                    # Sparse ones count the work of dense attention, as SLA's own benchmark does.
                    rate = {} if name.startswith(PARTS) else {"dense_tflops": flops / ms / 1e9}
                    row = {"ms": ms, "ok": True} | rate
                else:
                    row = run_check(by_name[name])
            except Exception as error:
                row = {"ok": False, "error": f"{type(error).__name__}: {error}"[:600]}
            row = {"name": name, "seconds": time.perf_counter() - start} | row
            out.write(json.dumps(row, default=float) + "\n")
            out.flush()


def _supervise(options) -> list[dict]:
    names = _names(options)
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "rows.jsonl"
        lines.touch()
        shown = 0
        while len(rows) < len(names):
            command = [sys.executable, "-m", "pallas_kernels.hardware_check", *options.forward]
            command += ["--child", str(lines), "--start", str(len(rows))]
            child = subprocess.Popen(command)
            deadline = time.monotonic() + CASE_SECONDS
            while child.poll() is None:
                time.sleep(0.2)
                done = lines.read_text().splitlines()
                if len(done) > shown:
                    for line in done[shown:]:
                        _print(json.loads(line))
                    shown, deadline = len(done), time.monotonic() + CASE_SECONDS
                elif time.monotonic() > deadline:
                    child.kill()
            done = lines.read_text().splitlines()
            for line in done[shown:]:
                _print(json.loads(line))
            if len(done) < len(names):  # the next case took the process with it, or hung
                row = {"name": names[len(done)], "ok": False, "error": f"process ended with {child.returncode}"}
                _print(row)
                with lines.open("a") as out:
                    out.write(json.dumps(row) + "\n")
            rows = [json.loads(line) for line in lines.read_text().splitlines()]
            shown = len(rows)
    return rows


def _print(row: dict) -> None:
    status = "ok  " if row["ok"] else "FAIL"
    fields = {key: value for key, value in row.items() if key not in ("name", "ok")}
    text = "  ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in fields.items())
    print(f"{status} {row['name']:55s} {text}", flush=True)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.hardware_check", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--bench", action="store_true", help="times instead of accuracy")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--part", type=part, default=(0, 1), help="I/N: every Nth case from the Ith on, from 0")
    parser.add_argument("--length", type=int, default=32_760)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--topk", type=float, default=0.1)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        _child(options)
        return 0
    options.forward = [a for a in argv if a != "--json" and (options.json is None or a != str(options.json))]
    rows = _supervise(options)
    if options.json:
        device = jax.devices()[0].device_kind  # after the children: a process holds most of the GPU's memory
        options.json.write_text(json.dumps({"device": device, "jax": jax.__version__, "rows": rows}, indent=1))
    failed = [row["name"] for row in rows if not row["ok"]]
    print(f"{len(rows) - len(failed)} of {len(rows)} passed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

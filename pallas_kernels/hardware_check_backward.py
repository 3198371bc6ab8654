"""The backward pass of block-sparse attention on the GPU that is here: right, and how fast beside dense ones.

    python -m pallas_kernels.hardware_check_backward --json OUT [--length 32760 --heads 12]      under a minute

Gradients of the kernels against float32 ones through XLA; then milliseconds of the backward pass alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._refusals import BLOCKS
from pallas_kernels.block_map import sla_block_map
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.hardware_check import part
from pallas_kernels.sparse_linear_attention import sparse_linear_attention
from pallas_kernels.timing import seconds

# batch, length, heads, head_dim: small and ragged, then Wan's.
SHAPES = ((2, 777, 3, 128), (2, 777, 3, 64), (1, 1000, 2, 128), (1, 4100, 4, 128))
# P, dS and the results are rounded to 8 bits, and delta cancels what the rounding of o leaves: see the tests.
BOUND = 1e-2


def gradients(op: Callable[..., Any], arrays: tuple[Any, ...], cotangent: Any) -> list[np.ndarray]:
    pulled = jax.jit(lambda *args: jax.vjp(op, *args)[1](cotangent))(*arrays)
    return [np.asarray(x, np.float64) for x in pulled]


def check(shape: tuple[int, ...], blocks: tuple[int, int], topk: float) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    q, k, v, do = (jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16) for _ in range(4))
    sizes = {"block_q": blocks[0], "block_k": blocks[1]}
    index = sla_block_map(q, k, topk=topk, **sizes)
    wide = tuple(x.astype(jnp.float32) for x in (q, k, v))

    def op(implementation, *qkv):
        return block_sparse_attention(*qkv, index, **sizes, implementation=implementation)

    got = gradients(functools.partial(op, "mosaic_gpu"), (q, k, v), do)
    again = gradients(functools.partial(op, "mosaic_gpu"), (q, k, v), do)
    with jax.default_matmul_precision("highest"):
        want = gradients(functools.partial(op, "xla"), wide, do.astype(jnp.float32))
    error = [float(np.linalg.norm(g - w) / np.linalg.norm(w)) for g, w in zip(got, want, strict=True)]
    same = all((g == a).all() for g, a in zip(got, again, strict=True))
    ok = bool(np.isfinite(error).all() and max(error) <= BOUND and same)
    return {"relative": error, "repeatable": same, "ok": ok}


def backward_ms(op: Callable[..., Any], *arrays: Any, cotangent: Any) -> float:
    """Milliseconds of the pullback alone: its residuals are arguments."""
    pull = jax.jit(lambda *args: jax.vjp(op, *args)[1])(*arrays)
    return 1e3 * seconds(lambda f, x: f(x), pull, cotangent, budget=0.5)


def times(length: int, heads: int, dim: int, topk: float) -> dict[str, Callable[[], float]]:
    """Name -> milliseconds."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, do = (jax.random.normal(key, (1, length, heads, dim), jnp.bfloat16) for key in keys)
    w, b = jnp.zeros((dim, dim), jnp.bfloat16), jnp.zeros(dim, jnp.bfloat16)

    def sparse(blocks, implementation):
        sizes = {"block_q": blocks[0], "block_k": blocks[1]}
        index = sla_block_map(q, k, topk=topk, **sizes)
        op = functools.partial(block_sparse_attention, **sizes, implementation=implementation)
        return backward_ms(lambda *qkv: op(*qkv, index), q, k, v, cotangent=do)

    def sla(blocks):
        op = functools.partial(sparse_linear_attention, topk=topk, block_q=blocks[0], block_k=blocks[1])
        return backward_ms(op, q, k, v, w, b, cotangent=do)

    def lists(blocks):
        from pallas_kernels._hopper_backward import transposed

        index = sla_block_map(q, k, topk=topk, block_q=blocks[0], block_k=blocks[1])
        index = index.reshape(-1, *index.shape[2:])
        return 1e3 * seconds(functools.partial(transposed, blocks=-(-length // blocks[1])), index, budget=0.2)

    dense = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    out: dict[str, Callable[[], float]] = {"dense cudnn": lambda: backward_ms(dense, q, k, v, cotangent=do)}
    for blocks in BLOCKS:
        size = f"{blocks[0]}x{blocks[1]}"
        out[f"sparse {size}"] = functools.partial(sparse, blocks, "mosaic_gpu")
        out[f"sla {size}"] = functools.partial(sla, blocks)
        out[f"transposed lists {size}"] = functools.partial(lists, blocks)
    out["sparse 128x64, xla"] = functools.partial(sparse, BLOCKS[0], "xla")
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.hardware_check_backward", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--part", type=part, default=(0, 1), help="I/N: every Nth case from the Ith on, from 0")
    parser.add_argument("--length", type=int, default=32_760)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--topk", type=float, default=0.1)
    options = parser.parse_args(argv)
    shape = (1, options.length, options.heads, options.dim)
    cases: dict[str, Callable[[], dict[str, Any]]] = {}
    for size in (*SHAPES, shape):
        for blocks in BLOCKS:
            topk = options.topk if size == shape else 0.3
            cases[f"gradients {blocks[0]}x{blocks[1]} {size}"] = functools.partial(check, size, blocks, topk)
    for name, run in times(options.length, options.heads, options.dim, options.topk).items():
        cases[f"backward {name}"] = lambda run=run: {"ms": run(), "ok": True}
    names = [name for name in cases if options.only in name][options.part[0] :: options.part[1]]
    rows = []
    for name in names:
        start = time.perf_counter()
        try:
            row = cases[name]()
        except Exception as error:
            row = {"ok": False, "error": f"{type(error).__name__}: {error}"[:600]}
        rows.append({"name": name, "seconds": time.perf_counter() - start} | row)
        print(rows[-1], flush=True)
        if options.json:
            device = jax.devices()[0].device_kind
            found = {"device": device, "jax": jax.__version__, "shape": shape, "topk": options.topk, "rows": rows}
            options.json.write_text(json.dumps(found, indent=1))
    return int(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())

"""Attention to the few keys of a text on the GPU that is here: cases of `hardware_check`, whose commands run them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.text_attention import text_attention

DIM = 128
TEXT_ROWS = 512
"""Rows to which Wan pads a prompt."""
# Relative L2 against float32, and against XLA's path in bfloat16: P and o are rounded, 2^-9 each at most.
BOUND = 5e-3


@dataclasses.dataclass(frozen=True)
class TextCheck:
    """One accuracy case, with factors and the maximum unless `plain`. data: "gaussian", "large" (logits to +-60) or
    "negative" (all near -280). count: of the last key; None fills up to TEXT_ROWS."""

    keys: int
    length: int
    heads: int
    data: str = "gaussian"
    batch: int = 1
    count: int | None = None
    plain: bool = False

    @property
    def last_count(self) -> int:
        return TEXT_ROWS + 1 - self.keys if self.count is None else self.count

    @property
    def name(self) -> str:
        shape = f"{self.batch}x{self.length}x{self.heads}x{DIM}"
        return f"text {self.keys} keys x{self.last_count} {shape} {self.data}{' plain' if self.plain else ''}"


def checks() -> list[TextCheck]:
    out = [TextCheck(keys, 1000, 3, batch=2) for keys in (56, 120, 184, 248)]
    out += [TextCheck(keys, 777, 2, count=1, plain=True) for keys in (1, 64, 200, 256)]
    out += [TextCheck(120, length, 2) for length in (1, 64, 100, 333)]
    out += [TextCheck(120, 2000, 4, data) for data in ("large", "negative")]
    # More heads than a card has cores; Wan 1.3B at 480p and 14B at 720p.
    out += [TextCheck(120, 500, 40, batch=5), TextCheck(248, 32_760, 12), TextCheck(120, 75_600, 40)]
    return [*out, TextCheck(120, 32_760, 12), TextCheck(120, 32_760, 12, batch=2)]


def operands(check: TextCheck) -> tuple[jax.Array, ...]:
    """q, k, v in bfloat16 and factors."""
    names = jax.random.split(jax.random.key(0), 4)
    rows = (check.batch, check.length, check.heads, DIM), *((check.batch, check.keys, check.heads, DIM),) * 2
    q, k, v = (jax.random.normal(name, shape) for name, shape in zip(names, rows, strict=False))
    if check.data == "large":
        q = q * 20
    elif check.data == "negative":
        q, k = 5 + q / 8, -5 + k / 8
    factor = jax.random.uniform(names[3], (check.batch, check.length), minval=0.5, maxval=1.5)
    return *(x.astype(jnp.bfloat16) for x in (q, k, v)), factor


def run_check(check: TextCheck) -> dict[str, Any]:
    *qkv, factor = operands(check)
    options = {"last_count": check.last_count, "return_amax": not check.plain}
    options["q_factor"] = None if check.plain else factor

    def run(implementation: str, *qkv: jax.Array) -> tuple[np.ndarray, np.ndarray | None]:
        found = text_attention(*qkv, **options, implementation=implementation)
        o, amax = found if isinstance(found, tuple) else (found, None)
        return np.asarray(o, np.float32), None if amax is None else np.asarray(amax)

    got, amax = run("mosaic_gpu", *qkv)
    again, amax_again = run("mosaic_gpu", *qkv)
    same, _ = run("xla", *qkv)
    with jax.default_matmul_precision("highest"):
        want, _ = run("xla", *(x.astype(jnp.float32) for x in qkv))
    norm = np.linalg.norm(want)
    row = {
        "relative": float(np.linalg.norm(got - want) / norm),
        "from_xla": float(np.linalg.norm(got - same) / norm),
        "xla_relative": float(np.linalg.norm(same - want) / norm),
        "worst": float(np.abs(got - want).max()),
        "finite": bool(np.isfinite(got).all()),
        "repeatable": bool((got == again).all() and (amax is None or (amax == amax_again).all())),
        "amax": amax is None or bool((amax == np.abs(got).max(axis=(2, 3))).all()),
    }
    close = row["relative"] <= BOUND and row["from_xla"] <= BOUND
    return row | {"ok": bool(close and row["finite"] and row["repeatable"] and row["amax"])}


def bench_cases(length: int, heads: int, timed: Callable[..., float]) -> dict[str, Callable[[], float]]:
    """Name -> a function that returns milliseconds; beside the op at two lengths of prompt, with factors and maxima,
    what it replaces: cuDNN attention to all of the padding."""
    cases: dict[str, Callable[[], float]] = {}
    for keys in (120, 248):
        check = TextCheck(keys, length, heads)

        def run(check=check):
            *qkv, factor = operands(check)
            op = functools.partial(text_attention, last_count=check.last_count, return_amax=True)
            return timed(lambda q, k, v, factor: op(q, k, v, q_factor=factor), *qkv, factor, repeats=50)

        cases[f"text attention {keys} keys"] = run

    def cudnn():
        q, k, v, _ = operands(TextCheck(TEXT_ROWS, length, heads))
        return timed(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"), q, k, v, repeats=50)

    return cases | {f"text cudnn bf16 {TEXT_ROWS} keys": cudnn}

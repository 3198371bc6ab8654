"""Timing of jitted functions: many calls in flight, so that what is measured is the device and not the dispatch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


def seconds(fn: Callable[..., Any], *args: Any, budget: float = 1.0, repeats: int = 5) -> float:
    """Median over `repeats` of the mean time of a call, in seconds; about `budget` seconds in all after warm-up.

    fn: compiled here with `jax.jit`. The calls of one repeat are queued together and awaited once.
    """
    compiled = jax.jit(fn)
    jax.block_until_ready(compiled(*args))
    start = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    once = time.perf_counter() - start
    calls = max(1, min(100, int(budget / repeats / once)))
    means = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            out = compiled(*args)
        jax.block_until_ready(out)
        means.append((time.perf_counter() - start) / calls)
    return statistics.median(means)

"""Timing of jitted functions: many calls in flight, so that what is measured is the device and not the dispatch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

Call = tuple[Callable[..., Any], Sequence[Any]]


def compare(calls: Mapping[str, Call], *, budget: float = 1.0, repeats: int = 5) -> dict[str, float | Exception]:
    """Seconds a call of each: median over `repeats` of the mean over calls queued together and awaited once.

    calls: name -> (function, arguments), compiled here with `jax.jit`. They take turns, so that whatever else the
        machine does falls on all of them. budget: seconds for each after warm-up, roughly.
    One that fails has its exception for a time, and the others run.
    """
    ready: dict[str, tuple[Callable[[], Any], int]] = {}
    found: dict[str, list[float]] = {name: [] for name in calls}
    failed: dict[str, Exception] = {}
    for name, (fn, args) in calls.items():
        try:
            once = _bound(jax.jit(fn), args)
            jax.block_until_ready(once())
            ready[name] = once, max(1, min(100, int(budget / repeats / _elapsed(once, 1))))
        except Exception as error:
            failed[name] = error
    for _ in range(repeats):
        for name, (once, count) in ready.items():
            found[name].append(_elapsed(once, count) / count)
    return {name: failed[name] if name in failed else statistics.median(found[name]) for name in calls}


def seconds(fn: Callable[..., Any], *args: Any, budget: float = 1.0, repeats: int = 5) -> float:
    """`compare` of one; raises what it raises."""
    (result,) = compare({"": (fn, args)}, budget=budget, repeats=repeats).values()
    if isinstance(result, Exception):
        raise result
    return result


def _bound(fn: Callable[..., Any], args: Sequence[Any]) -> Callable[[], Any]:
    return lambda: fn(*args)


def _elapsed(once: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    out = None
    for _ in range(count):
        out = once()
    jax.block_until_ready(out)
    return time.perf_counter() - start

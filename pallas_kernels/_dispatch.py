"""Which implementation of an op runs: named by the caller, or the fastest that the platform has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax import lax

IMPLEMENTATIONS = ("xla", "mosaic_gpu", "interpret")


def dispatch(
    name: str,
    implementation: str | None,
    refusal: str | None,
    xla: Callable[..., Any],
    kernel: Callable[..., Any],
    *args: Any,
) -> Any:
    """Run `xla(*args)` or `kernel(*args, interpret=bool)`.

    `implementation` None: the kernel on CUDA and XLA elsewhere, in one trace (`lax.platform_dependent`), or
    XLA alone when `refusal` says that the kernel does not cover these arguments. A named implementation that
    cannot run raises ValueError with the reason.
    """
    if implementation is None:
        if refusal is not None:
            return xla(*args)
        return lax.platform_dependent(*args, cuda=lambda *a: kernel(*a, interpret=False), default=xla)
    if implementation not in IMPLEMENTATIONS:
        names = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"{name}: implementation {implementation!r} is unknown; choose None, {names}")
    if implementation == "xla":
        return xla(*args)
    if refusal is not None:
        raise ValueError(f"{name}: implementation {implementation!r} cannot run: {refusal}; use None or 'xla'")
    return kernel(*args, interpret=implementation == "interpret")

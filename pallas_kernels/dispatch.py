"""Which implementation of an op runs: the one place where `implementation=` is understood.

`None`          the kernel where the platform is CUDA and the kernel can run these arguments, else XLA. The
                choice is staged with `jax.lax.platform_dependent`, so one trace serves CPU and GPU.
`"xla"`         plain JAX, any platform.
`"mosaic_gpu"`  the kernel, or an error that says why it cannot run.
`"interpret"`   the kernel in Pallas' Mosaic GPU interpreter, on the CPU, with race detection: for tests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax

IMPLEMENTATIONS = (None, "xla", "mosaic_gpu", "interpret")

_target_arch: ContextVar[tuple[int, int] | None] = ContextVar("target_arch", default=None)
_target_cores: ContextVar[int | None] = ContextVar("target_cores", default=None)


def gpu_arch() -> tuple[int, int]:
    """Compute capability that kernels are built for: (9, 0) for H100, (8, 9) for RTX 4090, (12, 0) for RTX 5090.

    The target of an enclosing `compiling_for`, else the default device's, else (9, 0).
    """
    return _target_arch.get() or _mosaic()._infer_arch()


def core_count() -> int:
    """Streaming multiprocessors of that GPU: 132 (H100) where nothing says otherwise."""
    return _target_cores.get() or getattr(jax.devices()[0], "core_count", None) or 132


@contextlib.contextmanager
def compiling_for(arch: tuple[int, int], cores: int = 132) -> Iterator[None]:
    """Build kernels for a GPU that this machine does not have.

    Mosaic GPU asks the default device for its architecture and takes Hopper when there is none, so the answer has
    to be replaced; and ptxas keeps the first architecture it meets, so a process can compile for one only.
    """
    tokens = _target_arch.set(arch), _target_cores.set(cores)
    mosaic_utils = _mosaic()
    original = mosaic_utils._infer_arch
    mosaic_utils._infer_arch = lambda: arch
    try:
        yield
    finally:
        mosaic_utils._infer_arch = original
        _target_arch.reset(tokens[0])
        _target_cores.reset(tokens[1])


def dispatch(
    op: str,
    implementation: str | None,
    args: tuple[Any, ...],
    *,
    xla: Callable[..., Any],
    kernel: Callable[..., Any] | None,
    unsupported: str | None,
) -> Any:
    """Calls `xla(*args)` or `kernel(*args, interpret=...)`.

    unsupported: why the kernel cannot run these arguments, or None if it can.
    Raises ValueError for an unknown implementation and NotImplementedError for a forced one that cannot run.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: implementation={implementation!r} is unknown; take one of {IMPLEMENTATIONS}")
    if implementation == "xla":
        return xla(*args)
    if implementation is None:
        if unsupported or kernel is None:
            return xla(*args)
        return jax.lax.platform_dependent(*args, cuda=lambda *a: kernel(*a, interpret=False), default=xla)
    reason = unsupported
    if implementation == "mosaic_gpu" and not reason and not has_cuda():
        reason = f"this process has {jax.default_backend()} devices only and compiles for no GPU"
    if reason or kernel is None:
        raise NotImplementedError(
            f"{op}: implementation={implementation!r} cannot run: {reason}. Leave implementation=None to fall back"
        )
    return kernel(*args, interpret=implementation == "interpret")


def _mosaic() -> Any:
    from jax.experimental.mosaic.gpu import utils  # late: see _plgpu

    return utils


def has_cuda() -> bool:
    """Whether this process runs on, or compiles for, an NVIDIA GPU."""
    return _target_arch.get() is not None or jax.default_backend() in ("gpu", "cuda")

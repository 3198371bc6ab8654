"""Keep freed buffers in the process: on Linux, page faults otherwise cost a CPU run up to half of its time.

XLA's CPU backend allocates and frees every intermediate array. glibc hands blocks of that size back to the kernel at
once, and the kernel clears each page again at its next use.
"""

from __future__ import annotations

import ctypes
import platform

# mallopt's parameters, from malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8
_KEEP = 2**31 - 1


def keep_freed_memory() -> None:
    """Tell glibc to reuse freed memory rather than return it. Does nothing where there is no glibc.

    Call it before the first array is made; resident memory then stays at the peak that was needed.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    # One arena: those of other threads, where XLA runs, are made of pieces of 64 MiB that do go back.
    for parameter, value in ((_MMAP_THRESHOLD, 2**30), (_TRIM_THRESHOLD, _KEEP), (_TOP_PAD, 2**28), (_ARENA_MAX, 1)):
        libc.mallopt(parameter, value)

"""Which forward attention kernels the GPU at hand runs: Hopper's, or those that any GPU from sm_80 has."""

from __future__ import annotations

import importlib
from types import ModuleType

from pallas_kernels.dispatch import gpu_arch

HOPPER = (9, 0)


def attention_kernels() -> ModuleType:
    """The module with `sage_forward` and `sparse_forward`. Called at lowering, not at import: see _plgpu."""
    name = "_hopper_attention" if gpu_arch() == HOPPER else "_portable_attention"
    return importlib.import_module(f"pallas_kernels.{name}")

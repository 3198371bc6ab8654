"""`jax.experimental.pallas.mosaic_gpu`, imported at its first use: that takes a second, which a CPU has no use for."""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    return getattr(importlib.import_module("jax.experimental.pallas.mosaic_gpu"), name)

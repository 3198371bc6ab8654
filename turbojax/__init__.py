"""Wan video diffusion in JAX, made fast by the four parts of TurboDiffusion.

Importing this package loads nothing heavy: public names and submodules are fetched at their first use.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turbojax.attention import AttentionConfig
    from turbojax.checkpoint import load_component as load
    from turbojax.errors import UserError
    from turbojax.pipeline import Pipeline
    from turbojax.video import Video, read_video

__all__ = ["AttentionConfig", "Pipeline", "UserError", "Video", "load", "read_video"]

# The `aot` extra brings JAX's CUDA plugin without cuDNN. Where no driver is, the plugin would print a page of traceback
# about that whenever JAX starts.
if not Path("/proc/driver/nvidia/version").exists():
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

# public name -> (module, attribute)
_ATTRIBUTES = {
    "AttentionConfig": ("turbojax.attention", "AttentionConfig"),
    "Pipeline": ("turbojax.pipeline", "Pipeline"),
    "UserError": ("turbojax.errors", "UserError"),
    "Video": ("turbojax.video", "Video"),
    "load": ("turbojax.checkpoint", "load_component"),
    "read_video": ("turbojax.video", "read_video"),
}


def __getattr__(name: str) -> Any:
    if name in _ATTRIBUTES:
        module, attribute = _ATTRIBUTES[name]
        return getattr(importlib.import_module(module), attribute)
    if name == "__version__":
        from importlib.metadata import version

        return version("turbojax")
    submodule = f"turbojax.{name}"
    if not name.startswith("_"):
        try:
            return importlib.import_module(submodule)
        except ModuleNotFoundError as error:
            if error.name != submodule:
                raise
    raise AttributeError(f"module 'turbojax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ATTRIBUTES, *(m.name for m in pkgutil.iter_modules(__path__))})

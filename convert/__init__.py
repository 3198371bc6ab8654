"""PyTorch checkpoints into turbojax and back, without torch. Importing this package loads nothing heavy."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convert.convert import convert_checkpoint, convert_pipeline, merge_checkpoints
    from convert.errors import CheckpointError
    from convert.export import export_checkpoint
    from convert.inspect import inspect as inspect_checkpoint
    from convert.lora import apply_lora

__all__ = [
    "CheckpointError",
    "apply_lora",
    "convert_checkpoint",
    "convert_pipeline",
    "export_checkpoint",
    "inspect_checkpoint",
    "merge_checkpoints",
]

# public name -> (module, attribute)
_ATTRIBUTES = {
    "CheckpointError": ("convert.errors", "CheckpointError"),
    "apply_lora": ("convert.lora", "apply_lora"),
    "convert_checkpoint": ("convert.convert", "convert_checkpoint"),
    "convert_pipeline": ("convert.convert", "convert_pipeline"),
    "export_checkpoint": ("convert.export", "export_checkpoint"),
    "inspect_checkpoint": ("convert.inspect", "inspect"),
    "merge_checkpoints": ("convert.convert", "merge_checkpoints"),
}


def __getattr__(name: str) -> Any:
    if name in _ATTRIBUTES:
        module, attribute = _ATTRIBUTES[name]
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module 'convert' has no attribute {name!r}")

"""base + weight * (target - target_base): carry what one fine-tuning learned over to another model.

This is how SLA enters a distilled model (TurboDiffusion `scripts/merge_models.py`): base = distilled, target_base =
pretrained, target = tuned with SLA, whose `proj_l` the base lacks and takes from the target.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from convert.errors import CheckpointError
from convert.tensors import Leaf
from turbojax.component import Component
from turbojax.config import ComponentConfig, DiTConfig


def merge(base: Component, target_base: Component, target: Component, weight: float = 1.0) -> Component:
    """Sums in float32, rounded once to the base's dtype. Parameters that only the target has are copied.

    Raises CheckpointError for int8 weights and for components of different shape.
    """
    if not math.isfinite(weight):
        raise CheckpointError(f"weight {weight} is not a number")
    for name, component in (("base", base), ("target base", target_base), ("target", target)):
        if any(path.endswith(".weight_q") for path in component.leaves):
            raise CheckpointError(f"the {name} has int8 weights; merge the bf16 models, then quantise")
    config = _config(base, target_base, target)
    troubles = []
    for path, leaf in base.leaves.items():
        for name, other in (("target base", target_base), ("target", target)):
            if path in other.leaves and other.leaves[path].shape != leaf.shape:
                troubles.append(
                    f"{path} is {list(leaf.shape)} in the base, {list(other.leaves[path].shape)} in the {name}"
                )
        if (path in target.leaves) != (path in target_base.leaves):
            troubles.append(f"{path} is in only one of target and target base")
    new = {path: leaf for path, leaf in target.leaves.items() if path not in base.leaves}
    troubles += [f"{path} is in the target base, but not in the base" for path in new if path in target_base.leaves]
    if troubles:
        more = f"; and {len(troubles) - 6} more" if len(troubles) > 6 else ""
        raise CheckpointError(f"these models cannot be merged: {'; '.join(troubles[:6])}{more}")
    leaves = {
        path: _sum(leaf, target_base.leaves[path], target.leaves[path], weight) if path in target.leaves else leaf
        for path, leaf in base.leaves.items()
    }
    return Component(config, leaves | new, base.dtype)


def _config(base: Component, target_base: Component, target: Component) -> ComponentConfig:
    """The base's, with the linear branch where the target brings one."""
    for other in (target_base, target):
        if type(base.config) is not type(other.config):
            raise CheckpointError(f"cannot merge a {type(other.config).__name__} into a {type(base.config).__name__}")
    if not isinstance(base.config, DiTConfig) or not isinstance(target.config, DiTConfig):
        return base.config
    branch = base.config.linear_branch or target.config.linear_branch
    return dataclasses.replace(base.config, linear_branch=branch)


def _sum(base: Leaf, target_base: Leaf, target: Leaf, weight: float) -> Leaf:
    def read(start: int, stop: int) -> np.ndarray:
        values = base.read(start, stop).astype(np.float32)
        change = target.read(start, stop).astype(np.float32) - target_base.read(start, stop).astype(np.float32)
        values += np.float32(weight) * change
        return values.astype(base.dtype)

    return Leaf(base.shape, base.dtype, read)

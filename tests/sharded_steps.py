"""Run by test_sharding.py on four virtual devices: a sharded run against an unsharded one, printed as JSON."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import jax
import numpy as np
from train.small_students import sla_stage

from turbojax import sharding
from turbojax.checkpoint import Checkpoints
from turbojax.train import loop
from turbojax.train.state import FOLDER, restore_newest

sharding.MIN_SHARDED = 16  # of networks this small nothing else would be cut
out = Path(sys.argv[1])
stage = sla_stage()
alone = loop.run(stage, loop.LoopConfig(4, str(out / "alone")))
mesh = sharding.make_mesh(data=2, fsdp=2)
spread = loop.run(stage, loop.LoopConfig(4, str(out / "spread")), mesh=mesh)
with Checkpoints(out / "spread" / FOLDER) as checkpoints:
    restored, step = restore_newest(checkpoints, spread)


def difference(a, b):
    """Largest difference of two runs, relative to how far the parameters moved."""
    moved = max(
        float(np.abs(x - y).max()) for x, y in zip(leaves(alone.params), leaves(stage.init().params), strict=True)
    )
    return max(float(np.abs(x - y).max()) for x, y in zip(leaves(a), leaves(b), strict=True)) / moved


def leaves(tree):
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]


def placed(tree):
    return [x.sharding for x in jax.tree.leaves(tree)]


kernel = spread.params["blocks"]["ffn"]["up"]["kernel"]
moment = next(x for x in jax.tree.leaves(spread.opt_state) if x.shape == kernel.shape)
print(json.dumps({
    "devices": len(jax.devices()),
    "difference": difference(alone.params, spread.params),
    "restored": step if difference(spread, restored) == 0 and placed(spread) == placed(restored) else None,
    "whole": kernel.shape,
    "held": [list(x.addressable_shards[0].data.shape) for x in (kernel, moment)],
}))  # fmt: skip

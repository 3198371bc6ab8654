"""Which device holds what: a mesh of two axes, and the rules that spread parameters, optimiser states and batches.

    data    each group of devices sees its own part of the batch (data parallel)
    fsdp    sees its own part of the batch too, and holds its own part of every large array

XLA's partitioner moves the data. Left alone it would rather copy activations to every device than gather weights, so
models say what FSDP does by hand: a block's parameters are `gathered` where the block is computed (their gradients are
summed and scattered again), one layer of the scan at a time, and activations `keep_batch`. Both heed the mesh in use
(`jax.set_mesh`) and do nothing without one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from turbojax.errors import UserError

DATA, FSDP = "data", "fsdp"
# Below this an array is copied to every device: gathering it costs more than holding it.
MIN_SHARDED = 1 << 16


def make_mesh(data: int = 1, fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """data x fsdp devices. Raises UserError if there are too few, or a size is not positive."""
    devices = jax.devices() if devices is None else devices
    count = data * fsdp
    if data < 1 or fsdp < 1 or count > len(devices):
        raise UserError(f"a mesh of {data} x {fsdp} devices (data x fsdp) does not fit on the {len(devices)} there are")
    return Mesh(np.asarray(devices[:count]).reshape(data, fsdp), (DATA, FSDP))


def parameter_spec(path: str, shape: Sequence[int], fsdp: int) -> PartitionSpec:
    """How an array of that dotted path is cut over `fsdp` devices: along its longest axis that divides evenly.

    Never along the layers of stacked blocks, which are scanned over. Optimiser states follow their parameters: their
    paths end alike and their shapes are the same.
    """
    if fsdp == 1 or math.prod(shape) < MIN_SHARDED:
        return PartitionSpec()
    stacked = "blocks" in path.split(".")
    axes = [axis for axis in range(int(stacked), len(shape)) if shape[axis] % fsdp == 0]
    if not axes:
        return PartitionSpec()
    longest = max(axes, key=lambda axis: (shape[axis], axis))
    return PartitionSpec(*(FSDP if axis == longest else None for axis in range(longest + 1)))


def state_shardings(mesh: Mesh, state: PyTree) -> PyTree:
    """`parameter_spec` of every leaf of a training state (arrays, or their shapes)."""

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return NamedSharding(mesh, parameter_spec(name, leaf.shape, mesh.shape[FSDP]))

    return jax.tree_util.tree_map_with_path(sharding, state)


def component_sharding(mesh: Mesh) -> Any:
    """The same rule in the form that `load_component(sharding=...)` takes: a large model is never whole anywhere."""
    return lambda path, spec: NamedSharding(mesh, parameter_spec(path, spec.shape, mesh.shape[FSDP]))


def batch_spec(shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Activations and data are cut along the batch, over all devices. Raises UserError if it does not divide."""
    if not shape:
        return PartitionSpec()
    if shape[0] % mesh.size:
        raise UserError(f"a batch of {shape[0]} cannot be shared by {mesh.size} devices; choose a multiple")
    return PartitionSpec((DATA, FSDP))


def keep_batch(x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """x cut along the batch over the mesh in use; x as it is where there is none, or it does not divide."""
    mesh = _mesh_in_use()
    if mesh is None or x.shape[0] % mesh.size:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec((DATA, FSDP)))


def gathered(params: PyTree[Array], leave: str | None = None) -> PyTree[Array]:
    """Parameters whole on every device of the mesh in use; those inside the part called `leave` as they are."""
    if _mesh_in_use() is None:
        return params

    def gather(path: Any, leaf: Array) -> Array:
        if leave is not None and jax.tree_util.keystr(path[:1], simple=True) == leave:
            return leaf
        return jax.lax.with_sharding_constraint(leaf, PartitionSpec())

    return jax.tree_util.tree_map_with_path(gather, params)


def _mesh_in_use() -> Any:
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if {DATA, FSDP} <= set(mesh.axis_names) else None


def put_batch(mesh: Mesh, batch: PyTree) -> PyTree:
    """A host batch onto the mesh: NumPy arrays along the batch axis; what is on the devices already stays as it is."""

    def put(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array):
            return leaf
        return jax.device_put(leaf, NamedSharding(mesh, batch_spec(np.shape(leaf), mesh)))

    return jax.tree.map(put, batch)

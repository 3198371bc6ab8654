"""A training state on disk: one safetensors file, replaced whole, so that a killed run finds the last good one."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from safetensors.numpy import load_file, save_file

_STEP = "step"


def _named(state: PyTree) -> dict[str, jax.Array]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def save_state(path: str | Path, state: PyTree, step: int) -> None:
    """Write every leaf of `state` and the number of steps taken."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    arrays = {name: np.asarray(leaf) for name, leaf in _named(state).items()}
    save_file({**arrays, _STEP: np.asarray(step)}, partial)
    os.replace(partial, path)


def restore_state(path: str | Path, like: PyTree) -> tuple[PyTree, int]:
    """Read `save_state`'s file into the structure of `like`; returns (state, steps taken).

    Raises ValueError naming what differs, when the file is of another model or optimiser.
    """
    arrays = load_file(path)
    step = int(arrays.pop(_STEP))
    wanted = {name: (leaf.shape, jnp.dtype(leaf.dtype)) for name, leaf in _named(like).items()}
    found = {name: (a.shape, jnp.dtype(a.dtype)) for name, a in arrays.items()}
    if wanted != found:
        different = sorted({n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n)})
        raise ValueError(f"{path}: a state of another run, {len(different)} arrays differ, the first: {different[0]}")
    leaves = [jnp.asarray(arrays[name]) for name in wanted]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), step

"""A training state by name, as its checkpoints keep it: a state of another run is refused, telling what differs."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from turbojax.checkpoint import Checkpoints
from turbojax.errors import UserError

FOLDER = "checkpoints"


def named(state: PyTree) -> dict[str, jax.Array]:
    """Every leaf by dotted path."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): jnp.asarray(leaf) for path, leaf in leaves}


def restore_newest(checkpoints: Checkpoints, like: PyTree) -> tuple[PyTree, int]:
    """(state, steps taken) of the newest checkpoint, in the structure and on the devices of `like`; (like, 0) if none.

    Raises UserError naming what differs, when it is of another model or optimiser.
    """
    step = checkpoints.newest()
    if step is None:
        return like, 0
    wanted, found = named(like), checkpoints.shapes(step)
    expected = {name: (leaf.shape, leaf.dtype) for name, leaf in wanted.items()}
    if expected != found:
        different = sorted({n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n)})
        raise UserError(
            f"{checkpoints.folder} holds a state of another run: {len(different)} arrays differ, the first: "
            f"{different[0]}; choose another --out"
        )
    arrays = checkpoints.restore(step, wanted)
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in wanted]), step


def restore_run(out: Path, like: PyTree) -> tuple[PyTree, int] | None:
    """`restore_newest` of a run in `out`; None where there is no such run."""
    if not (out / FOLDER).is_dir():
        return None
    with Checkpoints(out / FOLDER) as checkpoints:
        return None if checkpoints.newest() is None else restore_newest(checkpoints, like)

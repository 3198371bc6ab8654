"""What golden tests share: a module with given parameters, and the distance that they bound."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import ArrayLike

from turbojax.checkpoint import abstract_module
from turbojax.config import ComponentConfig


def module_with(config: ComponentConfig, parameters: dict[str, np.ndarray], dtype: str | None = "float32"):
    """The module of `config`, its parameters by dotted name; one too many, too few or misshapen fails."""
    graph, state = nnx.split(abstract_module(config, dtype))
    leaves = {".".join(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(state)}
    assert {k: leaf.shape for k, (_, leaf) in leaves.items()} == {k: v.shape for k, v in parameters.items()}
    filled = [(path, leaf.replace(jnp.asarray(parameters[k], leaf.dtype))) for k, (path, leaf) in leaves.items()]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def relative(ours: ArrayLike, theirs: ArrayLike) -> float:
    """|ours - theirs| / |theirs|, over all elements."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))

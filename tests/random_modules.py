"""Modules with every parameter random, made without compiling an initialiser for every shape."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from turbojax.checkpoint import abstract_module, path_name
from turbojax.config import ComponentConfig


def random_module(config: ComponentConfig, dtype: str | None = None, seed: int = 0) -> nnx.Module:
    """The module of `config`; norms lie around 1, all else around 0."""
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(abstract_module(config, dtype))
    filled = []
    for path, variable in nnx.to_flat_state(state):
        centre = 1.0 if path[-1] in ("scale", "gamma") else 0.0
        value = centre + 0.1 * rng.standard_normal(variable.shape, np.float32)
        filled.append((path, variable.replace(jnp.asarray(value, variable.dtype))))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def flat(module: nnx.Module) -> dict[str, np.ndarray]:
    """Parameters by dotted path, as numpy arrays."""
    return {path_name(path): np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(module))}

"""The gradient of a mean over samples, all at once or a part of the batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

Metrics = Mapping[str, Array]
Loss = Callable[[PyTree, PyTree, PRNGKeyArray], tuple[Array, Metrics]]


def gradient(loss: Loss, params: PyTree, data: PyTree, key: PRNGKeyArray, parts: int = 1) -> tuple[PyTree, Metrics]:
    """(gradient, metrics) of loss(params, data, key) -> (mean over the samples of `data`, metrics), float32.

    parts: how many slices of the leading axis of `data` are worked on one after the other and averaged: gradient
    accumulation, for batches whose activations do not fit. Each slice has a key of its own and is strided, so that a
    batch spread over devices stays spread. Raises ValueError if the batch does not divide.
    """
    differentiate = jax.grad(loss, has_aux=True)
    if parts == 1:
        return differentiate(params, data, key)

    def sliced(leaf: Array) -> Array:
        if leaf.shape[0] % parts:
            raise ValueError(f"a batch of {leaf.shape[0]} does not divide into {parts} parts")
        return jnp.swapaxes(leaf.reshape(-1, parts, *leaf.shape[1:]), 0, 1)

    def add(total: PyTree, part: tuple[PyTree, PRNGKeyArray]) -> tuple[PyTree, Metrics]:
        data, key = part
        grads, metrics = differentiate(params, data, key)
        return jax.tree.map(lambda t, g: t + g / parts, total, grads), metrics

    zeros = jax.tree.map(jnp.zeros_like, params)
    total, metrics = jax.lax.scan(add, zeros, (jax.tree.map(sliced, data), jax.random.split(key, parts)))
    return total, jax.tree.map(lambda m: jnp.mean(m, axis=0), metrics)

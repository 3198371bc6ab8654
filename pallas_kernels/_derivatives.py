"""Derivatives that an op does not have."""

from __future__ import annotations

import functools

import jax
from jaxtyping import Array


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _identity(name: str, x: Array) -> Array:
    return x


@_identity.defjvp
def _refuse(name, primals, tangents):
    raise NotImplementedError(
        f"{name} is quantised and has no derivative: differentiate the unquantised op "
        "(attention kind 'sla' or 'dense', quantized=False)"
    )


def forward_only(name: str, *arrays: Array) -> tuple[Array, ...]:
    """The arrays, marked so that differentiating through them raises.

    Rounding has derivative zero almost everywhere: without this the gradient would silently be wrong.
    """
    return tuple(_identity(name, x) for x in arrays)

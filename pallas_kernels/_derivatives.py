"""Derivatives that an op does not have, or has from another implementation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

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


def derivative_of(differentiable: Callable[..., Any], fast: Callable[..., Any]) -> Callable[..., Any]:
    """`fast`, with the derivatives of `differentiable` (the same function): both modes, as rCM needs."""
    op = jax.custom_jvp(lambda *args: fast(*args))

    @op.defjvp
    def _(primals, tangents):
        return op(*primals), jax.jvp(differentiable, primals, tangents)[1]

    return op

"""Derivatives that an op does not have, or has from another implementation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.custom_derivatives import linear_call
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


def derivative_of(
    differentiable: Callable[..., Any], fast: Callable[..., Any], backward: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """`fast`, with the derivatives of `differentiable` (the same function): both modes, as rCM needs.

    backward: (arguments, results, cotangents of the results) -> cotangents of the arguments that have any (integers
        have none), in place of reverse mode through `differentiable`. Forward mode goes through that all the same.
    """
    op = jax.custom_jvp(lambda *args: fast(*args))

    @op.defjvp
    def _(primals, tangents):
        out = op(*primals)
        if backward is None:
            return out, jax.jvp(differentiable, primals, tangents)[1]
        moves = [tangent.dtype != jax.dtypes.float0 for tangent in tangents]

        def along(known, directions):
            rest = iter(directions)
            full = tuple(next(rest) if move else t for move, t in zip(moves, _still(known[0]), strict=True))
            return jax.jvp(differentiable, known[0], full)[1]

        def transposed(known, cotangents):
            return backward(*known, cotangents)

        moving = tuple(tangent for move, tangent in zip(moves, tangents, strict=True) if move)
        return out, linear_call(along, transposed, (primals, out), moving)

    return op


def _still(primals: tuple[Array, ...]) -> list[np.ndarray]:
    return [np.zeros(x.shape, jax.dtypes.float0) for x in primals]

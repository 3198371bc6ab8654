"""Derivatives that an op does not have, or has from another implementation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero, linear_call
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

    backward: (arguments, results, cotangents of the results) -> cotangents of the arguments that are not integers, in
        place of reverse mode through `differentiable`. Forward mode goes through that all the same.
    """
    op = jax.custom_jvp(lambda *args: fast(*args))

    @functools.partial(op.defjvp, symbolic_zeros=True)
    def _(primals, tangents):
        out = op(*primals)

        def along(known, directions):
            return jax.jvp(differentiable, known[0], directions)[1]

        def transposed(known, cotangents):
            assert backward is not None
            found = iter(backward(*known, cotangents))
            return tuple(next(found) if jnp.issubdtype(x.dtype, jnp.inexact) else None for x in known[0])

        return out, linear(along, transposed if backward else None, (primals, out), tangents)

    return op


def linear(
    along: Callable[..., Any], transposed: Callable[..., Any] | None, known: Any, tangents: tuple[Any, ...]
) -> Any:
    """`along(known, tangents)`, whose reverse is `transposed(known, cotangents)` if that is given; for a JVP rule with
    symbolic zeros. linear_call gets what really moves alone: its transpose takes a zero for a constant, and fails.
    """
    moves = [not isinstance(tangent, SymbolicZero) for tangent in tangents]

    def forwards(known, directions):
        rest = iter(directions)
        full = tuple(next(rest) if move else _zeros(zero) for move, zero in zip(moves, tangents, strict=True))
        return along(known, full)

    def backwards(known, cotangents):
        assert transposed is not None
        found = transposed(known, cotangents)
        return tuple(gradient for gradient, move in zip(found, moves, strict=True) if move)

    moving = tuple(tangent for tangent, move in zip(tangents, moves, strict=True) if move)
    if transposed is None or not moving:
        return forwards(known, moving)
    return linear_call(forwards, backwards, known, moving)


def _zeros(zero: Any) -> Array | np.ndarray:
    """A symbolic zero as an array; an integer's tangent has no values."""
    kind = jax.dtypes.float0
    return np.zeros(zero.shape, kind) if zero.dtype == kind else jnp.zeros(zero.shape, zero.dtype)

"""What a product tells of each row of its result besides the result, for whoever comes next: a pass over it less."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

Measure = Literal["amax", "squares"]


class RowMeasure(NamedTuple):
    """reduce(each(y), axis) over a row; join(each(a), each(b)) puts two parts of it on top of each other."""

    each: Callable[[Array], Array]
    join: Callable[[Any, Any], Array]
    reduce: Callable[..., Array]


MEASURES: dict[str, RowMeasure] = {
    # Stays in 16 bits, where a GPU compares two at once.
    "amax": RowMeasure(jnp.abs, jnp.maximum, jnp.max),
    "squares": RowMeasure(lambda y: jnp.square(y.astype(jnp.float32)), jnp.add, jnp.sum),
}


def measure_rows(y: Float[Array, "*rows N"], measure: Measure) -> Float32[Array, "*rows"]:
    """The largest magnitude of each row ("amax"), or the sum of its squares."""
    how = MEASURES[measure]
    return how.reduce(how.each(y), axis=-1).astype(jnp.float32)

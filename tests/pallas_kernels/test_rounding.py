"""Rounding to e4m3 in float32 arithmetic is the cast itself."""

import jax
import ml_dtypes
import numpy as np

from pallas_kernels.rounding import round_e4m3


def test_round_e4m3_is_the_cast_at_every_value_midpoint_and_neighbour():
    # Nothing but a boundary between two e4m3 numbers can go wrong: all of them, and the floats beside.
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    values = np.unique(np.abs(codes[np.isfinite(codes)]))
    middles = (values[1:] + values[:-1]) / 2
    points = np.concatenate([values, middles])
    points = np.concatenate([points, np.nextafter(points, np.float32(0)), np.nextafter(points, np.float32(448))])
    # Float32's own subnormals are zeros to a CPU that flushes them.
    points = points[(points <= 448) & ((points == 0) | (points >= np.finfo(np.float32).tiny))]
    points = np.concatenate([points, -points])
    cast = points.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    rounded = np.asarray(jax.jit(round_e4m3)(points))
    np.testing.assert_array_equal(rounded, cast)
    np.testing.assert_array_equal(np.signbit(rounded), np.signbit(cast))

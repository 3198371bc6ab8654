"""What int8_linear tells of the rows of its result, and what it does with rows of which it was told."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
from ptx_warp import Warp

from pallas_kernels import int8_linear, quantize_blockwise, quantize_per_channel, rounds_rows
from pallas_kernels._hopper_round_ahead import UNIT, WARPS, program
from pallas_kernels.dispatch import compiling_for
from pallas_kernels.quantize import rows_xla

OF_ROWS = {"amax": lambda y: np.abs(y).max(axis=-1), "squares": lambda y: np.square(y).sum(axis=-1)}


def problem(m, n, k, dtype=jnp.bfloat16):
    rng = np.random.default_rng(m + n + k)
    x = rng.normal(size=(m, k)) * rng.uniform(0.1, 10, size=(m, 1))
    return jnp.asarray(x, dtype), *quantize_per_channel(jnp.asarray(rng.normal(size=(n, k)), jnp.float32))


@pytest.mark.parametrize("measure", OF_ROWS)
@pytest.mark.parametrize("implementation", ["xla", "interpret"])
@pytest.mark.parametrize("epilogue", ["activation", "residual", "gate of each batch item", "tiles"])
def test_the_measure_is_that_of_the_result(measure, implementation, epilogue):
    """Of the rounded result, whole rows of several tiles of columns, the last of them ragged."""
    m, n, k = 2 * 70, 320, 256
    x, *weights = problem(m, n, k)
    if epilogue == "tiles":
        weights = quantize_blockwise(jnp.asarray(np.random.default_rng(1).normal(size=(n, k)), jnp.float32))
    rng = np.random.default_rng(0)
    residual, gate = (jnp.asarray(rng.normal(size=(2, rows, n)) * 40, jnp.bfloat16) for rows in (70, 1))
    options = {
        "activation": {"activation": "gelu_tanh"},
        "residual": {"residual": residual},
        "gate of each batch item": {"residual": residual, "gate": gate},
        "tiles": {},
    }[epilogue]
    y, measured = int8_linear(x.reshape(2, 70, k), *weights, measure=measure, implementation=implementation, **options)
    if implementation == "interpret":
        assert not interpreter.get_races().races_found
    assert measured.shape == (2, 70)
    assert measured.dtype == jnp.float32
    # The maximum is exact; a sum of 320 squares in float32 errs by a few of its last bits.
    rtol = 0 if measure == "amax" else 1e-5
    np.testing.assert_allclose(measured, OF_ROWS[measure](np.asarray(y, np.float64)), rtol=rtol)
    alone = int8_linear(x.reshape(2, 70, k), *weights, implementation=implementation, **options)
    np.testing.assert_array_equal(np.asarray(alone, np.float32), np.asarray(y, np.float32))


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
@pytest.mark.parametrize("shape", [(75, 192, 256), (136, 64, 512), (1, 128, 384)])
def test_known_maxima_give_the_same_numbers(shape, implementation):
    """Also where rows of that many features are not rounded by the product (384)."""
    x, weight_q, scale = problem(*shape)
    x = x.at[0].set(0)  # a row without a largest magnitude
    amax = jnp.abs(x).max(axis=-1).astype(jnp.float32)
    told = int8_linear(x, weight_q, scale, x_amax=amax, implementation=implementation)
    alone = int8_linear(x, weight_q, scale, implementation=implementation)
    np.testing.assert_array_equal(np.asarray(told, np.float32), np.asarray(alone, np.float32))


def test_maxima_are_used_and_not_taken_anew():
    """Twice the maximum is a step twice as large: other numbers, or nobody looked at it."""
    x, weight_q, scale = problem(64, 128, 256)
    amax = jnp.abs(x).max(axis=-1).astype(jnp.float32)
    for implementation in ("xla", "interpret"):
        told, off = (
            int8_linear(x, weight_q, scale, x_amax=factor * amax, implementation=implementation) for factor in (1, 2)
        )
        assert np.any(np.asarray(told, np.float32) != np.asarray(off, np.float32)), implementation


def test_rows_are_rounded_ahead_on_hopper_where_that_is_faster():
    assert rounds_rows(1536, 8960)  # the 1.3B model's second feed-forward layer
    assert not rounds_rows(5120, 13824)  # 14B: no gain
    assert not rounds_rows(1536, 8960, jnp.float32)
    assert not rounds_rows(1536, 384)
    with compiling_for((8, 9)):
        assert not rounds_rows(1536, 8960)


@pytest.mark.parametrize(("rows", "features"), [(24, 256), (12, 512), (16, 1536), (8, 5120), (4, 8960), (8, 13824)])
def test_the_warps_that_round_give_the_integers_of_rounding_before(rows, features):
    """Their program, run by one after the other, with tiles of 8 rows: every row, and the counts of all tiles."""
    x = np.array(problem(rows, 1, features)[0])
    x[1] = 0  # a row without a largest magnitude
    amax = np.abs(x).max(axis=1).astype(np.float32)
    found, finished = np.full((rows, features), 99, np.int8), np.zeros(-(-rows // 8), np.int32)
    arrays = [x.view(np.uint16), amax, found, finished]
    for block in range(2):
        for warp in range(1, WARPS + 1):
            Warp(arrays, block=block, blocks=2, warp=warp).run(program(rows, features, 8))
    np.testing.assert_array_equal(found, rows_xla(jnp.asarray(x))[0])
    np.testing.assert_array_equal(finished, [min(8, rows - row) // UNIT for row in range(0, rows, 8)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_amax": jnp.ones((3,))}, "x_amax"),
        ({"x_amax": jnp.ones((2,)), "x": jnp.ones((2, 8), jnp.int8), "x_scale": jnp.ones((2,))}, "x_amax"),
        ({"x_amax": jnp.ones((2,)), "weight_scale": jnp.ones((1, 1))}, "x_amax"),
        ({"measure": "mean"}, "mean"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_errors_name_the_offender(change, message):
    arguments = {"x": jnp.ones((2, 8)), "weight_q": jnp.ones((4, 8), jnp.int8), "weight_scale": jnp.ones((4,))} | change
    with pytest.raises(ValueError, match=message):
        int8_linear(**arguments)

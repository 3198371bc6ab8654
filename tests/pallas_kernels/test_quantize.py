"""Quantisers: the reference's rounding bit for bit, and error below half a step wherever nothing saturates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

from pallas_kernels import quantize_blockwise, quantize_per_channel, quantize_per_token


def reference_tiles(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Section by section as the reference's quantiser states it, in float32, tile by tile."""
    m, k = x.shape
    q = np.zeros((m, k), np.int8)
    scale = np.zeros((-(-m // 128), -(-k // 128)), np.float32)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            tile = np.s_[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            amax = np.maximum(np.float32(1e-8), np.abs(x[tile]).max())
            q[tile] = np.clip(np.rint(x[tile] * (np.float32(128) / amax)), -128, 127)
            scale[i, j] = amax / np.float32(128)
    return q, scale


def test_anchor_of_the_reference():
    x = jnp.linspace(-1, 1, 16384).reshape(128, 128).astype(jnp.bfloat16)
    q, scale = quantize_blockwise(x)
    q = np.asarray(q).ravel()
    assert scale.shape == (1, 1)
    assert scale[0, 0] == 0.0078125
    assert (q.min(), q.max(), q.astype(int).sum()) == (-128, 127, -48)
    assert q[[0, 1, 100, 8191, 8192, 16383]].tolist() == [-128, -128, -126, 0, 0, 127]


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (130, 127), (256, 384), (257, 129)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_tiles_are_the_references_bit_for_bit(shape, dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape) * 3, dtype)
    q, scale = jax.jit(quantize_blockwise)(x)
    expected_q, expected_scale = reference_tiles(np.asarray(x.astype(jnp.float32)))
    np.testing.assert_array_equal(q, expected_q)
    np.testing.assert_array_equal(scale, expected_scale)


@pytest.mark.parametrize("value", [0.0, 2.5, -2.5])
def test_constant_input(value):
    """Zeros stay zero (no division by zero); the divisor of 128 makes -amax exact and +amax one step short."""
    x = jnp.full((130, 140), value, jnp.float32)
    q, scale = quantize_blockwise(x)
    assert np.unique(q).tolist() == [int(np.clip(np.sign(value) * 128, -128, 127))]
    assert bool(jnp.all(scale > 0))
    q, scale = quantize_per_token(x)
    np.testing.assert_allclose(q * scale[:, None], x, rtol=1e-6)


def test_rows_err_by_at_most_half_a_step():
    """Divisor 127: nothing saturates, so rounding is the only error. 1e-3 of a step pays for the float32 product."""
    x = np.random.default_rng(1).normal(size=(3, 17, 333)).astype(np.float32)
    x[..., 7] *= 20
    q, scale = quantize_per_token(jnp.asarray(x))
    assert q.shape == x.shape
    assert scale.shape == x.shape[:-1]
    steps = (
        np.abs(np.asarray(q, np.float64) * np.asarray(scale, np.float64)[..., None] - x) / np.asarray(scale)[..., None]
    )
    assert steps.max() <= 0.5 + 1e-3


@pytest.mark.parametrize("shape", [(1, 128), (5, 384), (133, 256)])
@pytest.mark.parametrize("quantize", [quantize_per_token, quantize_blockwise])
def test_kernels_agree_with_xla_bit_for_bit(quantize, shape):
    if quantize is quantize_blockwise and shape[0] < 128:
        with pytest.raises(NotImplementedError, match="whole tiles"):
            quantize(jnp.ones(shape), implementation="interpret")
        return
    x = jnp.asarray(np.random.default_rng(3).normal(size=shape), jnp.bfloat16)
    q, scale = quantize(x, implementation="interpret")
    assert not interpreter.get_races().races_found
    expected_q, expected_scale = quantize(x, implementation="xla")
    np.testing.assert_array_equal(q, expected_q)
    np.testing.assert_array_equal(scale, expected_scale)


def test_weights_of_stacked_layers_quantise_each_alone():
    weight = jnp.asarray(np.random.default_rng(2).normal(size=(2, 8, 16)), jnp.float32)
    q, scale = quantize_per_channel(weight)
    assert scale.shape == (2, 8)
    one_q, one_scale = quantize_per_channel(weight[1])
    np.testing.assert_array_equal(q[1], one_q)
    np.testing.assert_array_equal(scale[1], one_scale)


@pytest.mark.usefixtures("unchecked")
def test_a_vector_is_refused():
    with pytest.raises(ValueError, match=r"matrix \[M, K\]"):
        quantize_blockwise(jnp.zeros((4,)))

"""LayerNorm, modulation and quantisation fused: near float64 on XLA and in the interpreter, without races."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

from pallas_kernels import norm_modulate_quantize

# float32 statistics move a value by about 1e-6 of the row's largest, 127 steps: 1e-3 covers it ten times over.
STEPS = 1e-3


def reference(x, scale, shift, eps=1e-6):
    x, scale, shift = (np.asarray(a, np.float64) for a in (x, scale, shift))
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * (1 + scale) + shift


def inputs(batch, length, width, mean=0.0):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, length, width)) + mean
    x[..., :: width // 3] *= 20
    scale, shift = (0.3 * rng.normal(size=(batch, 1, width)) for _ in range(2))
    return jnp.asarray(x, jnp.bfloat16), jnp.asarray(scale, jnp.float32), jnp.asarray(shift, jnp.float32)


def errors_in_steps(q, scales, expected, granularity):
    q = np.asarray(q, np.float64).reshape(-1, q.shape[-1])
    expected = expected.reshape(q.shape)
    if granularity == "token":
        step = np.asarray(scales, np.float64).reshape(-1, 1)
        return np.abs(q - expected / step)
    step = np.repeat(np.repeat(np.asarray(scales, np.float64), 128, 0)[: q.shape[0]], 128, 1)[:, : q.shape[1]]
    return np.abs(q - np.minimum(expected / step, 127))


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
@pytest.mark.parametrize(
    ("granularity", "shape"),
    [("token", (2, 11, 384)), ("token", (1, 1, 128)), ("block", (1, 133, 384)), ("block", (1, 256, 128))],
)
def test_rounds_the_float64_value(granularity, shape, implementation):
    """Half a step from rounding, and next to nothing from float32; a mean of 50 widths costs no accuracy."""
    x, scale, shift = inputs(*shape, mean=50.0)
    q, scales = norm_modulate_quantize(x, scale, shift, granularity=granularity, implementation=implementation)
    if implementation == "interpret":
        assert not interpreter.get_races().races_found
    expected = reference(x.astype(jnp.float32), scale, shift)
    assert errors_in_steps(q, scales, expected, granularity).max() <= 0.5 + STEPS


@pytest.mark.parametrize("granularity", ["token", "block"])
def test_modulation_broadcasts(granularity):
    """[D] (an affine LayerNorm), [B, 1, D] and [B, L, D] say the same thing in more words."""
    x, scale, shift = inputs(1, 150, 128)
    whole = norm_modulate_quantize(x, scale, shift, granularity=granularity)
    vector = norm_modulate_quantize(x, scale[0, 0], shift[0, 0], granularity=granularity)
    per_token = [jnp.broadcast_to(m, x.shape) for m in (scale, shift)]
    spread = norm_modulate_quantize(x, *per_token, granularity=granularity)
    for other in (vector, spread):
        np.testing.assert_array_equal(other[0], whole[0])
        np.testing.assert_array_equal(other[1], whole[1])


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_constant_rows(implementation):
    """No variance: eps keeps the row at its shift, and zeros stay zeros."""
    x = jnp.full((1, 3, 128), 7.0, jnp.bfloat16)
    shift = jnp.ones((1, 1, 128))
    q, scales = norm_modulate_quantize(x, shift, shift, implementation=implementation)
    np.testing.assert_allclose(q * scales[..., None], jnp.ones_like(q), rtol=1e-6)
    q, scales = norm_modulate_quantize(x, shift, 0 * shift, implementation=implementation)
    np.testing.assert_array_equal(q, 0)
    assert bool(jnp.all(scales > 0))


@pytest.mark.parametrize(
    ("shape", "granularity", "message"),
    [((1, 4, 100), "token", "100"), ((1, 4, 128), "block", "whole tiles"), ((2, 128, 128), "block", "straddle")],
)
def test_a_forced_kernel_that_cannot_run_says_why(shape, granularity, message):
    x = jnp.ones(shape)
    modulation = jnp.ones((shape[0], 1, shape[2]))
    with pytest.raises(NotImplementedError, match=message):
        norm_modulate_quantize(x, modulation, modulation, granularity=granularity, implementation="interpret")
    norm_modulate_quantize(x, modulation, modulation, granularity=granularity)


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_granularity_is_refused():
    with pytest.raises(ValueError, match="row"):
        norm_modulate_quantize(jnp.ones((1, 1, 128)), jnp.ones(128), jnp.ones(128), granularity="row")

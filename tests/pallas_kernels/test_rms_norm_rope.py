"""RMSNorm over the full width and RoPE on interleaved pairs: near float64, on every path, differentiable twice over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

from pallas_kernels import rms_norm_rope

# The result is rounded once to bf16: 2^-8 of the value at most, and float32 under it.
BF16 = 2.0**-8


def reference(x, weight, angle, eps=1e-6):
    """As the original states it: complex numbers a + ib over neighbouring elements, times e^(i angle)."""
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    batch, length, heads, dim = x.shape
    flat = x.reshape(batch, length, heads * dim)
    flat = flat / np.sqrt((flat**2).mean(-1, keepdims=True) + eps) * weight
    pairs = flat.reshape(batch, length, heads, dim // 2, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle)[:, None]
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def inputs(batch, length, heads, dim, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(batch, length, heads, dim)) * 30, dtype)
    weight = jnp.asarray(rng.normal(size=heads * dim), jnp.float32)
    angle = rng.uniform(0, 6.28, size=(length, dim // 2))
    return x, weight, angle, jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32)


@pytest.mark.parametrize("shape", [(1, 1, 2, 128), (2, 11, 4, 64), (1, 9, 6, 128), (2, 3, 3, 12)])
def test_xla_in_float32(shape):
    x, weight, angle, cos, sin = inputs(*shape, jnp.float32)
    y = rms_norm_rope(x, weight, cos, sin)
    np.testing.assert_allclose(y, reference(x, weight, angle), rtol=0, atol=2e-6 * np.abs(y).max())


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
@pytest.mark.parametrize("shape", [(1, 1, 2, 128), (2, 11, 4, 64), (1, 9, 6, 128)])
def test_bf16_rounds_once(shape, implementation):
    x, weight, angle, cos, sin = inputs(*shape, jnp.bfloat16)
    y = rms_norm_rope(x, weight, cos, sin, implementation=implementation)
    if implementation == "interpret":
        assert not interpreter.get_races().races_found
    expected = reference(x.astype(jnp.float32), weight, angle)
    assert y.dtype == jnp.bfloat16
    slack = BF16 * np.abs(expected) + 1e-6 * np.abs(expected).max()
    assert np.all(np.abs(np.asarray(y, np.float64) - expected) <= slack)


def test_the_kernel_and_xla_agree_bit_for_bit():
    """Same operations in the same precision: what differs would be the order of one sum of squares."""
    x, weight, _, cos, sin = inputs(1, 5, 2, 128, jnp.bfloat16)
    a = rms_norm_rope(x, weight, cos, sin, implementation="interpret")
    b = rms_norm_rope(x, weight, cos, sin, implementation="xla")
    assert np.mean(np.asarray(a.astype(jnp.float32)) != np.asarray(b.astype(jnp.float32))) <= 1e-2


def test_rope_anchor():
    """x[i] = i / 128 at token (f, h, w) = (3, 5, 7), from the reference's own code; RMSNorm undone by its weight."""
    freqs = [10000.0 ** (-2 * np.arange(n) / (2 * n)) for n in (22, 21, 21)]
    angle = np.concatenate([position * f for position, f in zip((3, 5, 7), freqs, strict=True)])[None]
    x = np.arange(128) / 128
    weight = np.full(128, np.sqrt((x**2).mean() + 1e-6))
    y = rms_norm_rope(
        jnp.asarray(x, jnp.float32)[None, None, None],
        jnp.asarray(weight, jnp.float32),
        jnp.asarray(np.cos(angle), jnp.float32),
        jnp.asarray(np.sin(angle), jnp.float32),
    )
    picked = np.asarray(y).ravel()[[0, 1, 2, 3, 44, 45, 86, 87, 127]]
    expected = [
        -0.00110250006,
        -0.00773431638,
        -0.0276877152,
        0.00518145331,
        0.434630692,
        -0.229905232,
        0.0599824983,
        0.953830810,
        0.993255318,
    ]
    np.testing.assert_allclose(picked, expected, atol=1e-6)
    assert abs(float(y.sum()) - 50.6212334) < 1e-4


def test_derivatives_in_both_modes():
    """Training goes through it forwards (rCM) and backwards: against central differences, 1e-2 for float32's noise."""
    x, weight, _, cos, sin = inputs(1, 3, 2, 16, jnp.float32)
    x = x / 30
    direction = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32)
    probe = jnp.asarray(np.random.default_rng(2).normal(size=x.shape), jnp.float32)

    def f(x, weight):
        return jnp.sum(rms_norm_rope(x, weight, cos, sin) * probe)

    step = 1e-2
    numeric = (f(x + step * direction, weight) - f(x - step * direction, weight)) / (2 * step)
    _, forward = jax.jvp(lambda x: f(x, weight), (x,), (direction,))
    reverse = jnp.sum(jax.grad(f)(x, weight) * direction)
    np.testing.assert_allclose(forward, numeric, rtol=1e-2)
    np.testing.assert_allclose(reverse, forward, rtol=1e-4)
    assert jax.grad(f, argnums=1)(x, weight).shape == weight.shape


@pytest.mark.parametrize(
    ("shape", "dtype", "message"), [((1, 2, 2, 128), jnp.float32, "bfloat16"), ((1, 2, 3, 64), jnp.bfloat16, "divide")]
)
def test_a_forced_kernel_that_cannot_run_says_why(shape, dtype, message):
    x, weight, _, cos, sin = inputs(*shape, dtype)
    with pytest.raises(NotImplementedError, match=message):
        rms_norm_rope(x, weight, cos, sin, implementation="interpret")


@pytest.mark.usefixtures("unchecked")
def test_wrong_shapes_are_named():
    x, weight, _, cos, sin = inputs(1, 4, 2, 16, jnp.float32)
    with pytest.raises(ValueError, match="full width"):
        rms_norm_rope(x, weight[:16], cos, sin)
    with pytest.raises(ValueError, match="cos"):
        rms_norm_rope(x, weight, cos[:2], sin[:2])

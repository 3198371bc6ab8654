"""A kernel takes its derivatives from a function that has them, and in reverse mode from a kernel of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dense_attention
from pallas_kernels._derivatives import derivative_of


def plain(x, y, index):
    return x[index] * y, jnp.sum(x)


def op(backward):
    # The fast one is 1 too large: values are its own, derivatives are not.
    return derivative_of(plain, lambda *args: (plain(*args)[0] + 1.0, plain(*args)[1]), backward)


def pulled_back(arguments, results, cotangents):
    """The right gradient of x, and of y one that only this function gives."""
    (x, y, index), (do, ds) = arguments, cotangents
    return jnp.zeros_like(x).at[index].add(do * y) + ds, results[0] * do


POINT = jnp.arange(4.0), jnp.asarray([2.0, 3.0])
INDEX = jnp.asarray([1, 3])


def loss(backward, x, y):
    o, total = op(backward)(x, y, INDEX)
    return jnp.sum(o**2) + total


@pytest.mark.parametrize("backward", [None, pulled_back])
def test_values_are_the_kernels_and_forward_mode_the_other_ones(backward):
    value, tangent = jax.jvp(lambda *args: op(backward)(*args, INDEX), POINT, (jnp.ones(4), jnp.ones(2)))
    np.testing.assert_array_equal(value[0], [3.0, 10.0])
    np.testing.assert_array_equal(tangent[0], [2.0 + 1.0, 3.0 + 3.0])
    assert tangent[1] == 4.0


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_reverse_mode_is_the_kernels_own(wrap):
    """x: 2 o y at the indices, and 1 of the sum; y: results times cotangents, 2 o^2."""
    dx, dy = jax.grad(wrap(lambda x, y: loss(pulled_back, x, y)), (0, 1))(*POINT)
    np.testing.assert_array_equal(dx, [1.0, 1.0 + 2 * 3.0 * 2.0, 1.0, 1.0 + 2 * 10.0 * 3.0])
    np.testing.assert_array_equal(dy, [2 * 9.0, 2 * 100.0])


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_one_argument_may_stand_still(wrap):
    dx = jax.grad(wrap(lambda x: op(pulled_back)(x, POINT[1], INDEX)[1]))(POINT[0])
    np.testing.assert_array_equal(dx, np.ones(4))  # and the result that is not used has a cotangent of zero
    dy = jax.grad(wrap(lambda y: loss(pulled_back, POINT[0], y)))(POINT[1])
    np.testing.assert_array_equal(dy, [2 * 9.0, 2 * 100.0])


def test_dense_attention_may_have_keys_that_stand_still():
    """As of a text that is not trained: the gradients are those of all three, one at a time."""
    arrays = tuple(jax.random.normal(jax.random.key(i), (1, 5, 2, 8)) for i in range(3))

    def loss(q, k, v):
        return jnp.sum(dense_attention(q, k, v, implementation="xla") ** 2)

    for i, want in enumerate(jax.grad(loss, (0, 1, 2))(*arrays)):
        np.testing.assert_allclose(jax.jit(jax.grad(loss, i))(*arrays), want, atol=1e-6)


def test_nothing_moves():
    """A value of the op beside one that is differentiated."""
    value = jax.grad(lambda z: z * jax.lax.stop_gradient(op(pulled_back)(*POINT, INDEX)[1]))(2.0)
    assert value == 6.0

"""INT8/FP8 attention stays within its number formats' error of exact attention, whatever the input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import DATA, attention, cosine, inputs, relative
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.mosaic.gpu import fragmented_array as fa
from register_layouts import held_by_each_thread

from pallas_kernels import dense_attention, sage_attention
from pallas_kernels._hopper import FP8_ORDER

# e4m3 keeps three mantissa bits: rounding P and V costs 2.6% each, INT8 scores 1.3%, 3.8% together (measured, and
# the sum of squares). bfloat16 inputs and outputs add 0.3%.
RELATIVE, COSINE = 5e-2, 0.9985


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("batch", "lq", "lk", "dim"), [(2, 130, 130, 64), (1, 1, 1, 64), (1, 77, 333, 128), (1, 50, 50, 48)]
)
def test_within_the_formats_error(kind, dtype, batch, lq, lk, dim):
    q, k, v = (jnp.asarray(x, dtype) for x in inputs(kind, batch, lq, lk, 2, dim))
    want, _ = attention(q, k, v)
    got = sage_attention(q, k, v, implementation="xla")
    assert got.dtype == q.dtype
    assert relative(got, want) <= RELATIVE
    if np.any(want):
        assert cosine(got, want) >= COSINE


def test_huge_logits_stay_finite_and_inside_the_values():
    """INT8 cannot order logits of 1e4 that are closer than its step, but a weighted mean of V it must remain."""
    q, k, v = inputs("huge logits", 1, 100, 200, 2, 64)
    got = np.asarray(sage_attention(q, k, v))
    assert np.isfinite(got).all()
    # Rounding V to e4m3 moves it by at most 1/16.
    assert np.abs(got).max() <= np.abs(v).max() * 17 / 16


def test_smoothing_is_what_affords_a_large_mean():
    q, k, v = inputs("large mean", 1, 128, 256, 2, 64)
    want, _ = attention(q, k, v)
    rough = sage_attention(q, k, v, smooth_k=False)
    assert relative(rough, want) > relative(sage_attention(q, k, v), want)


@pytest.mark.parametrize("length", [pytest.param((64, 130, 64)), pytest.param((200, 300, 128), marks=pytest.mark.slow)])
def test_the_hopper_kernel_agrees_in_the_interpreter(length):
    """Ragged ends on both sides, no races; apart from XLA's path only by rounding P against a running maximum."""
    lq, lk, dim = length
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs("outliers", 1, lq, lk, 1, dim))
    got = jax.block_until_ready(sage_attention(q, k, v, implementation="interpret"))
    assert not interpret_pallas_call.get_races().races_found
    assert relative(got, attention(q, k, v)[0]) <= RELATIVE
    assert relative(got, sage_attention(q, k, v, implementation="xla")) <= 3e-2


def test_the_fp8_order_is_that_of_the_register_layouts():
    """Each thread's accumulator values fill its own operand registers: the hardware's half of the switch, which the
    interpreter cannot run, read from the layouts' own tables."""
    accumulator = held_by_each_thread(fa.WGMMA_LAYOUT, (64, 16))
    row, column = np.divmod(held_by_each_thread(fa.WGMMA_LAYOUT_8BIT, (64, 16)), 16)
    moved = row * 16 + np.array(FP8_ORDER)[column]
    np.testing.assert_array_equal(np.sort(moved, axis=1), np.sort(accumulator, axis=1))


def test_a_derivative_is_refused():
    x = jnp.ones((1, 16, 1, 64))
    with pytest.raises(NotImplementedError, match="quantised"):
        jax.grad(lambda q: sage_attention(q, x, x).sum())(x)


@pytest.mark.parametrize(
    ("shape", "dtype", "scale", "reason"),
    [
        ((1, 64, 1, 96), "bfloat16", None, "head_dim is 96"),
        ((1, 64, 1, 64), "float32", None, "float32"),
        ((1, 64, 1, 64), "bfloat16", -1.0, "scale"),
    ],
)
def test_a_forced_kernel_says_why_it_cannot_run(shape, dtype, scale, reason):
    x = jnp.ones(shape, dtype)
    with pytest.raises(NotImplementedError, match=reason):
        sage_attention(x, x, x, scale=scale, implementation="mosaic_gpu")


@pytest.mark.usefixtures("unchecked")
def test_shapes_that_do_not_fit_are_named():
    x = jnp.ones((1, 64, 2, 64))
    with pytest.raises(ValueError, match="do not fit together"):
        sage_attention(x, x[:, :, :1], x[:, :, :1])


@pytest.mark.parametrize("length", [40, 1500])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dense_attention_is_exact(length, dtype):
    """Whole and in chunks. Bounds: float32 sums of 64 products; bfloat16 rounds P and the output."""
    q, k, v = (jnp.asarray(x, dtype) for x in inputs("gaussian", 2, length, length, 4, 32))
    bound = 1e-5 if dtype == "float32" else 1e-2
    assert relative(dense_attention(q, k, v, implementation="xla"), attention(q, k, v)[0]) <= bound

"""int8_linear against exact integer arithmetic in float64."""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

from pallas_kernels import int8_linear, quantize_blockwise, quantize_per_channel, quantize_per_token
from pallas_kernels.int8_gemm_portable import PortableTiles, portable_gemm

# One rounding to bf16 errs by at most half a unit in the last of 8 bits: 2^-8 of the value.
BF16 = 2.0**-8
GELU_C = np.sqrt(2 / np.pi)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(GELU_C * (x + 0.044715 * x**3)))


def exact(q, q_scale, weight_q, weight_scale, bias=None, activation=None):
    """The same product with exact integers and float64 scales."""
    q, weight_q = np.asarray(q, np.float64), np.asarray(weight_q, np.float64)
    q_scale, weight_scale = np.asarray(q_scale, np.float64), np.asarray(weight_scale, np.float64)
    if weight_scale.ndim == 1:
        y = q @ weight_q.T * q_scale[:, None] * weight_scale
    else:
        m, k = q.shape
        n = weight_q.shape[0]
        spread = lambda s, a, b: np.repeat(np.repeat(s, 128, 0)[:a], 128, 1)[:, :b]  # noqa: E731
        y = (q * spread(q_scale, m, k)) @ (weight_q * spread(weight_scale, n, k)).T
    if bias is not None:
        y = y + np.asarray(bias, np.float64)
    return gelu(y) if activation else y


def problem(m, n, k, granularity, dtype, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(m, k))
    x[:, :: max(1, k // 5)] *= 20
    weight = rng.normal(size=(n, k)) / np.sqrt(k)
    bias = rng.normal(size=n)
    x, bias = jnp.asarray(x, dtype), jnp.asarray(bias, dtype)
    weight = jnp.asarray(weight, jnp.float32)
    weight_q, weight_scale = quantize_blockwise(weight) if granularity == "block" else quantize_per_channel(weight)
    quantised = quantize_blockwise(x) if granularity == "block" else quantize_per_token(x)
    return x, quantised, weight_q, weight_scale, bias


SHAPES = [(1, 8, 16), (5, 130, 200), (256, 128, 384), (300, 257, 129)]


@pytest.mark.parametrize("granularity", ["block", "token"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
def test_float32_is_the_exact_integer_result(shape, granularity, activation):
    """In float32 only the scales' products and the sum over K tiles round: some 1e-6 of the largest output."""
    x, (q, q_scale), weight_q, weight_scale, bias = problem(*shape, granularity, jnp.float32)
    y = jax.jit(lambda *a: int8_linear(*a, activation=activation))(x, weight_q, weight_scale, bias)
    expected = exact(q, q_scale, weight_q, weight_scale, bias, activation)
    assert np.abs(y - expected).max() <= 3e-6 * np.abs(expected).max()


@pytest.mark.parametrize("granularity", ["block", "token"])
@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_is_within_its_rounding(shape, granularity):
    """Per token: one rounding of the result. Tiles round the sum, then sum plus bias, as the reference does."""
    x, (q, q_scale), weight_q, weight_scale, bias = problem(*shape, granularity, jnp.bfloat16)
    y = np.asarray(int8_linear(x, weight_q, weight_scale, bias), np.float64)
    expected = exact(q, q_scale, weight_q, weight_scale, bias)
    slack = BF16 * np.abs(expected) + 1e-5 * np.abs(expected).max()
    if granularity == "block":
        slack = slack + BF16 * np.abs(expected - np.asarray(bias, np.float64))
    assert np.all(np.abs(y - expected) <= slack * (1 + BF16))


@pytest.mark.parametrize(("granularity", "bound"), [("block", 9e-2), ("token", 5e-2)])
def test_w8a8_stays_near_the_float_product(granularity, bound):
    """Gaussian data with x20 outlier channels, one in about a hundred.

    A tile's largest of 128 x 128 values is near 20 x 4, so its step is 0.6 and the error 0.6 / sqrt(12) against
    a signal of 2.4: 7%, a property of the reference's format. A row's largest is near 20 x 1.3: 3%.
    """
    m, n, k = 256, 256, 512
    rng = np.random.default_rng(3)
    x = rng.normal(size=(m, k))
    x[:, ::100] *= 20
    weight = rng.normal(size=(n, k)) / np.sqrt(k)
    quantize = quantize_blockwise if granularity == "block" else quantize_per_channel
    weight_q, weight_scale = quantize(jnp.asarray(weight, jnp.float32))
    y = np.asarray(int8_linear(jnp.asarray(x, jnp.bfloat16), weight_q, weight_scale), np.float64)
    expected = x @ weight.T
    assert np.linalg.norm(y - expected) <= bound * np.linalg.norm(expected)


@pytest.mark.parametrize("granularity", ["block", "token"])
def test_leading_axes_are_rows(granularity):
    """Tiles straddle batch items, as the reference's flattening makes them."""
    x, _, weight_q, weight_scale, bias = problem(2 * 75, 40, 64, granularity, jnp.float32)
    flat = int8_linear(x, weight_q, weight_scale, bias)
    batched = int8_linear(x.reshape(2, 75, 64), weight_q, weight_scale, bias)
    np.testing.assert_array_equal(batched.reshape(150, 40), flat)


@pytest.mark.parametrize("granularity", ["block", "token"])
def test_quantised_input_gives_the_same(granularity):
    x, (q, q_scale), weight_q, weight_scale, bias = problem(150, 40, 200, granularity, jnp.bfloat16)
    a = int8_linear(x, weight_q, weight_scale, bias)
    b = int8_linear(q, weight_q, weight_scale, bias, x_scale=q_scale)
    assert b.dtype == jnp.bfloat16
    np.testing.assert_array_equal(a, b)


def test_residual_and_gate():
    x, (q, q_scale), weight_q, weight_scale, bias = problem(2 * 30, 40, 64, "token", jnp.float32)
    rng = np.random.default_rng(5)
    residual, gate = rng.normal(size=(2, 30, 40)), rng.normal(size=(2, 1, 40))
    y = int8_linear(
        x.reshape(2, 30, 64),
        weight_q,
        weight_scale,
        bias,
        residual=jnp.asarray(residual, jnp.float32),
        gate=jnp.asarray(gate, jnp.float32),
    )
    expected = residual + gate * exact(q, q_scale, weight_q, weight_scale, bias).reshape(2, 30, 40)
    assert np.abs(y - expected).max() <= 3e-6 * np.abs(expected).max()


def test_rows_past_one_chunk(monkeypatch):
    """The XLA path maps over chunks of rows to bound its memory: the seams must not show."""
    _, (q, q_scale), weight_q, weight_scale, bias = problem(50, 40, 64, "token", jnp.float32)
    # The module by its name: the package's attribute of that name is the function.
    module = importlib.import_module("pallas_kernels.int8_linear")
    run = partial(
        module._product, q, weight_q, q_scale, weight_scale, bias, None, None, activation=None, dtype=jnp.float32
    )
    whole = run()
    monkeypatch.setattr(module, "XLA_CHUNK", 40 * 16)
    np.testing.assert_allclose(run(), whole, rtol=0, atol=1e-6 * np.abs(whole).max())  # XLA fuses the scales anew


@pytest.mark.parametrize("granularity", ["block", "token"])
@pytest.mark.parametrize(
    ("m", "n", "k", "dtype", "epilogue"),
    [
        (1, 64, 128, jnp.bfloat16, {}),
        (131, 192, 256, jnp.bfloat16, {"activation": "gelu_tanh"}),
        (72, 320, 128, jnp.bfloat16, {"residual": True}),
        (40, 96, 384, jnp.float32, {"residual": True, "gate": True}),
    ],
)
def test_kernel_in_the_interpreter(m, n, k, granularity, dtype, epilogue):
    """Ragged rows and columns, every epilogue, no race; the exact integer result within the dtype's rounding."""
    _, (q, q_scale), weight_q, weight_scale, bias = problem(m, n, k, granularity, dtype)
    rng = np.random.default_rng(7)
    expected = exact(q, q_scale, weight_q, weight_scale, bias, epilogue.get("activation"))
    before = np.abs(expected)
    options = {"activation": epilogue.get("activation"), "out_dtype": dtype}
    if "residual" in epilogue:
        options["residual"] = jnp.asarray(rng.normal(size=(m, n)), dtype)
        gate = rng.normal(size=n) if "gate" in epilogue else np.ones(n)
        options["gate"] = jnp.asarray(gate, jnp.float32) if "gate" in epilogue else None
        expected = np.asarray(options["residual"], np.float64) + np.asarray(jnp.asarray(gate, jnp.float32)) * expected
    y = int8_linear(q, weight_q, weight_scale, bias, x_scale=q_scale, implementation="interpret", **options)
    assert not interpreter.get_races().races_found
    ulp = BF16 if dtype == jnp.bfloat16 else 2.0**-23
    roundings = 4 if granularity == "block" else 1  # tiles: the sum and the sum plus bias too, the bias cancelling
    slack = roundings * ulp * (np.abs(expected) + before + 1) + 4e-6 * np.abs(expected).max()
    assert np.all(np.abs(np.asarray(y, np.float64) - expected) <= slack)


def test_largest_sum_does_not_overflow():
    """K = 13,824 of the 14B model with every value at the end of its range."""
    k = 13824
    y = int8_linear(jnp.ones((1, k)), jnp.full((8, k), -128, jnp.int8), jnp.ones(8), implementation="xla")
    np.testing.assert_allclose(y, -128.0 * k, rtol=1e-6)


@pytest.mark.parametrize("granularity", ["block", "token"])
@pytest.mark.parametrize("m", [40, 200])
def test_portable_kernel_in_the_interpreter(m, granularity):
    """The kernel of sm_80, sm_89 and sm_120, its mma.sync replaced by XLA's product: whole tiles and ragged ends."""
    n, k, dtype = 128, 384, jnp.bfloat16
    _, (q, q_scale), weight_q, weight_scale, bias = problem(m, n, k, granularity, dtype)
    residual = jnp.asarray(np.random.default_rng(7).normal(size=(m, n)), dtype)
    options = {"activation": "gelu_tanh", "dtype": jnp.dtype(dtype), "interpret": True, "cp_async": False}
    tiles = PortableTiles(tile_n=64 if granularity == "block" else 128)
    run = jax.jit(partial(portable_gemm, tiles=tiles, **options))
    y = run(q, weight_q, q_scale, weight_scale, bias, residual, None)
    assert not interpreter.get_races().races_found
    product = exact(q, q_scale, weight_q, weight_scale, bias, "gelu_tanh")
    expected = np.asarray(residual, np.float64) + product
    slack = (4 if granularity == "block" else 1) * BF16 * (np.abs(expected) + np.abs(product) + 1)
    assert np.all(np.abs(np.asarray(y, np.float64) - expected) <= slack)


@pytest.mark.parametrize(("n", "k", "message"), [(64, 96, "K = 96"), (40, 128, "N = 40")])
def test_a_forced_kernel_that_cannot_run_says_why(n, k, message):
    weight_q, weight_scale = quantize_per_channel(jnp.ones((n, k)))
    x = jnp.ones((2, k), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=message):
        int8_linear(x, weight_q, weight_scale, implementation="interpret")
    int8_linear(x, weight_q, weight_scale)


def test_a_gpu_kernel_without_a_gpu_is_refused():
    weight_q, weight_scale = quantize_per_channel(jnp.ones((64, 128)))
    with pytest.raises(NotImplementedError, match="cpu devices only"):
        int8_linear(jnp.ones((2, 128), jnp.bfloat16), weight_q, weight_scale, implementation="mosaic_gpu")


@pytest.mark.parametrize("transform", [jax.grad, lambda f: lambda x: jax.jvp(f, (x,), (x,))])
def test_derivatives_are_refused(transform):
    """A silent zero gradient would stop a training run without a sign."""
    weight_q, weight_scale = quantize_per_channel(jnp.ones((4, 8)))
    with pytest.raises(NotImplementedError, match="no derivative"):
        transform(lambda x: int8_linear(x, weight_q, weight_scale).sum())(jnp.ones((2, 8)))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_scale": jnp.ones((3,))}, "neither"),
        ({"x": jnp.ones((2, 9))}, "9 features"),
        ({"bias": jnp.ones((5,))}, "bias"),
        ({"x": jnp.ones((2, 8), jnp.int8)}, "x_scale"),
        ({"gate": jnp.ones((4,))}, "residual"),
        ({"activation": "relu"}, "relu"),
        ({"implementation": "triton"}, "triton"),
        ({"weight_q": jnp.ones((4, 8))}, "int8"),
    ],
)
def test_errors_name_the_offender(change, message):
    arguments = {"x": jnp.ones((2, 8)), "weight_q": jnp.ones((4, 8), jnp.int8), "weight_scale": jnp.ones((4,))} | change
    with pytest.raises(ValueError, match=message):
        int8_linear(**arguments)

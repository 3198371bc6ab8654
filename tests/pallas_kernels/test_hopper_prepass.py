"""The one-pass kernels in front of Hopper's attention give the numbers of their plain definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import inputs
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from pallas_kernels import _hopper_attention, _hopper_linear, _hopper_quantize
from pallas_kernels._heads import heads_first
from pallas_kernels._hopper_attention import value_max
from pallas_kernels._hopper_join_runs import join_runs, join_runs_kernel, join_runs_xla
from pallas_kernels._quantize_qkv import (
    E4M3_MAX,
    quantize_query_key,
    quantize_value,
    rotate,
    scale_of_largest,
    value_scale,
)
from pallas_kernels._refusals import BLOCKS
from pallas_kernels.linear_attention import FEATURE_MAPS

LENGTHS = [(136, 64), pytest.param((200, 128), marks=pytest.mark.slow)]


def operands(length, dim):
    arrays = inputs("outliers", 1, length, length, 1, dim)
    return [jnp.asarray(x, jnp.bfloat16) for x in arrays]


@pytest.mark.parametrize("sizes", LENGTHS)
@pytest.mark.parametrize("block", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_rows_are_rotated_smoothed_and_rounded_alike(sizes, block):
    """Another order of the float32 sums may move a value over the edge between two integers, never further."""
    length = sizes[0]
    q, k, _ = operands(*sizes)
    rows = -(-length // 128) * 128
    mean = rotate(_hopper_quantize.mean_key(k))
    q8, q_scale = _hopper_quantize.quantize_rows(q, None, length, rows, block, interpret=True)
    k8, k_scale = jax.block_until_ready(_hopper_quantize.quantize_rows(k, mean, length, rows, block, interpret=True))
    assert not interpret_pallas_call.get_races().races_found
    want = quantize_query_key(heads_first(q), heads_first(k), block, block)
    for got, scale, x8, x_scale in ((q8, q_scale, *want[:2]), (k8, k_scale, *want[2:])):
        padded = x8.shape[1]
        np.testing.assert_allclose(scale[:, : padded // block], x_scale, rtol=1e-6)
        apart = np.abs(np.asarray(got[:, :padded], int) - np.asarray(x8, int))
        assert apart.max() <= 1
        assert apart.mean() <= 1e-3
        assert not np.any(got[:, length:]), "rows past the end are zeros"


@pytest.mark.parametrize("sizes", LENGTHS)
def test_values_are_transposed_in_the_order_of_the_operand(sizes):
    length, dim = sizes
    v = operands(*sizes)[2]
    rows = -(-length // 128) * 128
    scale = value_scale(v).reshape(-1, v.shape[-1])
    got = jax.block_until_ready(_hopper_quantize.quantize_values(v, 1.0 / scale, rows, interpret=True))
    assert not interpret_pallas_call.get_races().races_found
    v8, v_scale = quantize_value(heads_first(v))
    np.testing.assert_allclose(scale, v_scale, rtol=1e-6)
    want = np.zeros((1, rows, dim), np.float32)
    want[:, :length] = v8.astype(jnp.float32)
    # Columns of each 16 in FP8_ORDER: halves and pairs change places.
    want = want.reshape(1, -1, 2, 4, 2, dim).transpose(0, 5, 1, 3, 2, 4).reshape(1, dim, rows)
    # A product by the reciprocal may round to the neighbour: a sixteenth in e4m3.
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=1 / 8, atol=2.0**-9)


@pytest.mark.parametrize(
    "feature_map", ["softmax", *(pytest.param(f, marks=pytest.mark.slow) for f in ("elu", "relu"))]
)
def test_the_sums_over_the_keys(feature_map):
    """float32 sums of products of bfloat16: exact to the order of summation."""
    length, dim = 200, 64
    _, k, v = operands(length, dim)
    found = _hopper_linear.summarize_keys(k, v, length, feature_map, interpret=True)
    jax.block_until_ready(found)
    products, f_sum, k_sum = (x.sum(axis=1) for x in found[:3])
    k_sums = found.k_sums[:, : -(-length // _hopper_linear.BLOCK)]
    assert found.v_max is None
    assert not interpret_pallas_call.get_races().races_found
    k, v = (heads_first(x).astype(jnp.float32) for x in (k, v))
    f = np.asarray(FEATURE_MAPS[feature_map](k).astype(jnp.bfloat16), np.float64)
    # exp2 in place of exp may round f to the neighbouring bfloat16.
    np.testing.assert_allclose(products, np.einsum("nld,nle->nde", f, v), rtol=1e-2, atol=1e-2 * np.abs(v).max())
    np.testing.assert_allclose(f_sum, f.sum(axis=1), rtol=1e-2)
    padded = np.pad(k, ((0, 0), (0, -length % _hopper_linear.BLOCK), (0, 0)))
    want = padded.reshape(1, -1, _hopper_linear.BLOCK, dim).sum(axis=2)
    np.testing.assert_allclose(k_sums, want, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(k_sum, want.sum(axis=1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("batch", "length", "dim", "dtype", "run"),
    [
        # Two runs, of which the last one has a single tile that ends within the rows that TMA moves.
        (2, 133, 64, "bfloat16", 2),
        (1, 200, 64, "float16", 24),
        pytest.param(2, 261, 128, "bfloat16", 3, marks=pytest.mark.slow),
    ],
)
def test_the_largest_value_of_each_channel_comes_with_the_sums(monkeypatch, batch, length, dim, dtype, run):
    """Exactly, wherever it stands and whatever its sign; the sums stay what they are."""
    monkeypatch.setattr(_hopper_linear, "RUN", run)
    heads = 2
    rng = np.random.default_rng(0)
    k, v = (rng.standard_normal((batch, length, heads, dim)) for _ in range(2))
    # Each channel's largest is in another row, the last one among them; one channel is zeros.
    rows = np.arange(batch * heads * dim).reshape(batch, heads, dim) * 7 % length
    rows[..., 1] = length - 1
    signs = np.where(np.arange(dim) % 2, 9.0, -9.0)
    np.put_along_axis(v, rows[:, None], np.broadcast_to(signs, rows[:, None].shape), axis=1)
    v[..., 3] = 0.0
    k, v = (_hopper_attention.whole_rows(jnp.asarray(x, dtype)) for x in (k, v))
    found = _hopper_linear.summarize_keys(k, v, length, "softmax", v_max=True, interpret=True)
    jax.block_until_ready(found)
    assert not interpret_pallas_call.get_races().races_found
    assert found.v_max is not None
    assert found.v_max.dtype == jnp.float32
    largest = found.v_max.max(axis=1)
    np.testing.assert_array_equal(largest, np.abs(np.asarray(heads_first(v), np.float32)).max(axis=1))
    np.testing.assert_array_equal(scale_of_largest(largest), value_scale(heads_first(v)))
    without = _hopper_linear.summarize_keys(k, v, length, "softmax", interpret=True)
    jax.tree.map(np.testing.assert_array_equal, found[:3], without[:3])


def test_what_the_pass_over_the_keys_found_gives_the_same_operands():
    """But for the mean key, a sum in another order: some integers are the neighbouring ones."""
    q, k, v = operands(136, 64)
    sizes = {"block_q": 64, "block_k": 128, "scale": 1.0, "smooth_k": True, "interpret": True}
    runs = _hopper_linear.summarize_keys(k, v, 136, "softmax", v_max=True, interpret=True)
    keys = join_runs(runs, jnp.zeros((64, 64), k.dtype), 136, 128, value_max(128), interpret=True)
    (q8, q_scale, k8, k_scale, *values), want = (
        _hopper_attention.sage_operands(q, k, v, keys=known, **sizes) for known in (keys, None)
    )
    jax.tree.map(np.testing.assert_array_equal, (q8, q_scale, *values), (*want[:2], *want[4:]))
    np.testing.assert_allclose(k_scale, want[3], rtol=1e-5)
    steps = np.abs(np.asarray(k8, np.int32) - np.asarray(want[2], np.int32))
    assert steps.max() <= 1
    assert (steps > 0).mean() < 1e-3


@pytest.mark.parametrize(
    ("n", "length", "block_k", "run", "values"),
    [(1, 1100, 128, 1, True), pytest.param(2, 333, 64, 2, False, marks=pytest.mark.slow)],
)
def test_runs_are_joined_to_what_attention_and_routing_read(n, length, block_k, run, values):
    """The kernel against plain JAX, with garbage behind the last of the sums: float32 to the order of summation."""
    dim, dtype = 128, jnp.bfloat16
    count = -(-length // (run * _hopper_linear.BLOCK))
    rng = np.random.default_rng(0)
    shapes = ((dim, dim), (dim,), (dim,))
    found = [jnp.asarray(rng.standard_normal((n, count, *shape)), jnp.float32) for shape in shapes]
    sums = rng.standard_normal((n, count * run, dim)) * 64
    sums[:, -(-length // _hopper_linear.BLOCK) :] = np.nan
    v_max = (
        jnp.asarray(np.abs(rng.standard_normal((n, count, dim))), jnp.float32).at[:, :, 3].set(0) if values else None
    )
    runs = _hopper_linear.KeyRuns(*found, jnp.asarray(sums, jnp.float32), v_max)
    proj_w = jnp.asarray(rng.standard_normal((dim, dim)) / 8, dtype)
    arguments = runs, proj_w, length, block_k, value_max(block_k)
    got = jax.block_until_ready(join_runs_kernel(*arguments, interpret=True))
    assert not interpret_pallas_call.get_races().races_found
    want = join_runs_xla(*arguments)
    # The product is rounded once to bfloat16.
    np.testing.assert_allclose(*(np.asarray(x.combined, np.float32) for x in (got, want)), rtol=2**-7, atol=1e-5)
    for name in ("f_sum", "centred", "mean"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-5, atol=1e-5, err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, got[-2:], want[-2:])


@pytest.mark.parametrize("keys", sorted({block_k for _, block_k in BLOCKS}))
def test_a_step_of_the_largest_values_stays_in_float16(keys):
    """P is at most 448, and Hopper's kernel sums P V and P over the keys of a step in float16."""
    largest, half = value_max(keys), np.finfo(np.float16).max
    assert E4M3_MAX * largest * keys <= half
    assert E4M3_MAX * keys <= half
    # Then the numbers are those of 448, shifted.
    assert np.frexp(largest / E4M3_MAX)[0] == 0.5


def test_values_fill_the_range_that_float16_leaves_them():
    q, k, v = operands(136, 64)
    block_q, block_k = BLOCKS[-1]
    sizes = {"block_q": block_q, "block_k": block_k}
    *_, vt8, v_scale, _ = _hopper_attention.sage_operands(q, k, v, scale=1.0, smooth_k=True, interpret=True, **sizes)
    found = np.abs(np.asarray(vt8, np.float32)).max(axis=-1)
    np.testing.assert_array_equal(found, value_max(block_k))
    channels = np.abs(np.asarray(v[0, :, 0], np.float32)).max(axis=0)
    np.testing.assert_allclose(found[0] * v_scale[0], channels, rtol=1e-6)

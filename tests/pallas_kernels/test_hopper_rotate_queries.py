"""One pass over the queries gives what norm and rotation, sums over blocks and INT8 give one after another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from register_layouts import held_by_each_thread

from pallas_kernels import _hopper as hw
from pallas_kernels import rms_norm_rope
from pallas_kernels._heads import heads_first
from pallas_kernels._hopper_attention import whole_rows
from pallas_kernels._hopper_linear import block_sums
from pallas_kernels._hopper_pairs import PAIRS
from pallas_kernels._hopper_quantize import quantize_rows
from pallas_kernels._hopper_rotate_queries import TILE, rotate_queries
from pallas_kernels._quantize_qkv import rotate
from pallas_kernels.rotary import Rotary

EPS, SCALE = 1e-6, 0.7
SHAPES = [
    # Lengths end within the rows that TMA moves, within a tile, and with a tile, or leave a tile without any; more
    # heads than the ring has slots.
    (2, 133, 2, 64),
    (1, 72, 5, 64),
    pytest.param((1, 61, 3, 128), marks=pytest.mark.slow),
    pytest.param((2, 192, 3, 128), marks=pytest.mark.slow),
]


def inputs(batch, length, heads, dim, dtype="bfloat16"):
    """q as a product gives it, with a channel that stands out, and its Rotary, as the product's squares tell it."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(batch, length, heads, dim)) * 30
    q[..., 5] *= 20
    q = jnp.asarray(q, dtype)
    weight = jnp.asarray(rng.normal(size=heads * dim), jnp.float32)
    angle = rng.uniform(0, 6.28, size=(length, dim // 2))
    cos, sin = (jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin))
    square = jnp.mean(jnp.square(q.astype(jnp.float32)), axis=(2, 3))
    return q, Rotary(jax.lax.rsqrt(square + EPS), weight, cos, sin)


def run(q, rotary, quantized=True):
    """The kernel's, over tiles for 128 rows as attention has them, without races."""
    rows = -(-q.shape[1] // 128) * 128 if quantized else None
    found = rotate_queries(whole_rows(q), rotary, q8_rows=rows, score_scale=SCALE, interpret=True)
    jax.block_until_ready(found)
    assert not interpret_pallas_call.get_races().races_found
    return found


def exact(q, rotary):
    """float64, as complex numbers a + ib over neighbouring columns times e^(i angle)."""
    factor, weight, cos, sin = (np.asarray(x, np.float64) for x in rotary)
    y = np.asarray(q, np.float64) * factor[:, :, None, None] * weight.reshape(q.shape[2:])
    pairs = y.reshape(*y.shape[:-1], -1, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * (cos + 1j * sin)[:, None]
    return np.stack([turned.real, turned.imag], axis=-1).reshape(q.shape)


def one_apart(x):
    """What two roundings of nearly one number to bfloat16 may differ by: 2^-7 of it at most."""
    return 2.0**-7 * np.abs(np.asarray(x, np.float64))


@pytest.mark.parametrize("shape", SHAPES)
def test_queries_are_normed_and_turned_and_rounded_once(shape):
    q, rotary = inputs(*shape)
    got, want = run(q, rotary), exact(q, rotary)
    assert got.q.dtype == q.dtype
    length, turned = q.shape[1], np.asarray(got.q, np.float64)
    # Half a step of bfloat16, and float32 under it.
    slack = 2.0**-8 * np.abs(want) + 1e-6 * np.abs(want).max()
    assert np.all(np.abs(turned[:, :length] - want) <= slack)
    assert not np.any(turned[:, length:]), "rows past the end stay zeros"


@pytest.mark.parametrize("shape", SHAPES)
def test_they_are_those_of_norm_and_rotation(shape):
    """To the order in which float32 multiplies: where that rounds to a neighbour, the next bfloat16, and rarely."""
    q, rotary = inputs(*shape)
    got = np.asarray(run(q, rotary).q, np.float64)[:, : q.shape[1]]
    want = np.asarray(rms_norm_rope(q, *rotary[1:], eps=EPS, implementation="xla"), np.float64)
    assert np.all(np.abs(got - want) <= one_apart(want) + 1e-6 * np.abs(want).max())
    assert np.mean(got != want) <= 1e-2


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_and_integers_are_those_of_a_pass_each_over_what_is_returned(shape):
    """Sums of the rounded queries, rows past the end not counting; INT8 with the same scales, bit for bit: the same
    products of the same numbers on the tensor cores."""
    q, rotary = inputs(*shape)
    got, length = run(q, rotary), q.shape[1]
    np.testing.assert_array_equal(got.sums, block_sums(got.q, interpret=True))
    turned = heads_first(got.q[:, :length]).astype(jnp.float32)
    padded = np.pad(turned, ((0, 0), (0, -length % TILE), (0, 0)))
    want = padded.reshape(len(padded), -1, TILE, q.shape[-1]).sum(axis=2, dtype=np.float64)
    np.testing.assert_allclose(got.sums, want, atol=1e-5 * np.abs(padded).max() * TILE)
    assert got.q8 is not None
    q8, scales = quantize_rows(got.q, None, length, got.q8.shape[1], TILE, interpret=True)
    np.testing.assert_array_equal(got.q8, q8)
    np.testing.assert_array_equal(got.q8_scale, scales * jnp.float32(SCALE))
    assert not np.any(got.q8[:, length:])
    # And they are the queries, in the rotated basis, to half a step.
    steps = np.repeat(np.asarray(scales), TILE, axis=1)[:, :length, None]
    error = np.asarray(got.q8[:, :length], np.float32) * steps - rotate(heads_first(got.q[:, :length]))
    assert np.all(np.abs(error) <= 0.501 * steps)


def test_without_integers_the_rest_is_the_same():
    q, rotary = inputs(1, 72, 2, 64, "float16")
    got, whole = run(q, rotary, quantized=False), run(q, rotary)
    assert got.q8 is None
    assert got.q8_scale is None
    np.testing.assert_array_equal(got.q, whole.q)
    np.testing.assert_array_equal(got.sums, whole.sums)


def test_a_pair_and_its_angle_lie_in_one_thread():
    """On the GPU the registers of both are taken one by one: their order must be that of the layouts' own tables."""
    pairs = held_by_each_thread(PAIRS.to_mgpu(), (TILE, 64))
    columns = held_by_each_thread(hw.TILE.to_mgpu(), (TILE, 128))
    np.testing.assert_array_equal(columns[:, ::2], 2 * pairs)
    np.testing.assert_array_equal(columns[:, 1::2], 2 * pairs + 1)

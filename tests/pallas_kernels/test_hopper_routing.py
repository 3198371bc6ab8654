"""What Hopper's sparse-linear attention routes by, and lists of blocks that do not fill its steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import inputs, random_blocks, relative
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from pallas_kernels import _hopper_sla, block_sparse_attention
from pallas_kernels._hopper_linear import BLOCK, block_sums
from pallas_kernels._hopper_top_blocks import padded_width, top_blocks
from pallas_kernels.block_map import choose_blocks


@pytest.mark.parametrize("selected", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_an_odd_list_takes_a_masked_block_to_fill_its_first_step(selected):
    """Two blocks of 64 keys are one step in 16 bits: the copy that stands in for the missing one must not count."""
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs("gaussian", 1, 130, 300, 1, 64))
    index = jnp.asarray(random_blocks(1, 130, 300, 1, 128, 64, selected))
    op = functools.partial(block_sparse_attention, q, k, v, index, block_q=128, block_k=64)
    got = jax.block_until_ready(op(implementation="interpret"))
    assert not interpret_pallas_call.get_races().races_found
    # As in test_block_sparse_attention.
    assert relative(got, op(implementation="xla")) <= 5e-3


def test_the_sums_over_blocks():
    """float32 sums of bfloat16: exact to the order of summation."""
    x = jnp.asarray(inputs("outliers", 1, 1104, 1104, 1, 64)[0], jnp.bfloat16)
    sums = jax.block_until_ready(block_sums(x, interpret=True))
    assert not interpret_pallas_call.get_races().races_found
    whole = np.pad(np.asarray(x, np.float64)[0, :, 0], ((0, -1104 % BLOCK), (0, 0)))
    np.testing.assert_allclose(sums[0], whole.reshape(-1, BLOCK, 64).sum(1), atol=1e-4)


@pytest.mark.parametrize(("rows", "count", "k"), [(9, 130, 13), (2, 100, 99), (1, 64, 64)])
def test_counting_chooses_what_sorting_does(rows, count, k):
    """Among equal scores too, of which rounding makes many, and among negative ones."""
    scores = np.random.default_rng(0).standard_normal((rows, padded_width(count))).astype(np.float32)
    scores[0] = np.round(scores[0]) + 0.0  # no negative zeros: sorting puts them below the others
    scores[-1] -= 10
    found = top_blocks(jnp.asarray(scores), k, count, interpret=True)
    want = np.sort(jax.lax.top_k(scores[:, :count], k)[1], axis=1)
    np.testing.assert_array_equal(found, want)


def test_routing_by_counting_gives_the_same_blocks(monkeypatch):
    q, k = (jax.random.normal(jax.random.key(i), (1, 2, n, 64)) for i, n in enumerate((3, 20)))
    want = np.sort(choose_blocks(q, k, 20 * 64, 0.3, 64), axis=-1)
    centred = k - k.mean(axis=2, keepdims=True)
    monkeypatch.setattr(_hopper_sla, "SORTED", 0)
    counted = _hopper_sla.route(q, centred, 0.3, interpret=True)
    np.testing.assert_array_equal(counted, want)

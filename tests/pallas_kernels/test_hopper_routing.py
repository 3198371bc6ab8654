"""What Hopper's sparse-linear attention routes by, and lists of blocks that do not fill its steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import inputs, random_blocks, relative
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from ptx_warp import Warp

from pallas_kernels import _hopper_sla, block_sparse_attention
from pallas_kernels._hopper_linear import BLOCK, block_sums
from pallas_kernels._hopper_top_blocks import WARPS, listed, program, top_blocks
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


def counted(scores, k):
    """`top_blocks` as its warps run it on the card."""
    (rows, width), found = scores.shape, np.full((len(scores), k), -1, np.int32)
    for block in range(-(-rows // WARPS)):
        for warp in range(WARPS):
            Warp([scores, found], block=block, warp=warp).run(program(rows, width, k))
    return found


@pytest.mark.parametrize(("rows", "count", "k"), [(9, 130, 13), (2, 100, 99), (1, 64, 64), (3, 40, 1), (1, 1182, 118)])
def test_counting_chooses_what_sorting_does(rows, count, k):
    """Among equal scores too, of which rounding makes many, and among negative ones; in falling order."""
    scores = np.random.default_rng(0).standard_normal((rows, count)).astype(np.float32)
    scores[0] = np.round(scores[0]) + 0.0  # no negative zeros: sorting puts them below the others
    scores[-1] -= 10
    want = -np.sort(-np.asarray(jax.lax.top_k(scores, k)[1]), axis=1)
    np.testing.assert_array_equal(counted(scores, k), want)
    np.testing.assert_array_equal(top_blocks(jnp.asarray(scores), k, interpret=True)[0], want)


def test_each_list_has_the_scales_of_its_blocks():
    """Those of the group of rows that it belongs to: here a head's three lists."""
    rng = np.random.default_rng(0)
    scores, scales = (rng.standard_normal((n, 75)).astype(np.float32) for n in (6, 2))
    found, scale = np.full((6, 9), -1, np.int32), np.zeros((6, 9), np.float32)
    for block, warp in np.ndindex(2, WARPS):
        Warp([scores, scales, found, scale], block=block, warp=warp).run(program(6, 75, 9, group=3))
    np.testing.assert_array_equal(found, counted(scores, 9))
    np.testing.assert_array_equal(scale, np.repeat(scales, 3, axis=0)[np.arange(6)[:, None], found])
    np.testing.assert_array_equal(listed(jnp.asarray(scales), jnp.asarray(found)), scale)


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf, 0.0])
def test_a_row_without_an_order_still_gives_a_list(value):
    """Attention reads what the list says: each entry a block that there is, and none twice."""
    (found,) = counted(np.full((1, 75), value, np.float32), 7)
    assert len(set(found)) == 7
    assert found.min() >= 0
    assert found.max() < 75


@pytest.mark.parametrize("most", [_hopper_sla.MOST, 0])
def test_routing_gives_the_same_blocks_with_the_last_one_first(most, monkeypatch):
    """Of the sums of q as of its means, and where the scores are too many to count."""
    q, k = (jax.random.normal(jax.random.key(i), (1, 2, n, 64)) for i, n in enumerate((5, 20)))
    want = np.asarray(choose_blocks(q, k, 20 * 64, 0.3, 64))
    monkeypatch.setattr(_hopper_sla, "MOST", most)
    scales = jnp.arange(2.0 * 20).reshape(2, 20)
    lists, scale = _hopper_sla.route(64 * q, k - k.mean(axis=2, keepdims=True), 0.3, scales, interpret=True)
    lists = np.asarray(lists)
    np.testing.assert_array_equal(scale[0], lists[0] + np.array([0, 20])[:, None, None])
    np.testing.assert_array_equal(np.sort(lists), np.sort(want))
    has_last = np.any(lists == 19, axis=-1)
    assert has_last.any()
    np.testing.assert_array_equal(lists[..., 0] == 19, has_last)

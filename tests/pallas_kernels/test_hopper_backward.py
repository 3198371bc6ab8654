"""The backward kernels give the gradients of masked attention, without races, whatever the lists look like."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import attention, attention_gradients, inputs, random_blocks, relative
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from pallas_kernels._hopper_backward import sparse_backward, transposed

SLOW = pytest.mark.slow


def backward(q, k, v, index, blocks):
    """(gradients of the kernels, gradients in float64) for random cotangents of the output and the log-sum-exp."""
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    o, lse = attention(q, k, v, index, *blocks)
    rng = np.random.default_rng(1)
    do = jnp.asarray(rng.standard_normal(o.shape), jnp.bfloat16)
    dlse = rng.standard_normal(lse.shape)
    got = sparse_backward(
        (q, k, v, jnp.asarray(index)),
        (jnp.asarray(o, jnp.bfloat16), jnp.asarray(lse, jnp.float32)),
        (do, jnp.asarray(dlse, jnp.float32)),
        scale=q.shape[-1] ** -0.5,
        block_q=blocks[0],
        block_k=blocks[1],
        interpret=True,
    )
    got = jax.block_until_ready(got)
    assert not interpret_pallas_call.get_races().races_found
    return got, attention_gradients(q, k, v, do, dlse, index, *blocks)


@pytest.mark.parametrize(
    ("batch", "lq", "lk", "heads", "dim", "blocks", "count"),
    [
        (1, 70, 100, 1, 64, (64, 64), 2),
        pytest.param(2, 130, 200, 1, 128, (128, 64), 2, marks=SLOW),
        pytest.param(1, 130, 200, 2, 64, (64, 128), 1, marks=SLOW),
        pytest.param(2, 100, 333, 1, 128, (64, 64), 3, marks=SLOW),
        pytest.param(1, 200, 333, 1, 64, (128, 64), 5, marks=SLOW),
    ],
)
def test_gradients_are_those_of_masked_attention(batch, lq, lk, heads, dim, blocks, count):
    """Ragged ends, more tiles than slots, both halves of a block. P, dS and the results are rounded to 8 bits, and
    delta is of the rounded output: values of 20 make that 6e-3 of dq."""
    q, k, v = inputs("outliers", batch, lq, lk, heads, dim)
    got, want = backward(q, k, v, random_blocks(batch, lq, lk, heads, *blocks, count), blocks)
    for name, mine, exact in zip(("dq", "dk", "dv"), got, want, strict=True):
        assert relative(mine, exact) <= 1e-2, name


@SLOW
def test_keys_that_no_query_sees_have_no_gradient():
    """And scores of -800 do not overflow against the zeros behind the last key."""
    q, k, v = inputs("gaussian", 1, 70, 192, 1, 64)
    q, k = 50 + q, -2 + 0.1 * k
    index = np.asarray([[[[1], [1]]]], np.int32)
    got, want = backward(q, k, v, index, (64, 128))
    assert not np.any(np.asarray(got[1][:, :128], np.float32))
    assert not np.any(np.asarray(got[2][:, :128], np.float32))
    assert np.all(np.isfinite(np.asarray(got[0], np.float32)))
    # Scores of -800 in bfloat16 products of float32 sums: off by 1e-3 of themselves at the most.
    assert relative(got[2], want[2]) <= 2e-2


def test_the_transposed_lists_hold_the_same_pairs():
    index = random_blocks(2, 200, 300, 3, 16, 16, 4).reshape(6, -1, 4)
    index[0] = index[0, :1]  # every query block the same list: the other key blocks have none
    begin, entries = transposed(jnp.asarray(index), 19)
    for head in range(6):
        lists = [sorted(np.nonzero((index[head] == block).any(-1))[0]) for block in range(19)]
        mine = [list(entries[head, a:b]) for a, b in zip(begin[head, :-1], begin[head, 1:], strict=True)]
        assert mine == lists

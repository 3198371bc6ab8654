"""Routing is the reference's: pooled float32 scores, true counts in ragged blocks, ties to the lower index."""

import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import inputs

from pallas_kernels import sla_block_map
from pallas_kernels.block_map import num_selected


def pooled(x, block):
    return np.stack([x[:, i : i + block].mean(1) for i in range(0, x.shape[1], block)], axis=2)


def expected(q, k, topk, block_q, block_k):
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    scores = pooled(q, block_q) @ np.swapaxes(pooled(k - k.mean(1, keepdims=True), block_k), -1, -2)
    return np.argsort(-scores, axis=-1, kind="stable")[..., : max(1, int(topk * scores.shape[-1]))]


@pytest.mark.parametrize("kind", ["gaussian", "large mean", "outliers"])
@pytest.mark.parametrize(("block_q", "block_k"), [(128, 64), (64, 128), (32, 16)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_identical_to_float64_routing(kind, block_q, block_k, dtype):
    """Also from bfloat16 inputs: the scores are float32 there too, so only the inputs are rounded, not the choice."""
    q, k, _ = inputs(kind, 2, 330, 330, 3, 32)
    q, k = jnp.asarray(q, dtype), jnp.asarray(k, dtype)
    got = sla_block_map(q, k, topk=0.35, block_q=block_q, block_k=block_k)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, expected(q, k, 0.35, block_q, block_k))


def test_ties_go_to_the_lower_index():
    x = jnp.ones((1, 96, 1, 16))
    np.testing.assert_array_equal(sla_block_map(x, x, topk=0.5, block_q=16, block_k=16)[0, 0], [[0, 1, 2]] * 6)


@pytest.mark.parametrize(
    ("blocks", "topk", "count"), [(512, 0.1, 51), (1182, 0.1, 118), (591, 0.15, 88), (5, 0.1, 1), (4, 1.0, 4)]
)
def test_count_is_the_references(blocks, topk, count):
    """int(topk * blocks) as in SLA, but never an empty list."""
    assert num_selected(blocks, topk) == count


@pytest.mark.parametrize("topk", [0.0, 1.5])
def test_a_share_outside_its_range_is_refused(topk):
    with pytest.raises(ValueError, match="topk"):
        num_selected(10, topk)

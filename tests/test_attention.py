"""The one dispatch of attention: what it hands on, and what it adds itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import relative

import pallas_kernels as kernels
from turbojax.attention import AttentionConfig, attend


def operands(rng, projected):
    q, k, v = (jnp.asarray(rng.standard_normal((2, 40, 2, 16)), jnp.bfloat16) for _ in range(3))
    weight, bias = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((16, 16), (16,)))
    return q, k, v, (weight, bias) if projected else None


@pytest.mark.parametrize("kind", ["dense", "sage", "sla", "sagesla"])
@pytest.mark.parametrize("projected", [False, True])
def test_the_largest_output_of_each_token(kind, projected):
    """That of what is returned, exactly, and what is returned stays what it is."""
    rng = np.random.default_rng(0)
    q, k, v, proj_l = operands(rng, projected)
    config = AttentionConfig(kind, topk=0.5, block_q=16, block_k=8)
    o, amax = attend(q, k, v, config, proj_l, return_amax=True)
    assert amax.dtype == jnp.float32
    np.testing.assert_array_equal(amax, np.abs(np.asarray(o, np.float32)).max(axis=(2, 3)))
    np.testing.assert_array_equal(o, attend(q, k, v, config, proj_l))


@pytest.mark.parametrize("kind", ["dense", "sage", "sla", "sagesla"])
@pytest.mark.parametrize("projected", [False, True])
def test_every_kind_takes_queries_as_their_product_gave_them(kind, projected):
    rng = np.random.default_rng(0)
    q, k, v, proj_l = operands(rng, projected)
    shapes = ((2, 40), (32,), (40, 8), (40, 8))
    rotary = kernels.Rotary(*(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes))
    config = AttentionConfig(kind, topk=0.5, block_q=16, block_k=8)
    want = attend(jax.jit(kernels.turned)(q, rotary), k, v, config, proj_l)
    found = attend(q, k, v, config, proj_l, q_rotary=rotary)
    # Compiled alone or inside, a few float32 products round to a neighbouring bfloat16.
    assert relative(found, want) <= 1e-2

"""The number formats, masses and roundings that the experiments compare are what they say they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_pipeline
from flax import nnx

import pallas_kernels as kernels
from experiments import attention_error, attention_mass, ladder, quantisation
from experiments.capture import map_layers, query_key_value, sample
from turbojax.attention import AttentionConfig, attend
from turbojax.models.layers import rope_table
from turbojax.quant import block_linears, quantize_dit


def qkv(length: int = 96, heads: int = 2, dim: int = 32) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((1, length, heads, dim)), jnp.float32) for _ in range(3)]


def relative(a: jax.Array, b: jax.Array) -> float:
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


def test_the_default_variant_is_the_shipped_op():
    q, k, v = qkv()
    ours = attention_error.attend(q, k, v, attention_error.Variant())
    # The same roundings; sums in another order flip a few of them.
    assert relative(ours, kernels.sage_attention(q, k, v)) < 2e-3


def test_the_exact_variant_is_attention_and_does_not_see_a_shift_of_the_keys():
    q, k, v = qkv()
    exact = attention_error.Variant("exact", "exact")
    assert relative(attention_error.attend(q, k, v, exact), attend(q, k, v)) < 1e-5
    assert relative(attention_error.attend(q, k + 10.0, v, exact), attend(q, k, v)) < 1e-4


def test_smoothing_is_what_makes_a_shift_harmless():
    measure = {"data": "shifted keys", "spike": 20.0}
    variants = ("INT8 QK alone", "INT8 QK, not smoothed")
    small, large = (attention_error.errors(*qkv(), variants=variants, shift=s, **measure) for s in (0.0, 20.0))
    smooth, bare = variants
    assert np.allclose(large[smooth][0], small[smooth][0], rtol=0.05)
    assert (np.asarray(large[bare][0]) > 4 * np.asarray(small[bare][0])).all()


def test_all_blocks_hold_all_mass_and_the_best_choice_is_never_beaten():
    q, k, v = qkv(length=90)  # ragged: 3 query blocks of 32, 6 key blocks of 16
    found = attention_mass.captured_mass(q, k, v, block_q=32, block_k=16, topk=(0.34, 1.0))
    routed, best, chance, common = np.asarray(found[1.0])
    np.testing.assert_allclose([routed, best, chance, common], 1.0, rtol=1e-5)
    routed, best, chance, _ = np.asarray(found[0.34])
    assert (routed <= best + 1e-6).all()
    assert np.allclose(chance, 2 / 6)


def test_routing_finds_keys_that_point_where_the_queries_do():
    # Query block i looks along axis i, and so does key block i alone: one block of three holds nearly everything.
    directions = 6.0 * jnp.repeat(jnp.eye(3, 32), 16, axis=0)[None, :, None]
    found = attention_mass.captured_mass(directions, directions, directions, block_q=16, block_k=16, topk=(0.34,))
    routed, best, _, common = np.asarray(found[0.34])
    assert routed == pytest.approx(best)
    assert common == 1.0
    assert routed > 0.95


def test_captured_q_k_v_are_what_the_block_attends_with():
    dit = small_pipeline.module(small_pipeline.DIT, "dit")
    graph, layers = nnx.split(dit.blocks)
    block = nnx.merge(graph, jax.tree.map(lambda x: x[1], layers))
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((2, 12, 32)), jnp.float32)
    time = jnp.asarray(rng.standard_normal((2, 6, 32)), jnp.float32)
    rope = tuple(map(jnp.asarray, rope_table((2, 2, 3), 16)))
    q, k, v = query_key_value(block, x, time, rope)
    shift, scale, gate = jnp.split(block.modulation[...] + time, 6, axis=1)[:3]
    h = block.self_attn.q.modulated(x, shift, scale, block.eps)
    expected = block.self_attn(x, h, rope=rope, attention=AttentionConfig(), gate=gate)
    found = block.self_attn.o.onto(x, attend(q, k, v).reshape(2, 12, 32), gate)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_states_of_a_run_are_its_first_to_its_last_and_layers_are_looked_at_one_by_one():
    pipeline = small_pipeline.pipeline(size=(32, 32))
    captured = sample(pipeline, ["a red circle moving right"], [3], states=2)
    assert [round(state.s, 2) for state in captured.states] == [1.0, 0.6]  # of 3 steps at shift 3, the middle left out
    sizes = map_layers(captured, lambda q, k, v: jnp.asarray(q.shape))
    assert np.asarray(sizes[0]).tolist() == [[1, 2 * 2 * 2, 2, 16]] * 2


@pytest.mark.parametrize("grain", ["row", "block", "tensor"])
def test_rounding_is_within_half_a_step_of_its_own_scale(grain):
    x = jnp.asarray(
        np.random.default_rng(2).standard_normal((130, 140)) * np.linspace(0.1, 3, 130)[:, None], jnp.float32
    )
    error = jnp.abs(quantisation.through_int8(x, grain) - x)
    # Blocks divide by 128, so +amax saturates one step early: a whole step there.
    steps = 1.0 if grain == "block" else 0.5
    assert float(error.max()) <= steps * float(jnp.abs(x).max()) / 127 * 1.001
    if grain == "row":
        assert (error.max(1) <= 0.5 * jnp.abs(x).max(1) / 127 * 1.001).all()


@pytest.mark.slow
def test_rounded_layers_are_the_shipped_ones_and_leave_other_blocks_alone():
    dit = small_pipeline.module(small_pipeline.DIT, "dit")
    rng = np.random.default_rng(3)
    inputs = (
        jnp.asarray(rng.standard_normal((2, 2, 4, 4, 4)), jnp.float32),
        jnp.asarray([900.0, 300.0]),
        jnp.asarray(rng.standard_normal((2, 8, 16)), jnp.float32),
    )
    exact = dit(*inputs)
    shipped = quantize_dit(dit)(*inputs)
    rounded = quantisation.rounded_dit(dit, "row", "row")(*inputs)
    assert relative(rounded, shipped) < 0.1 * relative(shipped, exact)
    assert relative(quantisation.rounded_dit(dit, "none", "none")(*inputs), exact) < 1e-5
    parts = [relative(quantisation.rounded_dit(dit, "row", "row", block=i)(*inputs), exact) for i in range(2)]
    assert all(0 < part < relative(rounded, exact) * 1.5 for part in parts)
    one = quantisation.rounded_dit(dit, "row", "row", paths=block_linears(dit)[:1])(*inputs)
    assert 0 < relative(one, exact) < relative(rounded, exact)


@pytest.mark.slow
def test_norms_apart_round_no_worse_than_a_float_copy_does():
    pipeline = small_pipeline.pipeline(size=(32, 32))
    rng = np.random.default_rng(4)
    inputs = (
        jnp.asarray(rng.standard_normal((1, 2, 4, 4, 4)), jnp.float32),
        jnp.asarray([500.0]),
        jnp.asarray(rng.standard_normal((1, 8, 16)), jnp.float32),
    )
    fused, apart = quantize_dit(pipeline.dit)(*inputs), ladder.norms_apart(pipeline).dit(*inputs)
    exact = pipeline.dit(*inputs)
    # In float32 both quantise the same numbers, but for the last bit of the norm.
    assert relative(apart, fused) < 0.2 * relative(fused, exact)

"""The DiT's own properties: numeric anchors, switches that change nothing, and clear refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_modules import random_module

from turbojax.attention import AttentionConfig
from turbojax.config import PRESETS, DiTConfig
from turbojax.models.dit import patchify, unpatchify
from turbojax.models.layers import rope_table, timestep_embedding

CONFIG = DiTConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=3, text_dim=16)


@pytest.fixture(scope="module")
def dit():
    return random_module(CONFIG, jnp.float32)


def inputs(batch=2):
    keys = jax.random.split(jax.random.key(1), 2)
    latents = jax.random.normal(keys[0], (batch, 3, 4, 6, 16))
    return latents, jnp.linspace(100.0, 900.0, batch), jax.random.normal(keys[1], (batch, 5, 16))


def test_time_embedding_is_that_of_float64():
    """Anchors from the reference's float64 table; float32 angles alone would miss by 5e-5."""
    index = [0, 1, 64, 127, 128, 129, 192, 255]
    anchor = [.0308846422, -.470030427, -.898163438, .994369149,
              .999522984, .882650197, -.439661741, .105971903]  # fmt: skip
    got = np.asarray(timestep_embedding(jnp.array([988.0]), 256))[0, index]
    np.testing.assert_allclose(got, anchor, atol=1e-6)
    t = np.random.default_rng(0).uniform(0, 1000, 500).astype(np.float32)
    angle = t.astype(np.float64)[:, None] * 10000.0 ** (-np.arange(128) / 128)
    exact = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    np.testing.assert_allclose(timestep_embedding(jnp.asarray(t), 256), exact, atol=1e-6)


def test_rope_turns_by_the_reference_angles():
    """Anchor: x[i] = i/128 at token (3, 5, 7), from the reference's own rotation."""
    cos, sin = rope_table((4, 6, 8), 128)
    token = (3 * 6 + 5) * 8 + 7
    x = np.arange(128) / 128
    even = x[0::2] * cos[token] - x[1::2] * sin[token]
    odd = x[0::2] * sin[token] + x[1::2] * cos[token]
    turned = np.stack([even, odd], axis=1).reshape(-1)
    index = [0, 1, 2, 3, 44, 45, 86, 87, 127]
    anchor = [-.00110250006, -.00773431638, -.0276877152, .00518145331, .434630692,
              -.229905232, .0599824983, .953830810, .993255318]  # fmt: skip
    np.testing.assert_allclose(turned[index], anchor, atol=2e-6)
    assert turned.sum() == pytest.approx(50.6212334, abs=1e-4)


def test_patchify_orders_channels_first_and_unpatchify_last():
    latents = jnp.arange(2 * 1 * 4 * 4 * 3, dtype=jnp.float32).reshape(2, 1, 4, 4, 3)
    tokens = patchify(latents, (1, 2, 2))
    np.testing.assert_array_equal(tokens[0, 0, :4], latents[0, 0, :2, :2, 0].reshape(-1))
    last = tokens.reshape(2, 4, 3, 4).swapaxes(2, 3).reshape(2, 4, 12)
    np.testing.assert_array_equal(unpatchify(last, (1, 2, 2), (1, 2, 2)), latents)


@pytest.mark.parametrize("switch", [{"unroll": True}, {"unroll": 2}, {"remat": "blocks"}, {"remat": "keep_linear"}])
def test_how_the_layers_are_run_changes_nothing(dit, switch):
    np.testing.assert_allclose(dit(*inputs(), **switch), dit(*inputs()), rtol=1e-4, atol=1e-5)


def padded(rows, total=64):
    """A text of `rows` rows, then zeros as Wan pads it."""
    _, _, context = inputs()
    return jnp.zeros((2, total, 16)).at[:, :rows].set(context[:, :rows])


@pytest.mark.parametrize("kind", ["dense", "sla"])
def test_padding_is_one_row_that_counts_often(dit, kind):
    """The same function to float32 rounding; without the count it is another one."""
    latents, timestep, _ = inputs()
    attention, whole = AttentionConfig(kind, topk=0.5, block_q=8, block_k=8), padded(3)
    full = dit(latents, timestep, whole, attention=attention)
    for rows in (4, 9):
        folded = dit(latents, timestep, whole[:, :rows], attention=attention, last_count=64 - rows + 1)
        np.testing.assert_allclose(folded, full, rtol=1e-4, atol=1e-5)
    uncounted = dit(latents, timestep, whole[:, :4], attention=attention)
    assert float(jnp.abs(uncounted - full).max()) > 1e-2


def test_folded_padding_has_the_same_derivatives(dit):
    latents, timestep, _ = inputs()
    whole, xla = padded(3), AttentionConfig(implementation="xla")

    def derivatives(rows):
        def velocity(x):
            return dit(x, timestep, whole[:, :rows], attention=xla, last_count=64 - rows + 1)

        return jax.grad(lambda x: jnp.sum(jnp.sin(velocity(x))))(latents), jax.jvp(velocity, (latents,), (latents,))[1]

    for folded, full in zip(derivatives(4), derivatives(64), strict=True):
        assert float(jnp.linalg.norm(folded - full) / jnp.linalg.norm(full)) < 1e-5


def test_samples_of_a_batch_do_not_see_each_other(dit):
    latents, timestep, context = inputs()
    both = dit(latents, timestep, context)
    alone = dit(latents[1:], timestep[1:], context[1:])
    np.testing.assert_allclose(both[1:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["sla", "sagesla"])
def test_sparse_attention_with_every_block_is_dense(dit, kind):
    """topk 1 selects all blocks; what is left is float32 reordering, or the 8-bit rounding of Sage."""
    dense = dit(*inputs())
    sparse = dit(*inputs(), attention=AttentionConfig(kind, topk=1.0, block_q=8, block_k=8))
    bound = 1e-5 if kind == "sla" else 0.05
    assert float(jnp.linalg.norm(sparse - dense) / jnp.linalg.norm(dense)) < bound


def test_rounding_the_timestep_is_what_bfloat16_does(dit):
    latents, _, context = inputs()
    exact = dit(latents, jnp.array([988.0, 932.0]), context)
    rounded = dit(latents, jnp.array([987.6543, 933.78]), context, round_timestep=True)
    np.testing.assert_allclose(rounded, exact, rtol=1e-5, atol=1e-5)


def test_parameters_are_bfloat16_but_for_what_stays_float32():
    module = random_module(CONFIG, None)
    assert module.blocks.self_attn.q.kernel.dtype == jnp.bfloat16
    for stays in (module.blocks.modulation, module.head.kernel, module.time_projection.kernel,
                  module.blocks.cross_norm.scale, module.blocks.self_attn.norm_q.scale):  # fmt: skip
        assert stays.dtype == jnp.float32
    assert module(*inputs()).dtype == jnp.float32


def test_forward_mode_agrees_with_differences(dit):
    """rCM differentiates along a direction in (latents, timestep); central differences in float32 know 3 digits."""
    latents, timestep, context = inputs(1)
    direction = jax.random.normal(jax.random.key(9), latents.shape)

    def at(e):
        return dit(latents + e * direction, timestep + e * 20.0, context)

    _, tangent = jax.jvp(at, (0.0,), (1.0,))
    difference = (at(1e-2) - at(-1e-2)) / 2e-2
    assert float(jnp.linalg.norm(tangent - difference) / jnp.linalg.norm(difference)) < 5e-3


@pytest.mark.parametrize(
    ("latents", "context", "words"),
    [
        ((1, 3, 4, 6, 15), (1, 5, 16), "latents must be"),
        ((1, 3, 4, 5, 16), (1, 5, 16), "patches"),
        ((1, 3, 4, 6, 16), (1, 5, 17), "context must be"),
    ],
)
def test_wrong_shapes_are_named(dit, latents, context, words):
    with pytest.raises(ValueError, match=words):
        dit(jnp.zeros(latents), jnp.zeros(1), jnp.zeros(context))


def test_a_last_row_that_counts_for_nothing_is_refused(dit):
    with pytest.raises(ValueError, match="last_count is 0"):
        dit(*inputs(), last_count=0)


def test_parameter_counts_are_those_of_the_released_models():
    """Counts of the released checkpoints (1.3B, 14B, I2V A14B), from shapes alone."""
    from flax import nnx

    from turbojax.models.dit import WanDiT

    counts = {"wan2.1-t2v-1.3b": 1_418_996_800, "wan2.1-t2v-14b": 14_288_491_584, "wan2.2-i2v-a14b": 14_288_901_184}
    for name, count in counts.items():
        module = nnx.eval_shape(lambda name=name: WanDiT(PRESETS[name].dit, rngs=nnx.Rngs(0)))
        assert sum(x.size for x in jax.tree.leaves(nnx.state(module))) == count

"""K and V of a text, made once: the model computes the same from them, and nothing of the text again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_modules import random_module

from turbojax.attention import AttentionConfig
from turbojax.config import DiTConfig
from turbojax.quant import quantize_dit

SMALL = DiTConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=3, text_dim=16)
# A head that the kernel for text takes, in bfloat16: its columns are made, and XLA leaves them out on a CPU.
WIDE = DiTConfig(dim=128, ffn_dim=128, num_heads=1, num_layers=2, text_dim=16)
FORMS = ("float32", "bfloat16", "channel", "block")


def model(form):
    if form == "float32":
        return random_module(SMALL, jnp.float32)
    module = random_module(WIDE, jnp.bfloat16)
    return module if form == "bfloat16" else quantize_dit(module, form)


def inputs(batch=2):
    names = jax.random.split(jax.random.key(1), 2)
    latents = jax.random.normal(names[0], (batch, 3, 4, 6, 16))
    return latents, jnp.linspace(100.0, 900.0, batch), jax.random.normal(names[1], (batch, 5, 16))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("count", [1, 60])
def test_the_model_computes_the_same_from_keys(form, batch, count):
    """To the bit: the same operations on the same numbers, at every latents and timestep."""
    dit = model(form)
    latents, timestep, context = inputs(batch)
    keys = dit.text_keys(context, last_count=count)
    assert (keys.columns is None) == (form == "float32" or count == 1)
    for x, t in ((latents, timestep), (-latents, timestep / 2)):
        np.testing.assert_array_equal(dit(x, t, keys), dit(x, t, context, last_count=count))


@pytest.mark.parametrize("form", ["float32", "channel"])
@pytest.mark.parametrize("count", [1, 60])
def test_what_made_the_keys_is_not_computed_again(form, count):
    """Whatever becomes of the text's embedding and of the layers behind it."""
    dit = model(form)
    latents, timestep, context = inputs()
    keys = dit.text_keys(context, last_count=count)
    want = dit(latents, timestep, keys)
    attention = dit.blocks.cross_attn
    for module in (dit.text_embedding, attention.k, attention.v, attention.norm_k):
        nnx.update(module, jax.tree.map(lambda x: -x, nnx.state(module)))
    assert (np.asarray(dit(latents, timestep, context, last_count=count)) != want).all()
    np.testing.assert_array_equal(dit(latents, timestep, keys), want)


@pytest.mark.parametrize("count", [1, 60])
def test_derivatives_through_keys_are_those_through_the_text(count):
    """In both modes, to float32 rounding: sums over the layers are taken in another order."""
    dit = model("float32")
    latents, timestep, context = inputs()
    xla = AttentionConfig("dense", implementation="xla")

    def through_text(context):
        return dit(latents, timestep, context, attention=xla, last_count=count)

    def through_keys(context):
        return dit(latents, timestep, dit.text_keys(context, last_count=count), attention=xla)

    def derivatives(velocity):
        return jax.grad(lambda c: jnp.sum(jnp.sin(velocity(c))))(context), jax.jvp(velocity, (context,), (context,))[1]

    for got, want in zip(derivatives(through_keys), derivatives(through_text), strict=True):
        assert float(jnp.linalg.norm(want)) > 0
        assert float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want)) < 1e-5


@pytest.mark.parametrize("count", [1, 60])
def test_the_network_learns_through_its_keys(count):
    """Gradients of the layers that make them, in bfloat16 with columns beside: as from the text."""
    graph, state = nnx.split(model("bfloat16"))
    latents, timestep, context = inputs()

    def loss(state, ahead):
        dit = nnx.merge(graph, state)
        if ahead:
            return jnp.sum(jnp.sin(dit(latents, timestep, dit.text_keys(context, last_count=count))))
        return jnp.sum(jnp.sin(dit(latents, timestep, context, last_count=count)))

    got, want = (jax.grad(loss)(state, ahead) for ahead in (True, False))
    for layer in ("k", "v"):
        g, w = (np.asarray(x.blocks.cross_attn[layer].kernel[...], np.float64) for x in (got, want))
        assert np.linalg.norm(w) > 0
        # Gradients are rounded to bfloat16, 2^-9 each, a few times on their way.
        assert np.linalg.norm(g - w) <= 2.0**-7 * np.linalg.norm(w)


@pytest.mark.parametrize("kind", ["sla", "sagesla"])
def test_keys_do_not_depend_on_the_attention_to_the_tokens(kind):
    dit = model("float32")
    latents, timestep, context = inputs()
    attention = AttentionConfig(kind, topk=0.5, block_q=8, block_k=8)
    got = dit(latents, timestep, dit.text_keys(context, last_count=9), attention=attention)
    np.testing.assert_array_equal(got, dit(latents, timestep, context, attention=attention, last_count=9))


@pytest.mark.usefixtures("unchecked")
def test_keys_of_another_batch_model_or_count_are_refused():
    dit = model("float32")
    latents, timestep, context = inputs()
    keys = dit.text_keys(context, last_count=60)
    alone = dit.text_keys(context[:1], last_count=60)
    shallow = random_module(dataclasses.replace(SMALL, num_layers=2), jnp.float32)
    with pytest.raises(ValueError, match=r"k of the text keys must be .* \[3, 2, 5, 2, 24\], got \[3, 1, 5, 2, 24\]"):
        dit(latents, timestep, alone)
    with pytest.raises(ValueError, match=r"got \[2, 2, 5, 2, 24\]"):
        dit(latents, timestep, shallow.text_keys(context))
    with pytest.raises(ValueError, match=r"v of the text keys"):
        dit(latents, timestep, dataclasses.replace(keys, v=keys.v[:, :, :4]))
    with pytest.raises(ValueError, match=r"'rows', 2, 24\], got \[2, 5, 2, 24\]"):
        dit(latents, timestep, jax.tree.map(lambda x: x[0], keys))
    with pytest.raises(ValueError, match="last_count is 59, but the text keys were made with 60"):
        dit(latents, timestep, keys, last_count=59)


def test_a_text_that_the_model_cannot_take_gives_no_keys():
    dit = model("float32")
    _, _, context = inputs()
    with pytest.raises(ValueError, match="context must be"):
        dit.text_keys(context[..., :15])
    with pytest.raises(ValueError, match="last_count is 0"):
        dit.text_keys(context, last_count=0)

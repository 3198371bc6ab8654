"""W8A8 replaces the blocks' linear layers, nothing else, and stays close to the float model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_modules import random_module

import turbojax.attention
from turbojax.attention import AttentionConfig
from turbojax.config import DiTConfig
from turbojax.models import dit as dit_module
from turbojax.models.layers import Linear
from turbojax.quant import QuantizedLinear, block_linears, quantize_dit, quantize_linear

CONFIG = DiTConfig(dim=128, ffn_dim=256, num_heads=2, num_layers=2, text_dim=32, linear_branch=True)


@pytest.fixture(scope="module")
def dit():
    return random_module(CONFIG, jnp.float32)


def inputs():
    keys = jax.random.split(jax.random.key(0), 2)
    return (
        jax.random.normal(keys[0], (2, 2, 4, 4, 16)),
        jnp.array([300.0, 900.0]),
        jax.random.normal(keys[1], (2, 6, 32)),
    )


def test_ten_linear_layers_a_block_and_not_the_linear_branch(dit):
    assert len(block_linears(dit)) == 10
    assert not any("proj_l" in path for path in block_linears(dit))


@pytest.mark.parametrize("granularity", ["channel", "block"])
def test_output_stays_close_and_other_parameters_are_shared(dit, granularity):
    quantized = quantize_dit(dit, granularity)
    assert isinstance(quantized.blocks.ffn.up, QuantizedLinear)
    assert quantized.blocks.ffn.up.weight_q.shape == (2, 256, 128)
    assert quantized.head.kernel[...] is dit.head.kernel[...]
    assert not block_linears(quantized)
    exact, rounded = dit(*inputs()), quantized(*inputs())
    # Eight bits leave about 1% a layer (a step is 1/127 of the largest); tiles share one step among 128 rows.
    error = jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact)
    assert 0.0 < float(error) < 0.06


@pytest.mark.parametrize(("granularity", "share"), [("channel", 1 / 3), ("block", 1.0)])
def test_folded_padding_stays_as_close_as_rounding_lets_it(dit, granularity, share):
    """A row in 8 bits is the same alone: with a scale a token only float32 sums differ, which may round a value of the
    next layer to its neighbour. A tile shares its scale with the rows around it, and those are others."""
    latents, timestep, context = inputs()
    whole = jnp.zeros((2, 300, 32)).at[:, :5].set(context[:, :5])
    quantized = quantize_dit(dit, granularity)
    full = quantized(latents, timestep, whole)
    folded = quantized(latents, timestep, whole[:, :8], last_count=293)
    exact = dit(latents, timestep, whole)
    rounding, apart = (float(jnp.linalg.norm(x - full) / jnp.linalg.norm(full)) for x in (exact, folded))
    assert apart < share * rounding
    assert float(jnp.linalg.norm(folded - exact) / jnp.linalg.norm(exact)) < 1.5 * rounding
    uncounted = quantized(latents, timestep, whole[:, :8])
    assert float(jnp.linalg.norm(uncounted - full) / jnp.linalg.norm(full)) > 2 * rounding


def test_the_float_model_is_left_alone(dit):
    before = dit(*inputs())
    quantize_dit(dit)
    np.testing.assert_array_equal(dit(*inputs()), before)


def test_a_float32_model_gives_float32_back(dit):
    x = jnp.ones((1, 4, 128), jnp.float32)
    layer = jax.tree.map(lambda a: a[0], nnx.split(quantize_dit(dit).blocks.ffn.up)[1])
    single = nnx.merge(nnx.split(quantize_dit(dit).blocks.ffn.up)[0], layer)
    assert single(x).dtype == jnp.float32


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_granularity_is_refused(dit):
    with pytest.raises(ValueError, match="granularity"):
        quantize_dit(dit, "row")


def test_a_layer_hands_its_rows_maxima_to_the_next():
    """The numbers do not depend on it, whichever of two layers is quantised."""
    rows = jax.random.normal(jax.random.key(0), (1, 40, 128), jnp.bfloat16)
    rngs = nnx.Rngs(0)
    up, down = (Linear(*size, rngs=rngs, dtype=jnp.bfloat16) for size in ((128, 256), (256, 128)))
    quantized_down = quantize_linear(down, "channel")
    assert quantized_down.rounds_rows
    assert not down.rounds_rows
    assert not quantize_linear(down, "block").rounds_rows
    for layer in (up, quantize_linear(up, "channel"), quantize_linear(up, "block")):
        measured = layer.with_amax(rows, "gelu_tanh")
        np.testing.assert_array_equal(measured.amax, jnp.abs(measured.values).max(axis=-1).astype(jnp.float32))
        apart = quantized_down.onto(rows, layer(rows, "gelu_tanh"))
        np.testing.assert_array_equal(quantized_down.onto(rows, measured), apart)
        y, squares = layer.with_squares(rows)
        np.testing.assert_array_equal(y, layer(rows))
        np.testing.assert_allclose(squares, np.square(np.asarray(y, np.float64)).sum(axis=-1), rtol=1e-5)


SAGESLA = AttentionConfig("sagesla", topk=0.5, block_q=64, block_k=64)


@pytest.mark.parametrize(
    ("attention", "quantized", "linear_branch", "asked"),
    [
        (SAGESLA, True, True, True),
        (dataclasses.replace(SAGESLA, kind="sla"), True, True, True),
        # Its squares would take a pass of their own.
        (SAGESLA, False, True, False),
        # These have no pass over q that could turn it.
        (SAGESLA, True, False, False),
        (dataclasses.replace(SAGESLA, kind="sage"), True, True, False),
        (dataclasses.replace(SAGESLA, block_q=32), True, True, False),
        (dataclasses.replace(SAGESLA, implementation="xla"), True, True, False),
    ],
)
def test_attention_turns_the_queries_where_that_saves_a_pass(monkeypatch, attention, quantized, linear_branch, asked):
    """And the model is the same function, to the order in which float32 sums the squares."""
    config = dataclasses.replace(CONFIG, num_layers=1, linear_branch=linear_branch)
    module = random_module(config, jnp.bfloat16)
    module = quantize_dit(module) if quantized else module
    asks = []

    def attend(*args, q_rotary, **options):
        asks.append(q_rotary is not None)
        return turbojax.attention.attend(*args, q_rotary=q_rotary, **options)

    monkeypatch.setattr(dit_module, "attend", attend)
    latents, timestep, context = inputs()

    def run():
        dit_module._forward.clear_cache()
        return module(jnp.tile(latents, (1, 1, 4, 4, 1)), timestep, context, attention=attention)

    found = run()
    monkeypatch.setattr(dit_module, "rotates_queries", lambda *args, **options: False)
    before = run()
    assert asks == [asked, False]
    np.testing.assert_allclose(found, before, rtol=2e-2, atol=2e-2 * float(jnp.abs(before).max()))

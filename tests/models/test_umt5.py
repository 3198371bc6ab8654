"""umT5 computes what transformers' UMT5EncoderModel computes, and what is masked has no say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden import seeded
from golden.modules import module_with, relative

from turbojax.config import UMT5Config
from turbojax.models.umt5 import UMT5Encoder, relative_position_buckets

CONFIG = UMT5Config(vocab_size=100, dim=48, dim_attn=48, dim_ffn=96, num_heads=4, num_layers=2)
# Names inside a layer of transformers' model, for our own.
LAYER = {
    "layer.0.layer_norm.weight": "norm1.scale",
    **{f"layer.0.SelfAttention.{x}.weight": f"attn.{x}.kernel" for x in "qkvo"},
    "layer.0.SelfAttention.relative_attention_bias.weight": "position_bias.embedding",
    "layer.1.layer_norm.weight": "norm2.scale",
    "layer.1.DenseReluDense.wi_0.weight": "ffn.gate.kernel",
    "layer.1.DenseReluDense.wi_1.weight": "ffn.up.kernel",
    "layer.1.DenseReluDense.wo.weight": "ffn.down.kernel",
}


def flat_from_transformers(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    def turned(ours: str, value: np.ndarray) -> np.ndarray:
        return value.T if ours.endswith("kernel") else value

    layers = range(CONFIG.num_layers)
    flat = {
        f"blocks.{ours}": np.stack([turned(ours, weights[f"encoder.block.{i}.{theirs}"]) for i in layers])
        for theirs, ours in LAYER.items()
    }
    return flat | {
        "token_embedding.embedding": weights["shared.weight"],
        "norm.scale": weights["encoder.final_layer_norm.weight"],
    }


@pytest.fixture(scope="module")
def golden():
    shapes, arrays = seeded.load("umt5")
    return flat_from_transformers(seeded.weights(shapes)), arrays


@pytest.mark.parametrize("unroll", [1, True])
def test_equals_transformers_in_float32(golden, unroll):
    flat, g = golden
    out = module_with(CONFIG, flat)(g["ids"], g["mask"], unroll=unroll)
    # Both sum in float32, in different orders.
    assert relative(out, g["output"]) < 1e-5
    assert not np.asarray(out)[g["mask"] == 0].any()


def test_bfloat16_stays_near_float32(golden):
    flat, g = golden
    out = module_with(CONFIG, flat, None)(g["ids"], g["mask"])
    assert out.dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits (2**-9 a rounding); a dozen roundings in a row over two layers.
    assert relative(out, g["output"]) < 3e-2


def test_buckets_are_the_references(golden):
    _, g = golden
    table = relative_position_buckets(301)
    ours = np.concatenate([table[300, :300], table[0]])  # offsets -300 ... 300
    np.testing.assert_array_equal(ours, g["buckets"])


def test_padding_changes_nothing(golden):
    flat, g = golden
    model = module_with(CONFIG, flat)
    ids, mask = g["ids"][1:], g["mask"][1:]
    n = int(mask.sum())
    other = np.where(mask == 0, 7, ids)  # other tokens under the mask
    np.testing.assert_array_equal(model(other, mask), model(ids, mask))
    # The same prompt, without its padding: only the order of the sums may differ.
    assert relative(model(ids[:, :n], mask[:, :n]), model(ids, mask)[:, :n]) < 1e-5


def test_is_differentiable_and_jits_as_a_function_of_its_state(golden):
    flat, g = golden
    graph, state = nnx.split(module_with(CONFIG, flat))
    ids, mask = g["ids"][:, :8], g["mask"][:, :8]

    @jax.jit
    def loss(state):
        return (nnx.merge(graph, state)(ids, mask) ** 2).sum()

    grads = jax.grad(loss)(state)
    for path, leaf in nnx.to_flat_state(grads):
        assert np.isfinite(leaf[...]).all(), path
        assert np.abs(leaf[...]).max() > 0, path


def test_heads_must_divide():
    with pytest.raises(ValueError, match="dim_attn 50 is not a multiple of num_heads 4"):
        UMT5Encoder(UMT5Config(vocab_size=10, dim=8, dim_attn=50, num_heads=4), rngs=nnx.Rngs(0))

"""Sparse-linear attention on XLA computes what TurboDiffusion's own module computes, forwards and backwards.

The module rounds to bfloat16 inside, which is worth 4e-3 by itself; the close comparison is with the module run in
float32 (see golden/make_sla.py), and the bfloat16 one is held to the size of that rounding.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import seeded
from golden.modules import relative

from pallas_kernels import sla_block_map, sparse_linear_attention

HEADS, WIDTH, TOPK = 2, 32, 0.67
NAMES = ("q", "k", "v", "proj_weight", "proj_bias")
_, GOLDEN = seeded.load("sla")
_, GRADIENTS = seeded.load("sla_grad")


def inputs(length: int) -> list[np.ndarray]:
    """The arrays of make_sla.py; the projection's weight is (out, in), as torch has it."""
    shape, slow = (1, length, HEADS, WIDTH), (1, -(-length // 64), HEADS, WIDTH)

    def signal(name: str) -> np.ndarray:
        blocks = seeded.uniform(f"sla/{name}/blocks", slow, scale=0.8)
        return seeded.uniform(f"sla/{name}", shape) + np.repeat(blocks, 64, axis=1)[:, :length]

    return [
        signal("q"),
        signal("k"),
        seeded.uniform("sla/v", shape),
        seeded.uniform("sla/proj_weight", (WIDTH, WIDTH), scale=WIDTH**-0.5),
        seeded.uniform("sla/proj_bias", (WIDTH,), scale=0.2),
    ]


def sla(q, k, v, weight, bias, *, block_q: int, feature_map: str = "softmax"):
    return sparse_linear_attention(
        q, k, v, weight, bias,
        topk=TOPK, block_q=block_q, block_k=64, feature_map=feature_map, implementation="xla",
    )  # fmt: skip


@pytest.mark.parametrize("block_q", [64, 128])
def test_float32_equals_the_module(block_q):
    # 328 rows: the last blocks are ragged on both sides.  Only the order of float32 sums differs.
    assert relative(sla(*inputs(328), block_q=block_q), GOLDEN[f"float32_{block_q}"]) < 1e-5


@pytest.mark.parametrize("name", ["float32_64", "float32_128", "bfloat16_128"])
def test_block_map_is_the_references(name):
    dtype, block_q = name.split("_")
    q, k = (jnp.asarray(x, dtype) for x in inputs(328)[:2])
    chosen = sla_block_map(q, k, topk=TOPK, block_q=int(block_q), block_k=64)
    np.testing.assert_array_equal(np.sort(chosen, axis=-1), GOLDEN[f"{name}_blocks"])


def test_bfloat16_errs_no_more_than_the_module_does():
    out = sla(*(jnp.asarray(x, jnp.bfloat16) for x in inputs(328)), block_q=128)
    exact, theirs = GOLDEN["float32_128"], GOLDEN["bfloat16_128"]
    assert out.dtype == jnp.bfloat16
    assert relative(out.astype(jnp.float32), exact) < 1.1 * relative(theirs, exact)
    assert relative(out.astype(jnp.float32), theirs) < 6e-3


@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
def test_feature_maps_equal_the_modules(feature_map):
    assert relative(sla(*inputs(152), block_q=64, feature_map=feature_map), GRADIENTS[feature_map]) < 1e-5


def test_gradients_equal_the_modules():
    cotangent = seeded.uniform("sla/cotangent", (1, 152, HEADS, WIDTH))
    arguments = [jnp.asarray(x) for x in inputs(152)]
    grads = jax.grad(lambda *a: (sla(*a, block_q=64) * cotangent).sum(), argnums=range(5))(*arguments)
    for name, grad in zip(NAMES, grads, strict=True):
        assert relative(grad, GRADIENTS[f"grad_{name}"]) < 1e-5, name
